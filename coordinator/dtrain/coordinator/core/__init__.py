"""Decisions of the coordinator, as functions of values.

``plan.py`` is the file to read first: ``plan(job, fleet, moment)`` looks at
what the mirror holds (``views.py``) and returns what to write, what to send
and what to do next (``decisions.py``). Nothing here knows a clock, a socket or
a thread; the simulation runs the same code as production.
"""
