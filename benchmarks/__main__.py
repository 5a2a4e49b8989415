"""``python -m benchmarks [measure ...] [--rounds N]``."""

import argparse

from benchmarks import dashboard, elastic, failover, hangs, overhead, recovery, report
from benchmarks.checkpoint import suite
from benchmarks.listing import suite as listing
from benchmarks.store import client_cpu

MEASURES = {
    "failover": failover.measure,
    "recovery": recovery.measure,
    "elastic": elastic.measure,
    "hangs": hangs.measure,
    "overhead": overhead.measure,
    "listing": listing.measure,
    "dashboard": dashboard.measure,
    "store": client_cpu.measure,
    "checkpoint": suite.measure,
}
PARTS = suite.MEASURES
"""Of ``checkpoint``, to run one at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure dtrain beside its peers."
    )
    parser.add_argument(
        "measure",
        nargs="*",
        metavar="MEASURE",
        help=f"any of {', '.join([*MEASURES, *PARTS])} (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of each")
    args = parser.parse_args()
    results = []
    for name in args.measure or MEASURES:
        print(f"measuring {name} ...", flush=True)
        results += (MEASURES | PARTS)[name](args.rounds)
        report.write(results)
    print(report.table(results))
    print(f"written to {report.RESULTS}")


if __name__ == "__main__":
    main()
