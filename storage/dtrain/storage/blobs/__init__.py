"""Blobs: the port and its backends. Read ``port.py`` first."""
