"""What a stage trains on: its datasets, their split, the shares of a batch, and the streams of batches made of them."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int64

from hvd import mixture
from hvd.configs import Experiment, StageConfig
from hvd.data import normalize
from hvd.data.dataset import Dataset, check_rates, split_episodes
from hvd.data.loader import Batcher, Loader, SampleSpec, Source, order_of
from hvd.data.norm_record import MadeOf
from hvd.data.transforms import InputTransform
from hvd.errors import UserError
from hvd.runtime import processes
from hvd.train import run_dir as runs
from hvd.train.mesh import Devices

type Weights = Mapping[str, Float32[np.ndarray, "_ l"]]


@dataclasses.dataclass(frozen=True)
class Told:
    """What stands before the prompts (hvd.method.condition): the texts, the number of each row's by the name of its set
    (the last text in the sets that are not there), and the share of samples without."""

    texts: tuple[str, ...]
    of_rows: Mapping[str, Int64[np.ndarray, " _"]]
    drop: float


@dataclasses.dataclass(frozen=True)
class StageData:
    """The open datasets of a stage by the names of their sets, their training and held-out rows, and each one's rows of
    a batch; `made_of` says what the norm stats are of, `told` what stands before the prompts."""

    cfg: Experiment
    stage: runs.Stage
    transform: InputTransform
    datasets: dict[str, Dataset]
    train: dict[str, Int64[np.ndarray, " _"]]
    val: dict[str, Int64[np.ndarray, " _"]]
    shares: dict[str, int]
    inputs: dict[str, str]
    made_of: MadeOf | None = None
    told: Told | None = None

    @property
    def stage_cfg(self) -> StageConfig:
        return getattr(self.cfg, self.stage)

    @property
    def spec(self) -> SampleSpec:
        value = self.stage == "value"
        return SampleSpec(
            self.transform,
            num_levels=len(self.cfg.levels()),
            next_images=self.cfg.value.next_images if value else "none",
            gamma=self.cfg.value.gamma,
            image_cache=self.cfg.image_cache,
            **({"texts": self.told.texts, "drop": self.told.drop} if self.told else {}),
        )

    def loader(self, start: int, devices: Devices, weights: Weights) -> Loader:
        """The stream of training batches from step `start` on."""
        index, count = devices.place_of_process
        return Loader(
            self._sources(self.train, self.shares, weights),
            self.spec,
            self.stage_cfg.batch_size,
            self.cfg.seed,
            num_workers=self.cfg.num_workers,
            process_index=index,
            process_count=count,
            start_step=start,
            place=devices.place_batch,
        )

    def validation(self, devices: Devices, weights: Weights) -> list[dict]:
        """The placed validation batches, the same in every run; [] when no episode is held out."""
        having = [name for name in self.datasets if len(self.val[name])]
        if not having:
            return []
        shares = _split(self.stage_cfg.batch_size, {name: float(self.shares[name]) for name in having})
        batcher = Batcher(self._sources(self.val, shares, weights), self.spec)
        order = order_of(batcher.sources, self.cfg.seed)
        parts = [order.slice(i, *devices.place_of_process) for i in range(self.stage_cfg.val_batches)]
        return [devices.place_batch(batcher.batch(*part)) for part in parts]

    def only(self, keep: Mapping[str, Bool[np.ndarray, " _"]]) -> "StageData":
        """The same with those training rows of the sets in `keep` that it says; one entry a row of the dataset."""
        train = {name: rows[keep[name][rows]] if name in keep else rows for name, rows in self.train.items()}
        for name, rows in train.items():
            if not len(rows):
                raise UserError(f"{mixture.field(name)}: policy.extractor {self.cfg.policy.extractor!r} keeps no row")
        return dataclasses.replace(self, train=train)

    def _sources(
        self, rows: Mapping[str, Int64[np.ndarray, " _"]], shares: Mapping[str, int], weights: Weights
    ) -> list[Source]:
        """One source a set, under the number that its role has in every run: it keys the order of the rows."""
        told = self.told.of_rows if self.told else {}

        def source(name: str, share: int) -> Source:
            number = mixture.number(self.cfg, name)
            return Source(self.datasets[name], rows[name], share, weights.get(name), number, told.get(name))

        return [source(name, share) for name, share in shares.items()]


def abstract_batch(cfg: Experiment, stage: runs.Stage, devices: Devices) -> dict:
    """Shapes, dtypes and places of a training batch, from the config alone: what the loader's batches are, placed."""
    model, rows = cfg.model, getattr(cfg, stage).batch_size
    side = model.image_size
    observation = {
        "state": ((model.action_dim,), "float32"),
        "tokenized_prompt": ((model.max_token_len,), "int32"),
        "tokenized_prompt_mask": ((model.max_token_len,), "bool"),
        "images": dict.fromkeys(model.cameras, ((side, side, 3), "uint8")),
        "image_masks": dict.fromkeys(model.cameras, ((), "bool")),
    }
    batch = {
        "observation": observation,
        "actions": ((model.action_horizon, model.action_dim), "float32"),
        "action_mask": ((model.action_horizon,), "bool"),
        "weights": ((len(cfg.levels()),), "float32"),
        "source": ((), "int32"),
        "index": ((), "int32"),
    }
    if stage == "value":
        batch |= {"reward": ((), "float32"), "discount": ((), "float32"), "next_observation": observation}

    def shaped(entry: tuple[tuple[int, ...], str]) -> jax.ShapeDtypeStruct:
        shape, dtype = entry
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=devices.batch)

    return jax.tree.map(shaped, batch, is_leaf=lambda x: isinstance(x, tuple))


