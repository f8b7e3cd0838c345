"""Five steps of each stage on several meshes: what tests/train/test_sharding.py compares.

`python -m tests.train.meshes OUT` runs every case on the meshes of this process's 8 devices; with HVD_COORDINATOR and
its fellows set, on the one mesh of all processes. OUT (.npz) holds <case>/<mesh>/loss [5] and .../params/<name>.
"""

import dataclasses
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hvd.configs import Experiment, LrSchedule, Optimizer
from hvd.method import policy, value
from hvd.runtime import processes
from hvd.train import loop, mesh, parameter_rules, state
from hvd.train.checkpoints import Checkpoints
from hvd.train.mesh import Devices
from tests.train import factory

STEPS, ROWS, OPTIMAL = 5, 32, 20  # of the 32 rows 20 are of the optimal set: no micro-batch has their share
MESHES = {"1x1": (1, 1), "1x8": (8, 8), "2x4": (8, 4), "4x2": (8, 2)}  # data x fsdp: (devices, fsdp)
CASES = {  # stage, variant, changes, meshes: each compiles for half a minute
    "policy": ("policy", "dummy_2", {}, ("1x1", "1x8", "2x4", "4x2")),
    "policy-lora": ("policy", "dummy_2_lora", {}, ("1x1", "2x4")),
    "policy-pi05": ("policy", "dummy_2", {}, ("1x1", "2x4")),
    "value": ("value", "dummy_2", {}, ("1x1", "2x4", "4x2")),
    "policy-4": ("policy", "dummy_2", {"grad_accum_steps": 4}, ("2x4",)),
    "value-4": ("value", "dummy_2", {"grad_accum_steps": 4}, ("2x4",)),
}


def config(case: str) -> Experiment:
    stage, variant, changes, _ = CASES[case]
    model = factory.model(
        family="pi05" if "pi05" in case else "pi0",
        value_expert_variant="dummy_2",
        paligemma_variant=variant,
        action_expert_variant=variant,
        cameras=("base_0_rgb", "left_wrist_0_rgb"),
        siglip_variant="tiny",
        image_size=28,
    )
    own = {
        "batch_size": ROWS,
        "lr_schedule": LrSchedule(warmup_steps=2, peak_lr=1e-3, decay_steps=100, decay_lr=1e-4),
        # Adam makes a full step of a gradient that is zero but for rounding, unless eps says what is zero
        "optimizer": Optimizer(eps=1e-3),
        "state_noise": 0.1,
        "ema_decay": 0.9,
        "trace_samples": False,
    }
    return factory.experiment(Path("nowhere"), model=model, **{stage: own | changes})


def batches(cfg: Experiment, stage: str) -> Iterator[dict[str, Any]]:
    """Whole batches of noise, the same everywhere."""
    rng = np.random.default_rng(0)
    model, levels = cfg.model, len(cfg.levels())

    def observation() -> dict[str, Any]:
        size = (ROWS, model.image_size, model.image_size, 3)
        return {
            "state": rng.normal(size=(ROWS, model.action_dim)).astype(np.float32),
            "images": {camera: rng.integers(0, 256, size, np.uint8) for camera in model.cameras},
            "image_masks": {camera: rng.random(ROWS) < 0.9 for camera in model.cameras},
            "tokenized_prompt": rng.integers(0, model.vocab_size, (ROWS, model.max_token_len)).astype(np.int32),
            "tokenized_prompt_mask": np.ones((ROWS, model.max_token_len), bool),
        }

    for _ in range(STEPS):
        mask = np.arange(model.action_horizon)[None] < rng.integers(1, model.action_horizon + 1, ROWS)[:, None]
        batch = {
            "observation": observation(),
            "actions": rng.normal(size=(ROWS, model.action_horizon, model.action_dim)).astype(np.float32),
            "action_mask": mask,
            "weights": rng.exponential(size=(ROWS, levels)).astype(np.float32),
            "source": (np.arange(ROWS) >= OPTIMAL).astype(np.int32),
            "index": np.arange(ROWS, dtype=np.int32),
        }
        if stage == "value":
            batch |= {
                "reward": rng.random(ROWS).astype(np.float32),
                "discount": (rng.random(ROWS) < 0.8).astype(np.float32),
                "next_observation": observation(),
            }
        yield batch


