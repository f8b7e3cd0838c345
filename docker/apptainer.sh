#!/usr/bin/env bash
# The built image as one SIF file for Slurm sites with Apptainer: `container = "apptainer"`, `image = FILE.sif`.
#
#   docker/apptainer.sh TAG|FILE.tar FILE.sif      FILE.tar: what docker/save.sh wrote, on a machine without the engine
#
# Needs apptainer (or singularity), no root.
set -euo pipefail
[ $# = 2 ] || { sed -n '2,4s/^# \?//p' "$0" >&2; exit 2; }
program=$(command -v apptainer || command -v singularity) || {
  echo "error: no apptainer here: copy the tar of docker/save.sh to a machine that has it, and run this there" >&2
  exit 2
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
archive=$1
if [ ! -f "$archive" ]; then
  archive=$work/image.tar
  "$(dirname "$0")/save.sh" "$1" "$archive" "$1"
fi
"$program" build "$2" "docker-archive:$archive"
