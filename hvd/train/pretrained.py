"""`weight_loader`: start from the parameters of an openpi checkpoint instead of random ones.

A checkpoint is an Orbax item {'params': tree}; openpi writes a trailing 'value' into each path, released checkpoints
do not: both are taken. Each array goes straight to its place on the mesh. What the checkpoint lacks (LoRA updates, the
value heads) stays as it was initialised; what the model lacks is left over; both are printed.
"""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from hvd.errors import UserError
from hvd.train import run_dir as runs
from hvd.train import state
from hvd.train.state import Graph, TrainState

type Path = tuple[str, ...]


def load(train_state: TrainState, path: str, graph: Graph) -> TrainState:
    """The state with all parameters that are in the checkpoint at `path` replaced; averages start from them.

    Raises:
        UserError: no checkpoint there, no array of it fits the model, or one has another shape (it is named).
    """
    if not path:
        return train_state
    folder = _folder(path)
    stored = _stored(folder)
    model = {
        tuple(name.split("/")): x
        for name, x in state.named(state.join(train_state.trained, train_state.frozen)).items()
    }
    shared = sorted(model.keys() & stored.keys())
    if not shared:
        raise UserError(f"weight_loader {path}: none of its {len(stored)} arrays is a parameter of this model")
    for name in shared:
        if stored[name][1] != model[name].shape:
            ours, theirs = list(model[name].shape), list(stored[name][1])
            raise UserError(f"weight_loader {path}: {'/'.join(name)} has shape {theirs} in it, the model needs {ours}")

    wanted = state.nest(
        {
            stored[name][0]: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in model.items()
            if name in stored
        }
    )
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
    restored = state.named(ocp.PyTreeCheckpointHandler().restore(folder, args=args))
    found = {name: restored["/".join(stored[name][0])] for name in shared}
    _report(path, model, stored, found)
    trained, frozen = graph.split(state.nest(model | found))
    return dataclasses.replace(
        train_state,
        trained=trained,
        frozen=frozen,
        ema=jax.tree.map(jnp.copy, trained) if train_state.ema else {},
        target=jax.tree.map(jnp.copy, trained) if train_state.target else {},
    )


def _folder(path: str) -> epath.Path:
    root = epath.Path(os.path.abspath(os.path.expanduser(path)) if runs.is_local(path) else path)
    for folder in (root, root / "params"):
        if (folder / "_METADATA").exists():
            return folder
    raise UserError(f"weight_loader {path}: no Orbax checkpoint there (no _METADATA); give the folder of its `params`")


def _stored(folder: epath.Path) -> dict[Path, tuple[Path, tuple[int, ...]]]:
    """The model's path of each stored array -> (path in the checkpoint, shape)."""
    found = {}
    for name, leaf in state.named(ocp.PyTreeCheckpointHandler().metadata(folder).tree).items():
        path = tuple(name.split("/"))
        plain = path[1:] if path[0] == "params" else path
        found[plain[:-1] if plain[-1] == "value" else plain] = (path, tuple(leaf.shape))
    return found


def _report(path: str, model: dict[Path, Any], stored: dict[Path, Any], found: dict[Path, Any]) -> None:
    fresh = sorted("/".join(name) for name in model.keys() - found.keys())
    left = sorted("/".join(name) for name in stored.keys() - model.keys())
    millions = sum(x.size for x in found.values()) / 1e6
    print(f"weight_loader {path}: {len(found)} arrays ({millions:.1f} M parameters) loaded", flush=True)
    for what, names in (("initialised", fresh), ("left over in the checkpoint", left)):
        if names:
            print(f"  {len(names)} {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}", flush=True)
