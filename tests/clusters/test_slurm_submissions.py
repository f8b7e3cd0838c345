"""A hundred submissions leave the expected files of a hundred jobs, and nothing else (acceptance C8)."""

import contextlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hvd.launch import submit
from tests.clusters import daemons
from tests.clusters.site import Site, until
from tests.clusters.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

COMMANDS, AT_A_TIME = 20, 4  # each a process; from one folder, as a sweep's script would do
CALLS = 80  # one after the other
# Every step of the job is the program `true`.
FLAGS = ["--stage", "value", "--slurm.command", "true", "--slurm.cpus", "1", "--slurm.mem", "500M"]


def ids(printed: str) -> list[str]:
    return [line.split("job ")[1].split(";")[0] for line in printed.splitlines() if line.startswith("value: job ")]


def files(folder: Path) -> set[str]:
    """Everything below: files, links, empty folders."""
    found = folder.rglob("*")
    return {str(p.relative_to(folder)) for p in found if p.is_symlink() or not p.is_dir() or not any(p.iterdir())}


def with_our_folder(folder: Path) -> list[tuple[int, str]]:
    """Processes that work in the folder or were given it: whatever a submission or a job has started."""
    found = []
    for pid in daemons.all_pids():
        with contextlib.suppress(OSError):
            inside = Path(os.readlink(f"/proc/{pid}/cwd")).is_relative_to(folder)
            given = f"TMPDIR={folder}" in daemons.read(f"/proc/{pid}/environ")
            if pid != os.getpid() and (inside or given):
                found.append((pid, daemons.command_line(pid)))
    return found


def on_nodes(cluster: SlurmCluster) -> Iterator[str]:
    """Command lines of what runs on the nodes besides their daemons."""
    for node in cluster.layout.names:
        for _, line in cluster.node_processes(node):
            if not line.startswith(("slurmd ", "bash ", "sleep 86400")):
                yield f"{node}: {line}"


@pytest.fixture(scope="module")
def submitted(slurm, tmp_path_factory):
    """(site, temporary folder of all submissions and jobs, names that are new in /tmp, ids); all jobs have ended."""
    root = tmp_path_factory.mktemp("submissions")
    site = Site(root / "checkout", slurm, root / "shared")
    temporary = root / "checkout.tmp"
    temporary.mkdir()
    site.env["TMPDIR"] = str(temporary)
    before = set(os.listdir("/tmp"))
    found = []
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for done in pool.map(lambda _: site.launch(*FLAGS, check=False), range(COMMANDS)):
            assert done.returncode == 0, done.stderr
            found += ids(done.stdout)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(site.folder)
        for name, value in site.env.items():
            patch.setenv(name, value)
        for _ in range(CALLS):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                assert submit.main([*site.options, *FLAGS]) == 0
            found += ids(printed.getvalue())
    until(lambda: not slurm.run("squeue", "-h"), lambda: f"no job left: {slurm.run('squeue')}", 120)
    return site, temporary, set(os.listdir("/tmp")) - before, found


def test_each_has_become_a_job_that_is_complete(slurm, submitted):
    site, _, _, jobs = submitted
    assert len(set(jobs)) == COMMANDS + CALLS
    states = dict(line.split() for line in slurm.run("squeue", "-h", "-t", "all", "-o", "%i %T").splitlines())
    assert {states[job] for job in jobs} == {"COMPLETED"}
    assert {site.ended(job) for job in jobs} == {"0 complete"}


def test_they_leave_the_files_of_their_jobs_and_nothing_else(submitted):
    site, _, _, jobs = submitted
    kept = ("{0}.log", "{0}/{0}_submission.sh", "{0}/job.json", "{0}/restarts", "{0}/end")
    expected = {f"slurm/jobs/{name.format(job)}" for job in jobs for name in kept}
    (config,) = (path.name for path in (site.run / "configs").iterdir())
    expected |= {f"slurm/{name}" for name in ("value.sbatch", "awr.sbatch", "job.sh")}
    assert files(site.folder) == expected | {".venv", f"runs/demo/configs/{config}"}
    assert not [path for path in (site.folder / "slurm").rglob("*") if path.is_symlink()]


def test_they_leave_nothing_in_temporary_folders(submitted):
    _, temporary, new, _ = submitted
    assert files(temporary) == set()
    assert not [name for name in new if "hvd" in name or "submitit" in name]  # of what does not ask for TMPDIR


def test_they_leave_no_process(slurm, submitted):
    site, *_ = submitted
    until(lambda: not list(on_nodes(slurm)), lambda: str(list(on_nodes(slurm))), 10)
    assert not with_our_folder(site.folder)
