"""Checkpoints and meshes of many devices, in processes of their own: `python -m tests.train.reading COMMAND ...`.

write CHECKPOINT      makes one, sharded over this process's devices
read CHECKPOINT OUT   reads it onto the mesh of all processes; OUT (.json): what this one read, what it then holds
identity FOLDER       a full and a LoRA pi0, written from one mesh and read onto another: not a bit is different
"""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from hvd.method import policy
from hvd.models import weights
from hvd.train import mesh, parameter_rules, state
from tests.train import factory

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


def identity(folder: str) -> None:
    parameter_rules.PARAMETER_RULES = ((2, 1 << 10, "largest"), (0, 0, "copy"))  # so that a tiny model is split
    for variant in ("dummy", "dummy_lora"):
        cfg = factory.experiment(Path("nowhere"), model=factory.model(
            paligemma_variant=variant, action_expert_variant=variant, dtype="bfloat16"))  # fmt: skip
        graph = policy.make_graph(cfg)
        trees = []
        for count in (4, 2):
            devices = mesh.make_devices(count, jax.devices()[:count])
            like = state.named(jax.tree.map(lambda x, d=devices: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=d.parameter(x.shape, x.dtype)), graph.shapes))  # fmt: skip
            if not trees:
                shardings = state.nest({tuple(name.split("/")): x.sharding for name, x in like.items()})
                params = jax.jit(graph.init, out_shardings=shardings)(jax.random.key(1))
                weights.write(f"{folder}/{variant}", params)
                trees.append(state.named(params))
            else:
                opened = weights.open_checkpoint(f"{folder}/{variant}")
                assert set(weights.match(opened, like).loaded) == set(like)
                trees.append(weights.read(opened, like))
        written, read = trees
        split = [name for name, x in written.items() if not x.sharding.is_fully_replicated]
        assert len(split) > 10 and written.keys() == read.keys()
        for name, x in written.items():
            assert read[name].dtype == x.dtype and np.asarray(x).tobytes() == np.asarray(read[name]).tobytes(), name
        frozen = {str(x.dtype) for name, x in read.items()}
        assert frozen == ({"bfloat16", "float32"} if "lora" in variant else {"float32"})


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    {"write": write, "read": read, "identity": identity}[sys.argv[1]](*sys.argv[2:])
