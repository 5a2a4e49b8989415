"""Measurements beside a peer, in one run, interleaved, as ratios.

``python -m benchmarks`` runs every measure, prints a table and writes ``results.jsonl``, one
object a measure; what is not measured again stays there. Nothing here fails a
build: a bar that is missed is reported as missed.
"""
