"""The image tower against openpi's arrays."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hvd.models.siglip import SigLIP
from tests.models.golden import below, build, cases, close, load, siglip_config

pytestmark = pytest.mark.optimised


@cases("siglip_*.npz")
def test_siglip(case):
    a = load(case)
    params = below(a, "p/")
    images = jnp.asarray(a["image"])
    sizes = siglip_config(params), params["head/kernel"].shape[-1], images.shape[1:3]
    tower = build(partial(SigLIP, *sizes, jnp.dtype(jnp.float32)), params)
    close(tower(images), a["out"])
    if "encoded" in a:
        close(tower.encode(images), a["encoded"])
    if "with_posemb" in a:
        close(tower.patches(images), a["with_posemb"])
    if "out_bf16" in a:
        half = build(partial(SigLIP, *sizes, jnp.dtype(jnp.bfloat16)), params)
        out = np.asarray(nnx.jit(lambda m, x: m(x))(half, images), np.float32)
        scale = np.abs(a["out_bf16"]).max()
        np.testing.assert_allclose(out, a["out_bf16"], rtol=2e-2, atol=2e-2 * scale)
