"""What a conversion is asked for and will write: every recording is looked at before anything is touched on disk."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hvd import pools
from hvd.data.labels import Labels, load_labels, sidecar_path
from hvd.data.recordings import (
    CAMERAS,
    Recording,
    RecordingRef,
    episodes_of,
    open_recording,
    recording_files,
)
from hvd.data.video import CodecName
from hvd.errors import UserError
from hvd.fields import NOT_NEGATIVE, between, option
from hvd.robots import get_robot

DEFAULT_FPS = 10  # JoyLo's own rate, for files that do not say theirs


@dataclass(frozen=True)
class ConvertConfig:
    """Recordings (JoyLo HDF5 and others, with label sidecars) -> one LeRobot v3.0 dataset."""

    raw_dirs: tuple[str, ...] = option((), "Folders of recordings (or merged files).")
    repo_id: str = option("", "Name of the dataset.")
    tasks: tuple[str, ...] = option((), "A prompt per folder; without any the sidecars' own.")
    num_episodes: int = option(0, NOT_NEGATIVE, "Episodes per folder, the first ones; 0 = all.")
    root: str = option("", "Target folder; default $HF_LEROBOT_HOME/REPO_ID.")
    robot: str = option("r1", "Action layout of the recordings, a robot of hvd/robots.py: r1, r1_pro, ...")
    cameras: tuple[str, ...] = option(CAMERAS, "Cameras to convert.")
    success_only: bool = option(False, "Leave out episodes whose label says that they failed.")
    default_success: bool = option(False, "Recordings without a sidecar count as successes (reward 1 at the end).")
    skip_bad: bool = option(False, "Count, list and leave out broken recordings instead of stopping at the first.")
    push_to_hub: bool = option(False, "Upload the finished dataset to the Hugging Face Hub, as a private one.")
    public: bool = option(False, "Upload it as one that anybody may read.")
    fps: int = option(0, between(0, 1000), "Frames per second; 0 = as recorded (10 where the files do not say).")
    codec: CodecName = option(
        "h264", "h264: fast to write and to read at random; av1: half the size, 8 times slower to write."
    )
    crf: int = option(-1, "Quality of the videos, less is better; -1 = the codec's default.")
    odom_yaw_deg: float = option(0.0, "How the odometry tracker is turned on the base, where base_velocity is missing.")
    workers: int = option(0, NOT_NEGATIVE, "Encoding processes; 0 = one per core.")
    overwrite: bool = option(False, "Replace a dataset that is there already.")

    def open(self, ref: RecordingRef) -> Recording:
        """The open recording, a context manager."""
        return open_recording(ref, get_robot(self.robot), math.radians(self.odom_yaw_deg))


@dataclass(frozen=True)
class PlannedEpisode:
    """One recording that goes into the dataset. `sidecar` None: the labels come from --default-success. `common`: what
    all episodes share (frames per second, image sizes, environment dims)."""

    ref: RecordingRef
    prompt: str
    labels: Labels
    sidecar: Path | None
    num_frames: int
    common: tuple[int, tuple[tuple[int, int], ...], int]


@dataclass(frozen=True)
class ConversionPlan:
    """All episodes in the dataset's order, what they have in common, and what was left out.

    Attributes:
        image_sizes: (height, width) per camera.
        environment_dim: width of the environment state, 0 = none.
        skipped: one line for each bad recording (--skip-bad).
        failures: recordings left out because they did not succeed (--success-only).
    """

    episodes: tuple[PlannedEpisode, ...]
    fps: int
    image_sizes: tuple[tuple[int, int], ...]
    environment_dim: int
    skipped: tuple[str, ...]
    failures: int


def make_plan(config: ConvertConfig, isolated: pools.Isolated) -> ConversionPlan:
    """Check the recordings and choose the episodes; raises UserError at the first bad one, or with none left.

    Args:
        isolated: reads them: what kills it costs one recording.
    """
    files = [recording_files(folder) for folder in config.raw_dirs]
    planner = _Planner(config, isolated)
    with tqdm(total=sum(map(len, files)), desc="check", unit="file", delay=1, leave=False) as bar:
        prompts = config.tasks or ("",) * len(files)
        for folder, prompt, paths in zip(config.raw_dirs, prompts, files, strict=True):
            planner.add_folder(folder, prompt, paths, bar)
    if not planner.episodes or planner.common is None:
        raise UserError(
            f"no episode to convert in {', '.join(config.raw_dirs)}: {len(planner.skipped)} bad, "
            f"{planner.failures} without success"
        )
    fps, sizes, dim = planner.common
    return ConversionPlan(tuple(planner.episodes), fps, sizes, dim, tuple(planner.skipped), planner.failures)


class _Planner:
    def __init__(self, config: ConvertConfig, isolated: pools.Isolated):
        self.config, self.isolated = config, isolated
        self.episodes: list[PlannedEpisode] = []
        self.skipped: list[str] = []
        self.failures = 0
        self.common: tuple[int, tuple[tuple[int, int], ...], int] | None = None

    def add_folder(self, folder: str, prompt: str, paths: Sequence[Path], bar: tqdm) -> None:
        wanted = self.config.num_episodes
        before = len(self.episodes)
        for path in paths:
            bar.update()
            for ref in self._refs(path):
                if wanted and len(self.episodes) - before == wanted:
                    return
                try:
                    episode = self._apart(str(ref), _examine, self.config, ref, prompt)
                    if episode is not None:
                        self._compare(episode)
                except UserError as error:
                    self._bad(error)
                    continue
                if episode is None:
                    self.failures += 1
                else:
                    self.episodes.append(episode)
        count = len(self.episodes) - before
        if count < wanted:
            bar.write(f"{folder}: {count} of the {wanted} episodes asked for")

    def _refs(self, path: Path) -> Iterator[RecordingRef]:
        try:
            yield from self._apart(str(path), episodes_of, path)
        except UserError as error:
            self._bad(error)

    def _apart[**P, T](self, what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The call in a process of its own; whatever a damaged file does to it is the user's line about that file."""
        try:
            return self.isolated(function, *args, **kwargs)
        except (UserError, KeyboardInterrupt):
            raise
        except BrokenProcessPool:
            raise UserError(
                f"{what}: the process that read it died or hung (a damaged file, or out of memory?)"
            ) from None
        except Exception as error:  # what HDF5 and its binding say of damage has many types
            raise UserError(f"{what}: cannot be read ({type(error).__name__}: {error})") from error

    def _bad(self, error: UserError) -> None:
        if not self.config.skip_bad:
            raise error
        self.skipped.append(str(error))

    def _compare(self, episode: PlannedEpisode) -> None:
        """A dataset has one rate, one size per camera, and an environment state in all episodes or in none."""
        common = episode.common
        self.common = self.common or common
        names = ("frames per second", "image sizes", "environment dims")
        for name, here, first in zip(names, common, self.common, strict=True):
            if here != first:
                raise UserError(f"{episode.ref}: {name} {here}, but {first} in {self.episodes[0].ref}")


