"""hvd export --config NAME --to FOLDER: a complete run in openpi's own form, so that openpi's tools can load it.

    FOLDER/params/                              Orbax item {'params': tree}, each path ending in 'value'
    FOLDER/assets/<asset id>/norm_stats.json    the statistics, as openpi applies them
    FOLDER/hvd_export.json                      which run it is (openpi does not read it)

openpi serves a policy with a config whose model has the same sizes (the command prints them) and whose data have that
asset id: `create_trained_policy(config, FOLDER)`.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float32

from hvd import overrides
from hvd.checks import check_config
from hvd.configs import Experiment, NormConfig
from hvd.data import normalize
from hvd.errors import EXIT_COMPLETE, UserError
from hvd.method import policy, value
from hvd.models import weights
from hvd.train import checkpoints, complete, inference, mesh
from hvd.train import run_dir as runs
from hvd.train.state import Graph, Tree

MARK = "hvd_export.json"
_FLAGS = {
    "to": "the folder to make",
    "stage": "policy or value (openpi itself can serve a policy only)",
    "merge_lora": "add the LoRA updates to their weights: openpi's config without LoRA then serves it",
    "asset_id": "name of the norm stats in assets/; default: the optimal set's repo_id",
    "keep_padding": "write every bit; else the weights of action dims that the robot lacks are 0, as hvd itself acts",
}


@dataclass(frozen=True)
class Export:
    """The step's own options (`usage` says what each means)."""

    to: str = ""
    stage: Literal["policy", "value"] = "policy"
    merge_lora: bool = False
    asset_id: str = ""
    keep_padding: bool = False


