"""What clients can ask of any replica, over gRPC.

``servicers.py`` answers from the mirror and writes operators' records;
``lookup.py`` is what it reads there, ``consulting.py`` its word to agents that
cannot reach etcd, ``callers.py`` says who asks and may see what; ``errors.py``
ends calls by the error tree; ``validate.py`` says what a job may look like;
``server.py`` holds ports and pools. Nothing here leads.
"""
