"""What a run tells: metrics.jsonl, TensorBoard, W&B if asked for, and a progress bar.

    metrics.jsonl  {"step": steps done, "split": "train" | "val", <metric>: mean of the steps since the last line, ...}
    samples.jsonl  (trace_samples) {"step": step, "samples": [[source, row], ...]}: what each step really was given
    events.jsonl   {"event": "start" | "stop" | "complete", ...}: one line each, never cut

A resumed run's files are those of one run: lines past the restored step are dropped before new ones are written.
Metrics that depend on the machine and not on the run start with "time/" or "memory/".
"""

import contextlib
import datetime
import importlib.util
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from hvd import accelerators, files
from hvd.configs import Experiment, StageConfig
from hvd.errors import UserError
from hvd.fields import to_plain
from hvd.files import JsonLines
from hvd.train import run_dir as runs


class Telemetry:
    """The voice of one run; processes other than the main one keep the same books and write nothing.

    Args:
        start: steps done when this process began.
        carried: `state` of the checkpoint that was restored, or {}.
        sizes: of the state in bytes, for the event "start".
        model_flops: of one step, over all devices (hvd.train.flops); 0 = not counted.
    """

    def __init__(
        self,
        cfg: Experiment,
        stage: runs.Stage,
        folder: os.PathLike | str,
        *,
        start: int,
        carried: Mapping[str, Any],
        sizes: Mapping[str, int],
        is_main: bool,
        model_flops: int = 0,
    ):
        stage_cfg: StageConfig = getattr(cfg, stage)
        self._log_interval, self._total, self._rows = (
            stage_cfg.log_interval,
            stage_cfg.num_train_steps,
            stage_cfg.batch_size,
        )
        self._sums: dict[str, float] = dict(carried.get("sums", {}))
        self._count = int(carried.get("count", 0))
        self._busy_before = float(carried.get("busy_s", 0.0))
        self._main = is_main
        self._flops_per_device = model_flops / jax.device_count()
        known = accelerators.of_kind(jax.devices()[0].device_kind)
        self._peak_flops = known.flops if known else 0.0
        self._began = self._last = time.perf_counter()
        self._steps, self._wait = 0, 0.0
        self._stack = contextlib.ExitStack()
        self._samples = None
        self.restarts = 0
        if is_main:
            self._open(cfg, stage, epath.Path(folder), start)
            about = {"deterministic": cfg.deterministic, "model_flops": model_flops}
            self.event("start", step=start, **_machine(), **about, **sizes)

    def _open(self, cfg: Experiment, stage: runs.Stage, root: epath.Path, start: int) -> None:
        """The files, the writers and the bar of the process that writes."""
        before = files.read_lines(root / "events.jsonl")
        self.restarts = sum(line.get("event") == "start" for line in before)
        self._writers = [_wandb(self._stack, cfg, stage, root, again=self.restarts > 0)] if cfg.wandb else []
        self._events = self._lines(root / "events.jsonl", lambda line: True)
        self._metrics = self._lines(root / "metrics.jsonl", lambda line: _belongs(line, start))
        if getattr(cfg, stage).trace_samples:
            self._samples = self._lines(root / "samples.jsonl", lambda line: line["step"] < start)
        self._writers.append(_tensorboard(self._stack, root / "tb", start))
        self._bar = self._stack.enter_context(
            tqdm(
                total=self._total,
                initial=start,
                desc=stage,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 15.0,
            )
        )

    def _lines(self, path: epath.Path, keep: Callable[[dict[str, Any]], bool]) -> JsonLines:
        lines = JsonLines(path, keep)
        self._stack.callback(lines.close)
        return lines

    def event(self, name: str, **what: Any) -> None:
        if self._main:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self._events.write(
                {"event": name, "time": now, "host": socket.gethostname(), "version": runs.code_version(), **what}
            )

    def train(self, done: int, metrics: Mapping[str, float], wait_s: float) -> None:
        """Metrics of the step that made it `done` steps; a line is written every log_interval steps and at the end."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        self._steps += 1
        self._wait += wait_s
        if self._main:
            self._bar.update()
        if done % self._log_interval and done != self._total:
            return
        now = time.perf_counter()
        step_s = (now - self._last) / self._steps
        line = {name: total / self._count for name, total in self._sums.items()}
        line |= {
            "time/step_s": step_s,
            "time/samples_per_s": self._rows / step_s,
            "time/data_wait_s": self._wait / self._steps,
            "time/busy_s": self._busy_before + now - self._began,
            "time/restarts": self.restarts,
            **self._rates(step_s),
            **_memory(),
        }
        if self._main:
            self._bar.set_postfix(loss=f"{line.get('loss', float('nan')):.4g}", wait=f"{self._wait / self._steps:.3f}s")
        self._write(done, "train", line)
        self._sums, self._count, self._steps, self._wait, self._last = {}, 0, 0, 0.0, now

    def _rates(self, step_s: float) -> dict[str, float]:
        """Model TFLOP/s of a device, and their share of its bfloat16 peak where that is known (the MFU)."""
        if not self._flops_per_device:
            return {}
        rate = self._flops_per_device / step_s
        found = {"time/tflops_per_device": rate / 1e12}
        return found | ({"time/mfu": rate / self._peak_flops} if self._peak_flops else {})

    def validation(self, done: int, metrics: Mapping[str, float]) -> None:
        self._write(done, "val", metrics)

    def first_step(self, seconds: float) -> None:
        """How long it took from the start of the stage to the first finished step."""
        self.event("first_step", seconds=round(seconds, 3))
        self._last, self._steps, self._wait = time.perf_counter(), 0, 0.0

    def samples(self, step: int, visited: np.ndarray) -> None:
        """`visited` [B, 2]: source and row of each sample that step `step` (0-based) was given."""
        if self._samples is not None:
            self._samples.write({"step": step, "samples": visited.tolist()})

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that the next line is the same as without an interruption."""
        busy = self._busy_before + time.perf_counter() - self._began
        return {"sums": self._sums, "count": self._count, "busy_s": busy}

    def flush(self) -> None:
        if self._main:
            self._metrics.flush()
            if self._samples is not None:
                self._samples.flush()

    def close(self) -> None:
        self._stack.close()

    def _write(self, done: int, split: str, metrics: Mapping[str, float]) -> None:
        if not self._main:
            return
        self._metrics.write({"step": done, "split": split, **metrics})
        for write in self._writers:
            write(done, split, metrics)


