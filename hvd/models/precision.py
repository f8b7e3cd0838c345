"""Which parameters can be kept in the type that the model computes in, bfloat16, and which must stay float32.

The matrices of the language model's and the image tower's layers are cast at each use: kept narrow they give the very
same numbers. Norms, patches, position embeddings and everything outside the trunk take part in float32.
"""

from collections.abc import Callable

import jax.numpy as jnp

type Name = tuple[str, ...]  # ("PaliGemma", "llm", "layers", ...)
type DtypeOf = Callable[[Name, bool], jnp.dtype]  # (parameter, is it frozen) -> how it is kept


def cast_at_use(name: Name) -> bool:
    """True where the model itself casts the parameter to the type it computes in, before anything else."""
    if any("norm" in part.lower() for part in name):
        return "Dense_0" in name  # of an adaptive norm (pi0.5)
    if "llm" in name:
        return "layers" in name
    return "img" in name and ("encoderblock" in name or "head" in name)


def training(dtype: str) -> DtypeOf:
    """Trained parameters are float32; frozen ones narrow, the table of word embeddings too (as in openpi)."""

    def of(name: Name, frozen: bool) -> jnp.dtype:
        return jnp.dtype(dtype if frozen and (cast_at_use(name) or "embedder" in name) else "float32")

    return of


def inference(dtype: str) -> DtypeOf:
    """Narrow wherever it changes no number."""
    return lambda name, frozen: jnp.dtype(dtype if cast_at_use(name) else "float32")
