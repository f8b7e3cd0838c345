"""Items are done once, in order, several at a time; what is killed is done again and ends the same. The commands are a
stand-in that writes what hvd's would; tests/benchmarks/kill_benchmark.py kills the real ones."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd.benchmark import command, matrix
from hvd.benchmark.work import Work, finished
from hvd.clusters.local import runner
from hvd.errors import UserError

SMALL = {'of_task.pick."sim.operator_noise" = "steady"': "", '["tote", "pick"]': '["tote"]', "[1, 2]": "[1]"}
STEP = """
import json, os, sys, time, yaml
from pathlib import Path
if "--raw-dirs" in sys.argv:
    sys.exit(not Path(sys.argv[sys.argv.index("--raw-dirs") + 1], "recorded").exists())
step, _, path = sys.argv[1:4]
cfg = yaml.safe_load(Path(path).read_text())
with open("order.txt", "a") as order:
    order.write(f"{Path(path).stem} {step} {sorted(os.sched_getaffinity(0))}\\n")
time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
if Path("fail").exists() and Path("fail").read_text() in path:
    sys.exit("this one fails")
if step == "rollouts":
    import subprocess
    subprocess.run(sys.argv[sys.argv.index("--") + 1 :], check=True)
if step in ("evaluate", "rollouts"):
    name, first, n = cfg["policy"]["run_name"], cfg["evaluate"]["seed"], cfg["evaluate"]["num_rollouts"]
    folder = Path(cfg["runs_dir"], cfg["exp_name"], "evaluation", name)
    folder.mkdir(parents=True, exist_ok=True)
    won = lambda i: (i * 7 + len(name) + cfg["sim"]["seed"]) % 3 == 0
    episodes = [dict(seed=first + i, success=won(i), stage=2, steps=9, video="") for i in range(n)]
    share = dict(mean=.5, low=.4, high=.6)
    (folder / "results.json").write_text(json.dumps(dict(
        kind="rollouts", run_name=name, task="tote", prompt="p", observes=None, seeds=[first, n], num_rollouts=n,
        horizon=9, execute_steps=1, action_horizon=1, success=dict(share, n=n, count=1), stage=share,
        subtasks=dict(a=1.0), episodes=episodes)))
    (folder.parent / "scores.json").write_text(json.dumps(dict(scores={}, levels={})))
"""


@pytest.fixture
def file(tmp_path) -> Path:
    """The matrix for one task and one data seed."""
    text = Path(__file__).with_name("matrix.toml").read_text()
    for whole, part in SMALL.items():
        text = text.replace(whole, part)
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    return path


@pytest.fixture
def work(tmp_path, file, monkeypatch):
    """Makes the work of the matrix in a folder, with the stand-in for hvd's commands."""
    script = tmp_path / "step.py"
    script.write_text(STEP)
    monkeypatch.setattr(runner, "COMMAND", (sys.executable, str(script)))

    def make(folder: str = "out", at_a_time: int = 2) -> Work:
        (tmp_path / folder).mkdir(exist_ok=True)
        return Work(tmp_path / folder, matrix.items(matrix.read(str(file))), at_a_time)

    return make


def order(out: Path) -> list[list[str]]:
    return [line.split(" ", 2) for line in (out / "order.txt").read_text().splitlines()]


def test_everything_is_done_once_and_in_order(work):
    ours = work()
    assert ours.run() == 0
    begun = [(name, step) for name, step, _ in order(ours.out)]
    assert len(begun) == len(set(begun)) == sum(len(item.steps) for item in ours.items)
    place = {name: i for i, (name, _) in enumerate(begun)}
    assert all(place[need] < place[item.name] for item in ours.items for need in item.needs)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        assert len({shares for _, _, shares in order(ours.out)}) == 2  # each on its share
    again = work()
    assert again.run() == 0 and len(order(ours.out)) == len(begun)
    found = finished(ours.out, next(item for item in ours.items if item.cell))
    assert found is not None and len(found.episodes) == 4 and found.cpu_s > 0


def test_a_failed_item_costs_what_needs_it_alone(work, capfd):
    ours = work()
    (ours.out / "fail").write_text("tote-1-value")
    assert ours.run() == 1
    missing = {item.name for item in ours.items} - ours.done
    assert missing == {f"tote-1-{x}" for x in ("value", "table", "td", "ratio", "awr-table", "awr")}
    assert "tote-1-value failed (exit code 1): this one fails" in capfd.readouterr().out
    (ours.out / "fail").unlink()
    assert work().run() == 0


def test_another_config_is_refused(work, file, tmp_path):
    ours = work()
    ours.run()
    changed = file.read_text().replace('"policy.score" = "ratio"', '"policy.score" = "both"')
    (tmp_path / "other.toml").write_text(changed)
    with pytest.raises(UserError, match=r"tote-1-ratio.json was made with policy.score 'ratio', not 'both'"):
        Work(ours.out, matrix.items(matrix.read(str(tmp_path / "other.toml"))), 2).run()


