#!/usr/bin/env bash
# The image's packages, pinned and hashed, from the pins in pyproject.toml: run it after these have changed.
set -euo pipefail
cd "$(dirname "$0")/.."
uv() { python3 -m uv "$@"; }
uv lock --quiet
for extra in cpu cuda12 data; do
  case $extra in cpu) flags=() ;; cuda12) flags=(--extra cuda12) ;; data) flags=(--extra lerobot) ;; esac
  # mujoco-studio: a viewer with windows, 30 MB
  uv export --quiet --frozen --no-dev --no-emit-project --no-emit-package mujoco-studio --no-header --no-annotate \
    --python 3.13 --extra s3 --extra gcs --extra wandb "${flags[@]}" -o "docker/requirements/$extra.txt" >/dev/null
done
# What builds the project in there
uv pip compile --quiet --no-header --no-annotate --generate-hashes --no-emit-index-url --python-version 3.13 \
  -o docker/requirements/build.txt - <<<"$(sed -n 's/^requires = \["\(.*\)"\]/\1/p' pyproject.toml)
uv==0.13.9"
