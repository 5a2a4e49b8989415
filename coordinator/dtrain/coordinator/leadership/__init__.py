"""Whether this replica may act: election over one etcd key bound to the session's lease.

``elector.py`` decides what to try next and is pure; ``lease.py`` is the thread
around it. What is not promised: that nobody else acts. A lease cannot promise
it; the fence in ``persistence.py`` does not need it.
"""
