#!/usr/bin/env bash
# The whole suite. End-to-end tests mostly wait for leases to end: two modules at a time, each with a cluster of its own.
# Both parts run whatever the first one finds: one run tells everything.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
export PATH="$PWD/$bin:$PATH"
status=0
"$bin/python" -m pytest -q -n 2 --dist loadfile tests/unit tests/scenarios tests/sim tests/contract tests/security tests/mutants tests/corruption tests/crashpoints tests/deploy tests/test_architecture.py "$@" || status=$?
"$bin/python" -m pytest -q -n 2 --dist loadfile -p no:randomly tests/e2e tests/skew tests/docs "$@" || status=$?
exit "$status"
