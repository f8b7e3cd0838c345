"""What a config names and a run needs: datasets, a tokenizer, weights, folders that can be written.

Every finding is a UserError that names the field. Nothing is changed, and nothing large is fetched. Imports no jax.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from hvd import mixture
from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.files import full_disk
from hvd.storage import cache as storage


def check_datasets(cfg: Experiment) -> None:
    """Raise UserError where a dataset that the config names is not there; simulated data are made by the run itself."""
    for name, data in cfg.datasets():
        info, field = data.path() / "meta" / "info.json", mixture.field(name)
        if not cfg.sim.task and not info.is_file():
            raise UserError(
                f"{field}: no LeRobot dataset at {data.path()} (no meta/info.json); `hvd convert` makes one "
                f"of recordings, --data PATH or --{field}.root PATH names another folder"
            )
    check_tokenizer(cfg)


def check_tokenizer(cfg: Experiment) -> None:
    """Raise UserError where tokenizer "paligemma" has no file and cannot fetch it; asks the network at most once."""
    if cfg.model.tokenizer != "paligemma":
        return
    path = cfg.model.tokenizer_path or storage.PALIGEMMA_TOKENIZER
    if storage.is_url(path):
        try:
            storage.check(path, "model.tokenizer_path")
        except UserError as error:
            raise UserError(f"{error}; {storage.TOKENIZER_ADVICE}") from error
    elif not Path(path).expanduser().is_file():
        raise UserError(f"model.tokenizer_path {path!r} is no file; leave it empty to fetch PaliGemma's once")


def check_weights(cfg: Experiment, stages: Sequence[str], *, overwrite: bool = False) -> None:
    """Raise UserError where a stage would start from weights that are not there; a run that goes on needs none.

    Asks the network once for a URL that is not cached. What is in the checkpoint is compared when it is opened.
    """
    for stage in stages:
        path, field = getattr(cfg, stage).weight_loader, f"{stage}.weight_loader"
        if not path or (not overwrite and _goes_on(cfg, stage)):
            continue
        if storage.is_url(path):
            storage.check(path, field)
            continue
        root = Path(path).expanduser()
        if not any((folder / "_METADATA").is_file() for folder in (root, root / "params")):
            raise UserError(
                f"{field} {path}: no Orbax checkpoint there (no _METADATA); give the folder of its `params`, or a URL "
                "such as gs://openpi-assets/checkpoints/pi0_base/params"
            )


def _goes_on(cfg: Experiment, stage: str) -> bool:
    from hvd.train.run_dir import has_checkpoint  # etils.epath: a tenth of a second of the launcher's start

    return has_checkpoint(getattr(cfg, f"{stage}_dir"))


def check_writable(folder: str, option: str = "--runs_dir") -> None:
    """Raise UserError where nothing can be written into `folder`, or into the nearest existing folder above it.

    A file without a name is made there, and nothing stays. `option` sets another folder.
    """
    if "://" in folder:
        return
    path = Path(folder).absolute()
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        if not existing.is_dir():
            raise UserError(f"{existing} is no folder; set {option}")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        full = full_disk(error) is not None
        advice = f"free some or set {option}" if full else f"set {option}, or look at the folder's owner and rights"
        raise UserError(f"{folder} cannot be written ({error.strerror}); {advice}") from error
