"""hvd STEP: which module runs, exit codes, help."""

import asyncio
import contextlib
import errno
import importlib
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest

from hvd import cli
from hvd.configs import Experiment
from hvd.errors import Failed, Stopped, UserError
from hvd.experiments import CONFIGS
from hvd.runtime import preemption


@pytest.fixture
def step(monkeypatch):
    """Register a function as the step `fake`; returns how to do it."""

    def register(main, **options):
        module = types.ModuleType("hvd_fake_step")
        module.__dict__["main"] = main
        monkeypatch.setitem(sys.modules, "hvd_fake_step", module)
        monkeypatch.setattr(cli, "STEPS", {**cli.STEPS, "fake": cli.Step("hvd_fake_step", "a fake", **options)})

    return register


def raiser(error: BaseException):
    def main(cfg):
        raise error

    return main


def test_the_step_gets_the_config_with_its_overrides(step):
    seen = []
    step(lambda cfg: seen.append(cfg))
    assert cli.main(["fake", "--config", "demo", "--exp-name", "mine"]) == 0
    assert isinstance(seen[0], Experiment)
    assert seen[0].exp_name == "mine"
    assert seen[0].optimal_data.root == os.path.join("runs", "mine", "datasets", "optimal")


def test_a_step_of_a_job_logs_what_it_runs(step, monkeypatch, capsys, tmp_path):
    step(lambda cfg: None)
    assert cli.main(["fake", "--config", "demo"]) == 0 and not capsys.readouterr().err
    monkeypatch.setenv("HVD_JOB_DIR", str(tmp_path))
    monkeypatch.setenv("HVD_IMAGE", "hvd@sha256:ab")
    assert cli.main(["fake", "--config", "demo"]) == 0
    assert re.fullmatch(r"fake on \S+: hvd [\d.]+\S*, image hvd@sha256:ab\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "flags, expected",
    [([], False), (["--resume"], False), (["--overwrite"], True), (["--overwrite", "--seed", "1"], True)],
)
def test_overwrite_reaches_a_step_that_knows_it(step, flags, expected):
    seen = []

    def main(cfg, *, overwrite=False):
        seen.append(overwrite)

    step(main, trains=True)
    assert cli.main(["fake", "--config", "demo", *flags]) == 0
    assert seen == [expected]


def test_overwrite_is_refused_by_a_step_without_a_run_directory(step, capsys):
    step(lambda cfg: None)
    assert cli.main(["fake", "--config", "demo", "--overwrite"]) == 2
    assert "keeps no run directory" in capsys.readouterr().err