def _examine(config: ConvertConfig, ref: RecordingRef, prompt: str) -> PlannedEpisode | None:
    """The checked episode; None when it is a failure and only successes are wanted."""
    with config.open(ref) as recording:
        labels, sidecar = _labels(config, ref, prompt, recording.num_frames)
        if config.success_only and not labels.success:
            return None
        recording.actions(), recording.state()  # read, and so checked
        environment = recording.environment_state()
        sizes = tuple(recording.image_size(camera) for camera in config.cameras)
        fps = config.fps or _whole_rate(ref, recording.fps)
        common = fps, sizes, 0 if environment is None else environment.shape[1]
        return PlannedEpisode(ref, prompt or labels.task, labels, sidecar, recording.num_frames, common)


def _labels(config: ConvertConfig, ref: RecordingRef, prompt: str, num_frames: int) -> tuple[Labels, Path | None]:
    path = sidecar_path(ref.path, ref.demo)
    if path.exists() or not config.default_success:
        return load_labels(path, num_frames), path
    if not prompt:
        raise UserError(f"{path}: label file is missing and with it the prompt; write it, or pass --tasks")
    return Labels(prompt, success=True), None


def _whole_rate(ref: RecordingRef, fps: float | None) -> int:
    if fps is None:
        return DEFAULT_FPS
    if abs(fps - round(fps)) > 1e-6 or round(fps) < 1:
        raise UserError(f"{ref}: recording_freq is {fps}, a LeRobot dataset needs a whole number; pass --fps")
    return round(fps)
