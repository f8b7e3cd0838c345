"""advantages.parquet: V, Q_i, A_i and omega_i of every frame, one row a frame; and meta.json, written after it.

    dataset ("optimal" | "suboptimal"), split ("train" | "val"), episode, frame, row (of the dataset), V, then for
    level i: Q_i (minimum of the twins), A_i, omega_i; the levels' names are in the file's metadata and in meta.json.

A and omega follow from V, Q and the policy's weighting, so a change of the weighting runs no network.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Float32, Int64

from hvd import files
from hvd.configs import Experiment
from hvd.data.dataset import Dataset
from hvd.errors import UserError
from hvd.fields import Mark, leaves, to_plain
from hvd.method import weights

PARQUET = "advantages.parquet"
META = "meta.json"


@dataclasses.dataclass(frozen=True)
class Values:
    """What the value model says about rows of one dataset."""

    rows: Int64[np.ndarray, " n"]
    v: Float32[np.ndarray, " n"]
    q: Float32[np.ndarray, "n l 2"]


def key(value_digest: str, datasets: Mapping[str, Dataset], rows: Mapping[str, np.ndarray]) -> str:
    """What V and Q depend on: the value checkpoint, the datasets, and which rows."""
    parts: list[Any] = [value_digest]
    for role in sorted(datasets):
        parts += [role, datasets[role].digest, hashlib.sha256(np.ascontiguousarray(rows[role], np.int64)).hexdigest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def weighting(cfg: Experiment) -> dict[str, Any]:
    """What A and omega depend on, given V and Q."""
    fields = [leaf for leaf in leaves(Experiment).values() if Mark.IN_TABLE in leaf.marks]
    names = {leaf.name: leaf.name.rpartition(".")[2].removeprefix("weight_") for leaf in fields}  # weight_clip: "clip"
    return {names[leaf.name]: to_plain(leaf.of(cfg)) for leaf in fields} | {"levels": list(cfg.level_names())}


def weigh(cfg: Experiment, values: Values) -> tuple[Float32[np.ndarray, "n l"], Float32[np.ndarray, "n l"]]:
    """(A_i, omega_i) of each row under the policy's weighting."""
    a = weights.advantages(jnp.asarray(values.v), jnp.asarray(values.q), cfg.policy.advantage)
    omega = weights.omega(
        a,
        cfg.policy.weighting,
        cfg.model.method,
        alpha=cfg.model.alpha,
        tau=cfg.model.tau,
        beta=cfg.policy.beta,
        clip=cfg.policy.weight_clip,
    )
    return np.asarray(a, np.float32), np.asarray(omega, np.float32)


def write(
    folder: epath.PathLike,
    cfg: Experiment,
    datasets: Mapping[str, Dataset],
    values: Mapping[str, Values],
    val_rows: Mapping[str, Int64[np.ndarray, " _"]],
    meta: Mapping[str, Any],
) -> None:
    """advantages.parquet, then meta.json: a table without its meta.json is not a table."""
    root = epath.Path(folder)
    tables = [_table(cfg, role, datasets[role], values[role], val_rows[role]) for role in sorted(values)]
    described = {"hvd": json.dumps({"levels": list(cfg.level_names())})}
    table = pa.concat_tables(tables).replace_schema_metadata(described)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    data = sink.getvalue()
    (root / META).unlink(missing_ok=True)
    files.write_atomic(root / PARQUET, data)
    record = {**meta, **weighting(cfg), "rows": table.num_rows, "sha256": hashlib.sha256(data).hexdigest()}
    files.write_atomic(root / META, json.dumps(record, indent=1))


def _table(cfg: Experiment, role: str, dataset: Dataset, values: Values, val_rows: np.ndarray) -> pa.Table:
    a, omega = weigh(cfg, values)
    position = dataset.episode_of[values.rows]
    starts = np.asarray([e.start for e in dataset.all_episodes], np.int64)
    numbers = np.asarray([e.index for e in dataset.all_episodes], np.int64)
    held_out = np.isin(values.rows, val_rows)
    columns: dict[str, Any] = {
        "dataset": pa.array([role] * len(values.rows)),
        "split": pa.array(np.where(held_out, "val", "train")),
        "episode": numbers[position],
        "frame": values.rows - starts[position],
        "row": values.rows,
        "V": values.v,
    }
    q = values.q.min(axis=-1)
    for name, array in (("Q", q), ("A", a), ("omega", omega)):
        columns |= {f"{name}_{i}": array[:, i] for i in range(array.shape[1])}
    return pa.table(columns)


def read_meta(folder: epath.PathLike) -> dict[str, Any] | None:
    """meta.json of a whole table, or None."""
    root = epath.Path(folder)
    if not (root / META).exists() or not (root / PARQUET).exists():
        return None
    try:
        return json.loads((root / META).read_text())
    except ValueError:
        return None  # it is written again


def read(folder: epath.PathLike) -> pa.Table:
    """The table; UserError when there is none or it is damaged."""
    root = epath.Path(folder)
    meta = read_meta(root)
    if meta is None:
        raise UserError(f"no advantages in {root}: run `hvd advantages`")
    data = (root / PARQUET).read_bytes()
    if hashlib.sha256(data).hexdigest() != meta["sha256"]:
        raise UserError(f"{root / PARQUET} is corrupted: delete {root / META} and run `hvd advantages` again")
    return pq.read_table(io.BytesIO(data))


def read_weights(folder: epath.PathLike, datasets: Mapping[str, Dataset]) -> dict[str, Float32[np.ndarray, "_ l"]]:
    """omega of each dataset's rows, [all rows of the dataset, levels]; NaN where the table has no such row."""
    table = read(folder)
    names = sorted((name for name in table.column_names if name.startswith("omega_")), key=lambda n: int(n[6:]))
    columns = {name: table[name].to_numpy() for name in ("row", *names)}
    role_of = table["dataset"].to_numpy(zero_copy_only=False)
    found = {}
    for role, dataset in datasets.items():
        here = role_of == role
        if not here.any():
            continue
        omega = np.full((dataset.num_frames, len(names)), np.nan, np.float32)
        omega[columns["row"][here]] = np.stack([columns[name][here] for name in names], axis=1)
        found[role] = omega
    return found
