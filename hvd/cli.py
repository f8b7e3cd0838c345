"""hvd <step> --config NAME [--dotted.field value]...

Each step is the `main` of one module, imported only when it runs. Exit codes: 0 complete; 2 the user's mistake (one
line); 143 stopped by a signal after saving, run me again; 75 lost a companion process, 76 hung: worth a few more
attempts; 130 interrupted; 1 anything else: a run that cannot go on says why in a line, a bug gives a traceback.
"""

import contextlib
import dataclasses
import faulthandler
import importlib
import inspect
import os
import re
import signal
import socket
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from hvd import overrides
from hvd.checks import check_config
from hvd.configs import Experiment
from hvd.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_LOST,
    EXIT_STOPPED,
    EXIT_USER,
    Failed,
    Lost,
    Stopped,
    UserError,
    nearest,
)
from hvd.experiments import CONFIGS
from hvd.files import UNWRITABLE, full_disk
from hvd.runtime import preemption, processes, records

_IN_A_JOB = ("HVD_JOB_DIR", "KUBERNETES_SERVICE_HOST")
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Step:
    """One step of the way: the module whose `main` does it, and a line of help.

    Attributes:
        trains: `main(cfg, overwrite=...)` keeps a run directory.
        own_flags: `main(argv)` has options beside those of an experiment, or none of them.
        writes: config -> a folder that it writes to in any case, and the option that names another.
    """

    module: str
    help: str
    trains: bool = False
    own_flags: bool = False
    writes: Callable[[Experiment], tuple[str, str]] | None = None


def _experiment(cfg: Experiment) -> tuple[str, str]:
    return cfg.exp_dir, "--runs_dir"


def _assets(cfg: Experiment) -> tuple[str, str]:
    return cfg.assets_dir, "--assets_dir"


STEPS: Mapping[str, Step] = types.MappingProxyType(
    {
        "simulate": Step(
            "hvd.sim.record", "record the simulated R1's optimal and mixed demonstrations", writes=_experiment
        ),
        "convert": Step("hvd.data.convert", "recordings (JoyLo HDF5) -> LeRobot v3.0 dataset", own_flags=True),
        "plan": Step("hvd.plan.command", "does a run fit its devices? without the devices", own_flags=True),
        "norm-stats": Step("hvd.data.normalize", "normalisation statistics of the optimal set", writes=_assets),
        "prepare": Step(
            "hvd.prepare", "all that a stage needs before it trains: the steps above, where they apply", writes=_assets
        ),
        "train-value": Step("hvd.method.value", "value stage: V and the levels' Q", trains=True),
        "advantages": Step("hvd.method.advantages", "V, Q, A and weights of every frame the policy will visit"),
        "train-policy": Step("hvd.method.policy", "policy stage: weighted flow matching, or imitation", trains=True),
        "evaluate": Step(
            "hvd.evaluate.command",
            "rollouts in the simulator, or action errors on held-out episodes",
            writes=_experiment,
        ),
        "rollouts": Step("hvd.evaluate.elsewhere", "the policy in an environment of your own", own_flags=True),
        "report": Step("hvd.report.command", "report.html of the experiment", writes=_experiment),
        "serve": Step("hvd.serve.command", "a trained policy behind openpi's websocket protocol", own_flags=True),
        "replay": Step("hvd.replay.command", "a robot's recorded questions, asked again", own_flags=True),
        "export": Step("hvd.export", "a complete run as a checkpoint of openpi", own_flags=True),
        "jobs": Step("hvd.jobs.command", "submitted jobs: list, logs, cancel, wait", own_flags=True),
        "site": Step("hvd.site.command", "try a cluster by one small job: hvd site check", own_flags=True),
        "gate": Step(
            "hvd.clusters.kubernetes.gate",
            "in a Kubernetes pod: release the policy Job after the value Job",
            own_flags=True,
        ),
        "data": Step(
            "hvd.clusters.kubernetes.data",
            "a dataset onto the volume of a Kubernetes cluster, results off it",
            own_flags=True,
        ),
        "benchmark": Step(
            "hvd.benchmark.command", "a matrix of policies on simulated tasks, with statistics", own_flags=True
        ),
        "verify": Step("hvd.train.complete", "is the run complete, undamaged and finite?"),
    }
)


