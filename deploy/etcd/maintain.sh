#!/bin/sh
# Look after a running etcd, one member at a time. Needs etcdctl 3.4 or newer.
#
#   maintain.sh [OPTIONS] status              version, size, part in use, lag, alarms of every member
#   maintain.sh [OPTIONS] defrag [PERCENT]    give free space back to the disk, where more than PERCENT
#                                             (default 30) of the file is free
#   maintain.sh [OPTIONS] compact [KEEP]      forget all revisions but the newest KEEP (default 100000)
#   maintain.sh [OPTIONS] nospace             after a NOSPACE alarm: compact, defrag, disarm, check
#
#   --user U [--password-file F]   while users are on: root, or a user with the role root
#
# ETCDCTL_ENDPOINTS must name all members; ETCDCTL_CACERT, ETCDCTL_CERT and ETCDCTL_KEY as for etcdctl.
# A member that is defragmented answers nothing meanwhile. So: followers first, the leader last, the
# next one only when all are healthy and this one has caught up. The first that fails ends it.
#
# Exit code: 0 done, 1 something failed, 2 wrong words, 3 not all members are healthy.
set -eu
. "$(dirname "$0")/lib.sh"

HEALTHY_S=120
LAG_MAX=1000

user=
password_file=
while [ $# -gt 0 ]; do
  case $1 in
    --user | --password-file)
      [ $# -ge 2 ] || usage
      case $1 in
        --user) user=$2 ;;
        --password-file) password_file=$2 ;;
      esac
      shift 2
      ;;
    -*) usage ;;
    *) break ;;
  esac
done
[ $# -ge 1 ] || usage
verb=$1
shift
[ -z "$user" ] || login "$user" "$password_file"
need_etcdctl

all_healthy() {
  for one in $(endpoints); do
    is_healthy "$one" || {
      sick=$one
      return 1
    }
  done
}

need_all() {
  all_healthy || fail 3 "$sick is not healthy: a second member out of service could stop etcd"
  first=$(endpoints | head -n 1)
  listed=$(at "$first" member list 2>/dev/null | grep -c .) || fail 1 "$first does not list the members"
  named=$(endpoints | grep -c .)
  [ "$listed" = "$named" ] || fail 3 "etcd has $listed members, ETCDCTL_ENDPOINTS names $named: name them all"
}

# Followers, then the leader.
in_order() {
  last=
  for one in $(endpoints); do
    found=$(at "$one" endpoint status -w json) || fail 1 "$one does not tell its status"
    if [ "$(echo "$found" | field member_id)" = "$(echo "$found" | field leader)" ]; then
      last=$one
    else
      echo "$one"
    fi
  done
  [ -z "$last" ] || echo "$last"
}

# Wait until ENDPOINT is healthy again and has applied what the others have.
await() {
  left=$HEALTHY_S
  while :; do
    if all_healthy; then
      most=0
      mine=0
      for one in $(endpoints); do
        index=$(at "$one" endpoint status -w json | field raftIndex)
        [ "$index" -le "$most" ] || most=$index
        [ "$one" != "$1" ] || mine=$(at "$one" endpoint status -w json | field raftAppliedIndex)
      done
      [ "$((most - mine))" -gt "$LAG_MAX" ] || return 0
    fi
    left=$((left - 1))
    [ "$left" -gt 0 ] || fail 1 "$1 has not come back within $HEALTHY_S s: look after it before the next one"
    sleep 1
  done
}

defrag() {
  for endpoint in $(in_order); do
    found=$(at "$endpoint" endpoint status -w json)
    size=$(echo "$found" | field dbSize)
    used=$(echo "$found" | field dbSizeInUse)
    free=$(((size - used) * 100 / (size > 0 ? size : 1)))
    if [ "$free" -lt "$1" ]; then
      say "$endpoint: $free % of $size bytes are free, left as it is"
      continue
    fi
    said=$(at "$endpoint" --command-timeout=120s defrag 2>&1) || fail 1 "$endpoint: $said"
    await "$endpoint"
    say "$endpoint: $size bytes, now $(at "$endpoint" endpoint status -w json | field dbSize)"
  done
}

compact() {
  first=$(endpoints | head -n 1)
  revision=$(at "$first" endpoint status -w json | field revision)
  [ "$revision" -gt "$1" ] || {
    say "there are $revision revisions, nothing is forgotten"
    return 0
  }
  said=$(at "$first" compact "$((revision - $1))" 2>&1) || case $said in
    *"has been compacted"*) ;;
    *) fail 1 "$first: $said" ;;
  esac
  say "forgot what was before revision $((revision - $1))"
}

number() {
  case $1 in '' | *[!0-9]*) fail 2 "'$1' is no number" ;; esac
}

case $verb in
  status)
    code=0
    for endpoint in $(endpoints); do
      if is_healthy "$endpoint" && found=$(at "$endpoint" endpoint status -w json 2>/dev/null); then
        role=follower
        [ "$(echo "$found" | field member_id)" != "$(echo "$found" | field leader)" ] || role=leader
        size=$(echo "$found" | field dbSize)
        used=$(echo "$found" | field dbSizeInUse)
        echo "$endpoint $role etcd $(echo "$found" | field version) revision $(echo "$found" | field revision)" \
          "$size bytes, $used in use, raft $(echo "$found" | field raftIndex)"
      else
        echo "$endpoint is not healthy"
        code=3
      fi
    done
    alarms=$(at "$(endpoints | head -n 1)" alarm list 2>&1) || alarms="cannot be read: $alarms"
    echo "alarms: ${alarms:-none}"
    exit $code
    ;;
  defrag)
    number "${1:-30}"
    need_all
    defrag "${1:-30}"
    ;;
  compact)
    number "${1:-100000}"
    need_all
    compact "${1:-100000}"
    ;;
  nospace)
    # Its alarm makes a member call itself unhealthy: what is checked is that each answers.
    first=$(endpoints | head -n 1)
    is_healthy() { at "$1" endpoint status >/dev/null 2>&1; }
    need_all
    compact 0
    defrag 0
    said=$(at "$first" alarm disarm 2>&1) || fail 1 "$said"
    left=$(at "$first" alarm list) || fail 1 "alarms cannot be listed"
    [ -z "$left" ] || fail 1 "still there: $left. Is --quota-backend-bytes too small?"
    say "no alarm is left. Turn on auto-compaction, or raise --quota-backend-bytes, or it will be back"
    ;;
  *) usage ;;
esac
