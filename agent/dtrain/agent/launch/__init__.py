"""What the launcher is made of: the rank's first steps, the store, /proc, preloading.

``rank_main.py`` runs in a rank from the fork until the training program ends;
start there. ``store.py`` is the child that serves an attempt's TCPStore.
``spawn.py`` forks both, or execs them where forking is not safe. The event loop
that ties them together is ``dtrain.agent.launcher``. Modules here import the
standard library and the contract only; torch is imported by name, once, in
``preload.py``, so that a plain script runs on a machine without it.
"""
