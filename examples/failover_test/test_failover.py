from pathlib import Path

from dtrain.testing import ProcessCluster

SCRIPT = Path(__file__).with_name("train.py")


def test_training_survives_the_loss_of_a_machine():
    with ProcessCluster(agents=3) as cluster:
        job = cluster.submit(SCRIPT, "--steps", 200, nnodes=2, checkpoint_every_steps=20)
        job.wait_for_step(50)
        cluster.kill(job.agents[0])
        job.wait()
        assert job.attempt > 1
        assert job.commits()[-1].step == 200
