"""The fuzz tool tells each end of an input, and what it has found stays mended."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvd import documents
from hvd.errors import UserError
from hvd.runtime import heartbeat, owner
from hvd.storage import cache as storage
from hvd.storage.google import _google_object
from hvd.storage.remote import Busy, listing_errors
from tests.fuzz import harness, mutations
from tests.fuzz.door import Door
from tests.fuzz.doors import DOORS
from tests.fuzz.harness import run, run_shared

ENDS = ("same", "refused", "wrong", "traceback", "memory", "hang", "crash")


def _ending(end: str) -> str:
    """What a reader does whose input ends so."""
    match end:
        case "refused":
            raise UserError("a: mend it")
        case "traceback":
            raise ValueError("found")
        case "memory":
            bytearray(3 << 30)
        case "hang":
            time.sleep(60)
        case "crash":
            os.abort()
    return "other numbers" if end == "wrong" else ""


def each_end(keep: str, workers: int = 1) -> dict:
    """24 inputs of a door whose readers end in every way."""

    def door(good: Path) -> Door:
        (good / "end").write_text("")
        chosen = lambda folder, rng: str((folder / "end").write_text(rng.choice(ENDS)))  # noqa: E731
        return Door(chosen, lambda folder: _ending((folder / "end").read_text()))

    DOORS["each"] = door
    harness.SECONDS = 0.5
    return vars(run_shared("each", 24, 60, 0, Path(keep), workers))


def ends_of(*names: str) -> dict[str, dict[str, int]]:
    return {name: run(name, 60, 60, 77).ends for name in names}


def fresh(call: str):
    """What the call gives in a process of its own: the harness forks, and here JAX has threads."""
    code = f"import json; from tests.fuzz.test_fuzz import *; print(json.dumps({call}))"
    return json.loads(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.parametrize("workers", (1, 3))
def test_each_end_is_told(tmp_path, workers):
    expected = [random.Random(f"each {seed}").choice(ENDS) for seed in range(24)]
    tally = fresh(f"each_end({str(tmp_path)!r}, {workers})")
    assert {end: expected.count(end) for end in ENDS} == tally["ends"] and set(expected) == set(ENDS)
    kept = {f"each-{seed}" for seed, end in enumerate(expected) if end in harness.WRONGLY}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert all((tmp_path / name / "end").read_text() in harness.WRONGLY for name in kept)
    assert any("--doors each --inputs 1 --seed" in text for text in tally["examples"].values())


def test_an_input_is_made_again_by_its_seed():
    data = b'{"a": [1, 2], "b": "x", "c": {"d": null}}'
    first = [mutations.document(random.Random(seed), data) for seed in range(300)]
    assert [mutations.document(random.Random(seed), data) for seed in range(300)] == first


def test_doors_hold():
    for name, ends in fresh("ends_of('labels', 'site', 'message', 'overrides')").items():
        assert set(ends) == {"same", "refused"} and sum(ends.values()) == 60, (name, ends)


def test_half_of_a_pair_in_a_document():
    with pytest.raises(UserError, match="x: "):
        documents.convert({"a": "\ud800"}, dict[str, int], "x")


@pytest.mark.parametrize("text", ("[" * 100_000, '{"pid": "7"}', "[]", "\ud800"))
def test_owners_that_are_none(tmp_path, text):
    (tmp_path / heartbeat.OWNER).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"owner\.json is damaged .*delete it"):
        owner.claim(tmp_path)


def test_a_sign_of_life_that_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.0)
    (tmp_path / heartbeat.FILE).write_bytes(b"\xff\xfe")
    assert not heartbeat.lives(tmp_path, "anybody")


@pytest.mark.parametrize("text", ("[" * 100_000, "[]", '{"files": true}', '{"files": {"a": [1]}}', '{"files": {}}'))
def test_notes_in_the_cache_that_are_none(tmp_path, monkeypatch, text):
    monkeypatch.setenv("HVD_CACHE", str(tmp_path))
    place = storage._entry(storage.parse("gs://a/b"))
    place.mkdir(parents=True)
    (place / storage.MANIFEST).write_text(text)
    assert storage.cached("gs://a/b") is None


@pytest.mark.parametrize(
    "fields",
    [
        {"size": None}, {"size": -1}, {"size": 10**400}, {"size": [1]}, {"size": "x"}, {"generation": None},
        {"crc32c": 5}, {"name": 7}, {"name": "\ud800"},
    ],
    ids=str,
)  # fmt: skip
def test_listed_objects_that_are_none(fields):
    blob = SimpleNamespace(**{"name": "a", "size": "3", "generation": "7", "crc32c": "ij6hUA=="} | fields)
    with pytest.raises(Busy, match="no listing of objects"), listing_errors():
        _google_object(blob)
