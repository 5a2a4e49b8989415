"""``dtrain top``: the cluster live on a terminal.

``view`` says what is looked at and what a key makes of it, ``frame`` draws that as lines: both
are pure. ``feed`` reads the cluster in threads of its own, ``screen`` has the terminal, and
``live`` runs them. What a job or an agent is in words is ``render``'s.
"""
