"""A dataset (hvd.data.layout) as arrays, without torch: numeric columns memory-mapped, frames decoded on call."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt8

from hvd.configs import DataConfig, KeyMap
from hvd.data.columns import dim_names, load_columns
from hvd.data.digest import digest
from hvd.data.frames import Camera, Frames
from hvd.data.labels import chunk_shares, episode_path, load_labels
from hvd.data.layout import Layout, read_info, read_layout, read_schema
from hvd.errors import UserError, nearest
from hvd.robots import ROBOTS, get_robot


@dataclass(frozen=True)
class Episode:
    """One episode: its number in the dataset, its first row, its frames, its prompt, and how it ended."""

    index: int
    start: int
    length: int
    task: str
    success: bool
    quality: str

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Dataset:
    """An open dataset. Row numbers are those of the dataset, whatever the config filters out.

    Attributes:
        episodes: those the config offers (success_only, max_episodes); `all_episodes` are all, and episode_of indexes
            those.
        state, actions: float32 [N,S] and [N,A], raw units of the robot; actions are absolute.
        rewards, terminal: float32 [N] and bool [N].
        task_ids: int32 [N] into `tasks`, the prompts.
        cameras: the model's cameras that this dataset has; the others are zero images with mask False.
        digest: sha256 of the dataset's contents.
        labels_dir: where its label files are, if it has any.
        state_dims, action_dims: a name for each dim: "observation.state[3] elbow", or without the last word where
            info.json has none.
    """

    name: str
    root: Path
    version: str
    fps: float
    digest: str
    episodes: tuple[Episode, ...]
    all_episodes: tuple[Episode, ...]
    state: Float32[np.ndarray, "n s"]
    actions: Float32[np.ndarray, "n a"]
    rewards: Float32[np.ndarray, " n"]
    terminal: Bool[np.ndarray, " n"]
    episode_of: Int32[np.ndarray, " n"]
    task_ids: Int32[np.ndarray, " n"]
    tasks: tuple[str, ...]
    cameras: tuple[str, ...]
    camera_frames: Mapping[str, Frames]
    state_dims: tuple[str, ...] = ()
    action_dims: tuple[str, ...] = ()
    labels_dir: Path = Path()

    @classmethod
    def open(cls, cfg: DataConfig, *, cameras: tuple[str, ...], robot: str = "", horizon: int = 0) -> "Dataset":
        """Open the dataset that `cfg` names.

        Args:
            cameras: names of the model's cameras whose frames will be asked for; () for numbers alone.
            robot: when given, the actions must have this robot's width, and its order where info.json names them.
            horizon: when given, at least one episode must be as long.

        Raises UserError (one line) for a missing or damaged file, an unknown version, a missing column or camera, a
        wrong width, NaN or infinite values, or no episode left after filtering.
        """
        layout, needed = _on_this_disk(read_layout(cfg.path()), cfg)
        frames_keys = _camera_keys(layout, cfg, cameras)
        first = layout.episodes[:needed]
        paths = {e.data_path for e in first}
        paths |= {e.videos[key].path for e in first for key in frames_keys.values() if key in e.videos}
        identity = digest(layout, paths)
        opened = {camera: Camera(layout, key, identity.value, needed) for camera, key in frames_keys.items()}
        columns = load_columns(layout, identity.value, cfg)
        identity.keep(layout)
        name = cfg.repo_id or layout.root.name
        width = columns["actions"].shape[1]
        if robot and width != get_robot(robot).action_dim:
            raise UserError(
                f"{name}: actions have {width} dims, robot {robot} has {get_robot(robot).action_dim}; "
                "set robot, or the data config's keys.actions"
            )
        action_dims = dim_names(layout.features, cfg.keys.actions, width)
        if robot:
            _check_order(name, action_dims, robot)
        tasks, task_ids = _prompts(layout, columns["task_index"])
        everything = _episodes(layout, columns["success"], tasks, task_ids)
        offered = [e for e in everything if e.success or not cfg.success_only]
        if not offered:
            raise UserError(f"{name}: no successful episode, and success_only is set")
        offered = offered[: cfg.max_episodes or None]
        check_horizon(name, offered, horizon)
        episode_of = columns["episode_of"]
        return cls(
            name=name,
            root=layout.root,
            version=layout.version,
            fps=layout.fps,
            digest=identity.value,
            episodes=tuple(offered),
            all_episodes=tuple(everything),
            state=columns["state"],
            actions=columns["actions"],
            rewards=columns["rewards"],
            terminal=columns["terminal"],
            episode_of=episode_of,
            task_ids=task_ids,
            tasks=tasks,
            cameras=tuple(frames_keys),
            camera_frames={name: camera.open(columns["time"], episode_of) for name, camera in opened.items()},
            state_dims=dim_names(layout.features, cfg.keys.state, columns["state"].shape[1]),
            action_dims=action_dims,
            labels_dir=Path(cfg.labels_dir) if cfg.labels_dir else layout.root / "labels",
        )

    @property
    def num_frames(self) -> int:
        """Rows of the whole dataset, filtered ones included."""
        return len(self.state)

    def rows(self, episodes: tuple[Episode, ...] | None = None) -> Int64[np.ndarray, " n"]:
        """Rows of the given (default: the offered) episodes, in order. Frames after an episode's first terminal one
        belong to no task any more and are left out."""
        parts = []
        for episode in self.episodes if episodes is None else episodes:
            over = np.flatnonzero(self.terminal[episode.start : episode.stop])
            length = int(over[0]) + 1 if len(over) else episode.length
            parts.append(np.arange(episode.start, episode.start + length))
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def frames(self, camera: str, rows: np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
        """Frames of the model's camera at `rows`; may be called from several threads."""
        if camera not in self.camera_frames:
            raise UserError(f"{self.name}: camera {camera!r} was not opened{nearest(camera, self.camera_frames)}")
        return self.camera_frames[camera](rows)

    def wrong_shares(self, levels: tuple[str, ...], horizon: int, waiting: bool) -> Float[np.ndarray, "n m"]:
        """Of the chunk of `horizon` actions at each row, the share that the label files call a mistake of each level of
        the robot, waiting for another's mistake included or not. UserError where they name no mistake."""
        shares, known = [], 0
        for episode in self.all_episodes:
            path = episode_path(self.labels_dir, episode.index)
            labels = load_labels(path, episode.length) if path.exists() else None
            if labels is None:
                break
            spans = labels.mistakes + (labels.waiting if waiting else ())
            shares.append(chunk_shares(spans, levels, episode.length, horizon)[0])
            known += len(labels.mistakes)
        if not known or len(shares) < len(self.all_episodes):
            raise UserError(f"{self.labels_dir} names no mistakes: only simulated recordings' label files do")
        return np.concatenate(shares)

    def task_of(self, row: int | np.integer) -> str:
        """The prompt of a row."""
        return self.tasks[int(self.task_ids[row])]


