"""Parameter trees of openpi's models at their real size, nothing allocated: names, shapes, types, what is frozen, and
along which axis FSDP splits each array.
"""

import json
from functools import cache
from pathlib import Path

import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from hvd.configs import ModelConfig
from hvd.models.pi0 import Pi0, freeze_filter
from hvd.train.mesh import Devices
from tests.models.golden import cases

pytestmark = pytest.mark.optimised


@cache
def openpis(case: Path) -> dict:
    return json.loads(case.read_text())


@cache
def ours(case: Path) -> dict:
    """name -> (shape, dtype, frozen)."""
    config = openpis(case)["config"]
    fields = ("action_dim", "action_horizon", "max_token_len", "dtype", "paligemma_variant", "action_expert_variant")
    cfg = ModelConfig(family="pi05" if config.get("pi05") else "pi0", **{name: config[name] for name in fields})
    shapes = nnx.eval_shape(lambda: Pi0(cfg, nnx.Rngs(0)))
    frozen = freeze_filter(cfg)
    return {
        "/".join(map(str, path)): (tuple(leaf.shape), str(leaf.dtype), frozen(path))
        for path, leaf in nnx.to_flat_state(nnx.state(shapes))
    }


@cases("tree_*.json")
def test_parameter_tree(case):
    tree = openpis(case)
    found = ours(case)
    assert found == {leaf["name"]: (tuple(leaf["shape"]), leaf["dtype"], leaf["frozen"]) for leaf in tree["leaves"]}
    assert len(found) == tree["n_leaves"]
    sizes = {leaf["name"]: leaf["n"] for leaf in tree["leaves"]}
    assert sum(sizes[name] for name, (_, _, frozen) in found.items() if frozen) == tree["n_frozen"]
    assert sum(sizes.values()) == tree["n_params"]


@cases("tree_*.json")
@pytest.mark.parametrize("fsdp", [2, 4, 8])
def test_where_fsdp_splits(case, fsdp):
    """openpi's rule, on float32, as hvd.train.mesh has it."""
    found = ours(case)
    devices = Devices(AbstractMesh((1, fsdp), ("data", "fsdp")))  # pyright: ignore[reportArgumentType]
    split = 0
    for leaf in openpis(case)["leaves"]:
        shape, _, _ = found[leaf["name"]]
        spec = [*devices.parameter(shape, "float32").spec]
        axis = spec.index("fsdp") if "fsdp" in spec else None
        assert axis == leaf["fsdp_axis_fp32"][str(fsdp)], leaf["name"]
        split += axis is not None
    if "base" in case.stem:
        assert split > 10, "a real model is split"
