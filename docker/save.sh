#!/usr/bin/env bash
# The built image as one tar, for `ctr images import`, `docker load`, `podman load`, docker/squashfs.sh and syft.
#
#   docker/save.sh TAG FILE.tar [NAME]      NAME: what it is called in there, default TAG
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,4s/^# \?//p' "$0" >&2; exit 2; }
TAG=$1 FILE=$2 NAME=${3:-$1}
# shellcheck source=docker/engine.sh
. "$(dirname "$0")/engine.sh"

rm -f "$FILE.part"
case $ENGINE in
  docker | podman)
    [ "$NAME" = "$TAG" ] || "$ENGINE" tag "$TAG" "$NAME"
    if [ "$ENGINE" = podman ]; then set -- --format docker-archive; else set --; fi
    "$ENGINE" save "$@" -o "$FILE.part" "$NAME"
    ;;
  buildah) buildah push --quiet "$TAG" "docker-archive:$FILE.part:$NAME" ;;
esac
mv "$FILE.part" "$FILE"
