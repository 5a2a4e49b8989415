"""The coordinator: N stateless replicas, one of them leads.

``core/`` decides (read ``core/plan.py`` first), ``driver.py`` is the only loop,
``leadership/`` says whether this replica may act, ``persistence.py`` writes
under the term's fence, ``dispatch.py`` calls agents, ``api/`` serves clients on
every replica. No file is written here and torch is never imported.
"""
