"""Datasets that others wrote: what is legal is read with its own values, and what contradicts itself is one line."""

import dataclasses
import io
import json
import os
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hvd.configs import DataConfig
from hvd.data.dataset import Dataset, check_rates
from hvd.errors import UserError
from tests.data.factory import CAMERAS, KEYS, TASKS, make_dataset

HEAD = KEYS[CAMERAS[0]]
VERSIONS = ("v2.1", "v3.0")


def change_info(root, **fields):
    path = root / "meta/info.json"
    info = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in info.items() if v is not ...}))


def change_table(path, **columns):
    """Set columns of a parquet file; None removes one."""
    table = pq.read_table(path)
    for name, column in columns.items():
        if name in table.column_names:
            table = table.drop_columns(name)
        if column is not None:
            table = table.append_column(name, column)
    pq.write_table(table, path)


def change_episodes(root, change):
    """Rewrite the description of the episodes, rows as dictionaries."""
    path = root / "meta/episodes.jsonl"
    if path.exists():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))
    else:
        path = root / "meta/episodes/chunk-000/file-000.parquet"
        pq.write_table(pa.Table.from_pylist(change(pq.read_table(path).to_pylist())), path)


def set_field(name, value, at=1):
    def change(rows):
        rows[at][name] = value
        return rows

    return change


def last_data(root):
    return sorted((root / "data").rglob("*.parquet"))[-1]


def opened(recipe, cameras=(), **data):
    return Dataset.open(dataclasses.replace(recipe.config, **data), cameras=cameras)


def refused(recipe, message, cameras=(), **data):
    with pytest.raises(UserError, match=message) as caught:
        opened(recipe, cameras, **data)
    assert len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------------------------------ success


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("yes", "no"),
    [
        (True, False), (1, 0), (1.0, 0.0), ("success", "failure"), ("TRUE", "False"), ("yes", " no "), ("1", "0"),
        ([True], [False]),
    ],
)  # fmt: skip
def test_success_of_episodes(tmp_path, version, yes, no):
    recipe = make_dataset(tmp_path / "d", version=version, cameras=(), success=(yes, no, yes))
    assert [e.success for e in opened(recipe).episodes] == [True, False, True]


@pytest.mark.parametrize("odd", ("perhaps", "", 0.5, 2, {"value": False}, [True, False]))
def test_success_that_says_neither_is_refused(tmp_path, odd):
    recipe = make_dataset(tmp_path / "d", version="v2.1", cameras=(), success=(True, odd, True))
    refused(recipe, "episode 1: success is .*; write true or false")


@pytest.mark.parametrize("nothing", (None, float("nan")))
def test_success_of_some_episodes_only_is_refused(tmp_path, nothing):
    recipe = make_dataset(tmp_path / "d", version="v2.1", cameras=(), success=(True, nothing, False))
    refused(recipe, "episode 1 has no success, though others have")
    recipe = make_dataset(tmp_path / "e", version="v2.1", cameras=(), success=(nothing,) * 3)
    assert all(e.success for e in opened(recipe).episodes)


@pytest.mark.parametrize(("yes", "no"), [("success", "failure"), (1, 0), (1.0, 0.0), (True, False)])
def test_success_of_frames(tmp_path, yes, no):
    recipe = make_dataset(tmp_path / "d", (4, 5), cameras=())
    change_table(last_data(recipe.root), success=pa.array([no] * 4 + [no] * 4 + [yes]))
    assert [e.success for e in opened(recipe).episodes] == [False, True]


@pytest.mark.parametrize("odd", ("reached", 0.3, float("nan")))
def test_success_of_frames_that_says_neither_is_refused(tmp_path, odd):
    recipe = make_dataset(tmp_path / "d", (4, 5), cameras=())
    change_table(last_data(recipe.root), success=pa.array([odd] * 9))
    refused(recipe, "column 'success'.*write true or false")


# ------------------------------------------------------------------------------------------------------------ prompts


def _tasks(root, index, **columns):
    """tasks.parquet as pandas writes it: the index is a column like the others, named by a note."""
    note = json.dumps({"index_columns": index, "columns": []})
    pq.write_table(pa.table(columns).replace_schema_metadata({"pandas": note}), root / "meta/tasks.parquet")


