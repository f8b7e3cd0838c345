"""hvd export --config NAME --to FOLDER: a complete run in openpi's own form, so that openpi's tools can load it.

    FOLDER/params/                              Orbax item {'params': tree}, each path ending in 'value'
    FOLDER/assets/<asset id>/norm_stats.json    the statistics, as openpi applies them
    FOLDER/hvd_export.json                      which run it is (openpi does not read it)

openpi serves a policy with a config whose model has the same sizes (the command prints them) and whose data have that
asset id: `create_trained_policy(config, FOLDER)`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hvd import documents, files, overrides
from hvd.checks import check_config
from hvd.configs import Experiment
from hvd.errors import EXIT_COMPLETE, UserError
from hvd.fields import option

MARK = "hvd_export.json"


@dataclass(frozen=True)
class Export:
    """The step's own options."""

    to: str = option("", "the folder to make")
    stage: Literal["policy", "value"] = option("policy", "openpi itself can serve a policy only")
    merge_lora: bool = option(
        False, "add the LoRA updates to their weights: openpi's config without LoRA then serves it"
    )
    asset_id: str = option("", 'name of the norm stats in assets/; "" = the optimal set\'s repo_id')
    keep_padding: bool = option(
        False, "write every bit; else the weights of action dims that the robot lacks are 0, as hvd itself acts"
    )


def main(argv: Sequence[str]) -> int:
    """Export one run; raises UserError. Nothing is written unless everything can be."""
    if overrides.asks_help(argv):
        about = "A complete run in openpi's own form. All fields of the config are options too."
        overrides.print_help("hvd export --config NAME --to FOLDER", about, Export(), overrides.Choice())
        return EXIT_COMPLETE
    options, rest = overrides.take(Export(), argv)
    cfg = overrides.experiment(rest)
    check_config(cfg)
    if not options.to:
        raise UserError("--to FOLDER is missing: where the export is to be")
    export(cfg, options)
    return EXIT_COMPLETE


def export(cfg: Experiment, options: Export) -> Path:
    """The run of `cfg` as a new folder `options.to`; the same export twice is made once.

    Raises:
        UserError: the run is not complete, or the folder holds something else.
    """
    from etils import epath

    from hvd.data import normalize
    from hvd.export import params as export_params
    from hvd.models import weights
    from hvd.train import complete
    from hvd.train import run_dir as runs
    from hvd.train.inputs import check_writable

    stage, run = options.stage, getattr(cfg, f"{options.stage}_dir")
    target = Path(options.to).expanduser().absolute()
    found = complete.check_complete(run, stage=stage, cfg=cfg)
    asset = options.asset_id or cfg.optimal_data.repo_id or cfg.name
    if not all(part not in ("", ".", "..") for part in asset.split("/")):
        raise UserError(f"--asset-id {asset!r} is not the name of a folder below assets/")
    mark = {
        "run": os.fspath(run),
        "stage": stage,
        **{name: getattr(found, name) for name in ("step", "digest", "version")},
        "asset_id": asset,
        **{name: getattr(options, name) for name in ("merge_lora", "keep_padding")},
    }
    if stage == "policy" and cfg.policy.prefix_max:
        mark["prefix_max"] = cfg.policy.prefix_max
    if _is_there(target, mark):
        print(f"{target}: this export is there already, nothing to do", flush=True)
        return target
    check_writable(os.fspath(target), "--to")
    record = runs.read(run)
    if record is None:
        raise UserError(f"{run} has no {runs.CONFIG}: it is not a run directory")
    trained = record.config
    stats, made_of = normalize.load_for(trained, epath.Path(run) / runs.NORM_STATS)
    params = export_params.exported(
        trained,
        stage,
        export_params.restored(trained, stage, run, found.step),
        keep_padding=options.keep_padding,
        merge_lora=options.merge_lora,
    )
    try:
        with files.locked(target.with_name(f".{target.name}.lock")):
            files.remove_left_over(target.parent, target.name)
            with files.replacing(target) as folder:
                weights.write(folder / "params", params)
                beside = epath.Path(folder / "assets" / asset / runs.NORM_STATS)
                normalize.save(beside, export_params.openpi_stats(stats, trained.norm), made_of)
                (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--to {target}: cannot be written ({error.strerror})") from error
    _say(target, trained, options, params, asset)
    return target


def _is_there(target: Path, mark: Mapping[str, Any]) -> bool:
    """This very export; False where there is nothing yet. UserError for anything else: it is not overwritten."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise UserError(f"--to {target} is a file; choose another folder")
    if not any(target.iterdir()):
        return False
    try:
        there = documents.read(target / MARK, dict[str, Any])
    except (OSError, UserError):
        raise UserError(f"--to {target} holds something else (it has no {MARK}); choose another folder") from None
    if there == dict(mark):
        return True
    different = sorted(name for name in there.keys() | mark.keys() if there.get(name) != mark.get(name))
    raise UserError(f"--to {target} holds another export (other {', '.join(different)}); delete it, or choose another")


def _say(target: Path, cfg: Experiment, options: Export, params: Any, asset: str) -> None:
    import jax

    from hvd.method import condition, extraction

    arrays = jax.tree.leaves(params)
    millions = sum(x.size for x in arrays) / 1e6
    print(f"{target}: {len(arrays)} arrays, {millions:.1f} M parameters, norm stats {asset}", flush=True)
    if options.stage == "value":
        return
    if extraction.extractor(cfg)[0].acts:
        print(f"note: this run acts by its critic ({extraction.label(cfg)}); openpi's form holds the policy alone")
    if extraction.extractor(cfg)[0].conditioned:
        print(f"note: this run acts on prompts that begin with {condition.texts(cfg)[-1]!r}; openpi's client says it")
    model = cfg.model
    names = [model.paligemma_variant, model.action_expert_variant]
    if options.merge_lora:
        names = [name.removesuffix("_lora") for name in names]
    print(
        f"openpi: Pi0Config(pi05={model.family == 'pi05'}, action_dim={model.action_dim}, "
        f"action_horizon={model.action_horizon}, max_token_len={model.max_token_len}, "
        f"paligemma_variant={names[0]!r}, action_expert_variant={names[1]!r}), "
        f"AssetsConfig(asset_id={asset!r}), use_quantile_norm {cfg.norm.mode == 'quantile'}"
        + (", DeltaActions for the position dims" if cfg.norm.delta_actions else ""),
        flush=True,
    )
