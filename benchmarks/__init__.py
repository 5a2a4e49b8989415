"""Measurements beside a peer, in one run, interleaved, as ratios.

``python -m benchmarks`` runs every measure, prints a table and appends nothing:
``results.jsonl`` is written anew, one object a measure. Nothing here fails a
build: a bar that is missed is reported as missed.
"""
