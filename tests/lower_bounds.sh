#!/usr/bin/env bash
# The lower bounds of pyproject.toml are true together: with the oldest version of each direct dependency, in an
# environment of its own, every module can be imported and the tiny experiment is trained, verified and reported.
# UV: the command of uv, where there is no ./uv (default: uv).
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r hvd tests launch slurm README.md pyproject.toml .python-version "$work"
[ ! -x ./uv ] || UV=$PWD/uv
cd "$work"
sed -i '/^constraint-dependencies = \[ # pins$/,/^\] # end of pins$/d' pyproject.toml
${UV:-uv} sync --quiet --no-dev --resolution lowest-direct
export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 MUJOCO_GL=egl
.venv/bin/python - <<'PYTHON'
import importlib
import pkgutil
from pathlib import Path

import hvd

for module in pkgutil.walk_packages(hvd.__path__, "hvd."):
    importlib.import_module(module.name)

from hvd.method import policy, value
from hvd.report import command as report
from hvd.train import complete
from tests.train import factory

factory.make_data(Path("tiny"))
cfg = factory.experiment(Path("tiny"))
value.main(cfg)
policy.main(cfg)
complete.main(cfg)
report.main(cfg)
PYTHON
