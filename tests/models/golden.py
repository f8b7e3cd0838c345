"""openpi's golden arrays: which cases a folder holds, and the sizes of their models, read off the arrays themselves."""

import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from hvd.models import gemma, siglip
from hvd.models.lora import LoraConfig
from tests.folders import golden_files

F32 = {"rtol": 1e-5, "atol": 1e-5}
Arrays = dict[str, np.ndarray]


def cases(*patterns: str):
    """Parametrise a test over the golden files whose names match, as argument `case`."""
    missing = pytest.param(None, marks=pytest.mark.skip(reason=f"HVD_GOLDEN: no folder with {' or '.join(patterns)}"))
    files = golden_files(*patterns)
    return pytest.mark.parametrize("case", [pytest.param(f, id=f.stem) for f in files] or [missing])


@cache
def load(case: Path) -> Arrays:
    """All arrays of a file, in its order."""
    with np.load(case) as arrays:
        return {name: arrays[name] for name in arrays.files}


def need(arrays: Arrays, *names: str):
    """Skip a test of arrays that this case of the kind does not have."""
    for name in names:
        if name not in arrays:
            pytest.skip(f"HVD_GOLDEN: the case has no {name}")


def below(arrays: Arrays, prefix: str) -> Arrays:
    """Arrays whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def section(case: Path) -> str:
    """What the folder's README says of the case; "" where it says nothing."""
    readme = case.parent / "README.md"
    text = readme.read_text() if readme.is_file() else ""
    found = re.search(rf"^## {re.escape(case.name)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found.group(1) if found else ""


def dtype(case: Path):
    return jnp.bfloat16 if "bf16" in case.stem else jnp.float32


def lora_config(case: Path, rank: int) -> LoraConfig:
    """Strength of the updates: the case's name and the README tell, the arrays do not."""
    arrays = load(case)
    found = re.search(r"alpha[ =]+(\d+(?:\.\d+)?)", section(case))
    alpha = float(arrays["alpha"]) if "alpha" in arrays else float(found.group(1)) if found else 8.0
    return LoraConfig(rank, alpha, rslora="rslora" in case.stem)


def gemma_config(case: Path, params: Arrays, expert: int = 0, stacked: bool = True) -> gemma.Config:
    """Sizes of one expert. `params` are named as below `llm`; without `stacked` they are one attention's own."""
    suffix = f"_{expert}" if expert else ""
    prefix = "layers/attn/" if stacked else ""

    def attention(name):
        return params.get(f"{prefix}{name}{suffix}/w")

    q, kv, qkv = attention("q_einsum"), attention("kv_einsum"), attention("qkv_einsum")
    if q is None:
        heads, width, head_dim = qkv.shape[-3:]
        kv_heads = heads
    else:
        heads, width, head_dim = q.shape[-3:]
        kv_heads = kv.shape[-3]
    lora = params.get(f"{prefix}attn_vec_einsum{suffix}/lora_a")
    dense = params.get(f"layers/pre_attention_norm{suffix}/Dense_0/kernel")
    linear = params.get(f"layers/mlp{suffix}/linear")
    return gemma.Config(
        width=width,
        depth=linear.shape[0] if stacked else 1,
        mlp_dim=linear.shape[1] if stacked else 1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        lora=None if lora is None else lora_config(case, lora.shape[-1]),
        cond_width=0 if dense is None else dense.shape[-2],
    )


def num_experts(params: Arrays) -> int:
    return 1 + sum(re.fullmatch(r"layers/mlp_\d+/linear", name) is not None for name in params)


def siglip_config(params: Arrays) -> siglip.Config:
    """Sizes of an image tower."""
    block = "Transformer/encoderblock/"
    depth, width, heads, _ = params[f"{block}MultiHeadDotProductAttention_0/query/kernel"].shape
    mlp = params[f"{block}MlpBlock_0/Dense_0/kernel"].shape[-1]
    return siglip.Config(width, depth, mlp, heads, patch=params["embedding/kernel"].shape[0])


def build(make, params: Arrays):
    """The module that `make(rngs)` describes with the golden parameters; their names and shapes must be equal."""
    shape = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphdef, state = nnx.split(shape)
    ours = {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}
    assert ours == {name: x.shape for name, x in params.items()}
    return nnx.merge(graphdef, nested(params))


def nested(params: Arrays):
    """Flat names to nested dicts of jax arrays."""
    tree: dict = {}
    for name, x in params.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jnp.asarray(x)
    return tree


def flat(tree) -> Arrays:
    """Nested dicts of arrays to flat names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): np.asarray(x) for path, x in leaves}


def close(actual, expected, case: Path | None = None, where=None):
    """Equal within 1e-5 in float32, within bfloat16 rounding in a case of that type; `where` selects rows."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    if where is not None:
        actual, expected = actual[where], expected[where]
    if case is not None and dtype(case) == jnp.bfloat16:
        scale = np.max(np.abs(expected), initial=1e-3)
        assert_allclose(actual, expected, rtol=2e-2, atol=2e-2 * scale)
    else:
        assert_allclose(actual, expected, **F32)
