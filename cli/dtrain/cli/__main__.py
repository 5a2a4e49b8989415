"""``python -m dtrain.cli``: the same as ``dtrain``."""

from dtrain.cli.main import main

if __name__ == "__main__":
    main()
