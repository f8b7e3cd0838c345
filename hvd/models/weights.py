"""Parameters in openpi's checkpoints: what one holds, which of it a model takes, reading it in parts, writing it.

A checkpoint is an Orbax (OCDBT) item {'params': tree}. openpi writes a trailing 'value' into each path, released
checkpoints do not: both are taken, in float32 and bfloat16. Arrays go straight to their place on the mesh in the type
that the model keeps them in; a process reads the chunks that its devices need and no others.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jaxtyping import Array, Float

from hvd.errors import Stopped, UserError
from hvd.models import gemma

type Tree = dict[str, Any]
type Named = Mapping[str, Any]  # "a/b/c" -> leaf

_READ_GB = 8  # of arrays being read at a time: bounds the host's memory, a checkpoint in whole chunks may be large


@dataclass(frozen=True)
class Stored:
    """An array of a checkpoint: its path there, shape, type."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; `arrays` by the model's names. `source` is what the user wrote, for messages."""

    source: str
    folder: epath.Path
    arrays: Mapping[str, Stored]


@dataclass(frozen=True)
class Match:
    """Names of a model's parameters that a checkpoint has, of those it has not, and of arrays that no parameter takes.

    Attributes:
        loaded: to be taken from the checkpoint.
        initialised: the model's, not in the checkpoint.
        left: in the checkpoint, not in the model.
        others: in both, but of another model's own part (the second expert and its projections), so not taken.
    """

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    left: tuple[str, ...]
    others: tuple[str, ...]


def open_checkpoint(path: os.PathLike | str, source: str = "") -> Checkpoint:
    """The checkpoint in a local folder, or in its sub-folder `params`. UserError (it begins with `source`) else."""
    source = source or os.fspath(path)
    root = epath.Path(os.path.abspath(os.path.expanduser(path)))
    folder = next((f for f in (root, root / "params") if (f / "_METADATA").exists()), None)
    if folder is None:
        raise UserError(f"{source}: no Orbax checkpoint there (no _METADATA); give the folder of its `params`")
    try:
        leaves: dict[tuple, Any] = traverse_util.flatten_dict(ocp.PyTreeCheckpointHandler().metadata(folder).tree)
        arrays = {
            _plain(key): Stored(tuple(map(str, key)), tuple(leaf.shape), leaf.dtype) for key, leaf in leaves.items()
        }
    except Exception as error:  # Orbax and tensorstore raise errors of many kinds for files that are damaged
        raise UserError(f"{source}: {folder} is no readable Orbax checkpoint ({_line(error)})") from error
    if not arrays:
        raise UserError(f"{source}: the checkpoint {folder} holds no array")
    return Checkpoint(source, folder, arrays)


def _plain(key: tuple) -> str:
    parts = [str(part) for part in key]
    if parts[0] == "params":
        parts = parts[1:]
    return "/".join(parts[:-1] if parts[-1] == "value" else parts)


def is_trunk(name: str) -> bool:
    """Belongs to PaliGemma: the image tower, the embedder, the first expert; not to a second expert or a head."""
    parts = name.split("/")
    second = len(parts) > 1 and parts[1] == "llm" and re.search(r"_1(/|$)", name) is not None
    return parts[0] == "PaliGemma" and not second


def _kind(names: Named) -> str:
    """Whose second expert it is: the value model's, the policy's, or neither's (PaliGemma alone)."""
    heads = {name.partition("/")[0] for name in names}
    return "value model" if "v_head" in heads else "policy" if "action_out_proj" in heads else ""


def _family(names: Named) -> str:
    """pi0's expert takes the time with the actions, pi0.5's in its norms."""
    heads = {name.partition("/")[0] for name in names}
    return "pi05" if "time_mlp_in" in heads else "pi0" if "action_time_mlp_in" in heads else ""


def match(checkpoint: Checkpoint, model: Named) -> Match:
    """What of a checkpoint the model (name -> anything with a shape) takes.

    The second expert reads other inputs in the policy than in the value model: from a checkpoint of the other kind only
    PaliGemma is taken, whatever the other sizes are.

    Raises:
        UserError: an array that is to be taken has another shape (it is named), or there is none; a policy of the other
            family.
    """
    stored = checkpoint.arrays
    families = _family(stored), _family(model)
    if all(families) and families[0] != families[1]:
        raise UserError(
            f"{checkpoint.source}: a checkpoint of {families[0]}, the model is {families[1]}: set model.family "
            f"{families[0]}, or name a checkpoint of {families[1]}"
        )
    kinds = _kind(stored), _kind(model)
    common = sorted(stored.keys() & model.keys())
    loaded = [name for name in common if kinds[0] == kinds[1] or not all(kinds) or is_trunk(name)]
    if not loaded:
        raise UserError(f"{checkpoint.source}: none of its {len(stored)} arrays is a parameter of this model")
    for name in loaded:
        if stored[name].shape != tuple(model[name].shape):
            raise UserError(_misfit(checkpoint.source, name, stored[name].shape, tuple(model[name].shape)))
    return Match(
        tuple(loaded),
        tuple(sorted(model.keys() - set(loaded))),
        tuple(sorted(stored.keys() - model.keys())),
        tuple(sorted(set(common) - set(loaded))),
    )


