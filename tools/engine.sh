#!/usr/bin/env bash
# A Docker engine for the container tests.
#
#   engine.sh start     print the address of an engine that answers: DOCKER_HOST's, else the machine's,
#                       else a dockerd of our own, which this starts (needs root and the package docker.io)
#   engine.sh stop      end the dockerd that `start` started, with its containers, and nothing else;
#                       with --purge also remove its images and volumes
#   engine.sh status    which engine answers
#
# The address goes to stdout, all else to stderr. Exit code 3: this machine cannot run an engine; the reason was said.
# Our own engine keeps its data in ENGINE_DIR (.cache/engine).
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${ENGINE_DIR:-$PWD/.cache/engine}
# Sockets cannot have long paths (107 bytes), so they are not below the checkout.
run=/run/dtrain-engine-$(echo "$dir" | sha256sum | cut -c1-8)
own=unix://$run/docker.sock

fail() {
  echo "engine: $1" >&2
  exit "${2:-1}"
}

answers() {
  DOCKER_HOST=$1 timeout 20 docker version -f '{{.Server.Version}}' >/dev/null 2>&1
}

# The pid of our own dockerd, if it lives: a pid file alone may name anybody after a crash.
pid() {
  local number
  number=$(cat "$run/pid" 2>/dev/null) || return 1
  tr '\0' ' ' <"/proc/$number/cmdline" 2>/dev/null | grep -qF -- "--pidfile $run/pid " && echo "$number"
}

default=${DOCKER_HOST:-unix:///var/run/docker.sock}

start() {
  command -v docker >/dev/null || fail "there is no docker command: apt-get install docker.io" 3
  if answers "$default"; then
    echo "$default"
    return
  fi
  if pid >/dev/null && answers "$own"; then
    echo "$own"
    return
  fi
  command -v dockerd >/dev/null || fail "no engine answers at $default, and dockerd is not installed: apt-get install docker.io" 3
  [ "$(id -u)" = 0 ] || fail "no engine answers at $default; starting one needs root" 3
  # Two engines in one network namespace overwrite each other's bridge and firewall rules.
  local other
  for other in $(pidof dockerd || true); do
    if [ "$(readlink "/proc/$other/ns/net")" = "$(readlink /proc/self/ns/net)" ]; then
      fail "a dockerd runs already (pid $other) but does not answer at $default: set DOCKER_HOST to where it does" 3
    fi
  done
  mkdir -p "$dir" "$run"
  if [ -e /sys/class/net/docker0 ]; then : >"$run/had-bridge"; fi
  # A session of its own: Ctrl-C at the tests must not end the engine before their containers.
  setsid dockerd --data-root "$dir/data" --exec-root "$run/exec" --pidfile "$run/pid" -H "$own" --log-level warn \
    </dev/null >"$dir/log" 2>&1 &
  local child=$! waited=0
  until answers "$own"; do
    if ! kill -0 "$child" 2>/dev/null || [ "$waited" -ge 60 ]; then
      tail -n 5 "$dir/log" >&2
      stop >/dev/null 2>&1 || true
      fail "dockerd did not start on this machine (its log: $dir/log)" 3
    fi
    sleep 1
    waited=$((waited + 1))
  done
  echo "engine: started dockerd, its data is in $dir" >&2
  echo "$own"
}

stop() {
  local number waited=0
  if number=$(pid); then
    # Containers first: dockerd would give each of them seconds of grace.
    docker -H "$own" ps -q 2>/dev/null | xargs -r docker -H "$own" kill >/dev/null 2>&1 || true
    kill "$number"
    while kill -0 "$number" 2>/dev/null; do
      [ "$waited" -lt 60 ] || { kill -9 "$number"; break; }
      sleep 1
      waited=$((waited + 1))
    done
    echo "engine: stopped dockerd" >&2
  fi
  # What a killed engine left mounted would keep its data from being removed.
  awk -v dir="$dir/" -v run="$run/" 'index($5, dir) == 1 || index($5, run) == 1 { print $5 }' /proc/self/mountinfo |
    LC_ALL=C sort -r | while read -r mounted; do umount -l "$mounted" || true; done
  if [ -d "$run" ] && [ ! -e "$run/had-bridge" ]; then
    ip link delete docker0 2>/dev/null || true
  fi
  rm -rf --one-file-system "$run"
}

case ${1:-} in
  start) start ;;
  stop)
    stop
    if [ "${2:-}" = --purge ]; then
      rm -rf --one-file-system "$dir"
    fi
    ;;
  status)
    if answers "$default"; then
      echo "engine: one answers at $default" >&2
    elif pid >/dev/null && answers "$own"; then
      echo "engine: our own answers at $own (pid $(pid))" >&2
    else
      fail "none answers"
    fi
    ;;
  *) fail "usage: engine.sh start|stop [--purge]|status" 2 ;;
esac
