"""Clusters for tests: write failover tests for your own training script in ten lines.

::

    from dtrain.testing import ProcessCluster

    def test_training_survives_a_lost_machine():
        with ProcessCluster(agents=2) as cluster:
            job = cluster.submit("train.py", "--steps", "300", nnodes=2, checkpoint_every_steps=20)
            job.wait_for_step(50)
            cluster.kill(job.agents[0])
            job.wait()

Two twins keep one contract, ``Cluster``: ``ProcessCluster`` runs everything as
processes of this machine and needs nothing but ``pip install 'dtrain[testing]'``;
``DtrainCluster`` runs it in containers on a network of their own, through
testcontainers. While the ``with`` block runs, an auditor judges every change in
etcd; a broken promise fails the test at its end.

Read ``cluster.py`` first, then ``job.py``. What the twins are made of is in
``processes.py`` and ``containers.py``; ``docs/testing.md`` is for users.
"""

from dtrain.testing.cluster import Cluster
from dtrain.testing.containers import DtrainCluster
from dtrain.testing.images import Images
from dtrain.testing.job import Job
from dtrain.testing.processes import ProcessCluster

__all__ = ["Cluster", "DtrainCluster", "Images", "Job", "ProcessCluster"]
