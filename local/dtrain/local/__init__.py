"""A whole dtrain cluster on this machine, as child processes.

etcd, an S3 server, coordinators and agents, on loopback, in one folder.
``dtrain up`` and ``dtrain run``, the demo, the end-to-end tests and the
benchmarks all start their servers here. Read ``cluster.py`` first. How they are
broken on purpose, and watched until they have recovered, begins in ``chaos.py``.
"""
