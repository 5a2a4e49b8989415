"""What it costs a client to send bytes to S3: CPU seconds per gigabyte, ours beside its peers.

``client_cpu`` runs the rounds, ``clients`` is one client in a process of its own,
``discard`` the server that reads everything and keeps nothing.
"""
