#!/usr/bin/env bash
# Build dtrain-coordinator:<version> and dtrain-agent:<version> from this checkout, on public bases.
#
# Environment: PYTHON_IMAGE and TORCH_IMAGE take the place of images.env's, TAG the place of the version, SOURCE is
# the address that the images' labels give for the code. Needs a Docker engine and a set-up checkout (VENV).
# Wheels in deploy/docker/wheelhouse make it an offline build; README.md says which those are.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${VENV:-.venv}/bin

fail() {
  echo "build: $1" >&2
  exit 1
}

docker info >/dev/null 2>&1 || fail "no Docker engine answers: set DOCKER_HOST, or run tools/engine.sh start"
docker buildx version >/dev/null 2>&1 || export DOCKER_BUILDKIT=0
python_image=${PYTHON_IMAGE:-} torch_image=${TORCH_IMAGE:-}
# shellcheck source=deploy/docker/images.env
. deploy/docker/images.env

# The file that is released, byte for byte, so that an image and an installation run the same.
"$bin/python" -m tools.dist
version=$("$bin/python" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
wheel=dtrain-$version-py3-none-any.whl
[ -f "dist/$wheel" ] || fail "dist/$wheel was not built"
for kind in "coordinator PYTHON_IMAGE=${python_image:-$PYTHON_IMAGE}" "agent TORCH_IMAGE=${torch_image:-$TORCH_IMAGE}"; do
  read -r name base <<<"$kind"
  docker build -f "deploy/docker/$name.Dockerfile" -t "dtrain-$name:${TAG:-$version}" --build-arg "$base" \
    --build-arg "WHEEL=dist/$wheel" --build-arg "VERSION=$version" \
    --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" --build-arg "SOURCE=${SOURCE:-}" .
done
