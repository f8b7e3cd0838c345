"""What slurm/value.sbatch, slurm/awr.sbatch and one golden script with everything in it are rendered from.

`python -m tests.launch.golden_scripts` renders them again: look at the differences before you commit.
"""

import contextlib
import io
import os
import unittest.mock
from pathlib import Path

from hvd.clusters.slurm import site
from hvd.launch import submit

ROOT = Path(__file__).resolve().parents[2]

# file -> arguments of launch/submit.py
CASES = {
    "slurm/value.sbatch": ("--stage", "value"),
    "slurm/awr.sbatch": ("--stage", "policy"),
    "tests/launch/golden.sbatch": ("--stage", "all", "--overwrite", "--exp_name", "a b", "--nodes", "2")
    + ("--accelerator", "gpu", "--slurm.gpu", "h100-80gb", "--slurm.container", "pyxis", "--slurm.image", "/x.sqsh")
    + ("--slurm.mounts", "/data:/data", "--slurm.setup", "module load cuda", "--slurm.exclusive", "--no-plan")
    + ("--slurm.extra", '["--mail-type=FAIL"]'),
}


def render(args: tuple[str, ...]) -> str:
    """What --dry-run prints, run in the checkout."""
    out = io.StringIO()
    own = {"HVD_SITE": str(ROOT / site.SITE_FILE), "HOME": "/nonexistent"}  # not the files of whoever runs this
    with contextlib.redirect_stdout(out), contextlib.chdir(ROOT), unittest.mock.patch.dict(os.environ, own):
        code = submit.main([*args, "--cluster", "slurm", "--dry-run"])
    assert code == 0, code
    return out.getvalue()


if __name__ == "__main__":
    for name, args in CASES.items():
        (ROOT / name).write_text(render(args))
