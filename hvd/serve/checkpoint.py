"""A policy straight from a checkpoint in openpi's form (openpi's own, or of `hvd export`), without a run folder.

The config says sizes, robot and keys; the statistics are those beside the checkpoint (<folder>/assets/*/
norm_stats.json), else the experiment's shared ones.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from etils import epath

from hvd import documents, export
from hvd.configs import Experiment
from hvd.data import normalize
from hvd.data.transforms import InputTransform
from hvd.errors import UserError
from hvd.method import extraction
from hvd.models import precision, weights
from hvd.models.pi0 import Pi0
from hvd.storage import cache as storage
from hvd.train import compilation, inference, mesh, pretrained, state
from hvd.train import run_dir as runs
from hvd.train.state import Graph


class _Mark(msgspec.Struct):
    """What an export says of its run, as far as it matters here."""

    prefix_max: documents.Count = 0


def load_checkpoint(cfg: Experiment, path: str, int8: bool = False) -> inference.Policy:
    """The policy whose parameters are the checkpoint's, every one of them.

    openpi trains and samples with noise in the padded action dims too, so they get it here (an export of ours has
    zeros as the weights of those dims, where noise reaches nothing). `int8`: as load_policy's.

    Raises:
        UserError: no checkpoint there, one that lacks parameters or has other shapes, norm stats of another robot.
    """
    cfg = _as_trained(cfg, path)
    if extraction.extractor(cfg)[0].acts:
        print(f"note: a checkpoint holds the policy alone: it acts without the critic of {extraction.label(cfg)}")
    transform = InputTransform.from_config(cfg, stats_for(cfg, path))
    opened = pretrained.open_checkpoint(path, "--checkpoint")
    graph = Graph(lambda rngs: Pi0(cfg.model, rngs), dtype_of=precision.inference(cfg.model.dtype))
    model = state.named(graph.shapes)
    found = weights.match(opened, model)
    if found.initialised:
        raise UserError(
            f"{opened.source}: it lacks {len(found.initialised)} parameters of the model, {found.initialised[0]} "
            "first: choose the variants of the checkpoint (model.paligemma_variant, model.action_expert_variant)"
        )
    print("\n".join(weights.report(opened, found, model)), flush=True)
    compilation.use_cache()
    devices = mesh.make_devices(1, jax.local_devices()[:1])
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.parameter(x.shape, x.dtype))
        for name, x in model.items()
    }
    # No name for the arrays: what holds them here would keep all of them in memory beside the policy's own
    params = state.nest({tuple(name.split("/")): x for name, x in weights.read(opened, wanted).items()})
    if not bool(jnp.equal(jax.jit(state.all_finite)(params), 1.0)):
        raise UserError(f"{opened.source}: its parameters are not finite")
    return inference.Policy(cfg, transform, params, noisy=np.ones(cfg.model.action_dim, np.float32), int8=int8)


def _as_trained(cfg: Experiment, path: str) -> Experiment:
    """With the policy.prefix_max that an export of ours names; openpi's own checkpoints leave it to the config."""
    for folder in _folders(path):
        if (folder / export.MARK).is_file():
            prefix_max = documents.read(folder / export.MARK, _Mark).prefix_max
            return dataclasses.replace(cfg, policy=dataclasses.replace(cfg.policy, prefix_max=prefix_max))
    return cfg


def _folders(path: str) -> list[Path]:
    """Where what lies beside a local checkpoint may lie."""
    if storage.is_url(path):
        return []
    root = Path(path).expanduser()
    return [root, root.parent] if root.name == "params" else [root]


def stats_for(cfg: Experiment, path: str) -> normalize.Stats:
    """The norm stats beside a local checkpoint if there is exactly one file of them, else the experiment's."""
    found: list[Path] = []
    for folder in _folders(path):
        found += sorted((folder / "assets").glob(f"**/{runs.NORM_STATS}"))
    if not found:
        return normalize.load_shared(cfg)
    if len(found) > 1:
        raise UserError(f"--checkpoint {path}: {found[0]} and {found[1]} both lie beside it; leave the right one there")
    return normalize.load_for(cfg, epath.Path(found[0]))[0]
