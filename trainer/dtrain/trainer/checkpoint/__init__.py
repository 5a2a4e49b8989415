"""From tensors to a frozen snapshot, and back.

Read in this order: ``state`` flattens what the script tracks into tensors and
JSON, with ``sharded`` for DTensors; ``regions`` is the arithmetic of their parts;
``layout`` decides which rank writes which of them, and where in the blob;
``replicas`` digests what several ranks should hold alike; ``arena`` is the shared
memory that holds the frozen copy; ``saver`` puts these together at a step boundary.
The way back: ``source`` is where verified bytes come from, ``destinations`` where
they go to, ``filling`` moves them, ``restore`` does it in order. Uploading is not
done here: the agent's transfer process reads the arena.
"""
