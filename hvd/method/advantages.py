"""The advantages pass: V, Q_i, A_i, omega_i once for every frame that the policy run visits. `hvd advantages`.

The value model is frozen by now, so the policy stage needs no value network. V and Q are keyed by the value
checkpoint, the datasets and the rows; A and omega follow from them and the policy's weighting, so a change of the
weighting runs no network. The expert ratio is fitted here too, where policy.score asks for it. A table whose key is the
present one is used as it is.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Int64

from hvd import files, mixture
from hvd.configs import Experiment
from hvd.data import normalize
from hvd.data.dataset import Dataset, split_episodes
from hvd.errors import Lost, UserError
from hvd.fields import Mark, leaves, to_plain
from hvd.method import expert_ratio, extraction, objectives, table, value_run, weights
from hvd.method.table import Advantages
from hvd.runtime import preemption, watchdog
from hvd.train import mesh, stage_data, value_pass
from hvd.train import run_dir as runs
from hvd.train.complete import Complete
from hvd.train.inputs import check_writable
from hvd.train.mesh import Devices
from hvd.train.value_pass import Values


def main(cfg: Experiment) -> None:
    """Make the table of the experiment, unless it is there."""
    with preemption.catch():
        if not value_run.needed(cfg):
            print("policy.weighting none: imitation needs no advantages", flush=True)
            return
        value = value_run.check(cfg)
        devices = mesh.start(cfg)
        ensured(cfg, devices, value, {name: stage_data.open_dataset(cfg, name) for name in mixture.weighted(cfg)})


def ensured(cfg: Experiment, devices: Devices, value: Complete, datasets: Mapping[str, Dataset]) -> Advantages:
    """The table of `datasets` under the policy's weighting, made first where it is missing. All processes together.

    Runs of one experiment share its folder: none writes it while another one makes or reads its own.

    Raises:
        Lost: another run has written its own all the same (storage without locks).
    """
    folder = epath.Path(cfg.advantages_dir)
    with _locked(folder) if devices.is_main else contextlib.nullcontext():
        meta = ensure(cfg, devices, value, datasets)
        found, there = Advantages.read(folder), table.read_meta(folder) or {}
        devices.barrier("advantages read")
    if any(there.get(name) != content for name, content in meta.items()):
        raise Lost(f"{folder}: another run of this experiment has written its own advantages meanwhile")
    return found


def _locked(folder: epath.Path) -> contextlib.AbstractContextManager:
    """One process at a time makes or reads the table; what killed ones have left half written is removed."""
    if not files.is_local(folder) or (folder.exists() and not os.access(folder, os.W_OK)):
        return contextlib.nullcontext()
    said = False

    def wait() -> None:
        nonlocal said
        if not said:
            print(f"{folder}: waiting for another run of this experiment, which makes its advantages", flush=True)
        said = True
        preemption.check("while another run made its advantages")
        time.sleep(0.2)

    return files.locked(Path(folder) / ".lock", wait)


def ensure(cfg: Experiment, devices: Devices, value: Complete, datasets: Mapping[str, Dataset]) -> dict[str, Any]:
    """Compute what is missing of the table of `datasets` and write it; its meta.json. Under the lock of `ensured`."""
    if value.inputs["norm_stats"] != runs.stats_digest(normalize.load_shared(cfg)):
        raise UserError(f"the norm stats changed since {cfg.value_run_dir} was trained: train the value run again")
    folder = epath.Path(cfg.advantages_dir)
    rows = {name: data.rows() for name, data in datasets.items()}
    key = values_key(value.digest, datasets, rows)
    meta = {"key": key, "value_digest": value.digest, "datasets": {name: d.digest for name, d in datasets.items()}}
    meta |= weighting_key(cfg)
    compared = None
    if extraction.needs_ratio(cfg):
        compared = expert_ratio.Compared.open(cfg, datasets, values_key)
        meta["ratio"] = compared.key
    known = table.read_meta(folder) or {}
    if devices.from_main(np.asarray(all(known.get(name) == content for name, content in meta.items()))):
        if devices.is_main:
            print(f"{folder}: up to date, {known['rows']} frames", flush=True)
        return meta
    check_writable(cfg.advantages_dir)
    seen = compared is not None and compared.needs_seen
    shards = value_pass.Shards(folder / "shards" / (key[:16] + "-seen" * seen), seen)
    if devices.is_main:
        for killed in (folder, shards.folder):
            files.remove_left_over(killed)
    with preemption.deferred(), watchdog.watch(cfg.hang_timeout):
        values = value_pass.evaluate(cfg, devices, datasets, rows, shards)
        ratios = compared.fit(cfg, devices, value.digest, values, folder / "shards") if compared else {}
    if devices.is_main:
        held_out = {n: split_episodes(d, cfg.evaluate.val_fraction, cfg.seed)[1] for n, d in datasets.items()}
        made = [
            dataclasses.replace(weigh(cfg, n, datasets[n], values[n], held_out[n]), **ratios.get(n, {}))
            for n in sorted(values)
        ]
        Advantages.joined(made).write(folder, meta)
        _print_summary(folder)
    devices.barrier("advantages")
    return meta


def weigh(
    cfg: Experiment, name: str, dataset: Dataset, values: Values, held_out: Int64[np.ndarray, " _"]
) -> Advantages:
    """The table's rows of one set: A_i and omega_i under the policy's weighting. `held_out`: rows of its "val"."""
    a = weights.advantages(jnp.asarray(values.v), jnp.asarray(values.q), cfg.policy.advantage)
    position = dataset.episode_of[values.rows]
    starts, numbers = (np.asarray([getattr(e, x) for e in dataset.all_episodes], np.int64) for x in ("start", "index"))
    return Advantages(
        levels=cfg.level_names(),
        dataset=np.full(len(values.rows), name, object),
        split=np.where(np.isin(values.rows, held_out), "val", "train"),
        episode=numbers[position],
        frame=values.rows - starts[position],
        row=values.rows,
        v=values.v,
        q=values.q.min(axis=-1),
        a=np.asarray(a, np.float32),
        omega=np.asarray(weights.omega(a, cfg), np.float32),
    )


def values_key(value_digest: str, datasets: Mapping[str, Dataset], rows: Mapping[str, np.ndarray]) -> str:
    """What V and Q depend on: the value checkpoint, the datasets, and which rows."""
    parts: list[Any] = [value_digest]
    for name in sorted(datasets):
        parts += [name, datasets[name].digest, hashlib.sha256(np.ascontiguousarray(rows[name], np.int64)).hexdigest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def weighting_key(cfg: Experiment) -> dict[str, Any]:
    """What A and omega depend on, given V and Q."""
    fields = [leaf for leaf in leaves(Experiment).values() if Mark.IN_TABLE in leaf.marks]
    names = {leaf.name: leaf.name.rpartition(".")[2].removeprefix("weight_") for leaf in fields}  # weight_clip: "clip"
    key = {names[leaf.name]: to_plain(leaf.of(cfg)) for leaf in fields} | {"levels": list(cfg.level_names())}
    declared = {**objectives.OBJECTIVES[cfg.model.method].parameters, **weights.weighting(cfg).parameters}
    values = objectives.parameters(cfg) | weights.parameters(cfg)
    further = {name: value for name, value in values.items() if not declared[name].field}
    return key | ({"parameters": further} if further else {})


def _print_summary(folder: epath.Path) -> None:
    made = Advantages.read(folder)
    print(f"{folder / table.PARQUET}: {len(made.row)} frames", flush=True)
    for i, name in enumerate(made.levels):
        a, (low, middle, high) = made.a[:, i], np.quantile(made.omega[:, i], [0.05, 0.5, 0.95])
        spread = f"A {a.mean():+.3f} +- {a.std():.3f}, weights 5/50/95 % {low:.3f} {middle:.3f} {high:.3f}"
        print(f"  {name}: {spread}", flush=True)
