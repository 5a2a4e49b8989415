"""Deliberate bugs and the tests that catch them: proof that the suite can fail.

``catalogue.py``, with the modules beside it, lists them; ``python -m tests.mutants`` applies each to a copy
of the tree and runs its killer there. ``test_catalogue.py`` keeps the list true to the code from one day to
the next.
"""
