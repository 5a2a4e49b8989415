"""The front door for scripts that save with ``torch.distributed.checkpoint``.

``run.dcp_writer(step)`` and ``run.dcp_reader()`` are a ``StorageWriter`` and a
``StorageReader``: planning and resharding stay with torch, bytes and commits are
dtrain's. Read ``writer`` first: what a rank is to write goes into its arena as
one blob (``blob``), in the form of every other checkpoint, and the ranks ask for
one commit. ``catalog`` shows a committed manifest as torch's ``Metadata``, also
one that was saved natively; ``reader`` copies verified bytes to where torch wants
them. ``planner`` has planners for those who derive from torch's. Nothing here
pickles: an object is stored as JSON or tensors, or refused by name.
"""
