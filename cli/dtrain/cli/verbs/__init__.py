"""One file per verb, named like it, holding a click command called ``command``.

A file here imports click and ``dtrain.cli.options`` at its top and everything
else inside its function: the listing of ``dtrain --help`` loads all of them.
"""
