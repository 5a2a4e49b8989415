"""torchrun's rendezvous on etcd v3: ``torchrun --rdzv-backend=dtrain``, with nothing else of dtrain running.

Start with ``core``: every decision, as a pure function. ``plugin`` is what torch
finds by its entry point; ``handler`` is torch's interface over the other parts.
"""
