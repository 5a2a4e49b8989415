#!/bin/sh
# Take the cluster down: down.sh [--volumes] [--keep-volumes]
#
# Containers and the network go. Volumes hold etcd's records, the checkpoints and agents' journals: they go
# with --volumes, or when you say yes. Without a terminal to ask on they stay.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
volumes=ask
for word in "$@"; do
  case $word in
    --volumes) volumes=yes ;;
    --keep-volumes) volumes=no ;;
    *)
      sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p;}' "$0" >&2
      exit 2
      ;;
  esac
done
# shellcheck source=deploy/compose/lib.sh
. "$here/lib.sh"
project=$(setting COMPOSE_PROJECT_NAME "")
[ -n "$project" ] || fail "there is no cluster: .env is missing"

if [ $volumes = ask ]; then
  volumes=no
  if [ -t 0 ] && [ -n "$(volumes_of)" ]; then
    printf 'Remove the volumes of %s too (jobs, checkpoints)? [y/N] ' "$project"
    read -r answer || answer=
    case $answer in y | Y | yes) volumes=yes ;; esac
  fi
fi
# Services of a profile that is off would stay.
COMPOSE_PROFILES=a3,a4,a5,a6,a7,a8,cli,monitoring
export COMPOSE_PROFILES
if [ $volumes = yes ]; then
  compose down --volumes --remove-orphans
  # The next cluster may be one without TLS.
  set_setting COMPOSE_FILE "$(setting COMPOSE_FILE compose.yaml | sed 's/:compose\.secure\.yaml//')"
  secure=$(setting DTRAIN_SECURE_DIR ./secure)
  case $secure in /*) ;; *) secure=$here/$secure ;; esac
  [ ! -d "$secure" ] || say "certificates and passwords are kept in $secure"
else
  compose down --remove-orphans
  [ -z "$(volumes_of)" ] || say "volumes are kept; 'make down-docker VOLUMES=1' removes them"
fi
