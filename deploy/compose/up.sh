#!/bin/sh
# Bring the cluster up and wait until it can train. Running it again changes only what differs.
#
#   up.sh [--agents 2..8] [--secure] [--monitoring] [--local-images] [--timeout SECONDS]
#
# What it decides it writes into .env, so that 'docker compose' in this folder means the same cluster.
# Images that are missing are pulled; dtrain's own are built by 'make images'. --local-images, or a
# registry that cannot be reached: 'make images-local' builds all of them without one.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

usage() {
  sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
}

agents=
secure=
monitoring=
local_images=
timeout=300
while [ $# -gt 0 ]; do
  case $1 in
    --agents | --timeout)
      [ $# -ge 2 ] || usage
      case $2 in '' | *[!0-9]*) usage ;; esac
      if [ "$1" = --agents ]; then agents=$2; else timeout=$2; fi
      shift
      ;;
    --secure) secure=yes ;;
    --monitoring) monitoring=yes ;;
    --local-images) local_images=yes ;;
    *) usage ;;
  esac
  shift
done
if [ -n "$agents" ] && { [ "$agents" -lt 2 ] || [ "$agents" -gt 8 ]; }; then
  echo "up.sh: compose.yaml has places for 2 to 8 agents; README.md says how to add more" >&2
  exit 2
fi
# shellcheck source=deploy/compose/lib.sh
. "$here/lib.sh"

if [ ! -f "$here/.env" ]; then
  (umask 077 && cp "$here/.env.example" "$here/.env")
  set_setting DTRAIN_STORE_SECRET_KEY "$(random 24)"
fi
# Containers read them as another user, whatever the umask of the checkout was.
chmod a+r "$here/bucket.py" "$here/place.sh" "$here/monitoring"/*.yaml "$here/monitoring"/*/* "$here/../grafana"/*
chmod a+rx "$here/monitoring"/*/ "$here/../grafana"

project=$(setting COMPOSE_PROJECT_NAME dtrain)
files=$(setting COMPOSE_FILE compose.yaml)
profiles=$(setting COMPOSE_PROFILES "")

case $files in *compose.secure.yaml*) was=yes ;; *) was= ;; esac
if [ -n "$secure" ] && [ -z "$was" ]; then
  # etcd's members could not find each other, nor clients their store.
  [ -z "$(volumes_of)" ] || fail "this cluster was made without TLS: 'make down-docker VOLUMES=1' first"
  files=$files:compose.secure.yaml
  set_setting COMPOSE_FILE "$files"
elif [ -n "$was" ]; then
  [ -n "$secure" ] || say "TLS and users stay on: .env names compose.secure.yaml"
  secure=yes
fi

if [ -n "$agents" ] || [ -n "$monitoring" ]; then
  wanted=
  for profile in $(echo "$profiles" | tr ',' ' '); do
    case $profile in
      a[3-8]) [ -n "$agents" ] || wanted=$wanted,$profile ;;
      monitoring) monitoring=yes ;;
      *) wanted=$wanted,$profile ;;
    esac
  done
  number=3
  while [ "$number" -le "${agents:-0}" ]; do
    wanted=$wanted,a$number
    number=$((number + 1))
  done
  [ -z "$monitoring" ] || wanted=$wanted,monitoring
  profiles=${wanted#,}
  set_setting COMPOSE_PROFILES "$profiles"
fi
expected=2
for profile in $(echo "$profiles" | tr ',' ' '); do
  case $profile in a[3-8]) expected=$((expected + 1)) ;; monitoring) monitoring=yes ;; esac
done

# Images
make_images() {
  say "building dtrain's images: make $1"
  make -C "$root" "$1" >&2
}

take_local() {
  for name in coordinator agent etcd store; do
    docker image inspect "dtrain-$name:local" >/dev/null 2>&1 || { make_images images-local && break; }
  done
  for name in coordinator agent etcd store; do
    docker image inspect "dtrain-$name:local" >/dev/null 2>&1 || fail "there is no image dtrain-$name:local"
    set_setting "DTRAIN_IMAGE_$(echo $name | tr '[:lower:]' '[:upper:]')" "dtrain-$name:local"
  done
}

take_public() {
  for variable in ETCD STORE ${monitoring:+PROMETHEUS GRAFANA}; do
    image=$(image_of DTRAIN_IMAGE_$variable)
    docker image inspect "$image" >/dev/null 2>&1 && continue
    say "pulling $image"
    docker pull "$image" >&2 || return 1
  done
  for variable in COORDINATOR AGENT; do
    image=$(image_of DTRAIN_IMAGE_$variable)
    docker image inspect "$image" >/dev/null 2>&1 && continue
    case $image in
      */*)
        say "pulling $image"
        docker pull "$image" >&2 || return 1
        ;;
      *)
        make_images images || return 1
        docker image inspect "$image" >/dev/null 2>&1 || return 1
        ;;
    esac
  done
}

if [ -n "$local_images" ]; then
  take_local
elif ! take_public; then
  say "no registry can be reached: taking images that are built without one"
  take_local
fi

# Agents that are no longer wanted checkpoint, hand their ranks over and go.
number=$((expected + 1))
while [ -n "$agents" ] && [ "$number" -le 8 ]; do
  for container in $(containers_of "a$number"); do
    say "stopping a$number"
    docker stop -t 90 "$container" >/dev/null
    docker rm "$container" >/dev/null
  done
  number=$((number + 1))
done

if [ -n "$secure" ]; then
  "$here/secure.sh" certs
  # The first start: there is nobody to log in as until etcd has been told.
  compose up -d etcd-0 etcd-1 etcd-2
  "$here/secure.sh" users
fi
compose up -d

container=$(containers_of c1)
[ -n "$container" ] || fail "c1 does not run: see '$compose_command logs c1'"
docker exec -i "$container" python - "$timeout" "$expected" <"$here/ready.py" ||
  fail "no leader and $expected agents within $timeout s: see '$compose_command ps' and '$compose_command logs c1 a1' in $here"

coordinators=127.0.0.1:$(setting DTRAIN_PORT_C1 7070),127.0.0.1:$(setting DTRAIN_PORT_C2 7071),127.0.0.1:$(setting DTRAIN_PORT_C3 7072)
cluster=$(setting DTRAIN_CLUSTER default)
cat <<EOF

The cluster is up. In $here:

  $compose_command run --rm cli get agents
  $compose_command run --rm cli submit /workspace/digits/job.yaml --follow
  $compose_command exec etcd-0 etcdctl ${secure:+--user reader }watch --prefix /dtrain/$cluster/jobs/

From this machine, if dtrain is installed:

EOF
if [ -n "$secure" ]; then
  keys=$(cd "$here" && cd "$(setting DTRAIN_SECURE_DIR ./secure)" && pwd)/pki/operator/me
  cat <<EOF
  export DTRAIN_TLS_CACERT=$keys/grpc-ca.crt DTRAIN_TLS_CERT=$keys/grpc.crt DTRAIN_TLS_KEY=$keys/grpc.key
EOF
fi
cat <<EOF
  export DTRAIN_COORDINATORS=$coordinators
  dtrain get agents
  dtrain submit examples/digits/job.yaml --set working_dir=/workspace/digits --follow

Break something: $compose_command kill c1. Take it all down: make down-docker.
EOF