def open_dataset(where: str | os.PathLike[str] | DataConfig, *, cameras: Sequence[str] | None = None) -> Dataset:
    """A LeRobot dataset as a notebook wants it (`hvd.open_dataset`).

    Args:
        where: its folder, or its repo_id below $HF_LEROBOT_HOME: state and actions are observation.state and action,
            cameras have the dataset's names, rewards are its column or, without one, 1 at the end of each success.
            A DataConfig says all of this otherwise.
        cameras: whose frames will be asked for; default: all.
    """
    if isinstance(where, DataConfig):
        return Dataset.open(where, cameras=tuple(where.keys.images if cameras is None else cameras))
    folder = Path(where) if Path(where).is_dir() else DataConfig(repo_id=str(where)).path()
    layout = read_layout(folder)
    names = set(read_schema(layout.data_paths[0]).names)
    rewarded = names & {"next.reward", "reward"} and names & {"terminal", "next.terminal", "next.done"}
    keys = KeyMap(images={key: key for key in layout.image_keys})
    data = DataConfig(root=str(folder), keys=keys, reward="column" if rewarded else "success_at_end")
    return Dataset.open(data, cameras=layout.image_keys if cameras is None else tuple(cameras))


def check_rates(datasets: Iterable[tuple[str, DataConfig]]) -> None:
    """Datasets (name, config) of one experiment must have one frame rate: a chunk of actions and the discount mean the
    same time in all. Those that are not there are passed over."""
    rates = {n: read_info(d.path())[1].fps for n, d in datasets if (d.path() / "meta" / "info.json").exists()}
    if rates and max(rates.values()) > 1.02 * min(rates.values()):
        each = ", ".join(f"{name} has {rate:g}" for name, rate in rates.items())
        raise UserError(
            f"the datasets of an experiment need the same frames per second (fps): {each}; convert them to one"
        )