def _misfit(source: str, name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> str:
    text = f"{source}: {name} has shape {list(theirs)} in it, the model needs {list(ours)}"
    if name.endswith("img/pos_embedding"):
        side = round(theirs[1] ** 0.5)
        return f"{text}: it was trained on images of {side}x{side} patches; set model.image_size to {side} patches"
    if name.endswith("input_embedding") and theirs[-1] == ours[-1]:
        return f"{text}: set model.vocab_size {theirs[0]}"
    if name.startswith(("action_", "state_proj", "time_")):
        return f"{text}: model.action_dim and model.action_expert_variant must be those of the checkpoint"
    return f"{text}: choose the variants (model.paligemma_variant, ...) of the checkpoint"


def report(checkpoint: Checkpoint, found: Match, model: Named) -> list[str]:
    """Lines that say what was loaded, what starts fresh, what is left over; no array goes without a word."""
    millions = sum(math.prod(model[name].shape) for name in found.loaded) / 1e6
    lines = [f"{checkpoint.source}: {len(found.loaded)} arrays ({millions:.1f} M parameters) loaded"]
    if found.initialised:
        lines.append(f"  {len(found.initialised)} initialised: {_folded(found.initialised)}")
    if found.others:
        what = f"of the {_kind(checkpoint.arrays)}'s own expert, which reads other inputs"
        lines.append(f"  {len(found.others)} not taken, being {what}: {_folded(found.others)}")
    if found.left:
        lines.append(f"  {len(found.left)} left over in the checkpoint: {_folded(found.left)}")
        lora = sum("lora" in name for name in found.left)
        if lora and not any("lora" in name for name in model):
            lines.append(
                f"  WARNING: {lora} of those are LoRA updates: without them this is the base model. Choose variants "
                "with _lora, or merge the updates first (hvd export --merge-lora)"
            )
    return lines


def _folded(names: tuple[str, ...]) -> str:
    """All names, those of one folder together: a/b/{c, d}."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, leaf = name.rpartition("/")
        folders.setdefault(folder, []).append(leaf)
    return ", ".join(
        f"{folder}/{{{', '.join(leaves)}}}"
        if folder and len(leaves) > 1
        else ", ".join(f"{folder}/{x}".lstrip("/") for x in leaves)
        for folder, leaves in folders.items()
    )


def read(checkpoint: Checkpoint, wanted: Named) -> dict[str, Array]:
    """Arrays by name, placed and typed as `wanted` says (jax.ShapeDtypeStruct with sharding, by name).

    All processes call it together. A failing disk or a damaged file is a UserError.
    """
    item = traverse_util.unflatten_dict(
        {
            checkpoint.arrays[name].path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in wanted.items()
        }
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_READ_GB)
    try:
        restored: dict[tuple, Any] = traverse_util.flatten_dict(handler.restore(checkpoint.folder, args=args))
        return {name: restored[checkpoint.arrays[name].path] for name in wanted}
    except (Stopped, MemoryError, jax.errors.JaxRuntimeError):  # of the process and its devices, not of the file
        raise
    except Exception as error:  # Orbax and tensorstore raise errors of many kinds for files that are damaged
        raise UserError(f"{checkpoint.source}: {checkpoint.folder} cannot be read: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def write(folder: os.PathLike | str, params: Tree) -> None:
    """A new folder in openpi's own form: {'params': tree}, each path ending in 'value'. Arrays may lie on a mesh."""
    tree = {"params": jax.tree.map(lambda x: {"value": x}, params)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(epath.Path(os.path.abspath(folder)), tree)


# -------------------------------------------------------------------------------------------------------------- LoRA


def merge_lora(params: Tree, variants: tuple[str, str]) -> Tree:
    """The parameters without LoRA: each update added to its weight, in float32, so that the plain model computes the
    same.

    Args:
        params: of a Pi0 or a value model.
        variants: of its two experts (hvd.models.gemma.VARIANTS); they know the updates' strength.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    merged = {name: x for name, x in flat.items() if "lora" not in name}
    scales = [c.lora.scale if c.lora else 0.0 for c in map(gemma.get_config, variants)]
    for name, a in flat.items():
        if not name.endswith("lora_a"):
            continue
        b = flat[f"{name[:-1]}b"]
        if name.endswith("/lora_a"):  # attention: <einsum>[_1]/{w, lora_a, lora_b}
            base = f"{name.removesuffix('lora_a')}w"
            second = name.split("/")[-2].endswith("_1")
            summed = "attn_vec_einsum" in name
            update = scales[second] * _product(a, _sum_of_heads(b) if summed else b)
        else:  # feed-forward: its updates are added unscaled (hvd.models.lora)
            base = name.removesuffix("_lora_a")
            update = _product(a, b)
        merged[base] = (merged[base].astype(jnp.float32) + update).astype(jnp.float32)
    return traverse_util.unflatten_dict(merged, sep="/")


def _product(a: Float[Array, "*n i r"], b: Float[Array, "*m r o"]) -> Float[Array, "..."]:
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _sum_of_heads(b: Float[Array, "*l n r o"]) -> Float[Array, "*l n r o"]:
    """The output projection sums over the heads on the way down and again on the way up (as openpi does)."""
    return jnp.broadcast_to(jnp.sum(b.astype(jnp.float32), axis=-3, keepdims=True), b.shape)
