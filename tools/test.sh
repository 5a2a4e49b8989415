#!/usr/bin/env bash
# The whole suite. Fast tests share the cores; end-to-end tests kill and time real processes, so they run alone.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
export PATH="$PWD/$bin:$PATH"
"$bin/python" -m pytest -q -n 2 --dist loadfile tests/unit tests/scenarios tests/sim tests/contract tests/security tests/mutants tests/test_architecture.py "$@"
"$bin/python" -m pytest -q -p no:randomly tests/e2e "$@"
