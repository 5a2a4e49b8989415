"""etcd: the port, its transport, an in-memory model, sessions and mirrors. Read ``port.py`` first."""
