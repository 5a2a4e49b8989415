"""A script as torchrun runs it, without dtrain's SDK: it computes until it is told to end."""

import time

if __name__ == "__main__":
    for _step in range(1_000_000):
        time.sleep(0.05)
