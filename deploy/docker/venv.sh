#!/bin/sh
# Runs in the build stages of both images, as `venv.sh deps [OPTION FOR venv]` and then `venv.sh dtrain`.
#
# deps:   a virtual environment at /opt/dtrain with the locked requirements. With --system-site-packages it sees
#         the packages of the base's own Python (an agent needs its torch); it never changes them.
# dtrain: dtrain's wheel for that environment, as files under /staged: a layer of its own, so that a
#         new dtrain on old requirements moves little.
#
# Wheels that lie in /build/wheelhouse make the build an offline one. A base without pip takes the wheelhouse's.
set -eu

python=/opt/dtrain/bin/python

pip() {
  if python3 -m pip --version >/dev/null 2>&1; then
    python3 -m pip --python "$python" "$@"
  else
    "$python" "$(echo /build/wheelhouse/pip-*.whl)/pip" "$@"
  fi
}

install() {
  if ls /build/wheelhouse/*.whl >/dev/null 2>&1; then
    set -- --no-index --find-links /build/wheelhouse "$@"
  fi
  pip install --no-cache-dir --disable-pip-version-check --no-warn-script-location --root-user-action=ignore "$@"
}

case $1 in
  deps)
    shift
    python3 -m venv --without-pip "$@" /opt/dtrain
    # Where the base's Python is itself a virtual environment, system-site-packages means the one below it.
    python3 - "$@" <<'EOF'
import pathlib, site, sys
if sys.prefix != sys.base_prefix and "--system-site-packages" in sys.argv:
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages()]
    folder = pathlib.Path(f"/opt/dtrain/lib/python3.{sys.version_info[1]}/site-packages")
    (folder / "base.pth").write_text("".join(lines))
EOF
    install --require-hashes -r /build/requirements.lock
    ;;
  dtrain)
    # --no-deps: what the lock lacks has to be missed below, not to be fetched unpinned.
    install --no-deps --root /staged /build/dist/dtrain-*.whl
    cp -a /staged/opt/dtrain/. /opt/dtrain/
    if grep -q '^include-system-site-packages = false' /opt/dtrain/pyvenv.cfg; then
      pip check
    fi
    "$python" -c 'import boto3, dtrain.cli.main, dtrain.coordinator.main, dtrain.agent.main'
    ;;
  *)
    echo "usage: venv.sh deps|dtrain" >&2
    exit 2
    ;;
esac
