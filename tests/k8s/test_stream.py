"""A folder through a pipe: what arrives is whole, and below the target; nothing is kept of anything else."""

import errno
import hashlib
import io
import json
import os
import re

import pytest

from hvd.errors import Failed, UserError
from hvd.storage import stream

CONTENT = {"meta/info.json": b"{}", "data/a": bytes(range(256)) * 9000, "data/empty": b"", "näme, spaces\n": b"x"}


@pytest.fixture
def folder(tmp_path):
    for name, data in CONTENT.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "source" / "nothing in it").mkdir()
    return tmp_path / "source"


def sent(path) -> bytes:
    out = io.BytesIO()
    stream.send(path, out)
    return out.getvalue()


def below(path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def kept(tmp_path) -> list[str]:
    """All but the source."""
    return sorted(one.name for one in tmp_path.iterdir() if one.name not in ("source", "outside"))


def test_a_folder_and_a_file_arrive(folder, tmp_path):
    target = tmp_path / "deep" / "target"
    assert stream.receive(io.BytesIO(sent(folder)), target) == len(CONTENT) + 4
    assert below(target) == CONTENT and (target / "nothing in it").is_dir()
    with pytest.raises(UserError, match="is there already: give another name, or --overwrite"):
        stream.receive(io.BytesIO(sent(folder)), target)
    (target / "old").write_bytes(b"")
    stream.receive(io.BytesIO(sent(folder)), target, overwrite=True)
    assert below(target) == CONTENT
    stream.receive(io.BytesIO(sent(folder / "data" / "a")), target, overwrite=True)
    assert target.read_bytes() == CONTENT["data/a"]
    assert [one.name for one in target.parent.iterdir()] == ["target"]


def test_what_was_there_stays_where_its_successor_cannot_take_its_place(folder, tmp_path, monkeypatch):
    (tmp_path / "target").write_bytes(b"old")
    rename = os.rename

    def fails_for_the_new(old, new):
        if old.is_dir():
            raise PermissionError(errno.EACCES, "no", str(new))
        rename(old, new)

    monkeypatch.setattr(stream.os, "rename", fails_for_the_new)
    with pytest.raises(UserError, match="cannot write"):
        stream.receive(io.BytesIO(sent(folder)), tmp_path / "target", overwrite=True)
    assert (tmp_path / "target").read_bytes() == b"old" and kept(tmp_path) == ["target"]


def test_nothing_is_kept_of_a_stream_that_is_cut_or_damaged(folder, tmp_path):
    whole = sent(folder)
    lines = [place.end() for place in re.finditer(rb'\{"entry":[^\n]*\n|\{"end":', whole)]
    for place in [0, 5, *lines, len(whole) - 2, len(whole) - 1]:  # between two files, within one, in the last line
        with pytest.raises(Failed, match=r"ended too early|truncated"):
            stream.receive(io.BytesIO(whole[:place]), tmp_path / "target")
    middle = whole.index(bytes(range(256))) + 1000
    with pytest.raises(Failed, match="is damaged"):
        stream.receive(io.BytesIO(whole[:middle] + b"?" + whole[middle + 1 :]), tmp_path / "target")
    assert kept(tmp_path) == []


def made(*entries: tuple[str, bytes | None]) -> bytes:
    """A stream with a right end, whatever its entries are."""
    text = b""
    for path, data in entries:
        size = {} if data is None else {"size": len(data)}
        text += json.dumps({"entry": {"path": path, **size}}).encode() + b"\n" + (data or b"")
    end = {"entries": len(entries), "sha256": hashlib.sha256(text).hexdigest()}
    return text + json.dumps({"end": end}).encode() + b"\n"


BAD = ["../out", "/out", "a/../../out", "a//b", "./a", "a\0b", "", "missing/a", "a/b"]


@pytest.mark.parametrize("name", BAD)
def test_no_name_leads_out_of_the_target(tmp_path, name):
    """`a` is a file: it is no folder, and not twice."""
    for data in (b"x", None):
        text = made(("", None), ("a", b"1"), (name, data))
        with pytest.raises(Failed, match="nothing of it is kept"):
            stream.receive(io.BytesIO(text), tmp_path / "target")
    assert kept(tmp_path) == []


def test_what_is_no_stream_is_a_line(tmp_path):
    for text in (
        b"<html>\n",
        b'{"entry": {"path": 3}}\n',
        b"{}\n",
        b'{"entry": {"path": "", "link": "x"}}\n',
        b"x" * 99999,
    ):
        with pytest.raises(Failed, match="nothing of it is kept") as error:
            stream.receive(io.BytesIO(text), tmp_path / "target")
        assert "\n" not in str(error.value)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "broken link", "pipe", "itself"])
def test_links_and_special_files_are_refused_before_anything_is_sent(folder, tmp_path, kind):
    (tmp_path / "outside").mkdir()
    source, place = folder, folder / "data" / "odd"
    match kind:
        case "pipe":
            os.mkfifo(place)
        case "itself":
            source = place
            place.symlink_to(folder / "meta")
        case _:
            place.symlink_to({"link to a file": folder / "data" / "a", "broken link": "nowhere"}.get(kind, tmp_path))
    out = io.BytesIO()
    said = "neither a file nor a folder" if kind == "pipe" else "a link, and links are not followed"
    with pytest.raises(UserError, match=f"data/odd is {said}"):
        stream.send(source, out)
    assert not out.getvalue()


def test_places_on_the_volume(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "away").symlink_to("/")
    assert stream.below(tmp_path, "data/mine") == tmp_path / "data" / "mine"
    assert stream.below(tmp_path, "new/deep") == tmp_path / "new" / "deep"
    for path in ("", ".", "/etc", "../x", "data/../../x"):
        with pytest.raises(UserError, match="give a path below"):
            stream.below(tmp_path, path)
    with pytest.raises(UserError, match=r"leads out of .* by a link"):
        stream.below(tmp_path, "away/tmp")
