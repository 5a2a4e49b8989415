# What up.sh, down.sh and secure.sh share: which compose command there is, and the settings in .env.
# Sourced with $here set to this folder.

fail() {
  echo "${0##*/}: $1" >&2
  exit 1
}

say() {
  echo "${0##*/}: $1" >&2
}

command -v docker >/dev/null 2>&1 || fail "the command docker is not installed"
docker info >/dev/null 2>&1 || fail "no Docker engine answers: start it, or set DOCKER_HOST"

if docker compose version >/dev/null 2>&1; then
  compose_command="docker compose"
elif command -v docker-compose >/dev/null 2>&1; then
  compose_command="docker-compose"
else
  fail "there is neither 'docker compose' nor docker-compose: install the compose plugin"
fi

# Without -f and -p: both are in .env, so that what people type here means the same cluster.
compose() (
  cd "$here"
  # shellcheck disable=SC2086 # two words for the plugin
  $compose_command "$@"
)

# setting NAME DEFAULT: from the environment, else from .env, else DEFAULT, as compose sees it.
setting() {
  eval "found=\${$1:-}"
  [ -n "$found" ] || found=$(sed -n "s/^$1=//p" "$here/.env" 2>/dev/null | tail -n 1)
  printf '%s' "${found:-$2}"
}

# set_setting NAME VALUE: in .env, where the name stands already or at the end.
set_setting() {
  [ "$(sed -n "s/^$1=//p" "$here/.env" | tail -n 1)" = "$2" ] && grep -q "^$1=" "$here/.env" && return
  awk -v name="$1" -v value="$2" '
    index($0, name "=") == 1 { if (!done) print name "=" value; done = 1; next }
    { print }
    END { if (!done) print name "=" value }' "$here/.env" >"$here/.env.new"
  chmod 0600 "$here/.env.new"
  mv -f "$here/.env.new" "$here/.env"
}

# The image that a variable means: what is set, else the default in compose.yaml.
image_of() {
  setting "$1" "$(sed -n "s/.*\${$1:-\([^}]*\)}.*/\1/p" "$here/compose.yaml" | head -n 1)"
}

random() {
  od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'
}

containers_of() {
  docker ps -q --filter "label=com.docker.compose.project=$project" --filter "label=com.docker.compose.service=$1"
}

volumes_of() {
  docker volume ls -q --filter "label=com.docker.compose.project=$project"
}
