"""Working directories as packages: what goes in, one archive of it, its place in a store, and out again.

Begin with ``packing``: it lists a folder (``ignoring`` says what is left out, ``links`` where a symbolic
link leads) and writes the archive. ``depot`` puts it into a store and gets it back; ``unpacking`` makes a
folder of it, trusting nothing in it. Records and names are in ``dtrain.protocol.package``.
"""
