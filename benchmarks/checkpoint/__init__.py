"""Saving checkpoints, beside what PyTorch brings for it.

``measure`` in ``suite`` runs all of it. Every rival saves the same tensors as the same number of
ranks to the same disk, synced, and has the same warm-up. Ours is the product's own path: ``Saver`` and
``Arena`` in the rank, the transfer process of the agent beside it with its CPU time counted in, the
leader's merge where a whole save is meant, and a whole local cluster where training is.
"""
