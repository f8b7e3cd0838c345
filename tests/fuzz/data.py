"""Doors of the data: datasets, their images and videos, recordings, labels, statistics.

An input is accepted rightly when hvd's numbers are those that pyarrow, Pillow, FFmpeg, h5py and json, called plainly,
find in the damaged file: a file whose numbers are other ones, in its own form, cannot be told from a good one.
"""

import io
import json
import random
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data import factory, joylo
from tests.fuzz import mutations, recordings
from tests.fuzz.door import Door, spoil, spoil_parquet

CAMERA = factory.CAMERAS[:1]
KEY = factory.KEYS[CAMERA[0]]


def _opened(folder: Path, cameras: tuple[str, ...] = ()):
    from hvd.data.dataset import Dataset

    root = folder / "set"
    cfg = factory.Recipe(root, (1,), cameras=cameras).config
    return Dataset.open(cfg, cameras=cameras, robot="r1")


def dataset(good: Path) -> Door:
    """Numbers and words: meta and data files of v2.1 and v3.0."""
    versions = ("v2.1", "v3.0")
    for version in versions:
        factory.make_dataset(good / version, (5, 4, 3), version=version, cameras=(), success=(True, False, True))
    truth = factory.Recipe(good, (5, 4, 3), cameras=())

    def damage(folder: Path, rng: random.Random) -> str:
        root = (folder / rng.choice(versions)).rename(folder / "set")
        meta, data = sorted((root / "meta").rglob("*.*")), sorted((root / "data").rglob("*.parquet"))
        path = rng.choice(meta if rng.random() < 0.7 else data)
        if rng.random() < 0.03:
            path.unlink()
            return f"{path.name} is gone"
        if path.suffix == ".parquet":
            return spoil_parquet(path, rng)
        return f"{path.name}: " + spoil(str(path.relative_to(folder)), path.suffix == ".jsonl")(folder, rng)

    def read(folder: Path) -> str:
        found = _opened(folder)
        tables = [_plain(path) for path in sorted((folder / "set/data").rglob("*.parquet"))]
        names = set.intersection(*(set(table.column_names) for table in tables))
        # a column may be of numbers in one file and of lists of one number in the next
        rows = {n: np.concatenate([_numbers(t[n]).reshape(len(t), -1) for t in tables]) for n in names}
        if not 0.75 < found.fps / truth.fps < 1.34:  # what the timestamps of a true recording may be off by
            return f"fps {found.fps}"
        if (total := sum(map(len, tables))) != found.num_frames:
            return f"{found.num_frames} of {total} rows"
        for name, values in (("observation.state", found.state), ("action", found.actions)):
            if not np.array_equal(rows[name].reshape(values.shape).astype(np.float32), values):
                return f"other {name}"
        ended = rows["terminal"].ravel().astype(bool)
        if not np.array_equal(rows["next.reward"].ravel(), found.rewards) or not np.array_equal(ended, found.terminal):
            return "other rewards"
        for episode in found.all_episodes if "episode_index" in rows else ():
            said = rows["episode_index"][episode.start : episode.stop]
            if set(said[~np.isnan(said)]) - {episode.index}:
                return f"rows of others in episode {episode.index}"
        return ""

    return Door(damage, read)


def _plain(path: Path) -> pa.Table:
    names = ["observation.state", "action", "next.reward", "terminal", "episode_index"]
    names = [name for name in names if name in pq.read_schema(path).names]
    table = pq.ParquetFile(path).read(columns=names)
    kinds = pa.schema([(name, _wide(table.schema.field(name).type)) for name in names])
    return pa.table({name: table[name].combine_chunks() for name in names}).cast(kinds, safe=False)


