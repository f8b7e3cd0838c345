#!/usr/bin/env bash
# A stand-in for debian:trixie-slim where no registry can be reached: made of Debian's packages, put into the store of
# buildah or podman as localhost/debian:trixie-slim. Needs root, mmdebstrap and buildah.
#
#   docker/base.sh [ARCHIVE.tar]      ARCHIVE: kept and used again; default a temporary file
set -euo pipefail
TAG=localhost/debian:trixie-slim
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ARCHIVE=${1:-$work/base.tar}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1760000000} # the same bytes from the same packages

if [ ! -s "$ARCHIVE" ]; then
  # minbase: what is essential, and apt; the settings of dpkg are those of the official image
  # shellcheck disable=SC2016 # mmdebstrap expands $1
  mmdebstrap --quiet --mode=root --variant=minbase \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-include=/usr/share/doc/*/copyright' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='force-unsafe-io' --aptopt='Acquire::Languages "none"' \
    --customize-hook='cd "$1" && rm -rf etc/resolv.conf var/lib/apt/lists/* var/cache/apt/*.bin' \
    --customize-hook='cd "$1" && rm -rf var/log/*.log var/log/apt' \
    trixie "$ARCHIVE.part.tar"
  mv "$ARCHIVE.part.tar" "$ARCHIVE"
fi
container=$(buildah from scratch)
buildah add --quiet "$container" "$ARCHIVE" / >/dev/null
buildah config --cmd '["bash"]' --os linux --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  "$container"
buildah commit --quiet --rm --format docker --timestamp "$SOURCE_DATE_EPOCH" "$container" "$TAG" >/dev/null
echo "$TAG"
