#!/usr/bin/env bash
# The container tests: an engine, the images, tests/containers; ends what it started, however it ends.
#
#   test-containers.sh [--subset] [ARGUMENT FOR PYTEST]...
#
# --subset (also with CI=true): only what is marked `ci`. Images that DTRAIN_IMAGE_* names are taken as they are,
# all others are built from what this machine has (deploy/docker/build-local.sh).
# Exit code 3: this machine cannot run containers; the reason was said.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
PATH=$(cd "$bin" && pwd):$PATH
export PATH

selection=()
if [ "${1:-}" = --subset ]; then
  shift
  selection=(-m ci)
elif [ "${CI:-}" = true ]; then
  selection=(-m ci)
fi

was_there=no
if tools/engine.sh status >/dev/null 2>&1; then
  was_there=yes
fi
stop() {
  [ "$was_there" = yes ] || tools/engine.sh stop || true
}
trap stop EXIT
# bash runs a trap for a signal only after its child has ended: pytest gets Ctrl-C itself and cleans up first.
trap 'exit 130' INT
trap 'exit 143' TERM

DOCKER_HOST=$(tools/engine.sh start)
export DOCKER_HOST

names=(COORDINATOR AGENT ETCD STORE TOOLS)
missing=no
for name in "${names[@]}"; do
  variable=DTRAIN_IMAGE_$name
  if [ -z "${!variable:-}" ]; then
    missing=yes
    declare -x "$variable=dtrain-${name,,}:local"
  fi
done
if [ "$missing" = yes ]; then
  deploy/docker/build-local.sh
fi

# Without an engine the tests are skipped; here that would be a failure that looks like success.
export DTRAIN_REQUIRE_ENGINE=1
status=0
"$bin/python" -m pytest -q -p no:randomly tests/containers "${selection[@]}" "$@" || status=$?
# Nothing was selected: not a failure of the product, but nothing was tested either.
[ "$status" != 5 ] || echo "test-containers: no test was selected" >&2
exit "$status"