@pytest.mark.parametrize(
    ("index", "columns"),
    [
        (["task"], {"task_index": [0, 1], "room": ["kitchen", "hall"], "task": TASKS}),
        (["__index_level_0__"], {"task_index": [1, 0], "n": [5, 7], "__index_level_0__": TASKS[::-1]}),
        (["words"], {"room": ["kitchen", "hall"], "task_index": [0, 1], "words": TASKS}),
        (
            [{"kind": "range", "start": 0, "stop": 2, "step": 1}],
            {"id": ["a", "b"], "task": TASKS, "task_index": [0, 1]},
        ),
    ],
)
def test_prompts_come_from_the_column_that_pandas_calls_the_index(tmp_path, index, columns):
    recipe = make_dataset(tmp_path / "d", cameras=())
    _tasks(recipe.root, index, **columns)
    dataset = opened(recipe)
    assert [dataset.task_of(e.start) for e in dataset.episodes] == [TASKS[0], TASKS[1], TASKS[0]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"task_index": [0, 1], "room": TASKS}, "no column of prompts called task"),
        ({"task_index": [0, None], "task": TASKS}, "row 1: Expected `int`"),
        ({"task_index": [0, 1], "task": ["a", None]}, "row 1: Expected `str`"),
        ({"task_index": [0, 0], "task": TASKS}, "task_index 0 is there twice"),
        ({"task_index": [0, 1], "task": ["a", "b\x1b[2J"]}, "task 1 holds control characters"),
    ],
)
def test_tasks_that_are_none(tmp_path, columns, message):
    recipe = make_dataset(tmp_path / "d", cameras=())
    pq.write_table(pa.table(columns), recipe.root / "meta/tasks.parquet")
    refused(recipe, message)


def test_episodes_without_tasks_have_the_prompts_of_their_rows(tmp_path):
    recipe = make_dataset(tmp_path / "d", cameras=())
    change_table(recipe.root / "meta/episodes/chunk-000/file-000.parquet", tasks=None)
    assert [e.task for e in opened(recipe).episodes] == [TASKS[0], TASKS[1], TASKS[0]]


# --------------------------------------------------------------------------------------------------- frames per second


def test_sets_of_one_experiment_have_one_rate(tmp_path):
    sets = [(f"at{fps}", make_dataset(tmp_path / str(fps), fps=fps, cameras=()).config) for fps in (10, 30)]
    with pytest.raises(UserError, match=r"frames per second \(fps\): at10 has 10, at30 has 30"):
        check_rates(sets)
    check_rates([*sets[:1], ("later", DataConfig(root=str(tmp_path / "nowhere")))])


def test_rate_of_the_timestamps(tmp_path):
    recipe = make_dataset(tmp_path / "d", cameras=())
    change_info(recipe.root, fps=30)
    refused(recipe, "fps is 30, but the timestamps of the data have 10 frames per second")


# ------------------------------------------------------------------------------------------------------------- layouts


def test_version_20(tmp_path):
    recipe = make_dataset(tmp_path / "d", version="v2.1")
    change_info(recipe.root, codebase_version="v2.0")
    dataset = opened(recipe, CAMERAS)
    np.testing.assert_array_equal(dataset.actions, recipe.actions)
    assert dataset.version == "v2.0" and dataset.frames(CAMERAS[0], np.arange(3)).shape == (3, 32, 48, 3)


def test_stale_data_file_index(tmp_path):
    recipe = make_dataset(tmp_path / "d", (5, 6, 7, 8), cameras=())
    change_episodes(recipe.root, set_field("data/file_index", 0, at=2))
    np.testing.assert_array_equal(opened(recipe).actions, recipe.actions)
    change_episodes(recipe.root, set_field("data/file_index", 0, at=3))  # now no episode names the second file
    dataset = opened(recipe)
    np.testing.assert_array_equal(dataset.actions, recipe.actions)
    before = dataset.digest
    change_table(last_data(recipe.root), action=pa.array((recipe.actions[11:] + 1).tolist(), pa.list_(pa.float32())))
    dataset = opened(recipe)
    assert dataset.digest != before
    np.testing.assert_array_equal(dataset.actions[11:], recipe.actions[11:] + 1)