def usage() -> str:
    width = max(len(name) for name in STEPS)
    lines = [
        "usage: hvd <step> --config NAME [--data PATH] [--resume | --overwrite] [--dotted.field value]...",
        "",
        *(f"  {name:<{width}}  {step.help}" for name, step in STEPS.items()),
        f"  {'configs':<{width}}  list the configs",
        "",
        "hvd <step> --help [--config NAME] shows every field with its value in that config.",
        "--resume (the default) goes on where a run stopped; --overwrite deletes that run directory and starts again.",
        "All steps in one go: python launch/submit.py --stage all --config NAME",
    ]
    return "\n".join(lines)


def command() -> NoReturn:
    """The command `hvd`: one step as a process; a scheduler's job is told how it ended (hvd.runtime.records)."""
    if processes.several():
        faulthandler.enable()  # JAX aborts a process whose companions have gone: say where it was
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # before and after the step: no traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        end = attempt(sys.argv[1:])
    except SystemExit as stop:
        records.tell_exit(stop.code if isinstance(stop.code, int) else EXIT_FAILED if stop.code else EXIT_COMPLETE)
        raise
    except BaseException:
        traceback.print_exc()
        end = End(EXIT_FAILED)
    records.tell_exit(end.code)
    # A full disk: libraries with open files complain at exit (Orbax's threads once an array) and would hide the line.
    # A process of several that fails: leaving in order means waiting for the others, which wait for this one.
    if end.disk_full or (processes.several() and end.code not in (EXIT_COMPLETE, EXIT_STOPPED)):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code)
    sys.exit(end.code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step and return its exit code; anything that is a bug propagates as a traceback."""
    return attempt(sys.argv[1:] if argv is None else argv).code


@dataclass(frozen=True)
class End:
    """How a step ended: its exit code and the line that says why ("" = complete)."""

    code: int
    line: str = ""
    disk_full: bool = False


@preemption.quiet_once_stopped()
def attempt(argv: Sequence[str]) -> End:
    """Run one step; an error that users are told about is printed as one line, a bug propagates."""
    _die_with_launcher()
    try:
        with stopped_by_signals():
            return End(run(list(argv)))
    except BrokenPipeError:  # `hvd configs | head`: the reader has gone, and nothing can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return End(128 + signal.SIGPIPE)
    except (Exception, KeyboardInterrupt, Stopped) as error:
        end = told(error)
        if end is None:
            raise
        print(end.line, file=sys.stderr)
        return end


def told(error: BaseException) -> End | None:
    """The end that an error means; None for a bug."""
    again = "run the same command again to go on"
    match error:
        case UserError():
            return End(EXIT_USER, f"error: {error}")
        case Failed():
            return End(EXIT_FAILED, f"failed: {error}")
        case Lost():
            return End(EXIT_LOST, f"lost: {error}; {again}")
        case Stopped():
            return End(EXIT_STOPPED, f"stopped: {error}; {again}")
        case KeyboardInterrupt():
            return End(EXIT_INTERRUPTED, f"interrupted; {again}")
    if (full := no_space(error)) is not None:
        return End(EXIT_USER, f"error: {full}", disk_full=True)
    if (unusable := _unusable(error)) is not None:
        return End(EXIT_USER, f"error: {unusable}")
    lost = processes.lost_companion(error)
    return None if lost is None else End(EXIT_LOST, f"lost: {lost}; {again}")


def run(argv: Sequence[str]) -> int:
    """`hvd STEP ...` -> exit code; errors are raised."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_COMPLETE if argv else EXIT_USER
    name, *rest = argv
    if name == "configs":
        print("\n".join(config_lines()))
        return EXIT_COMPLETE
    if name not in STEPS:
        raise UserError(f"unknown step {name!r}{nearest(name, [*STEPS, 'configs'])}")
    step = STEPS[name]
    if (not step.own_flags or name == "gate") and any(map(os.environ.get, _IN_A_JOB)):
        _tell_version(name)
    if step.own_flags:
        return importlib.import_module(step.module).main(rest) or EXIT_COMPLETE
    if overrides.asks_help(rest):
        step_help(name, [arg for arg in rest if arg not in ("-h", "--help")])
        return EXIT_COMPLETE
    rest, overwrite = overrides.take_overwrite(rest)
    if overwrite and not step.trains:
        raise UserError(f"--overwrite: {name} keeps no run directory; it is for train-value and train-policy")
    cfg = overrides.experiment(rest)
    check_config(cfg)
    if step.writes:
        from hvd.train.inputs import check_writable

        check_writable(*step.writes(cfg))
    from hvd.runtime import owner  # etils.epath: a tenth of a second that help pages do not wait for

    owner.job_alive = _job_alive
    main = importlib.import_module(step.module).main
    return (main(cfg, overwrite=overwrite) if step.trains else main(cfg)) or EXIT_COMPLETE


def _tell_version(step: str) -> None:
    from hvd.train import run_dir

    print(f"{step} on {socket.gethostname()}: {run_dir.running()}", file=sys.stderr, flush=True)


def _job_alive(scheduler: str, job: str) -> bool | None:
    from hvd.clusters import base

    return base.alive(scheduler, job)


def config_lines() -> list[str]:
    """One line a config: its name and the first line of its docstring."""
    width = max(len(name) for name in CONFIGS)
    return [f"{name:<{width}}  {(build.__doc__ or '').strip().splitlines()[0]}" for name, build in CONFIGS.items()]


def step_help(name: str, argv: Sequence[str]) -> None:
    """Print the step's help: every option, with the values that the named config (demo by default) has."""
    choice, _ = overrides.take(overrides.Choice(), argv)
    cfg = overrides.chosen(choice, "demo")
    build = CONFIGS.get(cfg.name)
    config = f"config {cfg.name}: {inspect.cleandoc(build.__doc__ or '')}" if build else f"config {cfg.name}"
    folder = (overrides.RunDirectory(),) if STEPS[name].trains else ()
    parts = (dataclasses.replace(choice, config=cfg.name), *folder, cfg)
    overrides.print_help(f"hvd {name} --config NAME", f"{STEPS[name].help}\n\n{config}", *parts)


@contextlib.contextmanager
def stopped_by_signals():
    """SIGTERM, SIGUSR1 and SIGUSR2 end a step that has no handler of its own with Stopped, not with a sudden death, and
    SIGINT, where it is not ignored, with KeyboardInterrupt. So does an error that nobody knows after such a signal: a
    library has made it of what the handler raised."""

    def stop(number, frame):
        if not preemption.later(number, frame):
            preemption.received(number)
            raise stopped(signal.Signals(number).name)

    def stopped(name: str) -> BaseException:
        return KeyboardInterrupt() if name == "SIGINT" else Stopped(f"by {name}")

    usual = signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.signal(number, stop) for number in (*STOP_SIGNALS, *[signal.SIGINT] * usual)}
    try:
        yield
    except Exception as error:
        name = preemption.requested()
        if name is None or told(error):
            raise
        raise stopped(name) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        preemption.forget()


