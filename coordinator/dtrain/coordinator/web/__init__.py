"""The dashboard: a process of its own beside each replica, and the only one with an event loop.

Read ``process.py`` first: what runs, and what of it lives in threads. ``records.py``
groups a copy of etcd by job, agent and replica; ``pages.py`` says what each page
shows of it (both pure); ``streams.py`` sends changes to browsers; ``gate.py``
says who may; ``calls.py`` asks replicas for what etcd does not hold; ``static/``
is what browsers run. ``keeper.py`` and ``settings.py`` are the guardian's half,
standard library only.

Nothing here decides or writes: a change that somebody asks for goes through the
same API as the CLI's. So a dashboard may be slow, or dead, and no training job
notices it.
"""
