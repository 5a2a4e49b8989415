"""``python -m benchmarks.store [--rounds N]``."""

import argparse

from benchmarks import report
from benchmarks.store import client_cpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=client_cpu.__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of each client")
    print(report.table(client_cpu.measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
