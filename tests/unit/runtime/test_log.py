"""Lines of logs: one event each, with names, and without secrets."""

import json
import subprocess
import sys

SCRIPT = """
from dtrain.runtime import log
log.configure(json_lines=True, component="agent/a1")
log.get("agent").info("store opened", job="digits", api_token="hunter2", token_file="/run/token",
    store="s3://user:hunter2@host/bucket", nested={"kept": 1})
try:
    raise ValueError("cannot reach https://user:hunter2@host/x")
except ValueError:
    log.get("agent").error("it failed", exc_info=True)
"""


def test_one_object_a_line_with_names_and_no_secret() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    first, second = (json.loads(line) for line in done.stderr.splitlines())
    assert (first["event"], first["component"], first["job"]) == ("store opened", "agent/a1", "digits")
    assert (first["api_token"], first["token_file"]) == ("***", "/run/token")
    assert first["store"] == "s3://***@host/bucket"
    assert "ValueError" in second["exception"]
    assert "hunter2" not in done.stderr
