#!/bin/sh
# Runs as root in a container of its own: give each holder its files, readable by nobody else.
# /stage/HOLDER/* (as secure.sh wrote them) -> /run-as/HOLDER/*, each replaced at once and only if it differs.
set -eu
umask 077
for folder in /stage/*/; do
  [ -d "$folder" ] || continue
  holder=$(basename "$folder")
  case $holder in
    # Their containers run as root without capabilities: files of others they could not read.
    etcd-* | store) owner=0:0 ;;
    *) owner=10001:10001 ;;
  esac
  for file in "$folder"*; do
    target=/run-as/$holder/$(basename "$file")
    cmp -s "$file" "$target" && continue
    cp "$file" "$target.new"
    chmod 0400 "$target.new"
    chown "$owner" "$target.new"
    mv -f "$target.new" "$target"
  done
done
