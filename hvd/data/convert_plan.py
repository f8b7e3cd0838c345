"""What a conversion will write: every recording is looked at before anything is touched on disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hvd.data.labels import Labels, load_labels, sidecar_path
from hvd.data.recordings import Recording, RecordingRef, Summary, episodes_of, recording_files
from hvd.errors import UserError
from hvd.robots import Robot

DEFAULT_FPS = 10  # JoyLo's own rate, for files that do not say theirs


@dataclass(frozen=True)
class Selection:
    """Which recordings are wanted and how they are read; see hvd.data.convert.ConvertConfig."""

    folders: tuple[Path, ...]
    prompts: tuple[str, ...]
    num_episodes: int
    robot: Robot
    cameras: tuple[str, ...]
    success_only: bool
    default_success: bool
    skip_bad: bool
    fps: int
    odom_yaw: float  # rad


@dataclass(frozen=True)
class Episode:
    """One recording that goes into the dataset. `sidecar` None: the labels come from --default-success."""

    ref: RecordingRef
    prompt: str
    labels: Labels
    sidecar: Path | None
    num_frames: int


@dataclass(frozen=True)
class Plan:
    """All episodes in the dataset's order, what they have in common, and what was left out.

    Attributes:
        image_sizes: (height, width) per camera.
        environment_dim: width of the environment state, 0 = none.
        skipped: one line for each bad recording (--skip-bad).
        failures: recordings left out because they did not succeed (--success-only).
    """

    episodes: tuple[Episode, ...]
    fps: int
    image_sizes: tuple[tuple[int, int], ...]
    environment_dim: int
    skipped: tuple[str, ...]
    failures: int

    @property
    def num_frames(self) -> int:
        return sum(episode.num_frames for episode in self.episodes)


def make_plan(selection: Selection) -> Plan:
    """Check the recordings and choose the episodes; raises UserError at the first bad one, or with none left."""
    planner = _Planner(selection)
    files = [recording_files(folder) for folder in selection.folders]
    with tqdm(total=sum(map(len, files)), desc="check", unit="file", delay=1, leave=False) as bar:
        for folder, prompt, paths in zip(selection.folders, selection.prompts, files, strict=True):
            planner.add_folder(folder, prompt, paths, bar)
    if not planner.episodes or planner.common is None:
        raise UserError(
            f"no episode to convert in {', '.join(map(str, selection.folders))}: {len(planner.skipped)} bad, "
            f"{planner.failures} without success"
        )
    fps, sizes, dim = planner.common
    return Plan(tuple(planner.episodes), fps, sizes, dim, tuple(planner.skipped), planner.failures)


class _Planner:
    def __init__(self, selection: Selection):
        self.selection = selection
        self.episodes: list[Episode] = []
        self.skipped: list[str] = []
        self.failures = 0
        self.common: tuple[int, tuple[tuple[int, int], ...], int] | None = None  # rate, sizes, environment dim

    def add_folder(self, folder: Path, prompt: str, paths: Sequence[Path], bar: tqdm) -> None:
        wanted = self.selection.num_episodes
        before = len(self.episodes)
        for path in paths:
            bar.update()
            for ref in self._refs(path):
                if wanted and len(self.episodes) - before == wanted:
                    return
                try:
                    episode = self._examine(ref, prompt)
                except UserError as error:
                    self._bad(error)
                    continue
                if episode is None:
                    self.failures += 1
                else:
                    self.episodes.append(episode)
        found = len(self.episodes) - before
        if found < wanted:
            bar.write(f"{folder}: {found} of the {wanted} episodes asked for")

    def _refs(self, path: Path) -> Iterator[RecordingRef]:
        try:
            yield from episodes_of(path)
        except UserError as error:
            self._bad(error)

    def _bad(self, error: UserError) -> None:
        if not self.selection.skip_bad:
            raise error
        self.skipped.append(str(error))

    def _examine(self, ref: RecordingRef, prompt: str) -> Episode | None:
        """The checked episode; None when it is a failure and only successes are wanted."""
        want = self.selection
        with Recording(ref, want.robot, want.odom_yaw) as recording:
            labels, sidecar = self._labels(ref, prompt, recording.num_frames)
            if want.success_only and not labels.success:
                return None
            summary = recording.check(want.cameras)
        self._compare(ref, summary)
        return Episode(ref, prompt or labels.task, labels, sidecar, summary.num_frames)

    def _labels(self, ref: RecordingRef, prompt: str, num_frames: int) -> tuple[Labels, Path | None]:
        path = sidecar_path(ref.path, ref.demo)
        if path.exists() or not self.selection.default_success:
            return load_labels(path, num_frames), path
        if not prompt:
            raise UserError(f"{path}: label file is missing and with it the prompt; write it, or pass --tasks")
        return Labels(prompt, success=True), None

    def _compare(self, ref: RecordingRef, summary: Summary) -> None:
        """A dataset has one rate, one size per camera, and an environment state in all episodes or in none."""
        fps = self.selection.fps or _whole_rate(ref, summary.fps)
        mine = (fps, summary.image_sizes, summary.environment_dim)
        if self.common is None:
            self.common = mine
        names = ("frames per second", "image sizes", "environment dims")
        for name, here, first in zip(names, mine, self.common, strict=True):
            if here != first:
                raise UserError(f"{ref}: {name} {here}, but {first} in {self.episodes[0].ref}")


def _whole_rate(ref: RecordingRef, fps: float | None) -> int:
    if fps is None:
        return DEFAULT_FPS
    if abs(fps - round(fps)) > 1e-6 or round(fps) < 1:
        raise UserError(f"{ref}: recording_freq is {fps}, a LeRobot dataset needs a whole number; pass --fps")
    return round(fps)
