"""What the compiler's temporary memory holds when it is fullest, read from XLA's own dump of its buffer assignment.

XLA packs all values that are not arguments into one block, each at an offset, with a time of life in the schedule. At
the moment when the most bytes of the block are alive every one of them is told apart by where it was computed (the
op_name that JAX gives it) and its shape.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

CATEGORIES = ("gradients", "activations", "temporaries")
LARGEST = 20

type Shape = tuple[str, tuple[int, ...]]  # (dtype, dims in ascending order): layouts and transposes do not matter

_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+), .*preallocated-temp")
_VALUE = re.compile(r"^ value: <\d+ (\S+?)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (\w+)\[([\d,]*)\]")
_LIVE = re.compile(r"^    (\S+?)(?:\{([\d,]*)\})?:(\d+)-(\d+)$")
_OP_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?metadata=\{[^}]*?op_name=\"([^\"]*)\"")


@dataclass(frozen=True)
class Value:
    """One value of the block: `name` ("fusion.3" or "while.2{5}"), where it lies, its shape and its time of life."""

    name: str
    offset: int
    size: int
    shape: Shape
    born: int
    died: int

    @property
    def instruction(self) -> str:
        return self.name.partition("{")[0]


@dataclass(frozen=True)
class Split:
    """The temporary block at its fullest.

    Attributes:
        sizes: bytes by CATEGORIES; their sum is the block's size.
        largest: of the places, in order: (bytes, category, shape, what computed it).
    """

    sizes: dict[str, int]
    largest: list[tuple[int, str, str, str]]


def split(
    folder: Path, hlo: str, temp_size: int, trained: Iterable[Shape], frozen: Iterable[Shape] = ()
) -> Split | None:
    """What fills the temporary block when it is fullest; None where the dump has another form or is missing.

    gradients: shaped as a device's part of a trained parameter, and not of the forward pass.
    activations: of the forward pass, alive because the backward pass needs them (or, where the forward pass itself is
    the fullest moment, computed in it).
    temporaries: everything else, and what the packing loses.

    Args:
        folder: of --xla_dump_to.
        hlo: text of the optimised module, for the op_names.
        trained, frozen: `shape` of the parts of these parameters on a device.
    """
    values = read(folder, temp_size)
    if not values:
        return None
    names = op_names(hlo)
    places: dict[tuple[int, int], tuple[str, str, str]] = {}
    wanted = set(trained)
    parameters = {dims for _, dims in (*wanted, *frozen)}
    for value in sorted(fullest(values), key=lambda v: v.born):
        op_name = names.get(value.instruction, "")
        kind = _category(value, op_name, wanted, parameters)
        before = places.get((value.offset, value.size))
        # several values may follow each other in one place (a loop's start, its carry): the most telling one counts
        if before is None or CATEGORIES.index(kind) < CATEGORIES.index(before[0]):
            dtype, dims = value.shape
            places[value.offset, value.size] = (
                kind,
                f"{dtype}[{','.join(map(str, dims))}]",
                (op_name or value.name)[:120],
            )
    sizes: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
    reach = 0
    for (offset, size), (kind, _, _) in sorted(places.items()):
        sizes[kind] += max(0, offset + size - max(reach, offset))  # a place within another one counts once
        reach = max(reach, offset + size)
    sizes["temporaries"] += temp_size - sum(sizes.values())
    largest = sorted(((size, *what) for (_, size), what in places.items()), reverse=True)
    return Split(sizes, largest[:LARGEST])


def shape(dtype: str, dims: Iterable[int]) -> Shape:
    """The form that shapes are compared in: axes of length 1 and their order do not count."""
    return dtype, tuple(sorted(d for d in dims if d != 1))


def read(folder: Path, temp_size: int) -> list[Value]:
    """The values of the temporary block of that size in the dump, with their times; [] when there is none."""
    for path in sorted(folder.glob("*-buffer-assignment.txt")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        places = _block(lines, temp_size)
        lives = path.with_name(path.name.replace("-buffer-assignment", "-live-range"))
        if places and lives.exists():
            return _with_lives(places, lives.read_text(encoding="utf-8", errors="replace").splitlines())
    return []


def op_names(hlo: str) -> dict[str, str]:
    """Instruction -> the op_name that JAX gave it, of those that have one."""
    found = (_OP_NAME.match(line) for line in hlo.splitlines())
    return {match[1]: match[2] for match in found if match}


def fullest(values: Iterable[Value]) -> list[Value]:
    """The values alive at the moment when they fill the most places; a place is counted once."""
    values = list(values)
    births, deaths = defaultdict(list), defaultdict(list)
    for value in values:
        births[value.born].append((value.offset, value.size))
        deaths[value.died + 1].append((value.offset, value.size))
    holders: Counter[tuple[int, int]] = Counter()
    now, most, at = 0, -1, 0
    for moment in sorted({*births, *deaths}):
        for place in deaths[moment]:
            holders[place] -= 1
            now -= place[1] if holders[place] == 0 else 0
        for place in births[moment]:
            now += place[1] if holders[place] == 0 else 0
            holders[place] += 1
        if now > most:
            most, at = now, moment
    return [value for value in values if value.born <= at <= value.died]


def _category(value: Value, op_name: str, trained: Set[Shape], parameters: Set[tuple[int, ...]]) -> str:
    forward = "jvp(" in op_name and "transpose(" not in op_name
    if value.shape in trained and not forward:
        return "gradients"
    # what a rematerialised backward pass computes again has both names, a copy of a parameter is no activation
    if forward and "rematted" not in op_name and value.shape[1] not in parameters:
        return "activations"
    return "temporaries"


def _block(lines: Iterable[str], temp_size: int) -> dict[str, tuple[int, int, Shape]]:
    places: dict[str, tuple[int, int, Shape]] = {}
    inside = False
    for line in lines:
        if line.startswith("allocation "):
            match = _ALLOCATION.match(line)
            inside = match is not None and int(match[2]) == temp_size
        elif inside and (match := _VALUE.match(line)):
            dims = [int(d) for d in match[5].split(",") if d]
            places[match[1]] = int(match[3]), int(match[2]), shape(match[4], dims)
    return places


def _with_lives(places: Mapping[str, tuple[int, int, Shape]], lines: Iterable[str]) -> list[Value]:
    values = []
    for line in lines:
        match = _LIVE.match(line)
        if match is None:
            continue
        name = match[1] + (f"{{{match[2]}}}" if match[2] else "")
        if name in places:
            values.append(Value(name, *places[name], born=int(match[3]), died=int(match[4])))
    return values
