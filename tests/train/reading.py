"""One process of a group that reads a checkpoint onto the mesh of all of them.

`python -m tests.train.reading write|read CHECKPOINT [OUT]`: write makes it, sharded over this process's devices; read
writes to OUT (.json) what this process read from disk and what it then holds.
"""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from hvd.models import weights
from hvd.train import mesh

SHAPES = {"PaliGemma/llm/large": (4, 1024, 2048), "PaliGemma/llm/norm": (2048,), "head/kernel": (2048, 1024)}
SIZE = 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random, so that compression does not make them small."""
    return np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)


def bytes_read() -> int:
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])


def write(folder: str) -> None:
    devices = mesh.make_devices(len(jax.devices()))
    placed = {
        name: jax.device_put(numbers(name, shape), devices.parameter(shape, "float32"))
        for name, shape in SHAPES.items()
    }
    llm = {leaf: placed[f"PaliGemma/llm/{leaf}"] for leaf in ("large", "norm")}
    weights.write(folder, {"PaliGemma": {"llm": llm}, "head": {"kernel": placed["head/kernel"]}})


def read(folder: str, out: str) -> None:
    mesh.initialize()
    devices = mesh.make_devices(len(jax.devices()), nodes=dict.fromkeys(range(jax.process_count()), 0))
    kept = {name: jnp.bfloat16 if "large" in name else jnp.float32 for name in SHAPES}
    wanted = {
        name: jax.ShapeDtypeStruct(shape, kept[name], sharding=devices.parameter(shape, "float32"))
        for name, shape in SHAPES.items()
    }
    opened = weights.open_checkpoint(folder)
    before = bytes_read()
    arrays = jax.block_until_ready(weights.read(opened, wanted))
    found = {
        "bytes": bytes_read() - before,
        "held": max(
            sum(s.data.nbytes for x in arrays.values() for s in x.addressable_shards if s.device == device)
            for device in jax.local_devices()
        ),
        "parts": {name: [list(s.data.shape) for s in x.addressable_shards] for name, x in arrays.items()},
        "right": all(
            np.array_equal(s.data, numbers(name, SHAPES[name])[s.index].astype(kept[name]))
            for name, x in arrays.items()
            for s in x.addressable_shards
        ),
        "devices": jax.device_count(),
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    {"write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
