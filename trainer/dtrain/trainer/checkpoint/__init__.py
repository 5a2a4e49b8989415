"""From tensors to a frozen snapshot, and back.

Read in this order: ``state`` flattens what the script tracks into tensors and
JSON; ``layout`` decides which rank writes which rows, and where in the blob;
``arena`` is the shared memory that holds the frozen copy; ``saver`` puts the
three together at a step boundary; ``restore`` does the way back. Uploading is
not done here: the agent's transfer process reads the arena.
"""
