"""The corruption campaign: damage to committed checkpoints, of which not one may reach a training rank.

``making`` commits checkpoints through the product's own code and keeps what every rank held when it
saved; ``damage`` draws what happens to the bytes; ``campaign`` applies one after the other and judges
what the restore says; ``rivals`` does the same to other formats, for docs/checkpoint-invariants.md. Run
``python -m tests.corruption --cases 1000 --seed 7``; the suite runs a smaller selection.
"""
