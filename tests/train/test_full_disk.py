"""Training on a disk that fills up: one line, exit code 2, and the same command goes on when there is room."""

import shlex
import sys
from pathlib import Path

import pytest

from hvd.errors import EXIT_USER
from hvd.train import complete
from tests.small_disk import need_small_disk, run_on_small_disk
from tests.train import factory
from tests.train.compare import assert_same_run

# `hvd` itself, with the tiny experiment among its configs
_HVD = """
import sys
from pathlib import Path
from hvd import cli, experiments
from tests.train import factory
folder = sys.argv.pop(1)
experiments.CONFIGS["tiny"] = lambda: factory.experiment(Path(folder))
cli.command()
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [0.5, 1.4])
def test_full_disk(trained, tmp_path, checkpoints):
    """Room for half a checkpoint: the first save fails; for 1.4: the second does, while the first is still kept."""
    need_small_disk()
    disk, steps = tmp_path / "disk", trained.value.num_train_steps
    disk.mkdir()
    one = sum(f.stat().st_size for f in Path(trained.value_dir, "checkpoints").rglob("*") if f.is_file())
    argv = [sys.executable, "-c", _HVD, str(Path(trained.assets_dir).parent), "train-value", "--config", "tiny"]
    line = shlex.join([*argv, "--runs-dir", str(disk / "runs"), "--evaluate.execute-steps", "4"])
    script = f"""
        {line}; code=$?
        [ -e {disk}/runs/tiny/value/complete.json ] && touch {tmp_path}/complete
        $enlarge
        {line} 2>&1 || echo again failed
        cp -r {disk}/runs {tmp_path}/copy
        exit $code
    """
    done = run_on_small_disk(disk, int(one * checkpoints) // 1024, script, timeout=240)
    assert done.returncode == EXIT_USER, done.stderr + done.stdout
    assert "again failed" not in done.stdout and not (tmp_path / "complete").exists(), done.stdout
    errors = [text for text in done.stderr.splitlines() if "error: " in text]
    assert len(errors) == 1 and "no space left on the disk of" in errors[0], done.stderr
    assert "the same command then goes on" in errors[0] and "Traceback" not in done.stderr, done.stderr
    cfg = factory.experiment(Path(trained.assets_dir).parent, runs_dir=str(tmp_path / "copy"))
    complete.check_complete(cfg.value_dir, stage="value", cfg=cfg)
    assert_same_run(cfg.value_dir, trained.value_dir, steps)
