#!/bin/sh
# Save a snapshot of etcd, checked, and keep the newest ones. Needs etcdctl 3.4 or newer.
#
#   backup.sh [--keep N] [--user U [--password-file F]] DIR
#
# DIR/etcd-TIME-rREVISION.db is the snapshot; the same name with .meta says what it is of: sha256,
# revision, cluster id, version. A .db that is there is whole: both appear under their names last.
# --keep N (default 24) deletes all but the newest N, once the new one is there.
#
# etcd is found as etcdctl finds it: ETCDCTL_ENDPOINTS, ETCDCTL_CACERT, ETCDCTL_CERT, ETCDCTL_KEY.
# While users are on, only root, or another user with the role root, may take snapshots.
# The snapshot comes from a follower that is healthy, if there is one.
#
# Exit code: 0 saved, 1 it could not be saved, 2 wrong words, 3 no member is healthy, 4 what was
# saved is no good (it is deleted).
set -eu
umask 077
. "$(dirname "$0")/lib.sh"

keep=24
user=
password_file=
while [ $# -gt 0 ]; do
  case $1 in
    --keep | --user | --password-file)
      [ $# -ge 2 ] || usage
      case $1 in
        --keep) keep=$2 ;;
        --user) user=$2 ;;
        --password-file) password_file=$2 ;;
      esac
      shift 2
      ;;
    -*) usage ;;
    *) break ;;
  esac
done
[ $# -eq 1 ] || usage
dir=$1
case $keep in '' | *[!0-9]* | 0) fail 2 "--keep wants a number from 1 on" ;; esac
[ -z "$user" ] || login "$user" "$password_file"
need_etcdctl
mkdir -p "$dir" || fail 1 "$dir cannot be made"

# A follower, else the leader. Health is a read through a quorum: a member that is cut off fails it.
chosen=
status=
for endpoint in $(endpoints); do
  is_healthy "$endpoint" || continue
  found=$(at "$endpoint" endpoint status -w json 2>/dev/null) || continue
  chosen=$endpoint
  status=$found
  [ "$(echo "$found" | field member_id)" = "$(echo "$found" | field leader)" ] || break
done
[ -n "$chosen" ] || fail 3 "none of $(endpoints | tr '\n' ' ')is healthy"
before=$(echo "$status" | field revision)

new=$dir/.saving.$$
trap 'rm -f "$new" "$new.part" "$new.meta"' EXIT
trap 'exit 1' INT TERM
said=$(at "$chosen" snapshot save "$new" 2>&1) || fail 1 "$chosen: $said"

# What follows the database in the file is its SHA-256: a transfer that broke off shows.
bytes=$(wc -c <"$new" | tr -d ' ')
[ "$((bytes % 512))" = 32 ] || fail 4 "the snapshot of $bytes bytes is cut off: it has no digest"
expected=$(tail -c 32 "$new" | od -An -tx1 | tr -d ' \n')
actual=$(head -c "$((bytes - 32))" "$new" | sha256sum | cut -d' ' -f1)
[ "$expected" = "$actual" ] || fail 4 "the snapshot does not match its digest"
facts=$(at "$chosen" snapshot status "$new" -w json 2>/dev/null) || fail 4 "the snapshot cannot be read"
revision=$(echo "$facts" | field revision)
keys=$(echo "$facts" | field totalKey)
case $revision in '' | *[!0-9]*) fail 4 "the snapshot has no revision: $facts" ;; esac
# An etcd that was never written to is at revision 1, its snapshot at 0.
[ "$revision" -ge "$before" ] || [ "$before" -le 1 ] || fail 4 "the snapshot is of revision $revision, etcd was at $before"
sync "$new" 2>/dev/null || sync

time=$(date -u +%Y%m%dT%H%M%SZ)
name=etcd-$time-r$revision
{
  echo "file=$name.db"
  echo "sha256=$(sha256sum "$new" | cut -d' ' -f1)"
  echo "bytes=$bytes"
  echo "revision=$revision"
  echo "keys=$keys"
  echo "cluster_id=$(hex "$(echo "$status" | field cluster_id)")"
  echo "member=$chosen"
  echo "etcd=$(echo "$status" | field version)"
  echo "taken=$time"
} >"$new.meta"
mv -f "$new.meta" "$dir/$name.meta"
mv -f "$new" "$dir/$name.db"
say "$dir/$name.db: revision $revision, $keys keys, $bytes bytes, from $chosen"

# Names sort by time; nothing else in the folder is touched.
find "$dir" -maxdepth 1 -name 'etcd-*T*Z-r*.db' | sort -r | sed "1,${keep}d" | while read -r old; do
  rm -f "$old" "${old%.db}.meta"
  say "deleted $old"
done