def no_space(error: BaseException | None) -> str | None:
    """One line about a full disk or quota when that is what the error, or one that caused it, is about; else None."""
    named = full_disk(error)
    if named is None:
        return None
    where = named or f"one of {os.getcwd()}, its runs folder or {tempfile.gettempdir()}"
    return f"no space left on the disk of {where}; free some or set --runs_dir; the same command then goes on"


def _unusable(error: BaseException) -> str | None:
    """One line about a file that this user may not touch, or a platform that jax has not got; else None."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename:
        return f"{error.filename}: {error.strerror}; look at the owner and the rights of the file and its folder"
    if isinstance(error, RuntimeError | ValueError | AssertionError) and _NO_PLATFORM.search(
        f"{error} {_place(error)}"
    ):
        why = str(error).strip().partition("\n")[0][:200] or "it has no such devices"
        told = [f"{name}={os.environ[name]}" for name in _PLATFORMS if name in os.environ]
        return f"jax cannot use the platform that it was told ({why}); set {', '.join(told) or _PLATFORMS[0]} otherwise"
    return None


def _place(error: BaseException) -> str:
    """The file and line in which an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}: {frames[-1].line}" if frames else ""


_PLATFORMS = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "CUDA_VISIBLE_DEVICES")
# What jax says about JAX_PLATFORMS=tpu or cuda where there is none, and about a variable of its own that it cannot read
_NO_PLATFORM = re.compile(
    r"Unable to initialize backend|Unknown backend|for environment 'JAX_|xla_bridge.*assert _default_backend is not"
)


def _die_with_launcher() -> None:
    """A step that launch/ started is stopped (and saves) when its launcher dies, so that no two runs share a folder."""
    launcher = os.environ.get("HVD_LAUNCHER_PID")
    if launcher and sys.platform == "linux":
        from hvd.pools import die_with

        die_with(int(launcher), signal.SIGTERM)


if __name__ == "__main__":
    command()
