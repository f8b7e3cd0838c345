"""advantages.parquet: V, Q_i, A_i and omega_i of every frame, one row a frame; and meta.json, written after it.

    dataset (the set's name), split ("train" | "val"), episode, frame, row (of the dataset), V, then for level i:
    Q_i (minimum of the twins), A_i, omega_i; the levels' names are in the file's metadata. With the expert ratio
    (hvd.method.ratio) also ratio_i, that of levels 0..i, and alone_i.

A table without its meta.json is not there: it is being written. Imports no jax.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import msgspec
import numpy as np
from etils import epath
from jaxtyping import Float32, Int64, Shaped

from hvd import documents, files
from hvd.errors import UserError

PARQUET = "advantages.parquet"
META = "meta.json"
_COLUMNS = {"dataset": "dataset", "split": "split", "episode": "episode", "frame": "frame", "row": "row", "V": "v"}
_OF_LEVELS = {"Q": "q", "A": "a", "omega": "omega"}
_OF_RATIO = {"ratio": "ratio", "alone": "alone"}


@dataclass(frozen=True)
class Advantages:
    """The table as arrays: n frames, l levels, whose names are `levels`."""

    levels: tuple[str, ...]
    dataset: Shaped[np.ndarray, " n"]
    split: Shaped[np.ndarray, " n"]
    episode: Int64[np.ndarray, " n"]
    frame: Int64[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]
    v: Float32[np.ndarray, " n"]
    q: Float32[np.ndarray, "n l"]
    a: Float32[np.ndarray, "n l"]
    omega: Float32[np.ndarray, "n l"]
    ratio: Float32[np.ndarray, "n l"] | None = None
    alone: Float32[np.ndarray, "n l"] | None = None

    @classmethod
    def read(cls, folder: epath.PathLike) -> "Advantages":
        """The table of a folder; UserError when there is none or it is damaged."""
        import pyarrow as pa

        root = epath.Path(folder)
        meta = read_meta(root)
        if meta is None:
            raise UserError(f"no advantages in {root}: run `hvd advantages`")
        data = (root / PARQUET).read_bytes()
        if hashlib.sha256(data).hexdigest() != meta["sha256"]:
            raise UserError(f"{root / PARQUET} is corrupted: delete {root / META} and run `hvd advantages` again")
        try:
            levels, columns = _columns(data)
        except (pa.ArrowException, LookupError, TypeError, ValueError, OSError, UserError) as error:
            raise UserError(
                f"{root / PARQUET} is no table of advantages ({error}): delete {root / META} and run `hvd advantages`"
            ) from None
        return cls(levels, **columns)

    @classmethod
    def find(cls, folder: epath.PathLike) -> "Advantages | None":
        """`read`, or None where there is no table."""
        return None if read_meta(folder) is None else cls.read(folder)

    @classmethod
    def joined(cls, parts: Sequence["Advantages"]) -> "Advantages":
        """One table of the rows of several."""
        return cls(
            parts[0].levels,
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in parts[0]._columns()},
        )

    def where(self, chosen: Shaped[np.ndarray, " n"]) -> "Advantages":
        """The chosen rows, by a mask or by their numbers."""
        return Advantages(self.levels, **{name: getattr(self, name)[chosen] for name in self._columns()})

    def _columns(self) -> list[str]:
        names = [f.name for f in fields(self) if f.name != "levels"]
        return [name for name in names if getattr(self, name) is not None]

    def of(self, *datasets: str) -> "Advantages":
        """The rows of the sets of these names."""
        return self.where(np.isin(self.dataset.astype(str), datasets))

    def by_row(self, column: str, frames: int) -> Float32[np.ndarray, "frames *l"]:
        """A column (v, q, a, omega, ...) of one set in the order of the dataset's `frames` rows; NaN where it has no
        row."""
        values = getattr(self, column)
        if len(self.row) and not 0 <= self.row.min() <= self.row.max() < frames:
            raise UserError(
                f"the advantages name row {self.row.max()} of a dataset of {frames} frames: run `hvd advantages` again"
            )
        whole = np.full((frames, *values.shape[1:]), np.nan, np.float32)
        whole[self.row] = values
        return whole

    def write(self, folder: epath.PathLike, meta: Mapping[str, Any]) -> None:
        """advantages.parquet, then meta.json with `meta`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {column: getattr(self, name) for column, name in _COLUMNS.items()}
        for letter, name in (_OF_LEVELS | (_OF_RATIO if self.ratio is not None else {})).items():
            columns |= {f"{letter}_{i}": getattr(self, name)[:, i] for i in range(len(self.levels))}
        described = {"hvd": json.dumps({"levels": list(self.levels)})}
        sink, root = io.BytesIO(), epath.Path(folder)
        pq.write_table(pa.table(columns).replace_schema_metadata(described), sink)
        data = sink.getvalue()
        (root / META).unlink(missing_ok=True)
        files.write_atomic(root / PARQUET, data)
        record = {**meta, "rows": len(self.row), "sha256": hashlib.sha256(data).hexdigest()}
        files.write_atomic(root / META, json.dumps(record, indent=1).encode())


def read_advantages(run: epath.PathLike) -> Advantages:
    """The table of an experiment (runs/demo) or of the experiment that a run belongs to (runs/demo/policy)."""
    folders = [epath.Path(run) / "advantages", epath.Path(run).parent / "advantages"]
    return Advantages.read(next((folder for folder in folders if read_meta(folder) is not None), folders[0]))


def read_meta(folder: epath.PathLike) -> dict[str, Any] | None:
    """meta.json of a whole table, or None."""
    root = epath.Path(folder)
    if not (root / META).exists() or not (root / PARQUET).exists():
        return None
    try:
        found = documents.read(root / META, dict[str, Any])
        documents.convert(found, _Meta, "")
    except UserError:
        return None  # it is written again
    return found


class _Meta(msgspec.Struct):
    sha256: str


class _Described(msgspec.Struct):
    levels: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=64)]


def _columns(data: bytes) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The levels and columns of a table, of the types and values that `Advantages` has; raises what is wrong."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(io.BytesIO(data))
    if not 0 < file.metadata.num_rows <= len(data):
        raise UserError(f"{file.metadata.num_rows} rows in {len(data)} bytes")
    levels = documents.decode((file.schema_arrow.metadata or {})[b"hvd"], _Described, "its levels").levels
    kinds = dict.fromkeys(("dataset", "split"), pa.string()) | dict.fromkeys(("episode", "frame", "row"), pa.int64())
    of_levels = _OF_LEVELS | (_OF_RATIO if "ratio_0" in file.schema_arrow.names else {})
    kinds |= {name: pa.float32() for name in ("V", *(f"{x}_{i}" for x in of_levels for i in range(len(levels))))}
    table = file.read(list(kinds)).select(list(kinds)).cast(pa.schema(kinds))
    if any(column.null_count for column in table.columns):
        raise UserError("it has empty cells")
    arrays = {name: table[name].to_numpy() for name in kinds}
    columns = {name: arrays[column] for column, name in _COLUMNS.items()}
    for letter, name in of_levels.items():
        columns[name] = np.stack([arrays[f"{letter}_{i}"] for i in range(len(levels))], axis=1)
    if not all(np.isfinite(columns[name]).all() for name in ("v", *of_levels.values())):
        raise UserError("a number in it is not finite")
    if not set(columns["split"]) <= {"train", "val"} or min(columns[n].min() for n in ("episode", "frame", "row")) < 0:
        raise UserError("its splits are others than train and val, or a row is negative")
    return levels, columns
