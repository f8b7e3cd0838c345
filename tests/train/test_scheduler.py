"""What a run has to do with its scheduler: finding its companions, telling how it ended, owning its folder, hanging."""

import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from hvd import cli
from hvd.errors import EXIT_HUNG, EXIT_LOST, Lost, UserError
from hvd.runtime import heartbeat, owner, processes, records
from hvd.runtime.processes import Group
from hvd.train import loop, mesh
from hvd.train import run_dir as runs
from tests.train import factory

STEP = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
PORT = 12_288 + (1000 * 31 + 2) % 20_480


# ------------------------------------------------------------------------------------------------- finding companions


@pytest.mark.parametrize(
    "changes, want",
    [
        ({}, Group(f"gpu003:{PORT}", 4, 3)),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, Group(f"gpu003:{PORT}", 4, 3, (1,))),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Group(f"gpu003:{PORT}", 4, 3, (2, 3))),
        ({"CUDA_VISIBLE_DEVICES": "3"}, Group(f"gpu003:{PORT}", 4, 3)),  # Slurm has divided them
        (
            {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            Group(f"gpu003:{PORT}", 4, 3),  # alone on its node: all of its devices
        ),
        ({"SLURM_STEP_NODELIST": "login1"}, Group(f"login1:{PORT}", 4, 3)),
        ({"SLURM_STEP_NODELIST": "a-[7,9]-ib,b1"}, Group(f"a-7-ib:{PORT}", 4, 3)),
        ({"SLURM_STEP_NODELIST": "gpu003", "SLURM_STEP_NUM_NODES": "1"}, Group(f"127.0.0.1:{PORT}", 4, 3)),
        ({"SLURM_STEP_NUM_NODES": "2"}, Group(f"gpu003:{PORT}", 4, 3)),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"HVD_COORDINATOR_PORT": "2000"}, Group("gpu003:2000", 4, 3)),
        ({"HVD_COORDINATOR": "ib-gpu003"}, Group(f"ib-gpu003:{PORT}", 4, 3)),
        ({"HVD_COORDINATOR": "ib-gpu003:77"}, Group("ib-gpu003:77", 4, 3)),
        ({"HVD_COORDINATOR": "ib-gpu003", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"HVD_COORDINATOR": "h:1", "HVD_NUM_PROCESSES": "2", "HVD_PROCESS_ID": "0"}, Group("h:1", 2, 0)),
    ],
)
def test_the_tasks_of_a_step_are_the_processes_of_a_run(changes, want):
    assert processes.group(STEP | changes) == want
    assert processes.several(STEP | changes) == (want is not None)


JAX = {"JAX_COORDINATOR_ADDRESS": "job-0.job:1234", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
ALONE = MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3", "PMIX_NAMESPACE": "prterun-1"}
PAIRS = MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "HVD_COORDINATOR": "n1"}
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0", "HVD_COORDINATOR": "n1:7"}


@pytest.mark.parametrize(
    "env, want",
    [
        (JAX, Group("job-0.job:1234", 3, 2)),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "job-0.job"}, Group("job-0.job:8476", 3, 2)),
        (JAX | {"HVD_COORDINATOR": "h:1", "HVD_NUM_PROCESSES": "2", "HVD_PROCESS_ID": "0"}, Group("h:1", 2, 0)),
        (STEP | JAX, Group("job-0.job:1234", 3, 2)),
        (STEP | {"JAX_COORDINATOR_ADDRESS": "ib-gpu003:77"}, Group("ib-gpu003:77", 4, 3)),
        (STEP | {"PMI_SIZE": "9", "PMI_RANK": "8", "PMIX_RANK": "8"}, Group(f"gpu003:{PORT}", 4, 3)),  # by srun itself
        (STEP | PAIRS | {"CUDA_VISIBLE_DEVICES": "0,1"}, Group("n1:8476", 4, 3, (1,))),  # mpirun in a step
        (PAIRS | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Group("n1:8476", 4, 3, (2, 3))),
        (PAIRS, Group("n1:8476", 4, 3, (1,))),  # all GPUs are seen: one each
        (HYDRA, Group("n1:7", 2, 1)),
        ({"PMIX_RANK": "1", "HVD_NUM_PROCESSES": "2", "HVD_COORDINATOR": "n1:7"}, Group("n1:7", 2, 1)),
        ({"PMIX_RANK": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
    ],
)
def test_other_starters_tell_the_processes_too(env, want):
    assert processes.group(env) == want
    assert processes.several(env) == (want is not None)
    assert processes.rank(env) == (want.index if want else 0)


