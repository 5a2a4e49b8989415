"""The agent: one per machine, supervises training processes, reports to etcd.

``core/`` decides, ``driver.py`` does. Processes around it: the guardian (its
parent, keeps the lease), a launcher per job (forks the ranks and outlives the
agent), and the transfer process (uploads and fetches checkpoints). Orders to
those are in ``launching.py`` and ``transferring.py``. The agent never imports torch.
"""
