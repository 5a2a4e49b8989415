"""``dtrain doctor``: looks at everything that a job depends on, and says what to do about what is wrong.

``findings`` are the words, ``judging`` turns what was measured into them (pure: the file to read first),
``etcd``, ``store``, ``cluster``, ``machine`` and ``job`` measure, ``running`` runs all of it at once, each
check within its limit. Nothing here repairs anything, and what a check writes it deletes.
"""
