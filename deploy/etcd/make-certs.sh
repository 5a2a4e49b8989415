#!/bin/sh
# Certificates for a cluster: etcd, coordinators, agents and people. Needs openssl, nothing else.
#
#   make-certs.sh DIR [--cluster C] [--days N] ROLE:NAME[=HOST,IP,...]...   make what is missing
#   make-certs.sh DIR renew [--days N] [--within DAYS] [ROLE:NAME...]       issue again, all or these
#   make-certs.sh DIR list                                                  what there is, and until when
#   make-certs.sh DIR new-ca       renewal of the CAs, step 1: new CAs beside the old ones in every bundle
#   make-certs.sh DIR drop-ca      step 3, after 'renew': old CAs leave the bundles
#
# ROLE is etcd, coordinator, agent, operator or reader. The result is one folder per holder,
# DIR/ROLE/NAME, to be copied to where it runs; DIR/ca, with the keys that sign, stays at home.
#
#   etcd/NAME         server.crt server.key server-ca.crt   --cert-file --key-file --trusted-ca-file
#                     peer.crt   peer.key   peer-ca.crt     --peer-cert-file ...
#   any other         etcd.crt   etcd.key   etcd-ca.crt     --cert --key --cacert (towards etcd)
#                     grpc.crt   grpc.key   grpc-ca.crt     --tls-cert --tls-key --tls-cacert
#
# Three CAs: etcd's peers, etcd's clients, and gRPC. Client certificates carry no CN: etcd's gateway
# refuses one together with users. Who somebody is on gRPC says a URI, dtrain://C/ROLE/NAME.
# etcd reads certificates anew with each connection, but its CAs only at its start: after new-ca and
# after drop-ca, copy the files and restart etcd's members one at a time. Nobody else is restarted.
# Running it again changes nothing; another list of hosts for a NAME issues that certificate again.
set -euf
umask 077

fail() {
  echo "make-certs: $1" >&2
  exit 1
}

usage() {
  sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
}

[ $# -ge 2 ] || usage
command -v openssl >/dev/null 2>&1 || fail "openssl is not installed"
dir=$1
shift
verb=make
case $1 in
  renew | list | new-ca | drop-ca)
    verb=$1
    shift
    ;;
esac
cluster=
days=365
ca_days=3650
within=
holders=
while [ $# -gt 0 ]; do
  case $1 in
    --cluster | --days | --ca-days | --within)
      [ $# -ge 2 ] || fail "$1 needs a value"
      case $1 in
        --cluster) cluster=$2 ;;
        --days) days=$2 ;;
        --ca-days) ca_days=$2 ;;
        --within) within=$2 ;;
      esac
      shift 2
      ;;
    -*) usage ;;
    *)
      case $1 in *[!A-Za-z0-9.:,=_@*-]*) fail "'$1' is not ROLE:NAME[=HOST,IP,...]" ;; esac
      holders="$holders $1"
      shift
      ;;
  esac
done
for number in "$days" "$ca_days" "${within:-0}"; do
  case $number in '' | *[!0-9]*) fail "'$number' is not a number of days" ;; esac
done
if [ -f "$dir/cluster" ]; then
  known=$(cat "$dir/cluster")
  [ -z "$cluster" ] || [ "$cluster" = "$known" ] || fail "$dir belongs to the cluster $known"
  cluster=$known
elif [ "$verb" != make ]; then
  fail "there are no certificates in $dir"
fi
cluster=${cluster:-default}
case $cluster in '' | -* | *- | *[!a-z0-9-]*) fail "'$cluster' is not the name of a cluster" ;; esac

