"""Where things lie in a dataset's folder. Each module of this package reads one layout, which it describes in `FORMAT`;
a new file here is a new dataset format.

Every dataset has a meta/info.json. Its "codebase_version" names the format, "features" its columns and cameras with
their "dtype" ("video", "image" or a number's), "fps" its rate. Read without lerobot. Nothing in the folder is trusted:
documents have declared forms, paths stay below the folder, only regular files are opened.
"""

import functools
import importlib
import json
import pkgutil
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Meta

from hvd import documents
from hvd.documents import Count
from hvd.errors import UserError

Length = Annotated[int, Meta(ge=1, le=2**31 - 1)]  # frames of an episode
Rate = Annotated[float, Meta(gt=0, le=10_000)]
_META_ROWS = 5_000_000  # of a parquet file in meta: they become Python objects


class Feature(msgspec.Struct):
    """A column or camera of info.json. `shape` and `names` are looked at by who uses them. `info`, formerly
    `video_info`, says more of a camera."""

    dtype: str
    shape: Any = None
    names: Any = None
    info: dict[str, Any] | None = None
    video_info: dict[str, Any] | None = None

    @property
    def is_depth(self) -> bool:
        said = (self.info or {}) | (self.video_info or {})
        return any(key.rpartition(".")[2] == "is_depth_map" and value is True for key, value in said.items())


class Info(msgspec.Struct):
    """What every format's info.json says. Each format reads the rest by a form of its own."""

    fps: Rate
    features: dict[str, Feature]
    total_episodes: Count | None = None
    total_frames: Count | None = None


@dataclass(frozen=True)
class VideoSpan:
    """The part of a video file that belongs to one episode: it begins `offset` seconds into the file."""

    path: Path
    offset: float


@dataclass(frozen=True)
class EpisodeMeta:
    """One episode as the meta folder has it. `extra` holds fields that are not LeRobot's own (success, quality).

    `videos` lacks a camera whose place meta does not say.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    data_path: Path
    videos: Mapping[str, VideoSpan]
    extra: Mapping[str, Any]


# ------------------------------------------------------------------------------------------------------------ parquet


def read_schema(path: Path) -> pa.Schema:
    """The schema of a parquet file; a UserError names a file that is missing or damaged."""
    return _parquet(path, lambda: pq.read_schema(path))


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A parquet file, or some columns of it; a UserError names a file that is missing or damaged."""
    return _parquet(path, lambda: pq.ParquetFile(path).read(columns=columns))


def count_rows(path: Path) -> int:
    """The rows of a parquet file, from its footer; a UserError names a file that is missing or damaged."""
    return _parquet(path, lambda: pq.read_metadata(path).num_rows)


def read_meta(path: Path, without: str = "") -> tuple[pa.Schema, list[dict[str, Any]]]:
    """The schema and the rows of a parquet file of the meta folder, which is opened once.

    pandas makes floats of whole numbers and NaN of what is not there; here they are whole numbers and None again.

    Args:
        without: columns whose names begin so are left out of the rows.
    """

    def read() -> tuple[pa.Schema, list[dict[str, Any]]]:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > _META_ROWS:
                raise UserError(f"{path}: has more than {_META_ROWS} rows, more than such a file can have")
            names = [n for n in file.schema_arrow.names if not n.startswith(without)] if without else None
            return file.schema_arrow, file.read(columns=names).to_pylist()

    schema, rows = _parquet(path, read)
    return schema, [{name: _plain(value) for name, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return None if value != value else int(value) if value.is_integer() else value


def _parquet[T](path: Path, read: Callable[[], T]) -> T:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a regular file")
        return read()
    except FileNotFoundError:
        raise UserError(f"{path}: data file is missing") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged or truncated parquet file ({error})") from error


# ------------------------------------------------------------------------------------------------------ paths and JSON


class PathTemplate:
    """A path such as "data/{episode_chunk:03d}.parquet", matched and never formatted: `fields` are all it may name."""

    def __init__(self, root: Path, template: str, fields: tuple[str, ...], where: str):
        self._root, self._where = root, f"{where} {template[:200]!r}"
        self._texts = re.split(r"\{\w+(?::0?\d?d)?\}", template)
        self._fields = re.findall(r"\{(\w+)(?::0?(\d?)d)?\}", template)
        unknown = [name for name, _ in self._fields if name not in fields]
        if unknown or re.search(r"[{}*?\[\]\\\0]", "".join(self._texts)):
            raise UserError(f"{self._where}: write a path with {' '.join(f'{{{f}}}' for f in fields)}")
        self._inside("".join(self._texts))

    def path(self, **values: int | str) -> Path:
        """The path for these values of the fields; a UserError if it leads out of the dataset."""
        filled = self._texts[0]
        for (name, width), text in zip(self._fields, self._texts[1:], strict=True):
            value = values[name]
            filled += (value if isinstance(value, str) else str(value).zfill(int(width or 0))) + text
        return self._root / self._inside(filled)

    def existing(self) -> tuple[Path, ...]:
        """The paths of this form that are there, sorted."""
        return tuple(sorted(self._root.glob("*".join(self._texts))))

    def _inside(self, path: str) -> str:
        if not path or path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise UserError(f"{self._where}: leads out of the dataset ({path[:200]!r})")
        return path


def parse_json(text: bytes, where: Path | str) -> Any:
    """The value of a JSON file's content, or of a line of it. NaN is read, as Python's writers leave it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error


def json_lines[T](path: Path, form: type[T]) -> list[tuple[T, dict[str, Any]]]:
    """Each line of a file of JSON lines, by its form and as it is."""
    try:
        lines = documents.read_bytes(path).splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}: line {number}"
            value = parse_json(line, where)
            found.append((documents.convert(value, form, where), value))
    return found


def prompts(pairs: Iterable[tuple[int, str]], where: Path) -> dict[int, str]:
    """The prompts by task_index. Raises UserError for two of one index, and for text that is none."""
    found: dict[int, str] = {}
    for index, text in pairs:
        if found.setdefault(index, text) != text:
            raise UserError(f"{where}: task_index {index} is there twice, with different tasks")
        if any((c < " " and c not in "\t\r\n") or "\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"{where}: task {index} holds control characters: {text[:80]!r}")
    return found


# ------------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Format:
    """How the datasets of one codebase_version are read.

    Attributes:
        describe: called with the dataset's folder and the content of info.json, gives the prompts by task_index and the
            episodes in the order of the rows. A KeyError is reported as a field that is missing in the folder meta.
        table: reads a data file, or some columns of it; numbers by frame, and images as encoded bytes or paths.
        schema: the column names and types of a data file.
        rows: the number of rows of a data file, from its head; None: the table is read for it.
        files: all data files there are, for a format whose episodes' description may name a wrong one.
    """

    version: str
    describe: Callable[[Path, Mapping[str, Any]], tuple[dict[int, str], list[EpisodeMeta]]]
    table: Callable[[Path, list[str] | None], pa.Table] = read_parquet
    schema: Callable[[Path], pa.Schema] = read_schema
    rows: Callable[[Path], int] | None = None
    files: Callable[[Path, Mapping[str, Any]], tuple[Path, ...]] = lambda root, info: ()


@functools.cache
def formats() -> dict[str, Format]:
    """The formats by version: the modules of this package."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    every = [importlib.import_module(f"{__name__}.{name}").FORMAT for name in names]
    return {format.version: format for format in every}


@dataclass(frozen=True)
class Layout:
    """A dataset's description. `tasks[i]` is the prompt of task_index i.

    `data_paths` are those that the episodes name, in the order of the rows, and then the others of `files`.
    """

    root: Path
    format: Format
    fps: float
    features: Mapping[str, Feature]
    episodes: tuple[EpisodeMeta, ...]
    tasks: Mapping[int, str]
    files: tuple[Path, ...] = ()

    @property
    def version(self) -> str:
        return self.format.version

    @property
    def data_paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((*(e.data_path for e in self.episodes), *self.files)))

    @property
    def video_paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(v.path for e in self.episodes for v in e.videos.values()))

    @property
    def image_keys(self) -> tuple[str, ...]:
        return tuple(k for k, f in self.features.items() if f.dtype in ("video", "image"))