def test_killed_anywhere_it_ends_with_the_same_table(work, file, tmp_path):
    """SIGKILL and SIGTERM of the benchmark at five moments; then to the end."""
    assert work("undisturbed").run() == 0
    assert command.main([str(file), "--out", str(tmp_path / "undisturbed"), "--tables"]) == 0
    argv = ["--file", str(file), "--out", str(tmp_path / "killed")]
    program = (
        "import sys; from hvd.clusters.local import runner; from hvd.benchmark import command\n"
        f"runner.COMMAND = {(sys.executable, str(tmp_path / 'step.py'))!r}\n"
        f"sys.exit(command.main({argv!r}))"
    )
    env = os.environ | {"STEP_SECONDS": "0.05"}
    for number, after in zip((signal.SIGKILL, signal.SIGTERM) * 2 + (signal.SIGKILL,), (1, 3, 6, 9, 12), strict=True):
        process = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while time.monotonic() < until and process.poll() is None:
            log = tmp_path / "killed" / "order.txt"
            if log.exists() and len(log.read_text().splitlines()) >= after:
                break
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) in (-number, 143)
    assert subprocess.run([sys.executable, "-c", program], env=env, stdout=subprocess.DEVNULL).returncode == 0
    ours, theirs = (tmp_path / name / "results.parquet" for name in ("killed", "undisturbed"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_tables_of_nothing_and_a_missing_folder_are_refused(file, tmp_path):
    with pytest.raises(UserError, match="no policy of"):
        command.main([str(file), "--out", str(tmp_path), "--tables"])
    with pytest.raises(UserError, match="give the matrix and a folder"):
        command.main([str(file)])


def test_a_dry_run_lists_what_is_left(file, tmp_path, capsys):
    assert command.main([str(file), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "tote-1-td: train-policy, evaluate" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_task_elsewhere(file, tmp_path, work, monkeypatch):
    """Its program records both sets and plays each policy; other arguments are not taken for the same data."""
    program = tmp_path / "blocks.py"
    program.write_text(
        "import pathlib, sys\n"
        "if sys.argv[1] == 'record':\n"
        "    pathlib.Path(sys.argv[2]).mkdir(parents=True); pathlib.Path(sys.argv[2], 'recorded').touch()\n"
        "with open('programs.txt', 'a') as told: print(*sys.argv[1:], file=told)\n"
    )
    monkeypatch.setenv("OWN_PYTHON", sys.executable)
    text = file.read_text().replace('["tote"]', '["blocks"]')
    table = f"[elsewhere.blocks]\nprogram = ['$OWN_PYTHON', '{program}']\nexperts = []\nmixed = ['--wrong', '0.5']\n"
    file.write_text(text + table)
    ours = work()
    assert ours.run() == 0
    recorded = ["record runs/blocks-1/recordings/experts --seed 10000"]
    recorded += ["record runs/blocks-1/recordings/mixed --seed 15000 --wrong 0.5"]
    assert (ours.out / "programs.txt").read_text().splitlines() == recorded + ["play"] * 5
    data, *_, last = ours.items
    assert data.steps == ("record-experts", "convert-experts", "record-mixed", "convert-mixed", "prepare")
    assert data.cfg.suboptimal_data.path() == Path("runs/blocks-1/datasets/mixed") and not last.cfg.sim.task
    file.write_text(file.read_text().replace("0.5", "0.6"))
    with pytest.raises(UserError, match="made by another program or with other arguments"):
        work().run()
    monkeypatch.setenv("OWN_PYTHON", "/nothing/here")
    with pytest.raises(UserError, match="elsewhere: /nothing/here: there is no such program"):
        work()
    file.write_text(file.read_text().replace("0.6", "0.5"))
    assert command.main([str(file), "--out", str(ours.out), "--tables"]) == 0, "tables need no program"
    monkeypatch.delenv("OWN_PYTHON")
    with pytest.raises(UserError, match=r"elsewhere: \$OWN_PYTHON: not set"):
        work()
    file.write_text(file.read_text().replace("first_start = 500", "first_start = 12_000"))
    monkeypatch.setenv("OWN_PYTHON", sys.executable)
    with pytest.raises(UserError, match="data of seed 1 are recorded from 10000 on"):
        work()


def test_a_part_of_the_matrix(file, tmp_path, capsys):
    file.write_text(file.read_text().replace("[1]", "[1, 11]"))
    argv = [str(file), "--out", str(tmp_path / "out"), "--dry-run", "--only"]
    assert command.main([*argv, "tote-1"]) == 0
    assert all(line.startswith("tote-1-") for line in capsys.readouterr().out.splitlines())
    with pytest.raises(UserError, match="--only tote-2: no data set of"):
        command.main([*argv, "tote-2"])