def test_numbers_that_pandas_made_floats(tmp_path):
    recipe = make_dataset(tmp_path / "d")

    def floats(rows):
        return [{k: float(v) if type(v) is int else v for k, v in row.items()} for row in rows]

    change_episodes(recipe.root, floats)
    np.testing.assert_array_equal(opened(recipe, CAMERAS).actions, recipe.actions)


@pytest.mark.parametrize("nothing", (None, float("nan")))
def test_an_episode_without_a_video(tmp_path, nothing):
    recipe = make_dataset(tmp_path / "d")

    def holes(rows):
        for name in ("chunk_index", "file_index", "from_timestamp"):
            rows[1][f"videos/{HEAD}/{name}"] = nothing
        return rows

    change_episodes(recipe.root, holes)
    assert opened(recipe).num_frames == 28
    assert opened(recipe, CAMERAS[1:]).num_frames == 28
    refused(recipe, f"names no video of camera '{HEAD}' for episode 1", CAMERAS)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ("video", "image"))
def test_only_the_files_of_the_offered_episodes_are_needed(tmp_path, version, kind):
    recipe = make_dataset(tmp_path / "d", (5, 6, 7, 8), version=version, kind=kind)
    gone = sorted((recipe.root / "data").rglob("*.parquet"))[-1:] + sorted((recipe.root / "videos").rglob("*3.mp4"))
    for path in gone:
        path.unlink()
    refused(recipe, f"{gone[0].name}: .*missing", CAMERAS)
    refused(recipe, f"{gone[0].name}: .*missing", CAMERAS, max_episodes=4)
    refused(recipe, f"{gone[0].name}: .*missing", CAMERAS, max_episodes=1, success_only=True)
    dataset = opened(recipe, CAMERAS, max_episodes=2)
    np.testing.assert_array_equal(dataset.actions[dataset.rows()], recipe.actions[:11])
    assert np.abs(dataset.frames(CAMERAS[0], np.arange(11)).astype(int) - recipe.frames(CAMERAS[0])[:11]).max() <= 4


def test_a_missing_video_of_an_episode_that_is_not_offered(tmp_path):
    recipe = make_dataset(tmp_path / "d", version="v2.1")
    next((recipe.root / f"videos/chunk-000/{HEAD}").glob("*2.mp4")).unlink()
    assert opened(recipe, CAMERAS[1:]).num_frames == 28  # nor does another camera need it
    dataset = opened(recipe, CAMERAS, max_episodes=2)
    assert dataset.frames(CAMERAS[0], np.arange(19)).shape[0] == 19
    with pytest.raises(UserError, match="the video of row 20 is not there"):
        dataset.frames(CAMERAS[0], np.asarray([0, 20]))


# ----------------------------------------------------------------------------------------------------------- documents

INFO = {
    "fps": [None, ..., 0, -10, float("nan"), 1e308, "ten", True, [10]],
    "features": [None, ..., [], {HEAD: None}, {HEAD: {"dtype": 5}}],
    "data_path": [None, ..., 5],
    "video_path": [5],
    "chunks_size": [None, 0, -1, "x"],
    "total_episodes": [4, -1],
    "total_frames": [27],
    "codebase_version": [None, ["v2.1"], "v1.6"],
}


@pytest.mark.parametrize(
    ("version", "field", "value"),
    [
        (version, field, value)
        for version in VERSIONS
        for field, values in INFO.items()
        if version == "v2.1" or field != "chunks_size"
        for value in values
    ],
    ids=str,
)
def test_every_field_of_info(tmp_path, version, field, value):
    recipe = make_dataset(tmp_path / "d", version=version)
    change_info(recipe.root, **{field: value})
    refused(recipe, rf"info\.json: .*{'version' if field == 'codebase_version' else field}", CAMERAS)


@pytest.mark.parametrize("value", (None, ...))
def test_cameras_without_a_video_path(tmp_path, value):
    recipe = make_dataset(tmp_path / "d", version="v2.1")
    change_info(recipe.root, video_path=value)
    assert opened(recipe).num_frames == 28
    refused(recipe, "names no video of camera", CAMERAS)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("value", (None, "x", -1, 1.5, 2**60, [1]), ids=str)
