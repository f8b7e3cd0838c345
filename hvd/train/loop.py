"""The step loop that both stages share.

The host is always one step ahead of the metrics: step n+1 is dispatched, then the metrics of step n are read. Those
tell of a non-finite loss and of a signal to any process, so all processes stop after the same step. Order at a step
boundary: metrics, save, validation; a resumed run repeats what came after the save, so its files are those of an
undisturbed one.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hvd.configs import Experiment, StageConfig
from hvd.data.loader import Loader
from hvd.errors import Failed, UserError
from hvd.runtime import owner, preemption, records, watchdog
from hvd.train import checkpoints, claim, complete, host_memory, state
from hvd.train import run_dir as runs
from hvd.train.mesh import Devices
from hvd.train.program import Batch, Metrics, Program
from hvd.train.state import TrainState
from hvd.train.telemetry import Telemetry


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run, ready to go.

    Attributes:
        inputs: digests of what it is trained on, for config.yaml and complete.json.
        program: the model, the first state, the step and the evaluation.
        prepare: what to do with a fresh state (load pretrained weights).
        loader: start step -> batches from that step on.
        model_flops: of one step, over all devices; 0 but in the main process, which alone tells it.
        validation: the placed validation batches, the same in every run; () = no validation.
    """

    cfg: Experiment
    stage: runs.Stage
    folder: str
    devices: Devices
    inputs: dict[str, str]
    program: Program
    prepare: Callable[[TrainState], TrainState]
    loader: Callable[[int], Loader]
    model_flops: int
    validation: Callable[[], list[Batch]]


def run(job: Job) -> None:
    """Train to the end: complete.json is written, or `Stopped`, `Failed` or `UserError` is raised."""
    began = time.perf_counter()
    devices, stage_cfg = job.devices, getattr(job.cfg, job.stage)
    steps: int = stage_cfg.num_train_steps
    with contextlib.ExitStack() as stack:
        stack.enter_context(watchdog.watch(job.cfg.hang_timeout))
        if devices.is_main:
            stack.callback(owner.release, job.folder)
            records.tell_run(job.stage, job.folder, steps)
        saves = checkpoints.Checkpoints(job.folder, job.program.graph, stage_cfg.keep_period)
        stack.callback(saves.close)
        start = claim.by_main(devices, job.folder, saves.newest_whole)
        saves.look_again()
        if start > steps:
            raise UserError(f"{job.folder} is at step {start}, past {job.stage}.num_train_steps {steps}: raise it")
        loader = stack.enter_context(contextlib.closing(job.loader(start))) if start < steps else None

        # --- the state, fresh or restored; a signal ends the run at once until there is something to save
        like = state.abstract(job.program.init, devices)
        if start:
            train_state, carried = saves.restore(start, like)
        else:
            train_state, carried = job.prepare(state.create(job.program.init, job.cfg.seed, like)), {}
        devices.poll("before the first step")
        stack.enter_context(preemption.deferred())
        if devices.is_main:
            claim.go_on(job.folder, job.cfg, job.stage, job.inputs)
        telemetry = Telemetry(
            job.cfg,
            job.stage,
            job.folder,
            start=start,
            carried=carried,
            sizes=state.num_bytes(like),
            is_main=devices.is_main,
            model_flops=job.model_flops,
        )
        stack.callback(telemetry.close)

        # --- the steps
        trainer = _Trainer(job, stage_cfg, saves, telemetry, like, train_state, start)
        if loader is not None:
            trainer.train(loader, steps, began)
        trainer.validate_if_due(steps, last=True)

        # --- complete
        saves.wait()
        finite = jax.jit(state.all_finite, out_shardings=devices.replicated)
        if not jax.device_get(finite((trainer.state.trained, trainer.state.frozen, trainer.state.ema))):
            raise Failed(f"{job.folder}: the parameters are not finite after {steps} steps; the run is not complete")
        telemetry.event("complete", step=steps)
        telemetry.close()
        if devices.is_main:
            digest = runs.config_hash(job.cfg, job.stage)
            complete.write_complete(
                job.folder, stage=job.stage, step=steps, config_hash=digest, inputs=job.inputs, finite=True
            )
        devices.barrier("complete")


