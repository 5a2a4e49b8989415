"""How long a list takes to appear, in a cluster of many jobs and machines."""
