"""hvd convert: recordings with label sidecars -> one LeRobot v3.0 dataset.

All recordings are checked before anything is written. The work happens in `<target>.partial`, and the finished dataset
is moved to the target in one step: a killed conversion leaves no half dataset, and the same command goes on where it
was. Run again on a finished dataset, the command says so and does nothing.

Columns: observation.images.<camera> (video), observation.state, observation.environment_state (simulated recordings),
action, next.reward, terminal and truncated (one of them is true at an episode's last frame); `success` and `quality`
per episode in meta/episodes; the sidecars in labels/episode_NNNNNN.labels.json.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd import documents, overrides
from hvd.configs import DataConfig
from hvd.data import hub
from hvd.data.convert_plan import ConversionPlan, ConvertConfig, make_plan
from hvd.data.convert_work import SegmentJob, WorkFolder, encode_all, is_work_folder
from hvd.data.convert_write import write_dataset
from hvd.data.recordings import is_recording
from hvd.data.video import get_codec
from hvd.documents import Count
from hvd.errors import UserError
from hvd.fields import check_rules
from hvd.files import FULL, UNWRITABLE
from hvd.pools import Isolated
from hvd.robots import get_robot

RECORD = "hvd_convert.json"  # in the dataset: the request that made it
_VERSION = 1  # of what this module writes: another one is another request


@dataclass(frozen=True)
class _Record:
    """RECORD: the request, a hash of what lay in each folder (`_fingerprint`), and what came of it."""

    request: dict[str, Any]
    sources: dict[str, str | None]
    counts: tuple[Count, Count, Count]  # episodes, frames, successes
    skipped: tuple[str, ...]
    failures: Count


@dataclass(frozen=True)
class ConvertResult:
    """What the dataset at `root` holds; `done_before`: it was there already and nothing was done."""

    root: Path
    num_episodes: int
    num_frames: int
    num_successes: int
    skipped: tuple[str, ...]
    failures: int
    done_before: bool = False

    def lines(self) -> list[str]:
        what = "complete already, nothing to do" if self.done_before else "written"
        line = f"{self.root}: {what}: {self.num_episodes} episodes ({self.num_successes} successes), "
        line += f"{self.num_frames} frames"
        if self.failures:
            line += f"; {self.failures} without success left out"
        if self.skipped:
            line += f"; {len(self.skipped)} bad recordings skipped:"
        return [line, *(f"  {reason}" for reason in self.skipped)]


def main(argv: Sequence[str]) -> None:
    """`hvd convert ...`; prints what the dataset holds."""
    if overrides.asks_help(argv):
        overrides.print_help("hvd convert --raw-dirs FOLDER... --repo-id NAME", __doc__ or "", ConvertConfig())
    else:
        print("\n".join(convert(parse(argv)).lines()))


def parse(argv: Sequence[str]) -> ConvertConfig:
    """The command line as a ConvertConfig."""
    config = overrides.parse(ConvertConfig(), argv)
    for flag, value in (("--raw-dirs", config.raw_dirs), ("--repo-id", config.repo_id)):
        if not value:
            raise UserError(f"hvd convert: {flag} is missing; `hvd convert --help` lists all options")
    return config


def convert(config: ConvertConfig) -> ConvertResult:
    """Do the conversion, or go on with it; returns what the dataset holds. Raises UserError, exit code 2."""
    target, work = _check(config)
    if config.crf < 0:
        config = dataclasses.replace(config, crf=get_codec(config.codec).crf)
    if config.push_to_hub:
        hub.check(config.repo_id)  # before hours of work
    request = _request(config)
    result = None if config.overwrite else _done_before(target, work, request)
    if result is None:
        try:
            sources = {folder: _fingerprint(folder) for folder in request["raw_dirs"]}
            record = _Record(request, sources, (0, 0, 0), (), 0)
            with Isolated() as isolated:
                result = _write(config, make_plan(config, isolated), target, work, record, isolated)
        except OSError as error:
            line = _no_room(error, work)
            if line is None:
                raise
            raise line from error
    if config.push_to_hub:
        hub.push(result.root, config.repo_id, public=config.public)
    return result


def _no_room(error: OSError, work: Path) -> UserError | None:
    """The line about a disk that is full or may not be written; None for any other error."""
    where, why = error.filename or work, error.strerror or error
    if error.errno in (*FULL, errno.EFBIG, errno.EIO):
        kept = f"; what is done is kept in {work}" if work.exists() else ""
        return UserError(f"{where}: cannot write ({why}); make room and run the same command again{kept}")
    if error.errno in UNWRITABLE:
        return UserError(f"{where}: {why}; choose another --root, or look at the folder's rights")
    return None


def _check(config: ConvertConfig) -> tuple[Path, Path]:
    """Target and work folder, after a look at every field."""
    if not config.raw_dirs:
        raise UserError("--raw-dirs: name at least one folder of recordings")
    if config.tasks and len(config.tasks) != len(config.raw_dirs):
        raise UserError(f"--tasks: {len(config.tasks)} prompts for {len(config.raw_dirs)} folders; give one per folder")
    if any(not task.strip() for task in config.tasks):
        raise UserError("--tasks: a prompt is empty")
    if not config.root and (not config.repo_id or Path(config.repo_id).is_absolute() or ".." in config.repo_id):
        raise UserError(f"--repo-id {config.repo_id!r}: give a name like user/dataset")
    check_rules(config, lambda name: f"--{name.replace('_', '-')}")
    if len(set(config.cameras)) != len(config.cameras):
        raise UserError(f"--cameras {' '.join(config.cameras)}: each camera once")
    get_codec(config.codec), get_robot(config.robot)
    target = DataConfig(repo_id=config.repo_id, root=config.root).path().expanduser().absolute()
    work = target.with_name(f"{target.name}.partial")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; choose another --root or --repo-id")
    if target.is_dir() and any(target.iterdir()) and not (target / "meta/info.json").is_file():
        raise UserError(f"{target}: is a folder but no dataset, and is not touched; choose another --root or --repo-id")
    if work.exists() and not is_work_folder(work):
        raise UserError(f"{work}: exists but is no work folder of hvd convert; move it away")
    return target, work


def _request(config: ConvertConfig) -> dict[str, Any]:
    """What decides the dataset's content, as JSON: all fields but those that only say how the work is done."""
    how = ("skip_bad", "push_to_hub", "public", "workers", "overwrite", "root", "repo_id")
    request = {key: value for key, value in vars(config).items() if key not in how}
    request |= {"raw_dirs": [os.path.abspath(folder) for folder in config.raw_dirs], "version": _VERSION}
    return json.loads(json.dumps(request))


