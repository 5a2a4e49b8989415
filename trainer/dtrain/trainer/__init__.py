"""What a training script imports.

::

    from dtrain import trainer

    run = trainer.join()
    run.track(model=model, optimizer=optimizer, data=sampler)
    for step in run.steps(total_steps):
        run.report(loss=train_one(step))

``run.py`` is the face; ``session.py`` holds what rank and agent owe each other,
``link.py`` the socket, ``checkpoint/`` the way of tensors to a frozen snapshot
and back. Standard library only: importing it must never clash with a user's
own packages, so torch and numpy are imported where they are used.
"""

from dtrain.trainer.data import Loader, Sampler
from dtrain.trainer.run import Run, join
from dtrain.trainer.stateful import StatefulLoader

__all__ = ["Loader", "Run", "Sampler", "StatefulLoader", "join"]
