"""Death at every boundary of a save, a commit, a retirement and a collection; nothing committed may be lost.

``ports`` kills the process that talks to etcd or to the store, before and after each such call of a whole
job, on the stage of tests/scenarios with the product's own uploader, committer, collector and planner.
``files`` kills with SIGKILL before, in and after each system call by which the uploader, the leader's merge,
the collector and the sweep change a directory store. ``python -m tests.crashpoints --all`` dies at every
point of both; the suite at a selection.
"""
