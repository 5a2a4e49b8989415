"""The command line: one file per verb in ``verbs/``, each a thin shell around pure parts.

``main.py`` finds the verbs and turns every error into one sentence and one exit
code (``exits.py``). ``client.py`` asks the replicas, through ``calling.py``, and
``context.py`` finds them; ``jobfile.py`` reads what users write, ``records.py`` and
``render/`` turn records into rows. Only click is imported at start: verbs import what they use
when they run, so that ``--help`` and completion answer at once.
"""
