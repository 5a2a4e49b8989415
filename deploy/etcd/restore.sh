#!/bin/sh
# Make one member's data folder from a snapshot, after etcd has lost its data. Needs etcdutl, or an
# etcdctl that still restores (3.4, 3.5). Run it for every member, from the same file, then start all.
#
#   restore.sh [--wal-dir W] [--token T] [--bump N | --no-bump] \
#              --name NAME --data-dir DIR --initial-cluster NAME=PEER_URL,... SNAPSHOT
#
# Name, peer URLs and token (--initial-cluster-token, etcd's default: etcd-cluster) as the members had
# them: then the cluster keeps its id, and nobody has to be told. A data folder that is there is never
# touched: move the lost one away, and make sure that no old member ever starts with it again.
#
# Revisions are raised by N (default 1000000000) and marked as compacted, so that none is given out
# twice: terms go on above all that agents have obeyed, and training goes on by itself. A tool that
# cannot do that (etcd 3.4, 3.5 before 3.5.16) is refused: take a newer one (ETCDUTL), or say --no-bump
# and do what is printed afterwards.
#
# Exit code: 0 restored, 1 it could not be, 2 wrong words, 3 the folder is in use, 4 the snapshot is no
# good, 5 the tool cannot raise revisions.
set -eu
umask 077
. "$(dirname "$0")/lib.sh"

bump=1000000000
token=etcd-cluster
name=
data=
wal=
members=
while [ $# -gt 0 ]; do
  case $1 in
    --no-bump)
      bump=0
      shift
      ;;
    --name | --data-dir | --wal-dir | --initial-cluster | --token | --bump)
      [ $# -ge 2 ] || usage
      case $1 in
        --name) name=$2 ;;
        --data-dir) data=$2 ;;
        --wal-dir) wal=$2 ;;
        --initial-cluster) members=$2 ;;
        --token) token=$2 ;;
        --bump) bump=$2 ;;
      esac
      shift 2
      ;;
    -*) usage ;;
    *) break ;;
  esac
done
[ $# -eq 1 ] && [ -n "$name" ] && [ -n "$data" ] && [ -n "$members" ] || usage
snapshot=$1
case $bump in
  0) ;;
  *[!0-9]* | '') fail 2 "--bump wants a number" ;;
  *) [ "$bump" -ge 100000000 ] || fail 2 "--bump $bump is not enough: dtrain wants at least 100000000" ;;
esac
peer=$(echo "$members" | tr ',' '\n' | sed -n "s/^$name=//p" | head -n 1)
[ -n "$peer" ] || fail 2 "--initial-cluster does not name $name"
case $(echo "$members" | tr ',' '\n' | grep -c "^$name=") in 1) ;; *) fail 2 "$name is there twice" ;; esac

for folder in "$data" "$wal"; do
  if [ -n "$folder" ] && [ -e "$folder" ] && [ -n "$(ls -A "$folder" 2>/dev/null || echo it)" ]; then
    fail 3 "$folder is there: stop etcd, and move it away (mv $folder $folder.lost)"
  fi
done
[ -s "$snapshot" ] || fail 4 "$snapshot is no file, or empty"
meta=${snapshot%.db}.meta
cluster=
if [ -r "$meta" ]; then
  wanted=$(sed -n 's/^sha256=//p' "$meta")
  [ "$wanted" = "$(sha256sum "$snapshot" | cut -d' ' -f1)" ] || fail 4 "$snapshot is not what $meta says"
  cluster=$(sed -n 's/^cluster_id=//p' "$meta")
fi

# Whichever is there and restores: from 3.6 on etcdctl does not.
tool=
for candidate in ${ETCDUTL:-etcdutl} "$etcdctl"; do
  command -v "$candidate" >/dev/null 2>&1 || continue
  help=$(ETCDCTL_API=3 "$candidate" snapshot restore --help 2>&1) || continue
  case $help in *--data-dir*) ;; *) continue ;; esac
  case $bump/$help in
    0/* | *--bump-revision*)
      tool=$candidate
      break
      ;;
  esac
  weak=$candidate
done
if [ -z "$tool" ]; then
  [ -z "${weak:-}" ] || fail 5 "$weak cannot raise revisions (--bump-revision): take etcdutl 3.6 or etcdctl 3.5.16, or say --no-bump"
  fail 1 "neither etcdutl nor an etcdctl that restores is here; set ETCDUTL"
fi

made=$data.restoring.$$
made_wal=
[ -z "$wal" ] || made_wal=$wal.restoring.$$
log=$(mktemp)
trap 'rm -rf "$made" ${made_wal:+"$made_wal"} "$log"' EXIT
trap 'exit 1' INT TERM
set -- snapshot restore "$snapshot" --name "$name" --data-dir "$made" --initial-cluster "$members" \
  --initial-advertise-peer-urls "$peer" --initial-cluster-token "$token"
[ -z "$wal" ] || set -- "$@" --wal-dir "$made_wal"
[ "$bump" = 0 ] || set -- "$@" --bump-revision "$bump" --mark-compacted
(
  # Restoring talks to nobody: variables for a running etcd are of no use to it.
  unset ETCDCTL_ENDPOINTS ETCDCTL_CACERT ETCDCTL_CERT ETCDCTL_KEY ETCDCTL_USER ETCDCTL_PASSWORD
  ETCDCTL_API=3 "$tool" "$@"
) >"$log" 2>&1 || fail 4 "$tool: $(tail -n 3 "$log")"
now=$(sed -n -e 's/.*cluster-id": *"\([0-9a-f]*\)".*/\1/p' -e 's/.* to cluster \([0-9a-f]*\).*/\1/p' "$log" | tail -n 1)

# The folder appears whole or not at all; an empty one may be a mount point.
place() {
  if [ -d "$2" ]; then
    find "$1" -mindepth 1 -maxdepth 1 -exec mv {} "$2"/ \;
    rmdir "$1"
  else
    mkdir -p "$(dirname "$2")"
    mv "$1" "$2"
  fi
}
[ -z "$wal" ] || place "$made_wal" "$wal"
place "$made" "$data"
say "$data holds $snapshot for $name ($peer), cluster id ${now:-unknown}"

echo "next:"
echo "  1. give $data to the user that runs etcd, if that is another one"
echo "  2. do the same for every other member, from the same file; none may start with its old data"
echo "  3. start all of them as ever, and look: etcdctl endpoint health --cluster"
flags="--keep-ranks true"
[ "$bump" != 0 ] || flags="--keep-ranks true --accept-restored-etcd true"
if [ -n "$cluster" ] && [ -n "$now" ] && [ "$cluster" != "$now" ]; then
  echo "  4. the cluster id is new (it was $cluster: other names, peer URLs or token), so everybody refuses it."
  echo "     Within the jobs' isolation_grace: stop all coordinators, start every agent anew with"
  echo "     $flags, then start the coordinators"
elif [ "$bump" = 0 ]; then
  echo "  4. revisions were not raised: agents obey nobody ('dtrain get agents' says so) until they are told."
  echo "     Leave the coordinators stopped (they end with 78), start every agent anew with"
  echo "     $flags, then start the coordinators"
else
  echo "  4. nothing: coordinators and agents go on by themselves"
fi
echo "  see docs/operations.md, 'etcd lost its data'"