def read_info(root: Path) -> tuple[Format, Info, Mapping[str, Any]]:
    """The format of the dataset at `root` and its info.json, by its form and as it is; raises as `read_layout`."""
    path = root / "meta" / "info.json"
    try:
        content = parse_json(documents.read_bytes(path), path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: not found; set the data config's root (or HF_LEROBOT_HOME) to a LeRobot dataset"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    version = content.get("codebase_version")
    format = formats().get(str(version))
    if format is None:
        *others, last = formats()
        raise UserError(f"{path}: dataset version {version!r} is unknown; hvd reads {', '.join(others)} and {last}")
    return format, documents.convert(content, Info, str(path)), content


def read_layout(root: Path) -> Layout:
    """Read the meta folder of the dataset at `root`. Raises UserError naming the file that is missing or wrong."""
    root = root.absolute()
    meta = root / "meta"
    format, info, content = read_info(root)
    try:
        tasks, episodes = format.describe(root, content)
        files = format.files(root, content)
    except KeyError as error:
        raise UserError(f"{meta}: field {error} is missing from the episodes' or tasks' description") from error
    except (ValueError, TypeError, ArithmeticError, OSError, pa.ArrowException) as error:
        raise UserError(f"{meta}: the episodes' or tasks' description is damaged ({error})") from error
    known: dict[int, EpisodeMeta] = {}
    for episode in episodes:
        if known.setdefault(episode.index, episode) != episode:
            raise UserError(f"{meta}: episode {episode.index} is described twice, and not alike; remove one of the two")
    if not known:
        raise UserError(f"{root}: the dataset has no episode")
    frames = sum(e.length for e in known.values())
    for name, said, found in (("episodes", info.total_episodes, len(known)), ("frames", info.total_frames, frames)):
        if said is not None and said != found:
            raise UserError(
                f"{meta / 'info.json'}: total_{name} is {said}, but {found} {name} are described; "
                "mend whichever is wrong"
            )
    return Layout(root, format, info.fps, info.features, tuple(known.values()), tasks, files)


def data_files(layout: Layout) -> list[tuple[Path, int]]:
    """The data files in the order of the rows, and how many rows each has. UserError when the episodes have others."""
    format = layout.format
    expected: Counter[Path] = Counter()
    for episode in layout.episodes:
        expected[episode.data_path] += episode.length
    count = format.rows or (lambda path: len(format.table(path, None)))
    named = [(path, count(path)) for path in expected]
    wrong = next(((path, n) for path, n in named if n != expected[path]), None)
    if wrong is None:
        return named
    path, rows = wrong
    # Meta may name a wrong file. Then the rows count, in the order of the files, as in lerobot.
    every = [(path, count(path)) for path in sorted(layout.data_paths)]
    if len(every) > 1 and sum(n for _, n in every) == expected.total() and "episode_index" in format.schema(path).names:
        return every
    raise UserError(f"{path}: has {rows} rows where the episodes' description says {expected[path]}")