def _belongs(line: Mapping[str, Any], start: int) -> bool:
    """Training lines up to the restored step stay; its validation is done again, since it comes after the save."""
    return line["step"] <= start if line.get("split") == "train" else line["step"] < start


def _tensorboard(stack: contextlib.ExitStack, folder: epath.Path, start: int) -> Callable[..., None]:
    # tensorboardX loads torch where it is installed: seconds and 300 MB, for tensors that we do not have
    with _hidden("torch"):
        from tensorboardX import SummaryWriter  # 0.5 s to import: not before a run needs it

    folder.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(os.fspath(folder), purge_step=start + 1)
    stack.callback(writer.close)

    def write(done: int, split: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(_titled(name, split), value, done)

    return write


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Modules that are imported meanwhile find no such package, unless it is loaded already."""
    hide = package not in sys.modules
    if hide:
        sys.modules[package] = None  # pyright: ignore[reportArgumentType]  # what `import` takes for "not installed"
    try:
        yield
    finally:
        if hide:
            del sys.modules[package]


def check_wandb(cfg: Experiment) -> None:
    """UserError where the run is to log to W&B and its package is not there."""
    if cfg.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb is set, but the package wandb is not installed: install hvd[wandb]")


def _machine() -> dict[str, Any]:
    devices = jax.devices()
    return {"devices": len(devices), "device_kind": devices[0].device_kind, "processes": jax.process_count()}


def _wandb(
    stack: contextlib.ExitStack, cfg: Experiment, stage: str, folder: epath.Path, *, again: bool
) -> Callable[..., None]:
    """Logs to the run's W&B run. Where W&B cannot be reached, a run that is gone on with (`again`) keeps its log here.

    Raises:
        UserError: it cannot be reached when the run starts.
    """
    check_wandb(cfg)
    import wandb  # pyright: ignore[reportMissingImports]

    marker = folder / "wandb_id.txt"
    known = marker.read_text().strip() if marker.exists() else None

    def begin(**mode: str) -> Any:
        return wandb.init(
            project="hvd",
            name=f"{cfg.exp_name or cfg.name}/{stage}",
            id=known,
            resume="allow",
            config=to_plain(cfg),
            dir=os.fspath(folder) if files.is_local(folder) else None,
            **mode,
        )

    def nothing(done: int, split: str, metrics: Mapping[str, float]) -> None:
        pass

    try:
        run = begin()
    except Exception as error:  # of wandb's own kinds, or of the network's
        why = f"W&B cannot be used ({' '.join(str(error).split())[:200] or type(error).__name__})"
        if not again:
            raise UserError(f"{why}: log in (wandb login), set WANDB_MODE=offline, or leave --wandb out") from error
        print(f"warning: {why}; the training goes on and logs in {folder} alone", flush=True)
        try:
            run = begin(mode="offline")
        except Exception:  # not even a local log: the line above says where the numbers are
            return nothing
    if known is None:
        files.write_atomic(marker, run.id)
    stack.callback(run.finish)

    def write(done: int, split: str, metrics: Mapping[str, float]) -> None:
        run.log({_titled(name, split): value for name, value in metrics.items()}, step=done)

    return write


def _titled(name: str, split: str) -> str:
    return name if name.startswith(("time/", "memory/")) else f"{split}/{name}"


def _memory() -> dict[str, float]:
    """Resident memory of this process and the peak of its first device, in MB."""
    try:
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc on this system: the peak instead of the present value
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"memory/rss_mb": resident / 1e6}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        found["memory/device_peak_mb"] = stats["peak_bytes_in_use"] / 1e6
    return found
