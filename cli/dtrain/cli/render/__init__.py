"""Rows and sentences out of records. Pure: ``now`` is an argument, nothing is printed.

Tables are for people and may change; programs use ``-o json``. ``lists`` has what
``get`` shows, ``describe`` one job or agent as a whole; ``sentences`` and
``failures`` are what both say of a job. Writing it out is ``output.py``'s.
"""
