"""B1: a checkpoint that openpi wrote, read into a real Pi0 of its size, gives openpi's own losses and actions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import SingleDeviceSharding
from numpy.testing import assert_array_equal

from hvd.models import weights
from tests.models.golden import below, cases, close, load
from tests.models.golden_pi0 import Pi0Case, pi0_case

pytestmark = pytest.mark.optimised


def placed(opened: weights.Checkpoint, model: dict) -> dict:
    """All of the model's arrays, from the checkpoint."""
    found = weights.match(opened, model)
    assert set(found.loaded) == set(model), (found.initialised, found.others)
    place = SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in model.items()}
    return weights.read(opened, wanted)


def arrays_of(case):
    """orbax_tiny is a checkpoint of pi0_tiny, orbax_pi05_tiny one of pi05_tiny."""
    name = case.name.removeprefix("orbax_")
    return case.parent / f"{name if name.startswith('pi0') else f'pi0_{name}'}.npz"


def loaded_case(case) -> Pi0Case:
    """The golden case of the same name, with zeros for parameters and then those of the checkpoint."""
    arrays = arrays_of(case)
    if not arrays.exists():
        pytest.skip(f"HVD_GOLDEN: {case.name} has no {arrays.name} beside it")
    golden = pi0_case(arrays)
    parts = [traverse_util.flatten_dict(part, sep="/") for part in (golden.trainable, golden.frozen)]
    params = sorted(case.glob("*/params"))[-1]
    read = placed(weights.open_checkpoint(params), parts[0] | parts[1])
    trainable, frozen = (traverse_util.unflatten_dict({k: read[k] for k in part}, sep="/") for part in parts)
    return dataclasses.replace(golden, trainable=trainable, frozen=frozen)


@cases("orbax_*")
def test_openpis_checkpoint(case):
    c = loaded_case(case)
    both = traverse_util.flatten_dict(c.trainable, sep="/") | traverse_util.flatten_dict(c.frozen, sep="/")
    stored = below(c.a, "p/")
    assert set(both) == set(stored)
    for name, x in stored.items():
        assert_array_equal(np.asarray(both[name]), x, name)
    a = load(arrays_of(case))
    (mean, (loss, *_)), _ = c.loss_and_grad(c.trainable, jnp.asarray(a["noise"]), jnp.asarray(a["time"]))
    close(loss, a["loss"], case)
    close(mean, a["loss"].mean(), case)
    act = jax.jit(c.model().sample_actions)
    steps = [name for name in a if name.startswith("sample_steps")]
    assert steps
    for name in steps:
        close(act(c.obs, jnp.asarray(a["noise"]), jnp.int32(name.removeprefix("sample_steps"))), a[name], case)
