"""What the agent decides, as functions of values. Read ``step.py`` first.

``step(state, event, now)`` returns the next state and a ``Decision``: durable
writes first, then orders to the launchers, the transfer process and the ranks,
then snapshots. No clock, thread, file or socket is reachable from here.
"""
