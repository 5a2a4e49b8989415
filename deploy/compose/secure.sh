#!/bin/sh
# Certificates, keys, passwords and users for compose.secure.yaml. 'make up-docker SECURE=1' calls it.
#
#   secure.sh certs    make what is missing, and hand each container its own   (again after 'renew')
#   secure.sh users    tell etcd its users and switch authentication on        (etcd must be up)
#
# Everything lies in ./secure (DTRAIN_SECURE_DIR), for you alone:
#   pki/         make-certs.sh's folder; pki/operator/me is yours. pki/ca signs: keep it safe
#   passwords/   of etcd's users
#   store/       certificate and secrets of the store
#   run/HOLDER   what a container sees, as /run/dtrain
#
# To renew: ../etcd/make-certs.sh secure/pki renew --within 30 && ./secure.sh certs. Nothing is restarted.
# Running it again changes nothing.
set -eu
umask 077
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=deploy/compose/lib.sh
. "$here/lib.sh"
case ${1:-} in
  certs | users) ;;
  *)
    sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p;}' "$0" >&2
    exit 2
    ;;
esac
project=$(setting COMPOSE_PROJECT_NAME dtrain)
cluster=$(setting DTRAIN_CLUSTER default)
secure=$(setting DTRAIN_SECURE_DIR ./secure)
case $secure in /*) ;; *) secure=$here/$secure ;; esac
agents="a1 a2 a3 a4 a5 a6 a7 a8"
coordinators="c1 c2 c3"
members="etcd-0 etcd-1 etcd-2"

secret() {
  [ -s "$secure/$1" ] || random 24 >"$secure/$1"
  cat "$secure/$1"
}

# The store's certificate has an authority of its own: it opens neither etcd nor gRPC.
store_certificate() {
  s=$secure/store
  [ -s "$s/store.key" ] && openssl x509 -in "$s/store.crt" -noout -checkend 2592000 >/dev/null 2>&1 && return
  [ -s "$s/ca.key" ] || openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 -days 3650 \
    -subj "/O=dtrain $cluster/CN=dtrain $cluster store CA" -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout "$s/ca.key" -out "$s/ca.crt" 2>/dev/null
  printf '%s\n' "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" \
    "extendedKeyUsage=serverAuth" "subjectKeyIdentifier=hash" "authorityKeyIdentifier=keyid" \
    "subjectAltName=DNS:store,DNS:localhost,IP:127.0.0.1" >"$s/ext"
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 -subj "/O=dtrain $cluster/CN=store" \
    -keyout "$s/store.key.new" -out "$s/csr" 2>/dev/null
  openssl x509 -req -in "$s/csr" -CA "$s/ca.crt" -CAkey "$s/ca.key" -sha256 -set_serial "0x$(openssl rand -hex 16)" \
    -days 365 -extfile "$s/ext" -out "$s/store.crt" 2>/dev/null || fail "openssl cannot sign the store's certificate"
  mv -f "$s/store.key.new" "$s/store.key"
  rm -f "$s/ext" "$s/csr"
}

identity() {
  printf '{"name": "%s", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": [%s]}' "$1" "$1" "$(secret "store/$1")" "$2"
}

credentials() {
  printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$1" "$(secret "store/$1")"
}

# stage HOLDER FILE: standard input, as the file that the holder's container sees.
stage() {
  mkdir -p "$secure/stage/$1" "$secure/run/$1"
  cat >"$secure/stage/$1/$2"
}

copy() {
  for file in "$secure/pki/$2"/*.crt "$secure/pki/$2"/*.key; do stage "$1" "$(basename "$file")" <"$file"; done
}

if [ "$1" = certs ]; then
  command -v openssl >/dev/null 2>&1 || fail "openssl is not installed"
  mkdir -p "$secure/passwords" "$secure/store"
  holders="operator:me operator:cli"
  for name in $members; do holders="$holders etcd:$name=127.0.0.1,localhost"; done
  for name in $coordinators; do holders="$holders coordinator:$name"; done
  for name in $agents; do holders="$holders agent:$name"; done
  # shellcheck disable=SC2086 # a list
  "$here/../etcd/make-certs.sh" "$secure/pki" --cluster "$cluster" $holders >&2
  store_certificate
  for user in root coordinator reader ops; do secret "passwords/$user" >/dev/null; done
  for name in $agents; do secret "passwords/agent-$name" >/dev/null; done

  for name in $members; do copy "$name" "etcd/$name"; done
  for name in $coordinators; do
    copy "$name" "coordinator/$name"
    secret passwords/coordinator | stage "$name" password
    credentials coordinator | stage "$name" aws
    stage "$name" store-ca.crt <"$secure/store/ca.crt"
  done
  for name in $agents; do
    copy "$name" "agent/$name"
    secret "passwords/agent-$name" | stage "$name" password
    credentials agent | stage "$name" aws
    stage "$name" store-ca.crt <"$secure/store/ca.crt"
  done
  copy cli operator/cli
  credentials admin | stage bucket aws
  stage bucket store-ca.crt <"$secure/store/ca.crt"
  bucket='"Read:dtrain", "Write:dtrain", "List:dtrain", "Tagging:dtrain"'
  printf '{"identities": [%s, %s, %s]}\n' "$(identity admin '"Admin", "Read", "Write", "List", "Tagging"')" \
    "$(identity coordinator "$bucket")" "$(identity agent "$bucket")" | stage store s3.json
  stage store store.crt <"$secure/store/store.crt"
  stage store store.key <"$secure/store/store.key"
  # Containers enter their own folder through a mount; on this machine the folder above is closed.
  chmod 0755 "$secure"/run/*/
  compose run --rm -T keys </dev/null >&2
  # Not the folder: Docker would make it again, as root.
  rm -rf "$secure"/stage/*
  exit 0
fi

# etcdctl is in etcd's image, which holds no shell to run setup-auth.sh with: it runs here, its etcdctl there.
container=$(containers_of etcd-0)
[ -n "$container" ] || fail "etcd-0 does not run"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/etcdctl" <<EOF
#!/bin/sh
# Named without their values, which every process of this machine could read.
exec docker exec -i -e ETCDCTL_USER -e ETCDCTL_PASSWORD $container etcdctl "\$@"
EOF
chmod 0700 "$work/etcdctl"
tries=60
until "$work/etcdctl" endpoint status >/dev/null 2>&1 </dev/null && [ -n "$("$work/etcdctl" endpoint status -w fields </dev/null | sed -n 's/^"Leader" : \([1-9].*\)/\1/p')" ]; do
  tries=$((tries - 1))
  [ $tries -gt 0 ] || fail "etcd-0 has no leader: see 'docker logs $container'"
  sleep 1
done
# shellcheck disable=SC2086 # a list
ETCDCTL=$work/etcdctl "$here/../etcd/setup-auth.sh" --passwords "$secure/passwords" --cluster "$cluster" init $agents >&2