def open_data(cfg: Experiment, stage: runs.Stage) -> StageData:
    """Open the datasets of a stage; a UserError for whatever is wrong with them, before anything is written.

    Prints what is not wrong but should be known: normalised values out of all bounds, prompts that are cut.
    """
    normalize.load_shared(cfg)  # opening a dataset takes longer
    check_rates(cfg.datasets())
    datasets = {name: open_dataset(cfg, name) for name in mixture.names(cfg, stage)}
    stats, made_of, said = normalize.for_data(cfg, datasets)
    transform = InputTransform.from_config(cfg, stats)
    said += cut_prompts(transform, datasets)
    if not processes.rank():
        print("".join(f"{line}\n" for line in said), end="", flush=True)
    train, val = {}, {}
    for name, data in datasets.items():
        train[name], val[name] = split_episodes(data, cfg.evaluate.val_fraction, cfg.seed)
    parts = mixture.parts(cfg, stage, {name: len(rows) for name, rows in train.items()})
    inputs = {name: data.digest for name, data in datasets.items()} | {"norm_stats": runs.stats_digest(stats)}
    return StageData(
        cfg,
        stage,
        transform,
        datasets,
        train,
        val,
        _split(getattr(cfg, stage).batch_size, parts),
        inputs,
        made_of,
    )


def cut_prompts(transform: InputTransform, datasets: Mapping[str, Dataset]) -> list[str]:
    """A line for each task of the offered rows that is longer than the model reads."""
    prompts = {data.tasks[i]: data.name for data in datasets.values() for i in np.unique(data.task_ids[data.rows()])}
    return [f"warning: {prompts[prompt]}: {line}" for prompt, line in transform.cut_prompts(list(prompts)).items()]


def open_dataset(cfg: Experiment, name: str) -> Dataset:
    """The dataset of a set of the experiment ("optimal", "suboptimal", one of more_data) with the model's cameras."""
    named = dict(cfg.datasets())
    if name not in named:
        raise UserError(f"config {cfg.name}: {mixture.field(name)} is needed here; set {mixture.field(name)}.repo_id")
    return Dataset.open(named[name], cameras=cfg.model.cameras, robot=cfg.robot, horizon=cfg.model.action_horizon)


def _split(rows: int, parts: Mapping[str, float]) -> dict[str, int]:
    """`rows` of a batch in proportion to `parts`; each part gets at least one row."""
    if rows < len(parts):
        raise UserError(f"batch_size {rows} is too small for {len(parts)} datasets: each needs a row")
    total, names = sum(parts.values()), list(parts)
    found = {name: max(1, round(rows * parts[name] / total)) for name in names}
    largest = max(names, key=lambda name: found[name])
    found[largest] += rows - sum(found.values())
    return found
