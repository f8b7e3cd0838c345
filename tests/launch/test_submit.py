"""launch/submit.py: options, the place, dry runs, what it never imports."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd.clusters import base
from hvd.clusters.kubernetes import kubectl
from hvd.clusters.local import runner as local
from hvd.launch import submit

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "submit.py")


def launch(*args, cwd, **env):
    return subprocess.run(
        [sys.executable, SCRIPT, *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_dry_run_prints_every_command_and_writes_nothing(tmp_path):
    done = launch("--stage", "all", "--dry-run", "--exp-name", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "hvd.cli" in line]
    first = ["prepare", "train-value", "advantages", "train-policy"]
    assert [line.split("hvd.cli ")[1].split()[0] for line in lines][:4] == first
    assert all("--exp-name mine" in line for line in lines)
    assert lines[-1].endswith("report --config demo --exp-name mine")
    assert list(tmp_path.iterdir()) == []


def test_the_printed_commands_run(tmp_path):
    done = launch("--stage", "value", "--dry-run", cwd=tmp_path)
    command = next(line for line in done.stdout.splitlines() if "train-value" in line)
    ran = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2, "there are no data yet, and that is what it says"
    assert ran.stderr.startswith("error: ")


def test_a_dry_run_with_nodes_shows_the_processes(tmp_path):
    done = launch("--stage", "value", "--nodes", "2", "--dry-run", cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if "train-value" in line]
    assert len(lines) == 2
    for index, line in enumerate(lines):
        assert "HVD_NUM_PROCESSES=2" in line and f"HVD_PROCESS_ID={index}" in line
    assert "HVD_" not in next(line for line in done.stdout.splitlines() if " prepare " in line)


def test_it_never_imports_jax(tmp_path):
    code = (
        "import sys; from hvd.launch import submit; "
        "code = submit.main(['--stage', 'all', '--dry-run']); "
        "heavy = [m for m in ('jax', 'flax', 'mujoco', 'orbax', 'torch') if m in sys.modules]; "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = code.replace("'all', '--dry-run'", "'policy'").replace(
        "assert not heavy, heavy", "assert not heavy and code"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr


def test_help_names_every_option(capsys):
    assert submit.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for option in ("stage", "nodes", "cluster", "config", "dry-run", "detach", "data", "overwrite", "exp-name"):
        assert f"--{option}" in printed


def fake(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    "programs, said",
    [
        ({}, ""),
        ({"scontrol": "exit 1"}, ""),  # Slurm's programs are there, a cluster is not
        (
            {"kubectl": "echo my-cluster"},
            "running on this machine (--cluster kubernetes would use kubernetes)",
        ),
        ({"kubectl": "exit 1"}, ""),
    ],
)
def test_auto_is_this_machine_where_there_is_no_cluster(tmp_path, monkeypatch, capsys, programs, said):
    for name, script in {"scontrol": "exit 1", **programs}.items():
        fake(tmp_path / "bin", name, script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin" if programs else str(tmp_path))
    if programs.keys() <= {"scontrol"} and os.path.exists("/usr/bin/kubectl"):
        monkeypatch.setattr(kubectl, "available", lambda: False)
    assert base.choose("auto") == "local"
    printed = capsys.readouterr().out
    assert said in printed and bool(printed) == bool(said)


def test_auto_is_slurm_where_it_answers_but_not_inside_a_job(tmp_path, monkeypatch):
    fake(tmp_path / "bin", "scontrol", "[ $1 = ping ]")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(kubectl, "available", lambda: False)
    assert base.choose("auto") == "slurm"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert base.choose("auto") == "local"


def test_options_of_the_launcher_of_the_site_and_of_the_config_are_told_apart():
    argv = [
        "--stage",
        "value",
        "--seed",
        "3",
        "--dry-run",
        "--exp_name=x",
        "--nodes",
        "2",
        "--slurm.gpus-per-node",
        "4",
    ]
    options, rest, settings = submit.parse(argv, submit.Submit())
    assert options == submit.Submit(stage="value", nodes=2, dry_run=True)
    assert rest == ["--config", "demo", "--seed", "3", "--exp_name", "x"]
    assert [(flag.field, flag.values) for flag in settings] == [("slurm.gpus_per_node", ("4",))]


@pytest.mark.parametrize(
    "flags, line",
    [
        (("--slurm.time", "1:00"), "--slurm.time is for --cluster slurm, this is local"),
        (("--after", "17"), "--after is for clusters with a queue; this machine has none"),
        (("--local.x", "1"), "unknown field --local.x: this machine has no settings"),
    ],
)
def test_what_is_for_another_cluster_is_refused(capsys, flags, line):
    assert submit.main(["--stage", "value", "--cluster", "local", *flags]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_devices_are_counted_without_jax(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert local.devices(2) == 2
    monkeypatch.setenv("XLA_FLAGS", "--a=b --xla_force_host_platform_device_count=4")
    assert local.devices(2) == 8
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert local.devices(2) == 4
    env = local.node_environment("host:1", 2, 1)
    assert env["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_detached_it_runs_on_in_the_background(tmp_path):
    """The first step is stopped at once: it is its start, not its work, that is asked for here."""
    done = launch("--stage", "value", "--detach", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("running in the background: process ")
    pid, log = int(first.split("process ")[1].split(",")[0]), tmp_path / first.split("log ")[1]
    until = time.monotonic() + 60
    while "] prepare" not in log.read_text():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)
    while os.path.exists(f"/proc/{pid}") and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)
