"""Adapters to the two systems that hold dtrain's state.

``etcd`` holds records, ``blobs`` holds bytes. Each has a ``port.py`` that is
its specification, and one contract suite that every implementation passes.
"""
