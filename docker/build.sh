#!/usr/bin/env bash
# Build the image with docker, podman or buildah, whichever is here.
#
#   docker/build.sh [cuda12|cpu|data] [TAG]      TAG: default hvd:EXTRA
#
# Environment: ENGINE (docker, podman, buildah), BASE_IMAGE (a Debian with Python 3.12 or 3.13), CA (certificates of a
# proxy, default the system's; a build secret, not part of the image), BUILD_FLAGS (further options of the engine).
# podman and buildah keep images where CONTAINERS_STORAGE_CONF says, as everywhere.
set -euo pipefail
cd "$(dirname "$0")/.."

EXTRA=${1:-cuda12}
TAG=${2:-hvd:$EXTRA}
CA=${CA:-/etc/ssl/certs/ca-certificates.crt}
case $EXTRA in
  cuda12 | cpu) target=trainer ;;
  data) target=data ;;
  *) echo "error: no extra '$EXTRA': cuda12, cpu or data" >&2; exit 2 ;;
esac
. docker/engine.sh

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git describe --always --dirty=+dirty --abbrev=12 --exclude='*' 2>/dev/null || echo unknown)
args=(--target "$target" --build-arg "EXTRA=$EXTRA" --build-arg "VERSION=$version" --build-arg "REVISION=$revision")
[ -z "${BASE_IMAGE:-}" ] || args+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
[ ! -s "$CA" ] || args+=(--secret "id=ca,src=$CA")
# shellcheck disable=SC2206 # several words on purpose
args+=(${BUILD_FLAGS:-} -f docker/Dockerfile -t "$TAG")

case $ENGINE in
  docker) DOCKER_BUILDKIT=1 docker build "${args[@]}" . ;;
  *) "$ENGINE" build --layers --format docker "${args[@]}" . ;;
esac
echo "built $TAG with $ENGINE"
