#!/bin/sh
# Users and roles of a cluster in etcd, each with the least that it needs. Needs etcdctl 3.4 or newer.
#
#   setup-auth.sh --passwords DIR [--cluster C] init [AGENT...]   users, roles, then authentication on
#   setup-auth.sh --passwords DIR [--cluster C] agent AGENT...    more agents, later
#   setup-auth.sh --passwords DIR [--cluster C] drop AGENT...     an agent that is gone for good
#   setup-auth.sh --passwords DIR passwd USER...                  tell etcd the password in DIR/USER
#   setup-auth.sh --passwords DIR list                            who may do what
#
#   user         may, below /dtrain/C/
#   coordinator  read and write everything
#   agent-NAME   read and write agents/NAME/, read leader and coordinators/
#   reader       read everything: etcdctl, dashboards, 'dtrain --endpoints'
#   ops          read and write everything: for repairs by hand, in a person's name
#   root         everything, in all of etcd. This script uses it, nothing else should
#
# etcd is found as etcdctl finds it: ETCDCTL_ENDPOINTS, ETCDCTL_CACERT, ETCDCTL_CERT, ETCDCTL_KEY.
# DIR/USER holds a password; what is missing is made up, readable by you alone. Copy each file to
# where it is needed (--password-file). Passwords never stand on a command line.
# To change one without a gap: replace the file everywhere first, then run 'passwd'.
# --user-prefix P puts P before all names but root's, where clusters share an etcd.
# Running it again changes nothing.
set -euf
umask 077

fail() {
  echo "setup-auth: $1" >&2
  exit 1
}

usage() {
  sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
}

etcdctl=${ETCDCTL:-${DTRAIN_ETCDCTL_BIN:-etcdctl}}
cluster=default
passwords=
prefix=
while [ $# -gt 0 ]; do
  case $1 in
    --cluster | --passwords | --user-prefix)
      [ $# -ge 2 ] || fail "$1 needs a value"
      case $1 in
        --cluster) cluster=$2 ;;
        --passwords) passwords=$2 ;;
        --user-prefix) prefix=$2 ;;
      esac
      shift 2
      ;;
    -*) usage ;;
    *) break ;;
  esac
done
[ $# -ge 1 ] && [ -n "$passwords" ] || usage
verb=$1
shift
command -v "$etcdctl" >/dev/null 2>&1 || fail "etcdctl is not installed; set ETCDCTL"
check_name() {
  case $1 in '' | -* | *- | *[!a-z0-9-]*) fail "'$1' is not a name: use a-z, 0-9 and -" ;; esac
}
check_name "$cluster"
[ -z "$prefix" ] || check_name "${prefix%-}"
for name in "$@"; do check_name "$name"; done
root=/dtrain/$cluster

# etcdctl without a user: works only while authentication is off.
plain() (
  unset ETCDCTL_USER ETCDCTL_PASSWORD
  ETCDCTL_API=3 "$etcdctl" "$@"
)

ctl() {
  if [ "$auth" = on ]; then
    # The environment, not a flag: flags are seen by everybody on this machine.
    ETCDCTL_API=3 ETCDCTL_USER=root ETCDCTL_PASSWORD="$root_password" "$etcdctl" "$@"
  else
    plain "$@"
  fi
}

# Run etcdctl and let it fail only if the outcome is another than the one wanted.
unless() {
  known=$1
  shift
  said=$(ctl "$@" 2>&1) && return
  case $said in *"$known"*) ;; *) fail "etcdctl $1 $2 $3: $said" ;; esac
}

# Print the password of a user, made up if there is none.
password() {
  if [ ! -s "$passwords/$1" ]; then
    mkdir -p "$passwords"
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$passwords/$1.new"
    mv -f "$passwords/$1.new" "$passwords/$1"
  fi
  found=$(cat "$passwords/$1")
  case $found in '' | *[[:space:]]*) fail "$passwords/$1 is empty or holds a space" ;; esac
  printf '%s' "$found"
}

# Whether user NAME holds the role NAME: it is granted last, so everything is there then.
complete() {
  ctl user get "$1" 2>/dev/null | grep -q "^Roles:.* $1\( \|\$\)"
}

user() {
  password "$1" | unless "already exists" user add "$1" --interactive=false
  unless "already" user grant-role "$1" "$1"
}

grant() {
  ctl role grant-permission "$@" >/dev/null || fail "role $1 cannot be granted $3"
}

agents() {
  for agent in "$@"; do
    role=${prefix}agent-$agent
    complete "$role" && continue
    unless "already exists" role add "$role"
    grant "$role" readwrite "$root/agents/$agent/" --prefix
    grant "$role" read "$root/leader"
    grant "$role" read "$root/coordinators/" --prefix
    user "$role"
    echo "agent $agent: user $role, password in $passwords/$role"
  done
}

if plain user list >/dev/null 2>&1; then
  auth=off
else
  auth=on
  [ -s "$passwords/root" ] || fail "etcd cannot be reached, or wants a login and $passwords/root is missing"
  root_password=$(password root)
  said=$(ctl user list 2>&1) || fail "etcd refuses root: $said"
fi

case $verb in
  init)
    for role in coordinator ops reader; do
      kind=readwrite
      [ $role != reader ] || kind=read
      complete "$prefix$role" && continue
      unless "already exists" role add "$prefix$role"
      grant "$prefix$role" $kind "$root/" --prefix
      user "$prefix$role"
    done
    agents "$@"
    if [ "$auth" = off ]; then
      unless "already exists" role add root
      user root
      root_password=$(password root)
      ctl auth enable >/dev/null
      auth=on
    fi
    ctl user list >/dev/null
    echo "authentication is on; passwords are in $passwords. Lock $passwords/root away: nothing needs it from here on"
    ;;
  agent)
    [ $# -ge 1 ] || usage
    agents "$@"
    ;;
  drop)
    [ $# -ge 1 ] || usage
    for agent in "$@"; do
      unless "not found" user delete "${prefix}agent-$agent"
      unless "not found" role delete "${prefix}agent-$agent"
      rm -f "$passwords/${prefix}agent-$agent"
    done
    ;;
  passwd)
    [ $# -ge 1 ] || usage
    for name in "$@"; do
      [ -s "$passwords/$name" ] || fail "$passwords/$name is missing: write the new password there first"
      [ "$name" != root ] || fail "root's password is needed to change it: use etcdctl user passwd root"
      password "$name" | ctl user passwd "$name" --interactive=false >/dev/null || fail "no new password for $name"
      echo "etcd knows the new password of $name"
    done
    ;;
  list)
    for name in $(ctl user list); do
      echo "user $name"
      ctl user get "$name" --detail 2>/dev/null | sed -n '2,$s/^/  /p'
    done
    ;;
  *) usage ;;
esac
