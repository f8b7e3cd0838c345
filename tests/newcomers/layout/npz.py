"""A dataset format, as a newcomer writes it: one .npz file per episode, told by meta/episodes.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hvd.data.layout import EpisodeMeta, Format


def describe(root: Path, info: Mapping[str, Any]) -> tuple[dict[int, str], list[EpisodeMeta]]:
    lines = json.loads((root / "meta/episodes.json").read_text())
    episodes = [
        EpisodeMeta(i, line["length"], (line["task"],), root / f"{i}.npz", {}, {"success": line["success"]})
        for i, line in enumerate(lines)
    ]
    return {0: lines[0]["task"]}, episodes


def table(path: Path, columns: list[str] | None) -> pa.Table:
    with np.load(path) as arrays:
        wide = {name: arrays[name].reshape(len(arrays[name]), -1) for name in columns or arrays.files}
    lists = {name: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]) for name, x in wide.items()}
    return pa.table(lists)


FORMAT = Format("npz-1", describe, table, lambda path: table(path, None).schema)
