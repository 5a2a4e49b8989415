#!/bin/sh
# Unpack Debian's etcd-server and etcd-client into a folder, without installing anything.
#
#   fetch-etcd.sh DIR [SUITE]      # SUITE: trixie (3.5.16, the default), bookworm (3.4.23), ...
#
# Afterwards DIR/usr/bin holds etcd and etcdctl. apt gets state folders of its own, so that the
# machine's package lists stay as they are, and one source line made of the machine's own mirror
# and keyring. Needs no root. Exits 0 at once if DIR holds etcd already.
set -eu

fail() {
  echo "fetch-etcd: $1" >&2
  exit 1
}

[ $# -ge 1 ] || fail "usage: fetch-etcd.sh DIR [SUITE]"
suite=${2:-trixie}
case $suite in *[!a-z0-9-]*) fail "'$suite' is not the name of a Debian suite" ;; esac
if [ -x "$1/usr/bin/etcd" ]; then
  exit 0
fi
command -v apt-get >/dev/null 2>&1 || fail "apt-get is not here; install etcd 3.5.13 or newer and set DTRAIN_ETCD_BIN"
command -v dpkg-deb >/dev/null 2>&1 || fail "dpkg-deb is not here; install etcd 3.5.13 or newer and set DTRAIN_ETCD_BIN"

sources=${FETCH_ETCD_SOURCES:-/etc/apt}
mkdir -p "$1"
dir=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

# "URI KEYRING" of the first Debian archive found, in deb822 files or in one-line files.
mirror=$(
  {
    for file in "$sources"/sources.list.d/*.sources; do
      [ -r "$file" ] || continue
      awk '
        function flush() {
          if (types ~ /(^| )deb( |$)/ && parts ~ /(^| )main( |$)/ && uri != "") print uri, key
          types = parts = uri = key = ""
        }
        /^[ \t]*#/ { next }
        /^[ \t]*$/ { flush(); next }
        tolower($1) == "types:"      { $1 = ""; types = $0 }
        tolower($1) == "components:" { $1 = ""; parts = $0 }
        tolower($1) == "uris:"       { uri = $2 }
        tolower($1) == "signed-by:"  { key = $2 }
        END { flush() }
      ' "$file"
    done
    for file in "$sources"/sources.list "$sources"/sources.list.d/*.list; do
      [ -r "$file" ] || continue
      awk '
        $1 == "deb" {
          key = ""; i = 2
          if ($2 ~ /^\[/) {
            for (; i <= NF; i++) {
              option = $i
              gsub(/[\[\]]/, "", option)
              if (option ~ /^signed-by=/) key = substr(option, 11)
              if ($i ~ /\]$/) { i++; break }
            }
          }
          for (j = i + 2; j <= NF; j++) if ($j == "main") { print $i, key; break }
        }
      ' "$file"
    done
  } | awk '$1 ~ /debian/ && $1 !~ /security|backports/ { print; exit }'
)
[ -n "$mirror" ] || fail "no Debian archive is configured under $sources, so there is no mirror to take etcd from"
uri=${mirror%% *}
keyring=${mirror#* }
[ -n "$keyring" ] || keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || fail "the keyring $keyring of the configured mirror cannot be read"

mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial" "$work/debs"
echo "deb [signed-by=$keyring] $uri $suite main" >"$work/sources.list"

apt() {
  apt-get -qq \
    -o "Dir::State=$work/state" -o "Dir::State::status=/dev/null" -o "Dir::Cache=$work/cache" \
    -o "Dir::Etc::sourcelist=$work/sources.list" -o "Dir::Etc::sourceparts=-" \
    -o "Dir::Etc::preferences=/dev/null" -o "Dir::Etc::preferencesparts=/dev/null" \
    -o "APT::Sandbox::User=$(id -un)" -o "Acquire::Languages=none" -o "Acquire::Retries=2" \
    -o "APT::Update::Error-Mode=any" "$@"
}

apt update >"$work/log" 2>&1 || fail "the mirror $uri did not serve suite $suite: $(tail -n 1 "$work/log")"
(cd "$work/debs" && apt download etcd-server etcd-client) >"$work/log" 2>&1 ||
  fail "the mirror $uri did not serve etcd-server and etcd-client of $suite: $(tail -n 1 "$work/log")"
mkdir "$work/root"
for deb in "$work"/debs/*.deb; do
  dpkg-deb -x "$deb" "$work/root" || fail "$(basename "$deb") could not be unpacked"
done
[ -x "$work/root/usr/bin/etcd" ] || fail "the packages of $suite hold no usr/bin/etcd"

# etcd last and by rename: a folder with usr/bin/etcd in it is complete.
mkdir -p "$dir/usr/bin"
cp "$work/root/usr/bin/etcdctl" "$dir/usr/bin/etcdctl"
cp "$work/root/usr/bin/etcd" "$dir/usr/bin/.etcd.$$"
mv "$dir/usr/bin/.etcd.$$" "$dir/usr/bin/etcd"