# A key and a certificate signed by a CA, put in place only when both are there:
# issue FOLDER FILE CA USAGE SAN,SAN... ROLE
issue() {
  work=$(mktemp -d "$1/.new-XXXXXX")
  trap 'rm -rf "$work"' EXIT
  {
    echo "basicConstraints=critical,CA:FALSE"
    echo "keyUsage=critical,digitalSignature"
    echo "extendedKeyUsage=$4"
    echo "subjectKeyIdentifier=hash"
    echo "authorityKeyIdentifier=keyid"
    [ -z "$5" ] || echo "subjectAltName=$5"
  } >"$work/ext"
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 \
    -subj "/O=dtrain $cluster/OU=$6" -keyout "$work/key" -out "$work/csr" 2>"$work/log" ||
    fail "$(cat "$work/log")"
  openssl x509 -req -in "$work/csr" -CA "$dir/ca/$3.crt" -CAkey "$dir/ca/$3.key" -sha256 \
    -set_serial "0x$(openssl rand -hex 16)" -days "$days" -extfile "$work/ext" -out "$work/crt" 2>"$work/log" ||
    fail "$(cat "$work/log")"
  chmod 0644 "$work/crt"
  mv -f "$work/key" "$1/$2.key"
  mv -f "$work/crt" "$1/$2.crt"
  rm -rf "$work"
  trap - EXIT
}

new_ca() {
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 -days "$ca_days" \
    -subj "/O=dtrain $cluster/CN=dtrain $cluster $1 CA $(openssl rand -hex 4)" \
    -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -keyout "$dir/ca/$1.key.new" -out "$dir/ca/$1.crt.new" 2>"$dir/ca/log" || fail "$(cat "$dir/ca/log")"
  rm -f "$dir/ca/log"
  chmod 0644 "$dir/ca/$1.crt.new"
  mv -f "$dir/ca/$1.key.new" "$dir/ca/$1.key"
  mv -f "$dir/ca/$1.crt.new" "$dir/ca/$1.crt"
}

# place FILE TARGET: a copy that is never seen half-written, and only if it differs.
place() {
  cmp -s "$1" "$2" && return
  cp "$1" "$2.new"
  chmod 0644 "$2.new"
  mv -f "$2.new" "$2"
}

distribute() {
  if [ "$role" = etcd ]; then
    place "$dir/ca/etcd-client.bundle" "$folder/server-ca.crt"
    place "$dir/ca/etcd-peer.bundle" "$folder/peer-ca.crt"
  else
    place "$dir/ca/etcd-client.bundle" "$folder/etcd-ca.crt"
    place "$dir/ca/grpc.bundle" "$folder/grpc-ca.crt"
  fi
}

# The subject alternative names of HOST,IP,...
names() {
  list=
  for host in $(echo "$1" | tr ',' ' '); do
    case $host in
      *:*) kind=IP ;;
      *[!0-9.]*) kind=DNS ;;
      *) kind=IP ;;
    esac
    list="$list${list:+,}$kind:$host"
  done
  echo "$list"
}

issue_all() {
  hosts=$(cat "$folder/hosts")
  if [ "$role" = etcd ]; then
    # The gateway inside etcd is a client of its own server, with the server's certificate.
    issue "$folder" server etcd-client serverAuth,clientAuth "$(names "$name,$hosts")" "$role"
    issue "$folder" peer etcd-peer serverAuth,clientAuth "$(names "$name,$hosts")" "$role"
  else
    issue "$folder" etcd etcd-client clientAuth "" "$role"
    # Callers verify a name that stays when machines move; the hosts are for other tools.
    case $role in
      coordinator) serves="coordinator.$cluster.dtrain" ;;
      agent) serves="$name.agent.$cluster.dtrain" ;;
      *) serves= ;;
    esac
    all=$(names "$serves${serves:+${hosts:+,}}$hosts")
    case $role in operator | reader) usages=clientAuth ;; *) usages=serverAuth,clientAuth ;; esac
    issue "$folder" grpc grpc "$usages" "URI:dtrain://$cluster/$role/$name${all:+,}$all" "$role"
  fi
}