@pytest.mark.parametrize("field", ("length", "episode_index"))
def test_every_field_of_an_episode(tmp_path, version, field, value):
    recipe = make_dataset(tmp_path / "d", version=version, cameras=())
    change_episodes(recipe.root, lambda rows: [row | {field: value} for row in rows])
    refused(recipe, rf"episode.*{field}|Expected")


@pytest.mark.parametrize("text", ("[0, 12]", '"x"', "{", "[" * 100_000, "null", '{"episode_index": 1e400}'))
@pytest.mark.parametrize("name", ("episodes.jsonl", "tasks.jsonl"))
def test_lines_that_are_no_objects(tmp_path, name, text):
    recipe = make_dataset(tmp_path / "d", version="v2.1", cameras=())
    (recipe.root / "meta" / name).write_text(text + "\n")
    refused(recipe, rf"{name}: line 1")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_episode_that_is_described_twice(tmp_path, version):
    recipe = make_dataset(tmp_path / "d", version=version, cameras=())
    change_episodes(recipe.root, lambda rows: [*rows, rows[1]])
    assert opened(recipe).num_frames == 28
    change_episodes(recipe.root, lambda rows: [*rows, rows[1] | {"length": 8}])
    refused(recipe, "episode 1 is described twice")


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("names", "order", "message"),
    [
        (("frame_index", "timestamp"), [2, 1, 0], "frame_index does not grow from row to row in episode"),
        (("timestamp",), [0, 0, 0], "timestamp does not grow from row to row in episode"),
        (("timestamp",), [0, 2, 1], "timestamp does not grow from row to row in episode"),
    ],
)
def test_rows_out_of_order(tmp_path, version, names, order, message):
    recipe = make_dataset(tmp_path / "d", (3, 3), version=version, cameras=())
    path = last_data(recipe.root)
    table = pq.read_table(path)
    place = np.concatenate([np.asarray(order) + start for start in range(0, len(table), 3)])
    change_table(path, **{name: table[name].take(place) for name in names})
    refused(recipe, message)


@pytest.mark.parametrize("value", (2**32, 2**31, 0.5))
def test_a_task_index_that_is_no_number_of_a_task(tmp_path, value):
    recipe = make_dataset(tmp_path / "d", (3, 3), cameras=())
    change_table(last_data(recipe.root), task_index=pa.array([value] * 6))
    refused(recipe, "'task_index' must hold whole numbers")


def test_the_head_of_a_file_is_asked_before_its_rows_are_read(tmp_path, monkeypatch):
    recipe = make_dataset(tmp_path / "d", version="v2.1", cameras=())
    pq.write_table(pa.concat_tables([pq.read_table(last_data(recipe.root))] * 50), last_data(recipe.root))
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("was read"))
    refused(recipe, "has 450 rows where the episodes' description says 9$")


def test_a_column_that_is_there_twice(tmp_path):
    recipe = make_dataset(tmp_path / "d", cameras=())
    table = pq.read_table(last_data(recipe.root))
    pq.write_table(table.append_column("action", table["action"]), last_data(recipe.root))
    refused(recipe, "column 'action' is there twice|damaged")


# --------------------------------------------------------------------------------------------------------------- trust

DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"


@pytest.mark.parametrize("field", ("data_path", "video_path"))
@pytest.mark.parametrize(
    "template",
    [
        "{episode_index:>3000000000}", "{episode_index.__class__}", "{}", "{0}", "{x!r}", "{", "a}b", "", "/etc/passwd",
        "../other/{episode_index}", "data/../../x", "a\0b", "data/{chunk_index:03d}.parquet", "data/**/*",
        "{video_key.__doc__}", "{episode_index:099999d}",
    ],
)  # fmt: skip
def test_templates_of_paths_are_matched(tmp_path, field, template):
    recipe = make_dataset(tmp_path / "d", version="v2.1")
    change_info(recipe.root, **{field: template})
    refused(recipe, rf"info\.json: {field} .*(write a path with|leads out of the dataset)", CAMERAS)


def test_a_camera_whose_name_leads_out(tmp_path):
    recipe = make_dataset(tmp_path / "d", version="v2.1")
    info = json.loads((recipe.root / "meta/info.json").read_text())
    change_info(recipe.root, features=info["features"] | {"../../../x": {"dtype": "video", "shape": [1]}})
    refused(recipe, "leads out of the dataset")


