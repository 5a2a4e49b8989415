#!/usr/bin/env bash
# Build dtrain-coordinator:<version> and dtrain-agent:<version> from this checkout, on public bases.
#
# Environment: PYTHON_IMAGE and TORCH_IMAGE take the place of images.env's, TAG the place of the version, SOURCE is
# the address that the images' labels give for the code. Needs a Docker engine and a set-up checkout (VENV).
# Wheels in dist/wheelhouse make it an offline build; README.md says which those are.
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

mkdir -p dist
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$bin/pip" wheel -q --disable-pip-version-check --no-deps -w "$work" .
wheel=$(basename "$work"/dtrain-*.whl)
mv "$work/$wheel" "dist/$wheel"
version=$(cut -d- -f2 <<<"$wheel")
for kind in "coordinator PYTHON_IMAGE=${python_image:-$PYTHON_IMAGE}" "agent TORCH_IMAGE=${torch_image:-$TORCH_IMAGE}"; do
  read -r name base <<<"$kind"
  docker build -f "deploy/docker/$name.Dockerfile" -t "dtrain-$name:${TAG:-$version}" --build-arg "$base" \
    --build-arg "WHEEL=dist/$wheel" --build-arg "VERSION=$version" \
    --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" --build-arg "SOURCE=${SOURCE:-}" .
done
