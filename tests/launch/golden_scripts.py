"""Golden batch scripts: what is asked for, and where what was rendered lies.

`python -m tests.launch.golden_scripts` renders them again, slurm/value.sbatch and slurm/awr.sbatch too: look at the
differences before you commit.
"""

import contextlib
import io
import os
import unittest.mock
from pathlib import Path

from hvd.clusters.slurm import site
from hvd.launch import submit

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden")
_GPUS = ("--config", "pi0_r1", "--data", "{data}", "--policy.weight_loader", "", "--model.tokenizer", "words")
_LARGE = ("--nodes", "8", "--slurm.gpu", "h100-80gb", "--policy.batch_size", "256", "--value.batch_size", "256")

# name -> arguments of launch/submit.py
CASES = {
    "one_node": ("--stage", "value"),
    "eight_nodes": ("--stage", "policy", *_GPUS, *_LARGE, "--after", "17", "--slurm.partition", "gpu"),
    "pyxis": ("--stage", "value", "--slurm.container", "pyxis", "--slurm.image", "/images/hvd.sqsh")
    + ("--slurm.mounts", "/data:/data"),
    "apptainer": ("--stage", "value", "--slurm.container", "apptainer", "--slurm.image", "/images/hvd.sif")
    + ("--slurm.mounts", "/data:/data", "/scratch"),
    "plain": ("--stage", "value", "--nodes", "2", "--slurm.tasks-per-node", "2", "--slurm.exclusive")
    + ("--slurm.command", "conda run -n hvd hvd", "--slurm.setup", "module load cuda", "ulimit -n 65536")
    + ("--slurm.account", "lab", "--slurm.qos", "low", "--slurm.constraint", "ib", "--slurm.time", "2-00:00:00")
    + ("--slurm.reservation", "r1", "--slurm.exclude", "n[1-2]", "--slurm.no-requeue", "--slurm.grace", "600")
    + ("--slurm.extra", '["--mail-type=FAIL", "--nice=100"]'),
    "overwrite": ("--stage", "all", "--overwrite"),
}
SHIPPED = {"value.sbatch": ("--stage", "value"), "awr.sbatch": ("--stage", "policy")}


def render(args: tuple[str, ...], data: Path) -> str:
    """What --dry-run prints, run in the checkout."""
    out = io.StringIO()
    argv = [word.replace("{data}", str(data)) for word in args]
    own = {"HVD_SITE": str(ROOT / site.SITE_FILE)}  # not the file of whoever runs this
    with contextlib.redirect_stdout(out), contextlib.chdir(ROOT), unittest.mock.patch.dict(os.environ, own):
        code = submit.main([*argv, "--cluster", "slurm", "--dry-run"])
    assert code == 0, code
    return out.getvalue().replace(str(data), "/data")


def make_data(folder: Path) -> Path:
    """As much of two datasets as the launcher looks for."""
    for name in ("optimal", "mixed"):
        (folder / "r1" / name / "meta").mkdir(parents=True)
        (folder / "r1" / name / "meta" / "info.json").write_text("{}")
    return folder


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        data = make_data(Path(temporary))
        GOLDEN.mkdir(exist_ok=True)
        for name, args in CASES.items():
            (GOLDEN / f"{name}.sbatch").write_text(render(args, data))
        for name, args in SHIPPED.items():
            (ROOT / "slurm" / name).write_text(render(args, data))
