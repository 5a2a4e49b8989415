# shellcheck shell=sh
# What backup.sh, restore.sh and maintain.sh share. POSIX sh; sourced, not run.
#
# etcd is found as etcdctl finds it, by ETCDCTL_* variables. Each call goes to one member, named by
# the variable: etcdctl refuses a flag for what a variable says.

etcdctl=${ETCDCTL:-${DTRAIN_ETCDCTL_BIN:-etcdctl}}
prog=$(basename "$0" .sh)

# The password goes into the environment: flags are seen by everybody on this machine.
login() {
  ETCDCTL_USER=$1
  [ -z "${2:-}" ] || ETCDCTL_PASSWORD=$(cat "$2") || fail 1 "the password file $2 cannot be read"
  export ETCDCTL_USER
  [ -z "${2:-}" ] || export ETCDCTL_PASSWORD
}

say() {
  echo "$prog: $1"
}

# fail CODE SENTENCE
fail() {
  echo "$prog: $2" >&2
  exit "$1"
}

usage() {
  sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
}

endpoints() {
  echo "${ETCDCTL_ENDPOINTS:-127.0.0.1:2379}" | tr ',' '\n' | sed '/^[[:space:]]*$/d'
}

# at ENDPOINT WORDS...: one call to one member.
at() (
  ETCDCTL_ENDPOINTS=$1
  ETCDCTL_API=3
  export ETCDCTL_ENDPOINTS ETCDCTL_API
  shift
  exec "$etcdctl" "$@"
)

# The value of one field of a JSON document on stdin.
field() {
  sed -n 's/.*"'"$1"'": *"\{0,1\}\([^,"}]*\).*/\1/p' | head -n 1
}

is_healthy() {
  at "$1" endpoint health >/dev/null 2>&1
}

# A cluster id as etcd's logs print it. The shell's own numbers end at 2^63.
hex() {
  awk -v d="$1" 'BEGIN {
    while (d != "" && d != "0") {
      r = 0; q = ""
      for (i = 1; i <= length(d); i++) { c = r * 10 + substr(d, i, 1); q = q int(c / 16); r = c % 16 }
      sub(/^0+/, "", q)
      out = substr("0123456789abcdef", r + 1, 1) out
      d = q
    }
    print out
  }'
}

need_etcdctl() {
  command -v "$etcdctl" >/dev/null 2>&1 || fail 1 "etcdctl is not installed; set ETCDCTL"
}
