"""A reader that is given damaged inputs, and the ways to damage a file that several of them share."""

import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz import mutations
from tests.train import factory


@dataclasses.dataclass(frozen=True)
class Door:
    damage: Callable[[Path, random.Random], str]
    read: Callable[[Path], str]


def spoil(name: str, lines: bool = False) -> Callable[[Path, random.Random], str]:
    """Damage one JSON file."""

    def damage(folder: Path, rng: random.Random) -> str:
        path = folder / name
        path.write_bytes(mutations.document(rng, path.read_bytes(), lines))
        return repr(path.read_bytes()[:200])

    return damage


def experiment(folder: Path):
    return dataclasses.replace(factory.experiment(folder), runs_dir=str(folder), exp_name="e")


def spoil_parquet(path: Path, rng: random.Random) -> str:
    """Bytes damaged, or a column of another type, name or content."""
    if rng.random() < 0.4:
        path.write_bytes(mutations.damaged(rng, path.read_bytes()))
        return f"{path.name}: bytes"
    table = pq.read_table(path)
    name, n = rng.choice(table.column_names), len(table)
    at = table.column_names.index(name)
    kinds: dict[str, Callable[[], Any]] = {
        "lost": lambda: table.drop_columns([name]),
        "twice": lambda: table.append_column(name, table[name]),
        "renamed": lambda: table.rename_columns([f"{each}\n" if each == name else each for each in table.column_names]),
        "fewer": lambda: table.slice(0, n - 1),
        "none": lambda: table.slice(0, 0),
        "more": lambda: pa.concat_tables([table, table]),
        "backwards": lambda: table.take(list(reversed(range(n)))),
        "dictionary": lambda: table.set_column(at, name, table[name].combine_chunks().dictionary_encode()),
        "no metadata": lambda: table.replace_schema_metadata({}),
    }
    for value in (None, float("nan"), "a\nb\0", -1, -(2**40), 2**31, 2**62, True, 0, 1.5, [1.0], {"a": 1}, b"x"):
        kinds[repr(value)] = lambda value=value: table.set_column(at, name, pa.array([value] * n))
    kind = rng.choice(sorted(kinds))
    try:
        pq.write_table(kinds[kind](), path)
    except pa.ArrowException:
        return spoil_parquet(path, rng)
    return f"{path.name}: {name} {kind}"


def now_and_then(every: int = 20) -> Callable[[], bool]:
    """True for one call in so many: drawing a figure takes longer than all the rest."""
    calls = itertools.count()
    return lambda: next(calls) % every == 0