def _wide(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(pa.float64())
    return pa.float64()


def _numbers(column: Any) -> np.ndarray:
    return np.asarray(column.to_pylist(), np.float64)


# ------------------------------------------------------------------------------------------------------------- pictures


def images(good: Path) -> Door:
    """Encoded images in parquet."""
    factory.make_dataset(good / "set", (3, 2), kind="image", cameras=CAMERA, size=(16, 24))
    data = sorted((good / "set/data").rglob("*.parquet"))[0].relative_to(good)
    modes = ("L", "LA", "P", "RGBA", "CMYK", "I;16", "F", "1", "YCbCr")

    def cell(rng: random.Random, image: bytes) -> Any:
        lot = rng.random()
        if lot < 0.6:
            return {"bytes": mutations.damaged(rng, image), "path": "0.png"}
        if lot < 0.7:
            other = rng.choice(
                (b"", b"x", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a", b"\0" * 100)
            )
            return {"bytes": other, "path": rng.choice((None, "../x.png", "/etc/passwd", "0.png", "a\0b", ""))}
        out, kind = io.BytesIO(), rng.choice(("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM"))
        size = rng.choice(((24, 16),) * 40 + ((1, 1), (25, 16), (2000, 2000)))
        Image.new(rng.choice(("RGB", *modes)), size, rng.choice((0, 1))).save(out, kind)
        data = out.getvalue()
        return {"bytes": mutations.damaged(rng, data) if rng.random() < 0.3 else data, "path": None}

    def damage(folder: Path, rng: random.Random) -> str:
        path = folder / data
        if rng.random() < 0.15:
            return spoil_parquet(path, rng)
        table = pq.read_table(path)
        cells = table[KEY].to_pylist()
        at = rng.randrange(len(cells))
        try:
            cells[at] = cell(rng, cells[at]["bytes"])
        except (OSError, ValueError):  # Pillow does not write this mode as this kind
            cells[at] = None
        place = table.column_names.index(KEY)
        pq.write_table(table.set_column(place, KEY, pa.array(cells, table.schema.field(KEY).type)), path)
        return f"row {at}: {cells[at]!r:.150}"

    def read(folder: Path) -> str:
        found = _opened(folder, CAMERA)
        got = found.frames(CAMERA[0], np.arange(found.num_frames))
        cells: list[Any] = []
        for path in sorted((folder / "set/data").rglob("*.parquet")):
            cells += pq.ParquetFile(path).read(columns=[KEY])[KEY].to_pylist()
        for row, (each, frame) in enumerate(zip(cells, got, strict=True)):
            plain = np.asarray(Image.open(io.BytesIO(each["bytes"])).convert("RGB"))
            if not np.array_equal(plain, frame):
                return f"another picture in row {row}"
        return ""

    return Door(damage, read)


def videos(good: Path) -> Door:
    """Video files; what FFmpeg conceals or skips is other pictures too."""
    factory.make_dataset(good / "set", (6, 4), version="v2.1", cameras=CAMERA, size=(32, 48))
    first = sorted((good / "set/videos").rglob("*.mp4"))[0].relative_to(good)

    def damage(folder: Path, rng: random.Random) -> str:
        path = folder / first
        path.write_bytes(mutations.damaged(rng, path.read_bytes()))
        return path.name

    def read(folder: Path) -> str:
        found = _opened(folder, CAMERA)
        got = found.frames(CAMERA[0], np.arange(6))
        with av.open(str(folder / first)) as container:
            container.streams.video[0].thread_count = 1
            frames = list(container.decode(video=0))
        by_time = {round(float(frame.time) * 10): frame.to_ndarray(format="rgb24") for frame in frames}
        others = [i for i in range(6) if i not in by_time or not np.array_equal(by_time[i], got[i])]
        return f"other pictures in rows {others}" if others else ""

    return Door(damage, read)


# ----------------------------------------------------------------------------------------- recordings, labels


def recording(good: Path) -> Door:
    """JoyLo HDF5: read, as `hvd convert` does, in a process of its own, whose death costs the recording alone."""
    from hvd.data.convert_plan import ConvertConfig, make_plan
    from hvd.pools import Isolated

    (good / "raw").mkdir()
    joylo.write_recording(good / "raw/demo.hdf5", 6, size=(8, 12), compression="gzip", environment=True)
    (good / "outside.h5").write_bytes((good / "raw/demo.hdf5").read_bytes())
    isolated = Isolated()

    def damage(folder: Path, rng: random.Random) -> str:
        return recordings.spoil(folder / "raw/demo.hdf5", rng)

    def read(folder: Path) -> str:
        config = ConvertConfig(raw_dirs=(str(folder / "raw"),), repo_id="a/b")
        plan = make_plan(config, isolated)
        return isolated(recordings.compare, config, plan.episodes[0])

    return Door(damage, recordings.deaths_are_lines(read))


def labels(good: Path) -> Door:
    name, frames = "x.labels.json", 12
    span = {"name": "reached", "start": 0, "end": 6, "reward": 1.0}
    mistake = {"level": "torso", "start": 2, "end": 5, "kind": "late"}
    whole = {"task": "stack", "success": True, "quality": "teleop", "subtasks": [span, span | {"start": 6, "end": 12}]}
    (good / name).write_text(json.dumps(whole | {"terminal": True, "mistakes": [mistake]}))

    def read(folder: Path) -> str:
        from hvd.data.labels import load_labels
        from hvd.fields import to_plain

        found = load_labels(folder / name, frames)
        said = json.loads((folder / name).read_bytes())
        read = {key: value for key, value in to_plain(found).items() if key in said}
        same = json.loads(json.dumps(_filled(said))) == json.loads(json.dumps(read))
        return "" if same and np.isfinite(found.rewards(frames)).all() else f"read as {read}"

    return Door(spoil(name), read)


def _filled(said: dict[str, Any]) -> dict[str, Any]:
    spans = said.get("subtasks")
    return said | ({"subtasks": [{"reward": 1.0} | each for each in spans]} if spans is not None else {})


def norm_stats(good: Path) -> Door:
    from hvd.data import norm_record
    from tests.train import factory as train

    cfg, path = train.experiment(good), "norm_stats.json"
    rng = np.random.default_rng(0)

    def numbers(dim: int) -> dict[str, list[float]]:
        middle, spread = rng.normal(size=dim), rng.uniform(0.1, 1, dim)
        return {
            "mean": middle.tolist(),
            "std": spread.tolist(),
            "q01": (middle - spread).tolist(),
            "q99": (middle + spread).tolist(),
        }

    made = {"dataset": "x", "digest": "d", "frames": 9, "robot": "r1", "delta_dims": [], "horizon": 4}
    made |= {"state": ["observation.state"], "actions": ["action"], "state_dims": ["a"] * 4, "action_dims": ["b"] * 21}
    both = {"state": numbers(4), "actions": numbers(21)}
    (good / path).write_text(json.dumps({"norm_stats": both, "made_of": made}))

    def read(folder: Path) -> str:
        from etils import epath

        where = epath.Path(folder / path)
        found, made_of = norm_record.read(where)
        norm_record.check_use(where, cfg, found, made_of)
        said = json.loads((folder / path).read_bytes())["norm_stats"]
        for name, each in found.items():
            for kind in ("mean", "std", "q01", "q99"):
                value, plain = getattr(each, kind), said[name].get(kind)
                if value is not None and not np.array_equal(value, np.asarray(plain, np.float64)):
                    return f"other {name} {kind}"
                if value is not None and not np.isfinite(value).all():
                    return f"{name} {kind} is not finite"
        return ""

    return Door(spoil(path), read)