def usage() -> str:
    lines = ["usage: hvd export --config NAME --to FOLDER [options] [--dotted.field value]...", ""]
    lines += [f"  --{name.replace('_', '-'):<14} {text}" for name, text in _FLAGS.items()]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Export one run; raises UserError. Nothing is written unless everything can be."""
    if "-h" in argv or "--help" in argv:
        print(usage())
        return EXIT_COMPLETE
    options, rest = parse(argv)
    cfg = overrides.experiment(rest)
    check_config(cfg)
    if not options.to:
        raise UserError("--to FOLDER is missing: where the export is to be")
    export(cfg, options)
    return EXIT_COMPLETE


def parse(argv: Sequence[str]) -> tuple[Export, list[str]]:
    """The step's own options, and the experiment's."""
    flags = overrides.split_flags(argv)
    own = [flag for flag in flags if flag.field.removeprefix("no_") in _FLAGS]
    rest = [arg for flag in flags if flag not in own for arg in (flag.token, *flag.values)]
    return overrides.apply(Export(), own), rest


def export(cfg: Experiment, options: Export) -> Path:
    """The run of `cfg` as a new folder `options.to`; the same export twice is made once.

    Raises:
        UserError: the run is not complete, or the folder holds something else.
    """
    stage, run = options.stage, getattr(cfg, f"{options.stage}_dir")
    target = Path(options.to).expanduser().absolute()
    found = complete.check_complete(run, stage=stage, cfg=cfg)
    asset = options.asset_id or cfg.optimal_data.repo_id or cfg.name
    if not all(part not in ("", ".", "..") for part in asset.split("/")):
        raise UserError(f"--asset-id {asset!r} is no name of a folder below assets/")
    mark = {
        "run": os.fspath(run),
        "stage": stage,
        "step": found.step,
        "digest": found.digest,
        "version": found.version,
        "asset_id": asset,
        "merge_lora": options.merge_lora,
        "keep_padding": options.keep_padding,
    }
    if _is_there(target, mark):
        print(f"{target}: this export is there already, nothing to do", flush=True)
        return target
    record = runs.read(run)
    if record is None:
        raise UserError(f"{run} has no {runs.CONFIG}: it is not a run directory")
    trained = record.config
    stats = normalize.load(epath.Path(run) / runs.NORM_STATS)
    params = exported(trained, stage, _restored(trained, stage, run, found.step), options)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            folder = Path(work) / target.name
            weights.write(folder / "params", params)
            normalize.save(epath.Path(folder / "assets" / asset / runs.NORM_STATS), openpi_stats(stats, trained.norm))
            (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
            if target.is_dir():  # empty, or _is_there would have refused
                target.rmdir()
            os.rename(folder, target)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--to {target}: cannot be written ({error.strerror})") from error
    _say(target, trained, options, params, asset)
    return target


def exported(cfg: Experiment, stage: str, params: Tree, options: Export) -> Tree:
    """The parameters as they are written: merged and with padding cut where that is asked for."""
    if stage == "policy" and not options.keep_padding:
        params = without_padding(params, inference.pad_mask(cfg))
    if options.merge_lora:
        model = cfg.model
        variants = (
            (model.paligemma_variant, model.action_expert_variant)
            if stage == "policy"
            else (model.value_paligemma_variant or model.paligemma_variant, model.value_expert_variant)
        )
        if not any("lora" in variant for variant in variants):
            raise UserError(f"--merge-lora: the {stage} run has no LoRA updates ({', '.join(variants)}); leave it out")
        params = weights.merge_lora(params, variants)
    return params


def without_padding(params: Tree, real: Float32[np.ndarray, " a"]) -> Tree:
    """A policy whose padded action dims (where `real` is 0) neither act nor are acted on.

    hvd gives those dims no noise, in training and in acting; openpi gives them noise. With these weights at 0 that
    noise reaches nothing, and openpi samples what hvd samples. They are never trained and never used here.
    """
    keep = jnp.asarray(real)
    first, last = params["action_in_proj"], params["action_out_proj"]
    return params | {
        "action_in_proj": first | {"kernel": first["kernel"] * keep[:, None].astype(first["kernel"].dtype)},
        "action_out_proj": {
            name: x * keep.reshape((1,) * (x.ndim - 1) + keep.shape).astype(x.dtype) for name, x in last.items()
        },
    }


def openpi_stats(stats: Mapping[str, normalize.NormStats], norm: NormConfig) -> normalize.Stats:
    """Statistics that give in openpi, which knows no floor, what hvd computes with norm.std_floor."""
    if not norm.std_floor:
        return dict(stats)
    found = {}
    for name, s in stats.items():
        half = (s.q99 - s.q01 + normalize.EPSILON) / 2  # hvd.data.normalize: shift q01 + half, scale max(half, floor)
        wide = np.maximum(half, norm.std_floor)
        low = np.where(wide > half, s.q01 + half - wide, s.q01)
        high = np.where(wide > half, low + 2 * wide - normalize.EPSILON, s.q99)
        found[name] = replace(s, std=np.maximum(s.std, norm.std_floor), q01=low, q99=high)
    return found


def _is_there(target: Path, mark: Mapping[str, Any]) -> bool:
    """This very export; False where there is nothing yet. UserError for anything else: it is not overwritten."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise UserError(f"--to {target} is a file; choose another folder")
    if not any(target.iterdir()):
        return False
    try:
        there = json.loads((target / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"--to {target} holds something else (it has no {MARK}); choose another folder") from None
    if there == dict(mark):
        return True
    different = sorted(name for name in there.keys() | mark.keys() if there.get(name) != mark.get(name))
    raise UserError(f"--to {target} holds another export (other {', '.join(different)}); delete it, or choose another")


def _restored(cfg: Experiment, stage: str, run: os.PathLike | str, step: int) -> Tree:
    """The run's parameters for inference in the types it keeps them in, spread over the devices of this machine."""
    devices = mesh.make_devices(jax.local_device_count(), jax.local_devices())
    graph: Graph = policy.make_graph(cfg) if stage == "policy" else value.make_graph(cfg)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=devices.parameter(x.shape, x.dtype)), graph.shapes
    )
    return checkpoints.restore_params(run, step, like)


def _say(target: Path, cfg: Experiment, options: Export, params: Tree, asset: str) -> None:
    arrays = jax.tree.leaves(params)
    millions = sum(x.size for x in arrays) / 1e6
    print(f"{target}: {len(arrays)} arrays, {millions:.1f} M parameters, norm stats {asset}", flush=True)
    if options.stage == "value":
        return
    model = cfg.model
    names = [model.paligemma_variant, model.action_expert_variant]
    if options.merge_lora:
        names = [name.removesuffix("_lora") for name in names]
    print(
        f"openpi: Pi0Config(action_dim={model.action_dim}, action_horizon={model.action_horizon}, "
        f"max_token_len={model.max_token_len}, paligemma_variant={names[0]!r}, action_expert_variant={names[1]!r}), "
        f"AssetsConfig(asset_id={asset!r}), use_quantile_norm {cfg.norm.mode == 'quantile'}"
        + (", DeltaActions for the position dims" if cfg.norm.delta_actions else ""),
        flush=True,
    )
