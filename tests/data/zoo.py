"""A zoo of dataset layouts and recordings, each small, with the values that they hold.

    python -m tests.data.zoo          # opens all with hvd and lerobot (extra lerobot), writes the table of docs/data.md

`LAYOUTS` writes each into a folder; `by_hvd` and `by_lerobot` open it and compare values: "read", or why not.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hvd.data.dataset import Dataset
from hvd.errors import UserError
from tests.data import joylo
from tests.data.factory import CAMERAS, KEYS, TASKS, Recipe, make_dataset

BEGIN, END = "<!-- zoo -->", "<!-- end of the zoo -->"
HEAD = KEYS[CAMERAS[0]]
type Made = Recipe | list[joylo.Truth]
_KINDS = {"float": "float32", "double": "float64", "halffloat": "float16"}


# ------------------------------------------------------------------------------------------------------ ways to change


def info(root: Path, **fields: Any) -> None:
    """Fields of info.json; ... removes one."""
    path = root / "meta/info.json"
    said = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))


def tables(root: Path, change: Callable[[pa.Table], pa.Table], where: str = "data") -> None:
    for path in sorted((root / where).rglob("*.parquet")):
        pq.write_table(change(pq.read_table(path)), path)


def column(root: Path, name: str, kind: pa.DataType) -> None:
    """A column of another type; info.json says so too."""
    tables(root, lambda t: t.set_column(t.column_names.index(name), name, pa.array(t[name].to_pylist(), kind)))
    complete(root)


def complete(root: Path) -> None:
    """What lerobot asks of a dataset beyond what hvd does: each column among the features, prompts as pandas' index."""
    said = json.loads((root / "meta/info.json").read_text())
    schema = pq.read_schema(min((root / "data").rglob("*.parquet")))
    features = {k: f for k, f in said["features"].items() if f["dtype"] in ("video", "image")}
    for name, kind in zip(schema.names, schema.types, strict=True):
        if name not in features:
            inner = kind.value_type if pa.types.is_nested(kind) and not pa.types.is_struct(kind) else kind
            width = said["features"].get(name, {}).get("shape", [1])
            features[name] = {"dtype": _KINDS.get(str(inner), str(inner)), "shape": width, "names": None}
    info(root, features=features, robot_type="r1", splits={"train": f"0:{said['total_episodes']}"}, total_tasks=2)
    if said["codebase_version"] != "v3.0":
        return
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, (kind, numpy) in kinds.items()
    ]
    note = json.dumps({"index_columns": ["task"], "columns": columns, "column_indexes": [], "pandas_version": "2.3.3"})
    tasks = pa.table({"task_index": [0, 1], "task": list(TASKS)}).replace_schema_metadata({"pandas": note})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    (root / "meta/stats.json").write_text("{}")


def episodes(root: Path, **fields: Any) -> None:
    """Fields of each episode's description; ... removes one."""
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    rows = [row | fields for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist([{k: v for k, v in row.items() if v is not ...} for row in rows]), path)


# ------------------------------------------------------------------------------------------------------------- layouts


def dataset(change: Callable[[Path], object] = lambda root: None, **options: Any) -> Callable[[Path], Recipe]:
    def make(folder: Path) -> Recipe:
        recipe = make_dataset(folder / "set", **({"lengths": (4, 3, 5), "size": (16, 24)} | options))
        complete(recipe.root)
        change(recipe.root)
        return recipe

    return make


def pictures(kind: str, type: pa.DataType, in_files: bool = False) -> Callable[[Path], Recipe]:
    """Images of one encoding in a column of one type."""

    def make(folder: Path) -> Recipe:
        recipe = make_dataset(folder / "set", (4, 3), kind="image", size=(16, 24), cameras=CAMERAS[:1])
        complete(recipe.root)

        def cell(row: int) -> Any:
            out = io.BytesIO()
            Image.fromarray(recipe.frame(CAMERAS[0], row)).save(out, kind, quality=100)
            name = f"images/{row}.{kind.lower()}"
            if in_files:
                (recipe.root / "images").mkdir(exist_ok=True)
                (recipe.root / name).write_bytes(out.getvalue())
            data = None if in_files else out.getvalue()
            return {"bytes": data, "path": name} if pa.types.is_struct(type) else data or name

        def change(table: pa.Table) -> pa.Table:
            cells = pa.array([cell(row) for row in table["index"].to_pylist()], type)
            return table.set_column(table.column_names.index(HEAD), HEAD, cells)

        tables(recipe.root, change)
        return recipe

    return make