class Run:
    """One case on one mesh."""

    def __init__(self, case: str, devices: Devices):
        self.stage = CASES[case][0]
        self.cfg, self.devices = config(case), devices
        module = policy if self.stage == "policy" else value
        self.program = module.make_program(self.cfg, devices, factory.STATE)
        self.like = state.abstract(self.program.init, devices)
        self.step = loop.jitted_step(self.program, getattr(self.cfg, self.stage), devices, self.like)
        self.losses: list[float] = []

    def fresh(self) -> state.TrainState:
        return state.create(self.program.init, 0, self.like)

    def go(self, train_state: state.TrainState, start: int, stop: int) -> state.TrainState:
        index, count = self.devices.place_of_process
        ours = slice(ROWS // count * index, ROWS // count * (index + 1))
        for i, batch in enumerate(batches(self.cfg, self.stage)):
            if start <= i < stop:
                placed = self.devices.place_batch(jax.tree.map(lambda x: x[ours], batch))
                train_state, (packed, _) = self.step(train_state, placed, self.devices.flag())
                self.losses.append(jax.device_get(packed).read()[0]["loss"])
        return train_state

    def results(self, train_state: state.TrainState, name: str) -> dict[str, np.ndarray]:
        assert self.step._cache_size() == 1, "compiled once"
        arrays = {"trained": train_state.trained, "ema": train_state.ema, "target": train_state.target}
        whole = multihost_utils.process_allgather(arrays, tiled=True)
        sizes = state.num_bytes(self.like)
        share = sizes["state_bytes_per_device"] / sizes["state_bytes"]
        found = {f"{name}/loss": np.array(self.losses), f"{name}/share": np.array(share)}
        return found | {
            f"{name}/params/{part}/{leaf}": np.asarray(x)
            for part, tree in whole.items()
            for leaf, x in state.named(tree).items()
        }


def moved_images(run: Run) -> list[str]:
    """The instructions of the compiled step that send pixels from device to device."""
    batch = next(batches(run.cfg, run.stage))
    compiled = run.step.lower(run.like, run.devices.place_batch(batch), run.devices.flag()).compile()
    side = run.cfg.model.image_size
    kinds = "all-to-all|all-gather|all-reduce|collective-permute"
    return re.findall(rf"\[[0-9,]*{side},{side},3\]\S* (?:{kinds})\(.*", compiled.as_text())


def resumed(case: str, before: Run, after: list[tuple[str, Run]]) -> dict[str, np.ndarray]:
    """Saved on one mesh after 2 steps, continued on others."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        saves = Checkpoints(folder, before.program.graph, 0)
        saves.save(2, before.go(before.fresh(), 0, 2), {})
        saves.wait()
        for name, run in after:
            run.losses = before.losses[-2:]
            restored, _ = saves.restore(2, run.like)
            assert jax.tree.map(lambda x: x.sharding, restored) == state.shardings(run.like)
            found |= run.results(run.go(restored, 2, STEPS), f"{case}/resumed-{name}")
        saves.close()
    return found


def main(out: str) -> None:
    (dims, _, place), *rest = parameter_rules.PARAMETER_RULES
    parameter_rules.PARAMETER_RULES = ((dims, 1 << 10, place), *rest)
    found: dict[str, np.ndarray] = {}
    if os.environ.get(processes.ENVIRONMENT[0]):
        devices = mesh.start(dataclasses.replace(config("value"), runs_dir=os.path.dirname(out), fsdp_devices=4))
        for case in ("policy", "policy-lora", "value"):
            run = Run(case, devices)
            found |= run.results(run.go(run.fresh(), 0, STEPS), f"{case}/2 processes")
        if devices.is_main:
            np.savez(out, **found)
        return
    for case in CASES:
        runs = {}
        for name in CASES[case][3]:
            count, fsdp = MESHES[name]
            began = time.perf_counter()
            runs[name] = run = Run(case, mesh.make_devices(fsdp, jax.devices()[:count]))
            found |= run.results(run.go(run.fresh(), 0, STEPS), f"{case}/{name}")
            if (case, name) in (("policy-4", "2x4"), ("value", "2x4")):
                assert not (found_moved := moved_images(run)), found_moved
            print(f"{case} {name}: {time.perf_counter() - began:.1f} s", flush=True)
        if "-4" not in case:
            found |= resumed(case, runs["2x4"], [(name, runs[name]) for name in ("4x2", "1x1") if name in runs])
    np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1])