def _on_this_disk(layout: Layout, cfg: DataConfig) -> tuple[Layout, int]:
    """How many episodes, from the first, `cfg` needs; and the layout without those behind whose data are not there."""
    every = layout.episodes
    if cfg.success_only or not 0 < cfg.max_episodes < len(every):
        return layout, len(every)
    gone = {path for path in {e.data_path for e in every[cfg.max_episodes :]} if not path.is_file()}
    gone -= {e.data_path for e in every[: cfg.max_episodes]}  # these are missed, and named
    stop = next((i for i, e in enumerate(every) if e.data_path in gone), len(every))
    return dataclasses.replace(layout, episodes=every[:stop]), cfg.max_episodes


def _check_order(name: str, action_dims: Sequence[str], robot: str) -> None:
    """Refuse actions that info.json names as another robot's, or as this robot's in another order."""
    named, ours = tuple(dim.partition("] ")[2] for dim in action_dims), get_robot(robot).action_names
    fits = next((other for other, r in ROBOTS.items() if r.action_names == named), "")
    if named == ours or not (fits or set(named) == set(ours)):
        return
    at = next(i for i, (theirs, own) in enumerate(zip(named, ours, strict=True)) if theirs != own)
    raise UserError(
        f"{name}: info.json calls action dim {at} {named[at]!r}, robot {robot} has {ours[at]!r} there"
        + (f": set robot to {fits}, whose order it is, or order" if fits else ": order")
        + " the dims in the data config's keys.actions"
    )


def check_horizon(name: str, episodes: list[Episode] | tuple[Episode, ...], horizon: int) -> None:
    """A horizon longer than every episode would train on padding alone."""
    longest = max(e.length for e in episodes)
    if horizon > longest:
        raise UserError(
            f"{name}: action_horizon {horizon} is longer than every episode (the longest has {longest} frames)"
        )


def split_episodes(
    dataset: Dataset, val_fraction: float, seed: int
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " val"]]:
    """Rows of the training and of the held-out episodes: whole episodes, chosen by `seed`.

    With at least two episodes and a positive fraction, each side has at least one.
    """
    episodes = dataset.episodes
    count = round(val_fraction * len(episodes))
    if val_fraction > 0 and len(episodes) >= 2:
        count = min(max(count, 1), len(episodes) - 1)
    else:
        count = 0
    order = np.random.default_rng(np.random.SeedSequence([seed, 0x5911])).permutation(len(episodes))
    held_out = set(order[:count].tolist())
    train = tuple(e for i, e in enumerate(episodes) if i not in held_out)
    val = tuple(e for i, e in enumerate(episodes) if i in held_out)
    return dataset.rows(train), dataset.rows(val)


def _camera_keys(layout: Layout, cfg: DataConfig, cameras: tuple[str, ...]) -> dict[str, str]:
    """model camera -> feature of the dataset, for those cameras that cfg.keys.images names."""
    keys = {}
    for camera in cameras:
        if camera not in cfg.keys.images:
            continue  # the dataset has no such camera: the model gets a masked image
        key = cfg.keys.images[camera]
        if key not in layout.image_keys:
            raise UserError(
                f"{layout.root}: camera {key!r} (for {camera}) is not in the dataset{nearest(key, layout.image_keys)}"
            )
        if layout.features[key].is_depth:
            raise UserError(f"{layout.root}: camera {key!r} gives depth, says meta/info.json; choose a colour camera")
        keys[camera] = key
    if cameras and not keys:
        raise UserError(
            f"{layout.root}: keys.images names none of the model's cameras ({', '.join(cameras)}); "
            f"the dataset has {', '.join(layout.image_keys) or 'no camera'}"
        )
    return keys


def _prompts(layout: Layout, task_index: np.ndarray) -> tuple[tuple[str, ...], Int32[np.ndarray, " n"]]:
    """The prompts and each row's position among them."""
    known = sorted(layout.tasks)
    used = np.unique(task_index)
    missing = [int(t) for t in used if int(t) not in layout.tasks]
    if missing:
        raise UserError(f"{layout.root / 'meta'}: task_index {missing[0]} of the data is not among the tasks")
    return tuple(layout.tasks[t] for t in known), np.searchsorted(known, task_index).astype(np.int32)


def _episodes(layout: Layout, success: np.ndarray, tasks: tuple[str, ...], task_ids: np.ndarray) -> list[Episode]:
    episodes, start = [], 0
    for i, meta in enumerate(layout.episodes):
        task = meta.tasks[0] if meta.tasks else tasks[int(task_ids[start])]
        quality = str(meta.extra.get("quality") or "")
        episodes.append(Episode(meta.index, start, meta.length, task, bool(success[i]), quality))
        start += meta.length
    return episodes