def recording(write: Callable[[Path], list[joylo.Truth]], **options: Any) -> Callable[[Path], list[joylo.Truth]]:
    """Recordings, converted."""

    def make(folder: Path) -> list[joylo.Truth]:
        from hvd.data.convert import ConvertConfig, convert

        truths = write(folder / "raw")
        with contextlib.redirect_stderr(io.StringIO()):
            convert(ConvertConfig((str(folder / "raw"),), "me/set", root=str(folder / "set"), workers=1, **options))
        return truths

    return make


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LAYOUTS: dict[str, Callable[[Path], Made]] = {}
for _version in ("v2.0", "v2.1", "v3.0"):
    _written = "v3.0" if _version == "v3.0" else "v2.1"
    _named = functools.partial(info, codebase_version=_version)
    for _what, _more in (
        ("numbers", {"cameras": ()}),
        ("video, two cameras", {}),
        ("video, one camera", {"cameras": CAMERAS[:1]}),
        ("AV1 video", {"codec": "av1", "size": (64, 64), "cameras": CAMERAS[:1]}),
        ("images", {"kind": "image"}),
        ("one episode", {"lengths": (6,), "cameras": ()}),
        ("an episode of one frame", {"lengths": (1, 4), "cameras": ()}),
        ("thirty episodes", {"lengths": (2,) * 30, "cameras": ()}),
        ("30 frames per second", {"fps": 30}),
        ("odd picture sizes", {"size": (17, 23)}),
        ("no rewards", {"columns": None, "cameras": ()}),
        ("success in words", {"success": ("success", "failure", "success"), "cameras": ()}),
    ):
        LAYOUTS[f"{_version}: {_what}"] = dataset(_named, version=_written, **_more)
_numbers = functools.partial(dataset, cameras=())
for _type in (pa.float64(), pa.float16(), pa.int32()):
    if _type != pa.int32():
        LAYOUTS[f"actions of {_type}"] = _numbers(lambda root, t=_type: column(root, "action", pa.list_(t)))
for _type in (pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 21)):
    LAYOUTS[f"actions as {str(_type).replace('item', 'x')}"] = _numbers(lambda root, t=_type: column(root, "action", t))
for _kind in ("PNG", "JPEG", "WEBP"):
    LAYOUTS[f"{_kind} as bytes and path"] = pictures(_kind, STRUCT)
    LAYOUTS[f"{_kind} as bytes"] = pictures(_kind, pa.binary())
    LAYOUTS[f"{_kind} as large bytes"] = pictures(_kind, pa.large_binary())
    LAYOUTS[f"{_kind} in files, named by a pair"] = pictures(_kind, STRUCT, in_files=True)
    LAYOUTS[f"{_kind} in files, named by text"] = pictures(_kind, pa.string(), in_files=True)
LAYOUTS |= {
    "rewards in `reward` and `next.done`": _numbers(columns=("reward", "next.done")),
    "fps as 10.0": _numbers(lambda root: info(root, fps=10.0)),
    "no total_episodes, total_frames": _numbers(lambda root: info(root, total_episodes=..., total_frames=...)),
    "stale data/file_index": _numbers(lambda root: episodes(root, **{"data/file_index": 0})),
    "episodes without tasks": _numbers(lambda root: episodes(root, tasks=...)),
    "tasks without pandas' note": _numbers(lambda root: tables(root, lambda t: t.replace_schema_metadata({}), "meta")),
    "a column more": _numbers(lambda root: tables(root, lambda t: t.append_column("more", pa.array([1] * len(t))))),
    "depth camera": dataset(lambda root: info(root, features=_depth(root)), cameras=CAMERAS[:1]),
    "fps 30, timestamps of 10": _numbers(lambda root: info(root, fps=30)),
    "rows backwards": _numbers(lambda root: tables(root, lambda t: t.take(list(range(len(t) - 1, -1, -1))))),
    "actions with NaN": _numbers(lambda root: tables(root, _nan)),
    "a data file is gone": _numbers(lambda root: max((root / "data").rglob("*.parquet")).unlink()),
    "total_frames of another dataset": _numbers(lambda root: info(root, total_frames=99)),
    "JoyLo: a file an episode": recording(joylo.write_folder),
    "JoyLo: all in one file": recording(lambda raw: joylo.write_merged(raw / "merged.hdf5", (5, 4))),
    "JoyLo: gzip": recording(lambda raw: joylo.write_folder(raw, (5, 4), compression="gzip")),
    "JoyLo: grippers [T,1]": recording(lambda raw: joylo.write_folder(raw, (5, 4), gripper_2d=True)),
    "JoyLo: raw odometry": recording(lambda raw: joylo.write_folder(raw, (5, 4), base_velocity=False)),
    "JoyLo: environment state": recording(lambda raw: joylo.write_folder(raw, (5, 4), environment=True)),
    "JoyLo: no recording_freq": recording(lambda raw: joylo.write_folder(raw, (5, 4), fps=None)),
    "JoyLo: no labels": recording(
        lambda raw: [joylo.write_recording(raw / "a.hdf5", 6, success=None)], default_success=True, tasks=("stack",)
    ),
    "JoyLo: R1 Pro": recording(lambda raw: joylo.write_folder(raw, (5, 4), robot="r1_pro"), robot="r1_pro"),
}