@pytest.mark.parametrize("name", ("meta/info.json", "meta/episodes.jsonl", "data/chunk-000/episode_000001.parquet"))
@pytest.mark.parametrize("kind", ("fifo", "folder", "device"))
def test_only_regular_files_are_opened(tmp_path, name, kind):
    recipe = make_dataset(tmp_path / "d", version="v2.1", cameras=())
    path = recipe.root / name
    path.unlink()
    {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda p: os.symlink("/dev/zero", p)}[kind](path)
    refused(recipe, f"{path.name} is not a regular file")


# -------------------------------------------------------------------------------------------------------------- images


def picture(mode="RGB", kind="PNG", size=(48, 32), **options):
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **options)
    return out.getvalue()


def with_images(tmp_path, cells, type):
    recipe = make_dataset(tmp_path / "d", (len(cells),), kind="image", cameras=CAMERAS[:1])
    change_table(last_data(recipe.root), **{HEAD: pa.array(cells, type)})
    return recipe


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize("kind", ("PNG", "JPEG", "WEBP"))
@pytest.mark.parametrize("type", (pa.binary(), pa.large_binary(), pa.string(), STRUCT), ids=str)
def test_encoded_images_in_any_usual_column(tmp_path, kind, type):
    level = np.asarray([40, 120, 200], np.uint8)
    pictures = []
    for value in level:
        out = io.BytesIO()
        Image.fromarray(np.full((32, 48, 3), value, np.uint8)).save(out, kind)
        pictures.append(out.getvalue())
    cells = {"string": [f"p{i}" for i in range(3)]}.get(str(type), pictures)
    recipe = with_images(tmp_path, [{"bytes": c, "path": None} for c in cells] if type is STRUCT else cells, type)
    for i, data in enumerate(pictures):
        (recipe.root / f"p{i}").write_bytes(data)
    got = opened(recipe, CAMERAS[:1]).frames(CAMERAS[0], np.arange(3))
    assert np.abs(got.astype(int) - level[:, None, None, None]).max() <= 2


BOMB = picture("1", size=(13_000, 13_000))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (picture("I;16"), r"more than 8 bits a value \(mode I;16\), as depth"),
        (picture("F", "TIFF"), "is no PNG, JPEG or WebP image"),
        (picture("L", "BMP"), "is no PNG, JPEG or WebP image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "is no PNG, JPEG or WebP image"),
        (BOMB, "13000 x 13000, larger than a camera's"),
        (picture("1", size=(30_000, 30_000)), "damaged or too large"),
        (picture()[:20], "damaged or too large|is no PNG"),
    ],
    ids=("16 bits", "TIFF", "BMP", "EPS", "bomb", "larger bomb", "cut"),
)
def test_images_that_are_refused_when_the_dataset_is_opened(tmp_path, data, message):
    recipe = with_images(tmp_path, [picture(), data], pa.binary())
    refused(recipe, rf"\.parquet: column '{HEAD}', row 1: .*{message}", CAMERAS[:1])


def test_a_picture_with_other_bytes_than_its_checksum(tmp_path):
    data = bytearray(picture())
    data[-13] ^= 1  # of the last checksum before the end mark
    dataset = opened(with_images(tmp_path, [picture(), bytes(data)], pa.binary()), CAMERAS[:1])
    assert dataset.frames(CAMERAS[0], np.arange(1)).max() == 0
    with pytest.raises(UserError, match="the image of row 1 is damaged"):
        dataset.frames(CAMERAS[0], np.arange(2))


def test_images_in_two_columns_of_one_name(tmp_path):
    recipe = with_images(tmp_path, [picture()] * 3, pa.binary())
    path = last_data(recipe.root)
    table = pq.read_table(path)
    pq.write_table(table.append_column(HEAD, table[HEAD]), path)
    refused(recipe, f"column '{HEAD}' is there 2 times", CAMERAS[:1])


@pytest.mark.parametrize("name", ("/etc/passwd", "../../x.png", "a\0b"))
def test_image_files_lie_below_the_dataset(tmp_path, name):
    refused(with_images(tmp_path, [{"bytes": None, "path": name}], STRUCT), "lies outside the dataset", CAMERAS[:1])