def test_processes_of_one_host_by_mpirun_meet_there():
    found = processes.group(ALONE)
    assert found is not None and found.coordinator.startswith("127.0.0.1:") and (found.count, found.index) == (4, 3)
    assert found != processes.group(ALONE | {"PMIX_NAMESPACE": "prterun-2"})
    first = processes.group(ALONE | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    assert first is not None and first.coordinator == found.coordinator


@pytest.mark.parametrize(
    "env, said",
    [
        (MPIRUN, "HVD_COORDINATOR is not set, and the 4 processes of OMPI_COMM_WORLD_SIZE are on several hosts"),
        (MPIRUN | {"OMPI_COMM_WORLD_RANK": "4"}, "HVD_COORDINATOR is not set"),
        (PAIRS | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK 4 is not below OMPI_COMM_WORLD_SIZE 4"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "HVD_NUM_PROCESSES is not set, but JAX_COORDINATOR_ADDRESS is"),
        (JAX | {"JAX_NUM_PROCESSES": "x"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers"),
        ({"PMIX_RANK": "1", "HVD_NUM_PROCESSES": "2"}, "HVD_COORDINATOR is not set, but HVD_NUM_PROCESSES is"),
    ],
)
def test_what_another_starter_leaves_out(env, said):
    with pytest.raises(UserError, match=said):
        processes.group(env)


def test_a_batch_script_is_not_a_step():
    env = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NODELIST": "a[1-4]"}
    assert processes.group(env) is None and not processes.several(env) and processes.rank(env) == 0


def test_steps_and_jobs_have_ports_of_their_own():
    ports = {
        processes.group(STEP | {"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)}) for j in range(50) for s in (0, 1)
    }
    assert len(ports) == 100
    again = processes.group(STEP | {"SLURM_RESTART_COUNT": "1"})
    assert again is not None and again != processes.group(STEP)


@pytest.mark.parametrize(
    "coordinator, bound",
    [
        ("127.0.0.1:700", "127.0.0.1:700"),
        ("localhost:700", "localhost:700"),
        ("[::1]:700", "[::1]:700"),
        ("192.0.2.7:700", None),  # the address of no interface here, as behind NAT
        ("gpu003:700", None),
    ],
)
def test_where_the_coordinator_listens(coordinator, bound):
    assert processes.bind_address(coordinator) == bound


def test_a_run_of_one_machine_listens_on_loopback_only():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = """if True:
        from pathlib import Path
        from hvd.train import mesh
        mesh.initialize()
        rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()]
        print(sorted({row[1] for row in rows if row[3] == "0A"}))"""
    env = {"HVD_COORDINATOR": f"127.0.0.1:{port}", "HVD_NUM_PROCESSES": "1", "HVD_PROCESS_ID": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [address for address in eval(done.stdout.strip().splitlines()[-1]) if address.endswith(f":{port:04X}")]
    assert found and all(address.endswith(f"0100007F:{port:04X}") for address in found)


def test_gpus_that_cannot_be_divided():
    with pytest.raises(UserError, match="3 GPUs of a node cannot be divided among its 2 tasks"):
        processes.group(STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_a_job_with_gpus_refuses_to_train_on_the_cpu(monkeypatch):
    mesh.check_gpus()
    monkeypatch.setenv("HVD_EXPECT_GPUS", "1")
    with pytest.raises(UserError, match=r"jax finds none \(its platform is 'cpu'\)"):
        mesh.check_gpus()


# ------------------------------------------------------------------------------------------------ telling how it ended


@pytest.mark.parametrize("argv, code", [(["configs"], 0), (["nonsense"], 2)])
def test_a_process_leaves_its_exit_code(tmp_path, argv, code):
    env = os.environ | STEP | {"HVD_JOB_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "hvd.cli", *argv], env=env, capture_output=True, check=False)
    assert done.returncode == code
    assert (tmp_path / "exit" / "3").read_text() == f"{code}\n"


FAILS = """
    import sys
    from hvd import cli
    def fail(argv):
        raise {error}
    cli.run = fail
    cli.command()
"""


@pytest.mark.parametrize(
    "error, code, said",
    [
        (
            "RuntimeError('FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer [10.0.0.1]')",
            75,
            "lost: ",
        ),
        ("RuntimeError('a bug')", 1, "RuntimeError: a bug"),
        ("ValueError('NCCL is a word')", 1, "ValueError"),
        ("SystemExit(2)", 2, ""),
        ("__import__('hvd.errors').errors.Lost('slurmctld')", 75, "lost: slurmctld"),
    ],
)
def test_a_lost_companion_is_told_from_a_bug(tmp_path, error, code, said):
    env = os.environ | STEP | {"HVD_JOB_DIR": str(tmp_path)}
    program = textwrap.dedent(FAILS).format(error=error)
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, (tmp_path / "exit" / "3").read_text()) == (code, f"{code}\n"), done.stderr
    assert said in done.stderr


def test_alone_there_is_nobody_to_lose(monkeypatch):
    monkeypatch.delenv("HVD_NUM_PROCESSES", raising=False)
    assert processes.lost_companion(RuntimeError("Gloo: Connection closed by peer")) is None


def test_a_restart_does_not_overwrite_what_its_job_has_begun(tmp_path, monkeypatch):
    assert not records.has_begun("runs/x/value")
    records.tell_begun("runs/x/value")
    assert not records.has_begun("runs/x/value"), "without a job nothing is kept"
    monkeypatch.setenv("HVD_JOB_DIR", str(tmp_path))
    records.tell_begun("runs/x/value")
    assert records.has_begun("runs/x/value") and not records.has_begun("runs/x/policy")


# ------------------------------------------------------------------------------------------------- owning a run folder


@pytest.fixture
def other():
    """Another living process of this machine, as an owner."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        started = owner._started(process.pid) or ""
        yield dataclasses.replace(owner.myself({}), pid=process.pid, started=started), process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def no_sign_of_life_stays():
    yield
    for folder in list(owner._beats):
        owner.release(folder)


def names(folder):
    """Of the files in the folder, but for the sign of life that comes and goes."""
    return {path.name for path in folder.iterdir() if heartbeat.FILE not in path.name}


def hold(folder, held):
    folder.mkdir(exist_ok=True)
    (folder / runs.OWNER).write_text(json.dumps(dataclasses.asdict(held)))


def test_a_folder_is_claimed_once_and_released(tmp_path, other):
    folder = tmp_path / "run"
    owner.claim(folder)
    owner.claim(folder)  # the same process again: a later step
    assert json.loads((folder / runs.OWNER).read_text())["pid"] == os.getpid()
    owner.release(folder)
    assert not list(folder.iterdir())
    held, process = other
    hold(folder, held)
    with pytest.raises(UserError, match=f"is being worked on by process {process.pid} on {socket.gethostname()}: wait"):
        owner.claim(folder)
    owner.release(folder)
    assert (folder / runs.OWNER).exists(), "it is not ours to release"
    process.kill()
    process.wait()
    owner.claim(folder)  # a dead one's
    assert names(folder) == {runs.OWNER}


def test_a_process_id_that_came_again_is_another_process(tmp_path, other):
    hold(tmp_path, dataclasses.replace(other[0], started="1"))
    owner.claim(tmp_path)


def test_a_process_of_another_machine_without_a_sign_of_life_cannot_be_judged(tmp_path, other):
    """As older versions left it: worth another attempt, and nothing is taken away from anybody."""
    hold(tmp_path, dataclasses.replace(other[0], machine="elsewhere", host="far", beats=False))
    with pytest.raises(Lost, match=r"process \d+ on far .*if it is gone for good, delete .*owner.json"):
        owner.claim(tmp_path)


def test_after_a_power_loss_the_same_command_goes_on(tmp_path, other):
    boot = "11111111-2222-3333-4444-555555555555 4026531836"
    hold(tmp_path, dataclasses.replace(other[0], machine=boot, beats=False))
    owner.claim(tmp_path)
    assert json.loads((tmp_path / runs.OWNER).read_text())["pid"] == os.getpid()
    owner.release(tmp_path)


def test_a_process_of_a_container_shows_that_it_lives(tmp_path, monkeypatch, other):
    """Its process id means nothing here: what counts is whether it still counts."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 1.0)
    held = dataclasses.replace(other[0], machine=f"{other[0].machine}1", host="3f2a1b0c9d8e")
    hold(tmp_path, held)
    beat = heartbeat.Heartbeat(tmp_path, held.sign)
    with pytest.raises(UserError, match="is being worked on by process"):
        owner.claim(tmp_path)
    beat.stop()
    owner.claim(tmp_path)
    owner.release(tmp_path)


def test_who_stood_still_for_too_long_does_not_write_any_more(tmp_path, other):
    owner.claim(tmp_path)
    owner.check(tmp_path)
    hold(tmp_path, other[0])
    with pytest.raises(Lost, match=r"was taken over by process \d+"):
        owner.check(tmp_path)
    owner.release(tmp_path)


def test_a_claim_follows_no_link(tmp_path, monkeypatch):
    """Whoever may write to the folder cannot guess the name under which the claim is written first."""
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    for name in (f".owner.json.{socket.gethostname()}.{os.getpid()}.tmp", f".owner.json.{os.getpid()}.tmp"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    owner.claim(tmp_path / "run")
    owner.release(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("alive", [True, False, None])
def test_a_job_is_asked_of_its_scheduler_and_not_of_the_clock(tmp_path, monkeypatch, other, alive):
    monkeypatch.setattr(owner, "job_alive", lambda scheduler, number: {("slurm", "77"): alive}[scheduler, number])
    hold(tmp_path, dataclasses.replace(other[0], job="77", host="gpu7"))
    if alive is None:
        with pytest.raises(Lost, match="Slurm cannot be asked"):
            owner.claim(tmp_path)
    elif alive:
        with pytest.raises(UserError, match="is being worked on by Slurm job 77 on gpu7: wait for it"):
            owner.claim(tmp_path)
    else:
        owner.claim(tmp_path)


def test_in_a_container_the_batch_script_has_asked(tmp_path, monkeypatch, other):
    hold(tmp_path, dataclasses.replace(other[0], job="77", host="gpu7"))
    monkeypatch.setattr(owner, "job_alive", cli._job_alive)
    listed = tmp_path / "live"
    monkeypatch.setenv("HVD_LIVE_JOBS_FILE", str(listed))
    with pytest.raises(Lost):
        owner.claim(tmp_path)
    listed.write_text("1\n77\n8\n")
    with pytest.raises(UserError, match="job 77"):
        owner.claim(tmp_path)
    listed.write_text("1\n777\n8\n")
    owner.claim(tmp_path)


def test_a_requeued_job_is_the_same_owner_on_another_node(tmp_path, monkeypatch, other):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "c")
    hold(tmp_path, dataclasses.replace(other[0], job="77", cluster="c", machine="x", host="gpu9"))
    owner.claim(tmp_path)
    hold(tmp_path, dataclasses.replace(other[0], job="77", cluster="d", machine="x", host="gpu9"))
    with pytest.raises(UserError, match="job 77 on gpu9"):
        owner.claim(tmp_path)


def test_of_many_that_find_a_dead_owner_one_gets_the_folder(tmp_path, other):
    held, process = other
    process.kill()
    process.wait()
    hold(tmp_path / "run", held)
    code = (
        f"import time; from hvd.runtime import owner; owner.claim({str(tmp_path / 'run')!r}); "
        "print('mine', flush=True); time.sleep(30)"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    try:
        deadline = time.monotonic() + 60
        while sum(r.poll() is not None for r in racers) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        losers = [r for r in racers if r.poll() is not None]
        assert all("is being worked on by" in r.communicate()[1] for r in losers) and len(losers) == 5
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def test_where_there_are_no_links_a_file_is_created_exclusively(tmp_path, monkeypatch, other):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    owner.claim(tmp_path)
    assert json.loads((tmp_path / runs.OWNER).read_text())["pid"] == os.getpid()
    hold(tmp_path, other[0])
    with pytest.raises(UserError, match="is being worked on by process"):
        owner.claim(tmp_path)
    other[1].kill()
    other[1].wait()
    owner.claim(tmp_path)
    assert names(tmp_path) == {runs.OWNER}


def test_a_full_disk_is_not_taken_for_a_lack_of_links(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left"):
        owner.claim(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "",
        "null",
        "[" * 100_000,
        '{"job": 5, "cluster": "", "host": "a", "machine": "b", "pid": 1, "started": "", "user": ""}',
        '{"job": "", "cluster": "", "host": "a", "machine": "b", "pid": "1", "started": "", "user": ""}',
        '{"job": "", "cluster": "", "host": ["a"], "machine": "b", "pid": 1, "started": "", "user": ""}',
    ],
)
def test_a_damaged_claim_is_named(tmp_path, text):
    (tmp_path / runs.OWNER).write_text(text)
    with pytest.raises(UserError, match=r"owner.json is damaged .*delete it"):
        owner.claim(tmp_path)


def test_overwriting_leaves_the_claim_and_a_claim_alone_is_no_run(tmp_path):
    owner.claim(tmp_path)
    runs.delete(tmp_path)
    assert (tmp_path / runs.OWNER).exists()


def test_training_refuses_a_folder_at_work(tmp_path, other, capsys):
    factory.make_data(tmp_path)
    cfg = factory.experiment(tmp_path)
    hold_in = tmp_path / "runs" / "tiny" / "value"
    hold_in.mkdir(parents=True)
    hold(hold_in, other[0])
    before = sorted(path.name for path in hold_in.rglob("*"))
    with pytest.raises(UserError, match="is being worked on by process"):
        from hvd.method import value

        value.main(cfg)
    assert sorted(path.name for path in hold_in.rglob("*")) == before, "nothing is touched"


# -------------------------------------------------------------------------------------------------------------- hanging


HANGS = """
    import sys, threading, time
    from hvd.runtime import watchdog
    def somewhere_deep():
        time.sleep(60)
    with watchdog.watch({seconds}):
        for _ in range({steps}):
            time.sleep(0.3)
            watchdog.progress()
        somewhere_deep()
"""


@pytest.mark.slow
def test_a_hang_prints_all_stacks_and_ends(tmp_path):
    program = textwrap.dedent(HANGS).format(seconds=1.0, steps=6)
    env = os.environ | STEP | {"HVD_JOB_DIR": str(tmp_path)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == EXIT_HUNG
    assert time.monotonic() - began > 1.8 + 1.0, "steps are progress"
    assert "hang: no progress for" in done.stderr and "process 3 on" in done.stderr
    assert "somewhere_deep" in done.stderr and "in _watch" in done.stderr
    assert (tmp_path / "exit" / "3").read_text() == f"{EXIT_HUNG}\n"


def test_a_watch_that_is_closed_lets_go():
    program = (
        textwrap.dedent(HANGS).format(seconds=0.8, steps=2).replace("\n    somewhere_deep()\n", "\ntime.sleep(2)\n")
    )
    assert program.endswith("\ntime.sleep(2)\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------- the grace


def test_a_save_is_measured_against_the_grace(tmp_path, monkeypatch, capsys):
    from hvd.errors import Stopped
    from hvd.method import value
    from hvd.runtime import preemption

    factory.make_data(tmp_path)
    monkeypatch.setenv("HVD_GRACE_SECONDS", "0.001")
    real = loop.checkpoints.Checkpoints.save

    def save(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(loop.checkpoints.Checkpoints, "save", save)
    with pytest.raises(Stopped, match=r"saved in .* s of 0 s grace"):
        value.main(factory.experiment(tmp_path))
    assert "more than half of the 0 s grace: ask for more" in capsys.readouterr().out
    events = [json.loads(line) for line in (tmp_path / "runs/tiny/value/events.jsonl").read_text().splitlines()]
    stop = next(event for event in events if event["event"] == "stop")
    assert stop["grace_seconds"] == 0.001 and stop["save_seconds"] > 0
    assert not (tmp_path / "runs/tiny/value" / runs.OWNER).exists(), "the folder is free again"
    assert preemption.requested() is None


def test_exit_codes_are_all_different():
    codes = [cli.EXIT_COMPLETE, cli.EXIT_FAILED, cli.EXIT_USER, cli.EXIT_STOPPED, EXIT_LOST, EXIT_HUNG]
    assert len(set(codes)) == 6