def _depth(root: Path) -> dict[str, Any]:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    return features | {HEAD: features[HEAD] | {"info": {"video.is_depth_map": True}}}


def _nan(table: pa.Table) -> pa.Table:
    rows = table["action"].to_pylist()
    rows[0][0] = float("nan")
    return table.set_column(table.column_names.index("action"), "action", pa.array(rows, pa.list_(pa.float32())))


# ------------------------------------------------------------------------------------------------------------- readers


def _truth(made: Made) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(made, Recipe):
        return made.state, made.actions
    return np.concatenate([t.state for t in made]), np.concatenate([t.actions for t in made])


def by_hvd(made: Made, root: Path) -> str:
    state, actions = _truth(made)
    try:
        if isinstance(made, Recipe):
            rewards = {} if made.columns else {"reward": "success_at_end"}
            found = Dataset.open(dataclasses.replace(made.config, **rewards), cameras=made.cameras)
        else:
            from hvd.data.dataset import open_dataset

            found = open_dataset(root)
        if not np.array_equal(found.state, state) or not _close(found.actions, actions):
            return "other numbers"
        rows = np.arange(len(state))
        for camera in made.cameras if isinstance(made, Recipe) else ():
            got = found.frames(camera, rows).astype(int)
            if np.abs(got - made.frames(camera)).max() > 8:
                return "other pictures"
    except UserError as error:
        return f"refused: {str(error).replace(str(root) + '/', '').replace(str(root) + ': ', '')}"
    return "read"


def _close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.shape == wanted.shape and np.allclose(found, wanted, rtol=1e-3, atol=1e-3)


def by_lerobot(made: Made, root: Path) -> str:
    """lerobot 0.6's reader, offline."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    state, actions = _truth(made)
    try:
        found = LeRobotDataset("me/set", root=root, video_backend="pyav")
        items = [found[i] for i in range(len(found))]
    except Exception as error:  # each has its own
        return f"not opened ({type(error).__name__})"
    if not items:
        return "no rows"
    ours = np.stack([item["action"].numpy() for item in items])
    if not np.array_equal(np.stack([item["observation.state"].numpy() for item in items]), state):
        return "other numbers"
    if not _close(ours, actions):
        return "other numbers"
    for camera in made.cameras if isinstance(made, Recipe) else ():
        got = np.stack([item[KEYS[camera]].numpy().transpose(1, 2, 0) * 255 for item in items])
        if np.abs(got - made.frames(camera)).max() > 9:
            return "other pictures"
    return "read"


def rows(read: Callable[[Made, Path], str]) -> dict[str, str]:
    found = {}
    for name, make in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = read(make(Path(folder)), Path(folder) / "set")
    return found


def table(hvd: dict[str, str], lerobot: dict[str, str]) -> str:
    lines = ["| layout | hvd | lerobot |", "|---|---|---|"]
    lines += [f"| {name} | {hvd[name].replace('|', ' ')} | {lerobot[name]} |" for name in LAYOUTS]
    return "\n".join(lines)


def main() -> None:
    path = Path(__file__).parents[2] / "docs/data.md"
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder}
        text = table(rows(by_hvd), rows(by_lerobot))
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
