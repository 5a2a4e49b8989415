"""Blobs: immutable bytes under unique keys, in a bucket, a folder or memory.

Read ``port.py`` first: it is the specification, and ``tests/contract/blobs`` checks
each backend against it. ``open.py`` maps URIs to backends, ``probe.py`` asks whether
one works, ``digest.py`` is the checksum they all use. What blobs mean, and when they
are garbage, belongs to the coordinator.
"""
