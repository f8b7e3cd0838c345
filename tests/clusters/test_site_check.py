"""`hvd site check` on a real Slurm and a real Kubernetes: what it says of them, what it says of broken ones, and that
it leaves nothing behind.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clusters.kubernetes_cluster import ROOT
from tests.clusters.site import Site, until

COMMAND = (sys.executable, "-m", "hvd.cli", "site", "check")


def states(printed: str) -> dict[str, str]:
    """Name of a line -> ok, FAILED or not checked."""
    found = [line.split(":", 2) for line in printed.splitlines() if line.count(":") > 1]
    return {name: state.strip() for name, state, _ in found if state.strip() in ("ok", "FAILED", "not checked")}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if ".venv" not in path.parts}


@pytest.mark.slurm
@pytest.mark.timeout(120)
def test_slurm(slurm, tmp_path):
    site = Site(tmp_path / "checkout", slurm, tmp_path / "shared")
    before, command = files(tmp_path), [*COMMAND, *site.site, "--space", "0.5"]
    good = site.call(*command, "--slurm.time", "60")
    assert {name for name, state in states(good.stdout).items() if state != "ok"} == {"gpu", "cuda", "image"}
    assert "2 process(es) on node1, node2" in good.stdout and "(gloo)" in good.stdout

    wrong = site.call(*command, "--slurm.partition", "nowhere", "--slurm.time", "0:30", check=False)
    found = states(wrong.stdout)
    assert wrong.returncode == 1 and found["queue"] == found["time limit"] == "FAILED" and found["job"] != "FAILED"

    (site.folder / "runs").mkdir()
    pid, *_ = next(one for one in slurm.node_processes("node2") if one[1].startswith("slurmd "))
    inside = ["nsenter", "-t", str(pid), "-m"]
    runs = str(site.folder / "runs")
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", runs], check=True)
    try:
        apart = site.call(
            *command, "--slurm.time", "60", "--slurm.extra=--nodelist=node[1-2]", "--patience", "6", check=False
        )
        failed = {name for name, state in states(apart.stdout).items() if state == "FAILED"}
        assert apart.returncode == 1 and failed == {"rename", "space"}, apart.stdout
        assert "0.0 GB are free" in apart.stdout and "on node2" in apart.stdout
    finally:
        subprocess.run([*inside, "umount", runs], check=True)
    (site.folder / "runs").rmdir()

    started = subprocess.Popen(
        command,
        cwd=site.folder,
        env=site.env,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a script's background job ignores it
    )
    until(lambda: slurm.run("squeue", "-h", "-n", "hvd-site", "-t", "R"), "the job runs", 30)
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 130
    assert not slurm.run("squeue", "-h") and files(tmp_path) == before


@pytest.mark.kubernetes
@pytest.mark.timeout(300)
def test_kubernetes(kubernetes, team):
    command = [*COMMAND, "--cluster", "kubernetes", "--kubernetes.overlay", "k8s/overlays/smoke", "--space", "0.5"]
    command += ["--kubernetes.namespace", "team"]
    there = ("jobs,pods,services", "-n", "team", "-o", "name")
    before = kubernetes.kubectl("get", *there), files(team)
    good = kubernetes.call(*command, cwd=ROOT)
    other = {"gpu", "cuda", "all-reduce", "rename"}
    assert {name for name, state in states(good.stdout).items() if state != "ok"} == other, good.stdout
    assert "image:       ok: sha256:" in good.stdout and "user 10001 writes in /storage/runs" in good.stdout
    runs = team / "runs" if (team / "runs").exists() else team
    runs.chmod(0o555)
    try:
        refused = kubernetes.call(*command, cwd=ROOT, check=False)
        assert refused.returncode == 1 and states(refused.stdout)["storage"] == "FAILED", refused.stdout
    finally:
        runs.chmod(0o755)
    unknown = kubernetes.call(*command, "--kubernetes.claim", "nowhere", cwd=ROOT, check=False)
    assert "there is no volume claim nowhere" in unknown.stdout
    assert (kubernetes.kubectl("get", *there), files(team)) == before