def test_a_picture_that_says_how_it_is_turned(tmp_path):
    turned = Image.fromarray(np.repeat(np.linspace(0, 250, 48, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2))
    exif, out = Image.Exif(), io.BytesIO()
    exif[274] = 3  # upside down
    turned.save(out, "JPEG", exif=exif)
    got = opened(with_images(tmp_path, [out.getvalue()], pa.binary()), CAMERAS[:1]).frames(CAMERAS[0], np.arange(1))
    assert got[0, 0, 0, 0] > 230 > 20 > got[0, 0, -1, 0]


@pytest.mark.parametrize("where", ("info", "video_info"))
@pytest.mark.parametrize("name", ("is_depth_map", "video.is_depth_map"))
def test_a_camera_that_gives_depth(tmp_path, where, name):
    recipe = make_dataset(tmp_path / "d")
    features = json.loads((recipe.root / "meta/info.json").read_text())["features"]
    features[HEAD][where] = {name: True}
    features[KEYS[CAMERAS[1]]][where] = {name: False}
    change_info(recipe.root, features=features)
    refused(recipe, f"camera '{HEAD}' gives depth", CAMERAS)
    assert opened(recipe, CAMERAS[1:]).num_frames == 28


def test_a_video_of_depth(tmp_path):
    recipe = make_dataset(tmp_path / "d", (6,), version="v2.1", cameras=CAMERAS[:1])
    with av.open(str(next(recipe.root.rglob("*.mp4"))), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", 10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "gray16le"
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48), np.uint16), format="gray16le")))
        container.mux(stream.encode(None))
    refused(recipe, "holds gray16le pictures, as depth cameras give", CAMERAS[:1])


# --------------------------------------------------------------------------------------------------------------- cache


def poison(root):
    """Other actions in the cache, and nothing else changed; times as before."""
    for path in root.glob(".hvd_cache/columns-*/actions.npy"):
        before = path.stat()
        np.save(path, np.full_like(np.load(path), 7))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("copied", (True, False))
def test_a_cache_that_came_along_or_was_changed_is_made_anew(tmp_path, copied):
    recipe = make_dataset(tmp_path / "d", cameras=())
    digest = opened(recipe).digest
    poison(recipe.root)
    if copied:
        shutil.copytree(recipe.root, tmp_path / "e")
        shutil.rmtree(recipe.root)
        (tmp_path / "e").rename(recipe.root)
    dataset = opened(recipe)
    np.testing.assert_array_equal(dataset.actions, recipe.actions)
    assert dataset.digest == digest


@pytest.mark.parametrize("kind", ("video", "image"))
@pytest.mark.parametrize("damage", (b"", b"hello", "unlink", "fifo", "folder", "more"))
def test_any_damage_to_the_cache_is_mended(tmp_path, kind, damage):
    recipe = make_dataset(tmp_path / "d", (4, 5), kind=kind, cameras=CAMERAS[:1])
    expected = opened(recipe, CAMERAS[:1]).frames(CAMERAS[0], np.arange(9))
    for name in sorted(p.relative_to(recipe.root) for p in recipe.root.glob(".hvd_cache/*/*")):
        path = recipe.root / name
        if not path.exists():  # a note whose fellows are damaged goes, too
            continue
        if damage == "more":
            path.with_name("more.npy").write_bytes(b"")
        elif isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            path.unlink()
            {"fifo": os.mkfifo, "folder": os.mkdir}.get(damage, lambda _: None)(path)
        dataset = opened(recipe, CAMERAS[:1])
        np.testing.assert_array_equal(dataset.actions, recipe.actions)
        np.testing.assert_array_equal(dataset.frames(CAMERAS[0], np.arange(9)), expected)


def test_what_lies_behind_a_link_in_the_cache_stays(tmp_path):
    recipe = make_dataset(tmp_path / "d", cameras=())
    opened(recipe)
    entry = next(recipe.root.glob(".hvd_cache/columns-*"))
    entry.rename(tmp_path / "mine")
    entry.symlink_to(tmp_path / "mine")
    (tmp_path / "mine/notes.txt").write_text("keep")
    np.testing.assert_array_equal(opened(recipe).actions, recipe.actions)
    assert (tmp_path / "mine/notes.txt").exists() and not entry.is_symlink()
