"""A run's metrics.jsonl, read. Imports no jax; `hvd jobs` asks for last lines, reports and notebooks for curves."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hvd import documents
from hvd.files import is_local, read_lines

if TYPE_CHECKING:
    import numpy as np

METRICS = "metrics.jsonl"
_TAIL = 1 << 16  # bytes of the end of the file that are read first


class _Line(msgspec.Struct):
    step: documents.Count
    split: str = "train"


def read_metrics(run_dir: os.PathLike | str) -> "dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]":
    """split -> metric -> (steps, values) of a run's metrics.jsonl; {} when there is none. A torn line is left out."""
    import numpy as np

    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    path = os.path.join(os.fspath(run_dir), METRICS)
    for record in read_lines(path):
        about = documents.convert(record, _Line, path)
        del record["step"]
        record.pop("split", None)
        split = points.setdefault(about.split, {})
        for name, value in documents.convert(record, dict[str, float], f"{path}, step {about.step}").items():
            split.setdefault(name, []).append((about.step, value))
    return {
        split: {
            name: (np.array([p[0] for p in line]), np.array([p[1] for p in line])) for name, line in metrics.items()
        }
        for split, metrics in points.items()
    }


def last_train_line(run_dir: os.PathLike | str) -> dict[str, Any]:
    """The newest training line of metrics.jsonl, {} when there is none.

    A local file is read from its end: that of a long run has many megabytes. A remote store raises its own errors.
    """
    path = os.path.join(os.fspath(run_dir), METRICS)
    if not is_local(path):
        return next((line for line in reversed(read_lines(path)) if line.get("split") == "train"), {})
    try:
        with Path(path).open("rb") as file:
            size, want = file.seek(0, os.SEEK_END), _TAIL
            while True:
                file.seek(max(0, size - want))
                line = _last_train(file.read(want))
                if line or want >= size:
                    return line
                want *= 8
    except OSError:
        return {}


def _last_train(data: bytes) -> dict[str, Any]:
    for text in reversed(data.splitlines()):
        try:
            line = json.loads(text)
        except ValueError:  # the line that is being written, or the first one of the part that was read
            continue
        if isinstance(line, dict) and line.get("split") == "train":
            return line
    return {}