class _Trainer:
    """The loop's moving parts: the state, the metrics not yet read, and what was saved last."""

    def __init__(
        self,
        job: Job,
        stage_cfg: StageConfig,
        saves: checkpoints.Checkpoints,
        telemetry: Telemetry,
        like: TrainState,
        train_state: TrainState,
        start: int,
    ):
        self.state = train_state
        self._job, self._cfg, self._devices = job, stage_cfg, job.devices
        self._saves, self._telemetry = saves, telemetry
        self._done = self._saved = start
        self._pending: tuple[int, Any, float] | None = None
        self._step = jitted_step(job.program, stage_cfg, job.devices, like)
        self._evaluate = jax.jit(_packed_evaluation(job.program.evaluate), out_shardings=job.devices.replicated)
        self._validation: list[tuple[Batch, jax.Array]] | None = None
        _ = job.devices.flags  # placed now: the loop itself transfers nothing implicitly

    def train(self, loader: Loader, steps: int, began: float) -> None:
        batches = iter(loader)
        first = True
        while self._done < steps:
            self.validate_if_due(self._done, last=False)
            asked = time.perf_counter()
            step, batch = next(batches)
            waited = time.perf_counter() - asked
            if step != self._done:
                raise RuntimeError(f"the loader gave the batch of step {step} at step {self._done}")
            if first:  # compiled by itself, so that the step does not need its memory on top of the compiler's
                self._step = self._step.lower(self.state, batch, self._devices.flag()).compile()
                host_memory.give_back()
            # No array may come or go by the way: a hidden transfer would make every step wait for the host
            with jax.transfer_guard("disallow"):
                self.state, out = self._step(self.state, batch, self._devices.flag())
                self._done += 1
                stop = self._read()
            self._pending = (self._done, out, waited)
            if stop or first or self._done % self._cfg.save_interval == 0 or self._done == steps:
                stop |= self._read()  # a checkpoint never holds a step whose metrics were not looked at
            if first:
                self._telemetry.first_step(time.perf_counter() - began)
                first = False
            if self._done % self._cfg.save_interval == 0 or self._done == steps:
                self._save()
            if stop:
                self._stop()

    def validate_if_due(self, done: int, *, last: bool) -> None:
        """Validation of the state after `done` steps, every val_interval steps and at the end."""
        if self._cfg.val_batches == 0 or not (last or (done and done % self._cfg.val_interval == 0)):
            return
        if self._validation is None:
            placed = self._job.validation()
            self._validation = [
                (b, jax.device_put(np.int32(i), self._devices.replicated)) for i, b in enumerate(placed)
            ]
        if not self._validation:
            return
        stop = self._read()
        totals: dict[str, float] = {}
        for batch, index in self._validation:
            metrics, stopped = jax.device_get(self._evaluate(self.state, batch, index, self._devices.flag())).read()
            if stop or stopped:
                self._stop()
            watchdog.progress()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / len(self._validation)
        _check_finite(done, totals, "validation")
        self._telemetry.validation(done, totals)

    def _read(self) -> bool:
        """Take in the metrics that were not yet read. True: some process was asked to stop."""
        if self._pending is None:
            return False
        (done, out, waited), self._pending = self._pending, None
        packed, visited = jax.device_get(out)
        watchdog.progress()
        metrics, stop = packed.read()
        _check_finite(done, metrics, "training")
        if self._cfg.trace_samples:
            self._telemetry.samples(done - 1, np.asarray(visited))
        self._telemetry.train(done, metrics, waited)
        return stop

    def _save(self) -> None:
        if self._saved == self._done:
            return
        if self._devices.is_main:
            owner.check(self._job.folder)
        self._telemetry.flush()
        self._saves.save(self._done, self.state, self._telemetry.state())
        self._saved = self._done
        watchdog.progress()

    def _stop(self) -> None:
        self._read()
        asked = time.perf_counter()
        self._save()
        self._saves.wait()
        seconds, grace = round(time.perf_counter() - asked, 3), records.grace_seconds()
        told = {"save_seconds": seconds} | ({"grace_seconds": grace} if grace else {})
        self._telemetry.event("stop", step=self._done, signal=preemption.requested(), **told)
        of_grace = f" of {grace:.0f} s grace" if grace else ""
        if grace and seconds > grace / 2 and self._devices.is_main:
            print(
                f"warning: saving took {seconds:.1f} s, more than half of the {grace:.0f} s grace: ask for more",
                flush=True,
            )
        preemption.raise_stopped(f"at step {self._done}, saved in {seconds:.1f} s{of_grace}")


_VALIDATION_SEED = 0x7A11D


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Metrics and the stop flag in one array, so that reading them is one small transfer."""

    values: Any  # float32: the metrics in the order of `names`, then the flag
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, metrics: Metrics, flags: jax.Array) -> "Packed":
        names = tuple(sorted(metrics))
        return cls(jnp.stack([*(metrics[name] for name in names), jnp.max(flags)]).astype(jnp.float32), names)

    def read(self) -> tuple[dict[str, float], bool]:
        """The metrics, and whether some process was asked to stop; of values that are on the host."""
        *numbers, stop = self.values.tolist()
        return dict(zip(self.names, numbers, strict=True)), stop > 0


def jitted_step(program: Program, stage_cfg: StageConfig, devices: Devices, like: TrainState) -> Any:
    """The step under jit, (state, batch, flags) -> (next state, (Packed, samples)).

    The state's buffers are donated. `hvd plan` compiles this one too.
    """

    def packed(train_state: TrainState, batch: Batch, flags: jax.Array) -> tuple[TrainState, Any]:
        train_state, metrics = program.step(train_state, batch)
        visited = jnp.stack([batch["source"], batch["index"]], axis=1) if stage_cfg.trace_samples else ()
        return train_state, (Packed.of(metrics, flags), visited)

    return jax.jit(packed, donate_argnums=0, out_shardings=(state.shardings(like), devices.replicated))


def _packed_evaluation(evaluate: Callable) -> Callable:
    """`evaluate` likewise; batch number i is always given the i-th key, so that its noise is the same in every run."""

    def packed(train_state: TrainState, batch: Batch, index: jax.Array, flags: jax.Array) -> Packed:
        key = jax.random.fold_in(jax.random.key(_VALIDATION_SEED), index)
        return Packed.of(evaluate(train_state, batch, key), flags)

    return packed


def _check_finite(done: int, metrics: dict[str, float], kind: str) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise Failed(
            f"{kind} at step {done}: {bad[0]} is {metrics[bad[0]]}; the run stops and is not complete "
            "(a smaller learning rate or clip_gradient_norm may help)"
        )