# Sets role, name, folder and given (the hosts) from ROLE:NAME[=HOST,...].
read_holder() {
  role=${1%%:*}
  rest=${1#*:}
  [ "$role" != "$1" ] || fail "'$1' is not ROLE:NAME[=HOST,IP,...]"
  name=${rest%%=*}
  given=
  folder=$dir/$role/$name
  case $rest in
    *=*) given=${rest#*=} ;;
    *) [ ! -f "$folder/hosts" ] || given=$(cat "$folder/hosts") ;;
  esac
  case $role in
    etcd | coordinator | agent)
      case $name in '' | -* | *- | *[!a-z0-9-]*) fail "'$name' is not a name: use a-z, 0-9 and -" ;; esac
      [ ${#name} -le 63 ] || fail "'$name' is longer than 63 characters"
      ;;
    operator | reader)
      case $name in '' | [!A-Za-z0-9]* | *[!A-Za-z0-9._@-]*) fail "'$name' is not a name" ;; esac
      ;;
    *) fail "'$role' is not a role: use etcd, coordinator, agent, operator or reader" ;;
  esac
  case $given in *[!A-Za-z0-9.:,*-]*) fail "'$given' is not a list of hosts" ;; esac
}

every_holder() {
  set +f
  for found in "$dir"/etcd/*/hosts "$dir"/coordinator/*/hosts "$dir"/agent/*/hosts \
    "$dir"/operator/*/hosts "$dir"/reader/*/hosts; do
    [ -f "$found" ] || continue
    found=${found%/hosts}
    name=${found##*/}
    found=${found%/*}
    printf '%s ' "${found##*/}:$name"
  done
}

leaves() {
  if [ "$role" = etcd ]; then echo "server peer"; else echo "etcd grpc"; fi
}

case $verb in
  make)
    [ -n "$holders" ] || usage
    # All are read before anything is made.
    for holder in $holders; do read_holder "$holder"; done
    mkdir -p "$dir/ca"
    [ -f "$dir/cluster" ] || echo "$cluster" >"$dir/cluster"
    for ca in etcd-peer etcd-client grpc; do
      [ -f "$dir/ca/$ca.crt" ] || new_ca $ca
      [ -f "$dir/ca/$ca.bundle" ] || place "$dir/ca/$ca.crt" "$dir/ca/$ca.bundle"
    done
    for holder in $holders; do
      read_holder "$holder"
      [ "$role" != etcd ] || [ -n "$given" ] || given=localhost,127.0.0.1,::1
      mkdir -p "$folder"
      distribute
      complete=yes
      for leaf in $(leaves); do [ -f "$folder/$leaf.crt" ] && [ -f "$folder/$leaf.key" ] || complete=; done
      if [ -z "$complete" ] || [ "$(cat "$folder/hosts" 2>/dev/null || echo -)" != "$given" ]; then
        echo "$given" >"$folder/hosts"
        issue_all
        echo "issued $role:$name in $folder"
      fi
    done
    ;;
  renew)
    for holder in ${holders:-$(every_holder)}; do
      read_holder "$holder"
      [ -f "$folder/hosts" ] || fail "there is no $role:$name in $dir"
      distribute
      ends=yes
      if [ -n "$within" ]; then
        ends=
        for leaf in $(leaves); do
          openssl x509 -in "$folder/$leaf.crt" -noout -checkend $((within * 86400)) >/dev/null || ends=yes
        done
      fi
      if [ -n "$ends" ]; then
        issue_all
        echo "renewed $role:$name in $folder"
      fi
    done
    ;;
  list)
    for holder in $(every_holder); do
      read_holder "$holder"
      for leaf in $(leaves); do
        until=$(openssl x509 -in "$folder/$leaf.crt" -noout -enddate)
        printf '%-30s %-7s until %s\n' "$role:$name" "$leaf" "${until#*=}"
      done
    done
    ;;
  new-ca | drop-ca)
    for ca in etcd-peer etcd-client grpc; do
      if [ $verb = new-ca ]; then
        cp "$dir/ca/$ca.bundle" "$dir/ca/$ca.known"
        new_ca $ca
        cat "$dir/ca/$ca.crt" "$dir/ca/$ca.known" >"$dir/ca/$ca.both"
        place "$dir/ca/$ca.both" "$dir/ca/$ca.bundle"
        rm -f "$dir/ca/$ca.known" "$dir/ca/$ca.both"
      else
        place "$dir/ca/$ca.crt" "$dir/ca/$ca.bundle"
      fi
    done
    for holder in $(every_holder); do
      read_holder "$holder"
      distribute
    done
    ;;
esac