def test_a_step_with_its_own_flags_gets_them_as_they_are(step):
    seen = []
    step(seen.append, own_flags=True)
    assert cli.main(["fake", "--raw-dirs", "a", "b"]) == 0
    assert seen == [["--raw-dirs", "a", "b"]]


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("file x: mend it"), 2, "error: file x: mend it"),
        (Stopped("at step 3"), 143, "stopped: at step 3; run the same command again to go on"),
        (Failed("loss is nan"), 1, "failed: loss is nan"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 2, "error: no space left on the disk of /data/x"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/home/x"), 2, "error: no space left on the disk of /home/x"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: no space left on the disk of one of "),
        (OSError(errno.EACCES, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied; look at the owner"),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), 2, "error: /x/y: Read-only file system; look at"),
        (
            caused(RuntimeError("save failed"), ValueError("Error writing '/runs/a/b': No space left on device")),
            2,
            "error: no space left on the disk of /runs/a/b",
        ),
    ],
)
def test_exit_codes(step, capsys, error, code, line):
    step(raiser(error))
    assert cli.main(["fake", "--config", "demo"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_a_bug_is_a_traceback(step):
    step(raiser(OSError(errno.EIO, "Input/output error", "/x")))
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["fake", "--config", "demo"])


@pytest.mark.parametrize("name", ["simulate", "norm-stats", "prepare", "evaluate", "report"])
def test_a_folder_that_cannot_be_written_is_said_before_the_step_begins(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "file").write_text("")
    begun = {step.module for step in cli.STEPS.values()}
    real = importlib.import_module
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda m: pytest.fail("the step was begun") if m in begun else real(m)
    )
    folders = ["--runs_dir", str(tmp_path / "file" / "a"), "--assets_dir", str(tmp_path / "file" / "b")]
    assert cli.main([name, "--config", "demo", *folders]) == 2
    assert re.fullmatch(r"error: .*file.* (--runs_dir|--assets_dir).*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "variable",
    [{"JAX_PLATFORMS": "tpu"}, {"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "gpuu"}, {"JAX_ENABLE_X64": "maybe"}],
)
def test_a_platform_that_is_not_there_is_one_line(variable):
    program = (
        "import sys, types; from hvd import cli; fake = types.ModuleType('fake'); sys.modules['fake'] = fake\n"
        "def main(cfg):\n import jax; jax.devices()\n"
        "fake.main = main; cli.STEPS = {'fake': cli.Step('fake', '')}; cli.command()"
    )
    command = [sys.executable, "-c", program, "fake", "--config", "demo"]
    done = subprocess.run(command, env=os.environ | variable, capture_output=True, text=True, check=False)
    (name, value), *_ = variable.items()
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: jax cannot use"), done.stderr
    assert "Traceback" not in done.stderr and name in done.stderr and value in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_stops_a_step_that_has_no_handler(step, capsys, number):
    before = signal.getsignal(number)
    step(lambda cfg: os.kill(os.getpid(), number))
    assert cli.main(["fake", "--config", "demo"]) == 143
    assert signal.Signals(number).name in capsys.readouterr().err
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("around", [contextlib.nullcontext, preemption.catch])
def test_what_a_library_makes_of_a_signal_is_no_bug(step, capsys, number, code, around):
    def main(cfg):
        with around():
            try:
                os.kill(os.getpid(), number)
            except BaseException as error:
                raise RuntimeError("the file cannot be read") from error

    step(main)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
    try:
        assert cli.main(["fake", "--config", "demo"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert "run the same command again" in capsys.readouterr().err and preemption.requested() is None


def test_what_a_signal_leaves_half_made_is_not_printed(step, capsys, monkeypatch):
    """In the middle of asyncio's work: an object that cannot be taken apart, a coroutine that nobody awaits."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)

    class Half:
        def __del__(self):
            raise AttributeError("_signal_handlers")

    async def never():
        pass

    def main(cfg):
        _ = Half(), never()
        if signals:
            os.kill(os.getpid(), signal.SIGTERM)

    step(main)
    signals = True
    assert cli.main(["fake", "--config", "demo"]) == 143
    assert not seen and "never awaited" not in capsys.readouterr().err
    signals = False
    assert cli.main(["fake", "--config", "demo"]) == 0 and len(seen) == 1  # a bug still shows


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_asyncio_s_loop_says_one_line(step, capsys, caplog, number):
    async def struck():
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
        await asyncio.sleep(5)

    step(lambda cfg: asyncio.run(struck()))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["fake", "--config", "demo"]) in (143, 130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not caplog.records and capsys.readouterr().err.count("\n") == 1


def test_an_interrupt_after_the_step_says_nothing():
    code = (
        "import atexit, os, signal, sys; from hvd import cli; signal.signal(2, signal.default_int_handler);"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT); sys.argv[1:] = ['configs']; cli.command()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "") and "demo" in done.stdout


def test_an_ignored_interrupt_stays_ignored(step):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `hvd ... &` in a script has it
    try:
        step(lambda cfg: os.kill(os.getpid(), signal.SIGINT))
        assert cli.main(["fake", "--config", "demo"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_help_names_every_step(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in cli.STEPS)
    assert cli.main([]) == 2


def test_configs_are_listed_with_their_first_line(capsys):
    assert cli.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CONFIGS)
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_help_of_a_step_shows_the_config_s_own_values(capsys, name):
    assert cli.main(["train-value", "--help", "--config", name]) == 0
    printed = capsys.readouterr().out
    assert "--value.num-train-steps" in printed
    assert f"(default: {CONFIGS[name]().value.num_train_steps})" in printed
    assert "Command:" in printed


def test_help_and_lists_start_without_what_is_slow_to_import():
    """Half a second at most, even on a login node with a slow disk: no jax, no file formats, no cloud libraries."""
    code = (
        "import sys; from hvd import cli; from hvd.launch import submit\n"
        "steps = [step for step in cli.STEPS if step not in ('convert', 'gate')]\n"
        "for words in (['--help'], ['configs'], *([step, '--help'] for step in steps)):\n"
        "    assert cli.main(words) == 0, words\n"
        "assert submit.main(['--help']) == 0 and not {'numpy', 'etils.epath'} & set(sys.modules)\n"
        "assert submit.main(['--dry-run', '--cluster', 'local']) == 0\n"
        "slow = {'jax', 'pyarrow', 'h5py', 'av', 'mujoco', 'google', 'submitit', 'matplotlib'}\n"
        "print(*sorted(slow & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr


def test_every_step_has_a_module_with_a_main():
    for step in cli.STEPS.values():
        assert callable(importlib.import_module(step.module).main)


def test_it_runs_as_a_module_and_imports_no_jax_for_a_mistake():
    code = (
        "import sys; from hvd import cli; code = cli.main(['train-value', '--config', 'nope']); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    done = subprocess.run([sys.executable, "-m", "hvd.cli", "configs"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "demo" in done.stdout


def test_a_step_does_not_start_when_its_launcher_is_gone():
    env = {**os.environ, "HVD_LAUNCHER_PID": "1"}  # not the parent of what follows
    done = subprocess.run([sys.executable, "-m", "hvd.cli", "configs"], env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGTERM
    assert not done.stdout


def test_a_step_is_stopped_when_its_launcher_dies(tmp_path):
    """launcher -> step: the launcher is killed, the step gets SIGTERM and takes its leave."""
    note = tmp_path / "note"
    step = (
        "import signal, sys, time; from hvd import cli; cli._die_with_launcher();"
        f"signal.signal(signal.SIGTERM, lambda n, f: (open({str(note)!r}, 'a').write('stopped'), sys.exit(143)));"
        f"open({str(note)!r}, 'w').write('ready '); time.sleep(60)"
    )
    launcher = (
        "import os, subprocess, sys; os.environ['HVD_LAUNCHER_PID'] = str(os.getpid());"
        f"subprocess.run([sys.executable, '-c', {step!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher])
    until = time.monotonic() + 60
    while not note.exists() or "ready" not in note.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.wait(30)
    while "stopped" not in note.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
