"""Wait, inside a coordinator's container, until there is a leader and N agents: ready.py SECONDS N."""

import json
import subprocess
import sys
import time
from typing import Any


def items(kind: str) -> list[dict[str, Any]]:
    """What ``dtrain get KIND`` lists; nothing while no replica answers."""
    asked = subprocess.run(["dtrain", "get", kind, "-o", "json"], capture_output=True, check=False)
    return list(json.loads(asked.stdout)["items"]) if asked.returncode == 0 else []


def main(seconds: float, wanted: int) -> int:
    """Print what there is as it changes; 1 if it is not enough in time."""
    end = time.monotonic() + seconds
    shown = ""
    while True:
        leaders = [replica["name"] for replica in items("coordinators") if replica["term"]]
        agents = sorted(agent["name"] for agent in items("agents") if agent.get("node"))
        state = f"leader: {', '.join(leaders) or '-'}; agents: {', '.join(agents) or '-'}"
        if state != shown:
            print(state, flush=True)  # noqa: T201 - its purpose
            shown = state
        if leaders and len(agents) >= wanted:
            return 0
        if time.monotonic() > end:
            return 1
        time.sleep(1)


if __name__ == "__main__":
    raise SystemExit(main(float(sys.argv[1]), int(sys.argv[2])))