def _fingerprint(folder: str) -> str | None:
    """Hash over names, sizes and times of a folder's recordings and sidecars; None when it is gone."""
    path = Path(folder)
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else None
    if files is None:
        return None
    stats = [(p.name, p.stat()) for p in files if is_recording(p) or p.name.endswith(".labels.json")]
    text = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def _done_before(target: Path, work: Path, request: Mapping[str, Any]) -> ConvertResult | None:
    """The result if the target is this very dataset; None if nothing is there; UserError if it is another."""
    if not target.is_dir() or not any(target.iterdir()):
        return None
    again = "pass --overwrite to convert again, or choose another --root or --repo-id"
    try:
        record = documents.read(target / RECORD, _Record)
    except FileNotFoundError:
        raise UserError(f"{target}: a dataset that hvd convert did not make is there; {again}") from None
    except UserError as error:
        raise UserError(f"{error}; {again}") from None
    made_by = record.request
    for key in request:
        if made_by.get(key) != request[key]:
            raise UserError(f"{target}: was converted with {key} {made_by.get(key)}, not {request[key]}; {again}")
    for folder, known in record.sources.items():
        now = _fingerprint(folder)
        if now is not None and now != known:  # recordings that are gone were converted all the same
            raise UserError(f"{target}: the recordings or labels in {folder} have changed since; {again}")
    if work.exists():  # killed between the last two steps of _write
        with WorkFolder(work):
            shutil.rmtree(work)
    return _result(target, record, done_before=True)


def _result(target: Path, record: _Record, done_before: bool = False) -> ConvertResult:
    return ConvertResult(target, *record.counts, record.skipped, record.failures, done_before)


def _write(
    config: ConvertConfig,
    plan: ConversionPlan,
    target: Path,
    work_path: Path,
    record: _Record,
    isolated: Isolated,
) -> ConvertResult:
    for camera, (height, width) in zip(config.cameras, plan.image_sizes, strict=True):
        if config.codec == "av1" and (height % 2 or width % 2):
            raise UserError(f"--codec av1: camera {camera} has {height}x{width} images, an odd side; use h264")
    with WorkFolder(work_path) as work:
        segments = [
            SegmentJob(e.ref, camera, config.robot, e.num_frames, plan.fps, config.codec, config.crf)
            for e in plan.episodes
            for camera in config.cameras
        ]
        encoded, bad = encode_all(work, segments, config.workers, config.skip_bad, isolated)
        skipped = [*plan.skipped, *bad.values()]
        episodes = [e for e in plan.episodes if e.ref not in bad]
        if not episodes:
            raise UserError(f"no episode left: {skipped[-1]}")
        folder = work.path / "dataset"
        shutil.rmtree(folder, ignore_errors=True)
        frames = write_dataset(folder, config, plan, episodes, encoded)
        counts = len(episodes), frames, sum(e.labels.success for e in episodes)
        record = dataclasses.replace(record, counts=counts, skipped=tuple(skipped), failures=plan.failures)
        (folder / RECORD).write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n", encoding="utf-8")
        if target.is_dir() and any(target.iterdir()):  # --overwrite: the old dataset stays whole until now
            shutil.rmtree(work.path / "replaced", ignore_errors=True)
            os.replace(target, work.path / "replaced")
        os.replace(folder, target)
        shutil.rmtree(work_path)
    return _result(target, record)
