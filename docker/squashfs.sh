#!/usr/bin/env bash
# The built image as one file for Slurm sites with enroot and pyxis: `container = "pyxis"`, `image = FILE.sqsh`.
#
#   docker/squashfs.sh TAG FILE.sqsh      needs mksquashfs (squashfs-tools), and root with podman or buildah
#
# Environment: ENGINE, LEVEL of compression (zstd's, default 12).
#
# As `enroot import` does it: the root file system, with the image's environment in /etc/environment and its entrypoint
# in /etc/rc. Where compute nodes have enroot and reach your registry, `enroot import` from there does the same.
set -euo pipefail
[ $# = 2 ] || { sed -n '2,4s/^# \?//p' "$0" >&2; exit 2; }
TAG=$1 FILE=$2
# shellcheck source=docker/engine.sh
. "$(dirname "$0")/engine.sh"
command -v mksquashfs >/dev/null || { echo "error: no mksquashfs here (package squashfs-tools)" >&2; exit 2; }

work=$(mktemp -d)
container=""
clean() {
  if [ -n "$container" ]; then "$ENGINE" rm "$container" >/dev/null; fi
  rm -rf "$work"
}
trap clean EXIT
# buildah mounts what it has; docker and podman give a tar. Both are copies: the image stays as it is.
case $ENGINE in
  buildah)
    container=$(buildah from --pull-never "$TAG")
    root=$(buildah mount "$container")
    environment=$(buildah inspect --type image --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$TAG")
    ;;
  *)
    container=$("$ENGINE" create "$TAG")
    root=$work/root
    mkdir "$root"
    "$ENGINE" export "$container" | tar -x --numeric-owner -C "$root"
    environment=$("$ENGINE" image inspect --format '{{range .Config.Env}}{{println .}}{{end}}' "$TAG")
    ;;
esac
printf '%s\n' "$environment" | sed '/^$/d; /^HOME=/d' >"$root/etc/environment" # HOME is the job's user's
cat >"$root/etc/rc" <<'RC'
if [ -s /etc/rc.local ]; then . /etc/rc.local; fi
exec /usr/bin/tini -s -- hvd "$@"
RC
rm -f "$FILE.part"
pack() { mksquashfs "$@" -no-progress -quiet >/dev/null; }
pack "$root" "$FILE.part" -comp zstd -Xcompression-level "${LEVEL:-12}" -noappend -e dev proc sys
mkdir -p "$work"/points/{dev,proc,sys} # the mount points, which went out with what was in them
pack "$work/points" "$FILE.part"
mv "$FILE.part" "$FILE"
echo "$FILE: $(stat -c %s "$FILE") bytes"
