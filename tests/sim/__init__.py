"""Whole clusters under virtual time: the real code against a model of the world, with seeded faults.

Real: the coordinator's ``plan``, ``Driver``, ``Committer``, ``Elector``, ``Worker`` and ``Mirror``, the
agent's ``step`` and driver, the trainer's ``Session``. Modelled: etcd (``MemoryEtcd``), the network, the
guardians, launchers, ranks and the transfer process. ``python -m tests.sim --seed N --trace`` tells the
story of one seed. Read ``cluster.py`` first; ``checks.py`` says what must hold after every event.
"""
