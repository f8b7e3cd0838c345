"""Ways to damage bytes, and trees of JSON; all by a seeded random.Random."""

import copy
import json
import random
import struct
from typing import Any

NAN = float("nan")
VALUES = (None, True, False, 0, -1, 1, 1.5, 2**31, 2**63, 10**400, 1e308, -1e308, 5e-324, NAN, float("inf"), "", "abc")
VALUES += ("a\nb\x1b[2J\x00", "\ud800", "x" * 200_000, [], {}, [None], [1, 2, 3], [[1, 2], [3]], {"a": 1}, ["a"], "1")
VALUES += (
    "../../../../etc/passwd",
    "/etc/passwd",
    "{0}",
    "{episode_index.__class__}",
    "%s%n",
    "NaN",
    -(2**63),
    "false",
)
WHOLE = (
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 6_000,
    b"1e999",
    b"-Infinity",
    b"\0",
    b"\xef\xbb\xbf{}",
    b"null",
    b"",
)
WHOLE += (
    b"true",
    b'"x"',
    b"[]",
    b"{}",
    b" ",
    b"\xff\xfe",
    b'{"a":1}{"b":2}',
    b'{"task": "a", "task": "b"}',
    b"? [a]\n: b",
)
WHOLE += (
    b"a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n",
    b"- 1\n- 2",
    b"a: *b",
    b"<<: 5",
    b"a: 2020-99-99",
)
WHOLE += (b"!!python/object/apply:os.system ['touch /tmp/never']",)
NUMBERS = (
    b"\xff" * 4,
    b"\xff" * 8,
    b"\0" * 8,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    struct.pack("<q", 1 << 40),
)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """`data` with bits flipped, cut off, with other numbers, with a block repeated, lost or replaced."""
    found = bytearray(data or b"\0")
    at, length = rng.randrange(len(found)), rng.choice((16, 64, 512, 4096))
    match rng.choice(("flip", "flip", "cut", "number", "number", "zero", "random", "twice", "drop", "insert")):
        case "flip":
            for _ in range(rng.choice((1, 1, 2, 4, 8, 32))):
                found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        case "cut":
            del found[rng.choice((0, 1, len(found) // 2, len(found) - 1, at)) :]
        case "number":
            value = rng.choice(NUMBERS)
            found[at : at + len(value)] = value
        case "zero":
            found[at : at + length] = bytes(len(found[at : at + length]))
        case "random":
            found[at : at + length] = rng.randbytes(len(found[at : at + length]))
        case "twice":
            found[at:at] = found[at : at + length]
        case "drop":
            del found[at : at + length]
        case "insert":
            found[at:at] = rng.randbytes(length)
    return bytes(found)


def places(tree: Any, way: tuple = ()) -> list[tuple]:
    """The way to each value of a tree, its root among them."""
    found = [way]
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += places(value, (*way, key))
    elif isinstance(tree, list):
        for i, value in enumerate(tree[:40]):
            found += places(value, (*way, i))
    return found


def changed(rng: random.Random, tree: Any) -> Any:
    """A copy of a tree with one to three values replaced, lost, added or changed as numbers are."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        way = rng.choice(places(tree))
        value, at = tree, {"": tree}
        inside: Any = at
        for key in ("", *way)[:-1]:
            inside = inside[key]
        last = ("", *way)[-1]
        value = inside[last]
        kind = rng.choice(("set", "set", "set", "lose", "add", "number"))
        if kind == "lose" and way:
            del inside[last]
        elif kind == "add" and isinstance(value, dict):
            value[rng.choice(("zzz", "success", "", "\n", "__class__"))] = copy.deepcopy(rng.choice(VALUES))
        elif kind == "add" and isinstance(value, list):
            value.extend(copy.deepcopy(value) or [1])
        elif kind == "number" and isinstance(value, int | float) and not isinstance(value, bool):
            others = (-value, value + 1, value * 1000, value * 10**9, str(value))
            more = (float(value), value / 2 or 0.5) if abs(value) < 1e300 else ()
            inside[last] = rng.choice(others + more)
        else:
            inside[last] = copy.deepcopy(rng.choice(VALUES))
        tree = at[""]
    return tree


def document(rng: random.Random, data: bytes, lines: bool = False) -> bytes:
    """A damaged JSON document, or file of JSON lines."""
    lot = rng.random()
    if lot < 0.25:
        return damaged(rng, data)
    if lot < 0.33:
        return rng.choice(WHOLE)
    tree = [json.loads(line) for line in data.splitlines()] if lines else json.loads(data)
    tree = changed(rng, tree)
    rows = tree if lines and isinstance(tree, list) else [tree]
    return "\n".join(map(json.dumps, rows)).encode() + b"\n"
