#!/usr/bin/env bash
# Regenerates common/dtrain/protocol/pb from proto/, or with --check proves that it is fresh.
# The generator lives in an environment of its own: beside the runtime it would drag protobuf back.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.cache/codegen
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import grpc_tools' 2>/dev/null; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install -q 'grpcio-tools==1.73.1' 'mypy-protobuf>=3.6,<4' 'setuptools<81'
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I proto \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" proto/dtrain/v1/*.proto
# The generated modules import each other by proto path; ours live under dtrain.protocol.pb.
sed -i -e 's/from dtrain\.v1 import/from dtrain.protocol.pb import/' -e 's/import dtrain\.v1\./import dtrain.protocol.pb./' "$out"/dtrain/v1/*.py*
target=common/dtrain/protocol/pb
if [ "${1:-}" = --check ]; then
  diff -r -x __pycache__ -x __init__.py -x py.typed "$out/dtrain/v1" "$target" ||
    { echo "generated protobuf code is stale: run 'make proto' and commit the result" >&2; exit 1; }
  exit 0
fi
rm -f "$target"/*_pb2*.py "$target"/*_pb2*.pyi
cp "$out"/dtrain/v1/* "$target"/
