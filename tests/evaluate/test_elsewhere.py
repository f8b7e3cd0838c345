"""`hvd rollouts`: episodes that a program of the user plays, and what it may say of them."""

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

from hvd.configs import EvaluateConfig
from hvd.errors import Failed, UserError
from hvd.evaluate import elsewhere


def program(tmp_path, body: str) -> list[str]:
    """A program that has `say(**episode)`, `first` and `count`."""
    head = """
        import json, os, time
        first, count = int(os.environ["HVD_FIRST_SEED"]), int(os.environ["HVD_EPISODES"])
        def say(**episode): print(json.dumps(episode), flush=True)
    """
    path = tmp_path / "play.py"
    path.write_text(textwrap.dedent(head) + textwrap.dedent(body))
    return [sys.executable, str(path)]


def play(tmp_path, body: str, seconds: float = 60.0, stages: int = 2):
    asked = EvaluateConfig(num_rollouts=3, seed=100, execute_steps=4)
    return elsewhere.play(program(tmp_path, body), "ws://nowhere", asked, stages, seconds)


def test_what_the_program_says_of_its_episodes(tmp_path, capfd):
    found = play(
        tmp_path,
        """
        print("\\x1b[2Jloading", os.environ["HVD_URL"], os.environ["HVD_EXECUTE"])
        say(seed=first + 1, success=True, steps=7)
        say(seed=first, success=False, stage=1, steps=9)
        say(seed=first + 2, success=False)
        """,
    )
    assert [(e.seed, e.success, e.stage, e.steps) for e in found] == [
        (100, False, 1, 9),
        (101, True, 2, 7),
        (102, False, 0, 0),
    ]
    said = capfd.readouterr()
    assert "loading ws://nowhere 4" in said.out + said.err and "\x1b" not in said.out


@pytest.mark.parametrize(
    ("body", "error", "why"),
    [
        ("say(seed=99, success=True)", UserError, "played seed 99; asked for were 100 to 102"),
        ("say(seed=100, success=True); say(seed=100, success=True)", UserError, "of seed 100 twice"),
        ("say(seed=100, success=True, stage=1)", UserError, r"seed 100 what cannot be: stage 1 of 2 \(--stages\)"),
        ("say(seed=100, success=False, stage=2)", UserError, "stage 2 of 2"),
        ("say(seed=100)", UserError, "missing required field `success`"),
        ("print('{' * 100_000)", UserError, "its line"),
        ("say(seed=100, success=True)", Failed, "1 of 3 episodes; that of seed 101 is missing"),
        ("say(seed=100, success=True); exit(3)", Failed, "exit code 3 after 1 of 3"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, body, error, why):
    with pytest.raises(error, match=why):
        play(tmp_path, body)


def test_a_program_that_hangs_is_stopped_with_its_children(tmp_path):
    body = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
        time.sleep(600)
    """
    with pytest.raises(Failed, match=r"was stopped after .* with 0 episodes"):
        play(tmp_path, body, seconds=2.0)
    child = Path("/proc") / (tmp_path / "child").read_text() / "cmdline"
    assert not child.exists() or b"sleep(600)" not in child.read_bytes()


def test_it_needs_a_program_and_a_task_that_is_not_simulated_here(tmp_path):
    with pytest.raises(UserError, match="give the program"):
        elsewhere.main(["--config", "demo"])
    with pytest.raises(UserError, match="simulated here"):
        elsewhere.main(["--config", "demo", "--", "true"])
    with pytest.raises(UserError, match="nothing-here: No such file"):
        elsewhere.play([str(tmp_path / "nothing-here")], "", EvaluateConfig(), 1, 5)


def test_where_results_cannot_be_written_is_said_before_any_episode(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        elsewhere.main(["--config", "g1", "--runs_dir", str(tmp_path / "runs"), "--", "true"])


def test_the_server_ends_with_the_process_that_started_it():
    code = "import os, time; print('serving it on ws://' + os.environ['HVD_LAUNCHER_PID'], flush=True); time.sleep(60)"
    with elsewhere._served([sys.executable, "-c", code]) as url:
        assert url == f"ws://{os.getpid()}"


@pytest.mark.slow
def test_the_whole_way(trained, tmp_path, monkeypatch, capfd):
    """The served policy's own actions reach the program; the table and the report have its episodes."""
    import dataclasses
    import shutil

    import yaml

    from hvd.fields import to_plain
    from hvd.report import command as report

    cfg = dataclasses.replace(trained, runs_dir=str(tmp_path / "runs"), evaluate=dataclasses.replace(trained.evaluate))
    shutil.copytree(trained.exp_dir, cfg.exp_dir)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_plain(cfg)))
    dims = 4
    body = f"""
        import numpy as np
        from hvd.client import connect
        with connect(os.environ["HVD_URL"]) as server:
            for seed in range(first, first + count):
                chunk = server.ask({{"observation.state": np.zeros({dims}, np.float32), "prompt": "carry the tote"}})
                moved = bool(np.abs(chunk["actions"]).max() > 0)
                say(seed=seed, success=moved and seed % 2 == 0, steps=len(chunk["actions"]))
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(elsewhere.__file__).parents[2]))
    argv = ["--config-file", str(config), "--evaluate.num_rollouts", "3", "--evaluate.seed", "100"]
    argv += ["--evaluate.execute_steps", "2", "--task", "box"]
    assert elsewhere.main([*argv, "--", *program(tmp_path, body)]) == 0
    out = capfd.readouterr().out
    assert "box" in out and "2/3 = 0.67" in out
    saved = json.loads(Path(cfg.exp_dir, "evaluation", cfg.policy.run_name, "results.json").read_text())
    assert [e["success"] for e in saved["episodes"]] == [True, False, True] and saved["subtasks"] == {"success": 2 / 3}
    report.main(cfg)
    assert "Task box" in Path(cfg.exp_dir, "report.html").read_text()
