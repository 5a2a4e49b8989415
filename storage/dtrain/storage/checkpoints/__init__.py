"""Committed checkpoints as readers see them: read, verified, and written out in other formats.

Begin with ``reading``: a manifest that fits its commit record, and verified bytes
of tensors. ``verifying`` reads all of it and says what is damaged; ``exporting``
and its formats write it out. Nothing here decides anything or knows etcd: which
checkpoint is meant, and that it stays while it is read, is the caller's business.
"""
