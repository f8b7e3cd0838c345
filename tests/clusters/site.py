"""A user's checkout on a cluster, with two small datasets and a config that trains in seconds."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests import published
from tests.clusters.slurm_cluster import SlurmCluster
from tests.train import factory

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60  # of both stages; save_interval is 20
SMALL = {
    "optimal_data.keys.state": "observation.state",
    "suboptimal_data.keys.state": "observation.state",
    "model.paligemma_variant": "dummy",
    "model.action_expert_variant": "dummy",
    "model.value_expert_variant": "dummy",
    "model.action_horizon": "4",
    "model.action_patch": "2",
    "model.vocab_size": "64",
    "model.max_token_len": "4",
    "evaluate.baselines": "false",
    **published.FIELDS,  # no expert ratio is fitted, which takes half a minute
    "evaluate.execute_steps": "2",
    **{
        f"{stage}.{name}": value
        for stage in ("value", "policy")
        for name, value in {
            "num_train_steps": str(STEPS),
            "batch_size": "8",
            "save_interval": "20",
            "val_interval": "30",
            "val_batches": "2",
            "log_interval": "5",
            "trace_samples": "true",
        }.items()
    },
}


class Site:
    """Jobs are submitted from `folder`, which has runs/, slurm/ and what `sbatch slurm/value.sbatch` needs.

    Args:
        shared: where the datasets lie, for all sites of a cluster.
        slow: seconds that a step waits at least; None: the plain `hvd`.
    """

    def __init__(self, folder: Path, cluster: SlurmCluster, shared: Path, *, slow: float | None = None):
        self.folder, self.cluster = folder, cluster
        folder.mkdir(parents=True)
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "slurm" / "jobs").mkdir(parents=True)
        for name in ("value.sbatch", "awr.sbatch", "job.sh"):
            (folder / "slurm" / name).write_text((ROOT / "slurm" / name).read_text())
        if not (shared / "data").exists():
            factory.write_dataset(shared / "data" / "optimal", episodes=4, length=20, seed=1)
            factory.write_dataset(shared / "data" / "suboptimal", episodes=6, length=20, seed=2)
        self.options = ["--config", "demo", "--sim.task="]
        self.options += [f"--{role}_data.root={shared / 'data' / role}" for role in ("optimal", "suboptimal")]
        self.options += [f"--{name}={value}" for name, value in SMALL.items()]
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "HVD_"))},
            **cluster.environment,
            "PYTHONPATH": str(ROOT),
            "HVD_TEST_STEP_SECONDS": str(slow or 0.0),
        }
        self.site = ["--slurm.mem", "1500M", "--slurm.grace", "20"]
        if slow is not None:
            self.site += ["--slurm.command", f"{sys.prefix}/bin/python -m tests.clusters.slow_hvd"]

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "demo"

    def call(self, *argv: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """A command in the folder."""
        done = subprocess.run(
            argv, cwd=self.folder, env=self.env | env, capture_output=True, text=True, check=False, timeout=600
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def launch(self, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.call(
            sys.executable, str(ROOT / "launch" / "submit.py"), *self.options, *self.site, *flags, check=check
        )

    def submit(self, *flags: str) -> list[str]:
        """Ids of the jobs that the launcher has put into the queue."""
        lines = self.launch(*flags).stdout.splitlines()
        return [line.split(": job ")[1].split(",")[0].split(";")[0] for line in lines if ": job " in line]

    def sbatch(self, *argv: str) -> str:
        return self.call("sbatch", "--parsable", *argv).stdout.strip()

    def hvd(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.call(sys.executable, "-m", "hvd.cli", *argv, check=check)

    def log(self, job: str) -> str:
        path = self.folder / "slurm" / "jobs" / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def restarts(self, job: str) -> list[str]:
        """Causes of the job's restarts."""
        path = self.folder / "slurm" / "jobs" / job / "restarts"
        return [line.split()[2] for line in path.read_text().splitlines()] if path.exists() else []

    def ended(self, job: str) -> str:
        path = self.folder / "slurm" / "jobs" / job / "end"
        return path.read_text().split(" ", 1)[1].strip() if path.exists() else ""

    def step(self, stage: str = "value") -> int:
        """The last step that metrics.jsonl tells of."""
        path = self.run / stage / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def events(self, stage: str = "value") -> list[dict]:
        path = self.run / stage / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(condition: Callable[[], object], what: str, seconds: float = 400.0) -> None:
    """Wait for it; an AssertionError that names it after so long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not after {seconds:.0f} s: {what() if callable(what) else what}"
        time.sleep(0.1)
