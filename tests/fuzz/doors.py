"""The readers that are given damaged inputs, one entry each in DOORS.

A door writes good files into a folder when it is made; `damage` spoils a copy of them and says how; `read` reads the
copy, and returns what is wrong with what it accepted, "" for nothing.
"""

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

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


# ---------------------------------------------------------------------------------------------------------------- runs


def config(good: Path) -> Door:
    from hvd.train import run_dir as runs

    runs.write_config(good, factory.experiment(Path("x")), "policy", {"optimal": "0" * 64})
    name = runs.CONFIG

    def damage(folder: Path, rng: random.Random) -> str:
        path, lot = folder / name, rng.random()
        data = path.read_bytes()
        if lot < 0.4:
            data = mutations.damaged(rng, data)
        elif lot < 0.5:
            data = rng.choice(mutations.WHOLE)
        else:
            tree = mutations.changed(rng, yaml.safe_load(data))
            data = yaml.safe_dump(tree, sort_keys=False).encode(errors="surrogatepass")
        path.write_bytes(data)
        return repr(data[:200])

    def read(folder: Path) -> str:
        record = runs.read(folder)
        assert record is not None
        runs.config_hash(record.config, record.stage)
        return "" if record.stage in ("value", "policy") else f"stage {record.stage!r}"

    return Door(damage, read)


def owner(good: Path) -> Door:
    from hvd.runtime import heartbeat
    from hvd.runtime import owner as owners

    heartbeat.SILENT_SECONDS = 0.5
    claim = dataclasses.asdict(owners.myself()) | {"machine": "another", "host": "h", "pid": 1}
    (good / owners.OWNER).write_text(json.dumps(claim))

    def read(folder: Path) -> str:
        owners.claim(folder)
        owners.release(folder)
        return ""

    return Door(spoil(owners.OWNER), read)


def advantages(good: Path) -> Door:
    from hvd.method.table import META, PARQUET, Advantages
    from hvd.report import advantages as report

    rng = np.random.default_rng(0)
    n, levels = 60, ("base", "torso", "arms")
    floats = rng.normal(size=(7, n)).astype(np.float32)
    numbers = np.arange(n)
    split = np.where(numbers < 50, "train", "val")
    names = np.full(n, "suboptimal")
    parts = [np.stack([floats[i]] * 3, 1) for i in (1, 2)] + [np.abs(np.stack([floats[3]] * 3, 1))]
    Advantages(levels, names, split, numbers // 20, numbers % 20, numbers, floats[0], *parts).write(good, {})
    digest = hashlib.sha256((good / PARQUET).read_bytes()).hexdigest()

    def damage(folder: Path, rng: random.Random) -> str:
        if rng.random() < 0.5:
            return spoil(META)(folder, rng)
        path = folder / PARQUET
        what = spoil_parquet(path, rng)
        if rng.random() < 0.7:  # somebody else's tool wrote it
            meta = json.loads((folder / META).read_text())
            meta["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            (folder / META).write_text(json.dumps(meta))
        return what

    def read(folder: Path) -> str:
        table = Advantages.find(folder)
        if table is None:
            return ""
        report.distributions(factory.experiment(folder), table)
        weights = table.of("suboptimal").by_row("omega", n)
        finite = np.isfinite(table.omega).all() and weights.shape[1] == len(table.levels)
        same = hashlib.sha256((folder / PARQUET).read_bytes()).hexdigest() == digest
        return "" if finite and (not same or np.array_equal(table.v, floats[0])) else "other numbers"

    return Door(damage, read)


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


# -------------------------------------------------------------------------------------------------- results and metrics


def results(good: Path) -> Door:
    from hvd.report import evaluation
    from hvd.report import results as report

    estimate = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    episode = {"seed": 3, "success": True, "stage": 2, "steps": 70, "dropped": False, "video": "videos/rollout_3.mp4"}
    rollouts = {"kind": "rollouts", "run_name": "policy", "task": "tote", "prompt": "carry", "weighting": "none"}
    rollouts |= {"observes": {"proprioception": True, "object_pose": False, "images": ["a"]}, "seeds": [3, 4]}
    rollouts |= {"num_rollouts": 4, "horizon": 90, "execute_steps": 4, "action_horizon": 4, "policy_digest": "d"}
    rollouts |= {"success": estimate | {"count": 2}, "stage": estimate, "subtasks": {"a": 0.5, "b": 0.25}}
    rollouts |= {"episodes": [episode, episode | {"video": "", "seed": 4}]}
    error = {"policy": {"normalised": 0.5, "raw": 0.1}, "mean": {"normalised": 1.0, "raw": 0.2}}
    offline = {"kind": "offline", "run_name": "policy", "weighting": "none", "policy_digest": "d"}
    offline |= {"datasets": {"optimal": {"action_error": error, "value_rank": estimate}}}
    pair = {"rest": estimate, "other": None}
    credit = {"clean_frames": 9, "mistake_frames": {"arms": 3}, "whole_frames": {"arms": 5}}
    credit |= {"omega": {"arms": {"mistakes": 0.5, "rest": 1.0}}, "auc": {"arms": {"A_base": pair, "A_arms": pair}}}
    folder = good / "e/evaluation/policy"
    (folder / "videos").mkdir(parents=True)
    (folder / "videos/rollout_3.mp4").write_bytes(b"film")
    (good / "offline.json").write_text(json.dumps(offline))
    (folder / "results.json").write_text(json.dumps(rollouts))
    (folder.parent / "credit.json").write_text(json.dumps(credit))
    (good / "e/policy").mkdir()
    (good / "e/policy/complete.json").write_text(json.dumps({"digest": "d"}))

    def damage(folder: Path, rng: random.Random) -> str:
        own = folder / "e/evaluation/policy/results.json"
        if rng.random() < 0.4:
            (folder / "offline.json").rename(own)
        which = rng.choice(("policy/results.json",) * 3 + ("credit.json",))
        return spoil(f"e/evaluation/{which}")(folder, rng)

    def read(folder: Path) -> str:
        cfg = experiment(folder)
        if (folder / "offline.json").exists():
            cfg = dataclasses.replace(cfg, sim=dataclasses.replace(cfg.sim, task="tote"))
        found = report.read(cfg)
        report.summary(cfg)
        for section in (evaluation.success, evaluation.offline, evaluation.videos):
            section(cfg, found)
        evaluation.credit(cfg)
        return ""

    return Door(damage, read)


def metrics(good: Path) -> Door:
    from hvd.report import curves

    rows = [
        {"step": step, "split": split, "flow_error": 1 / step, "weight/arms": 1.0, "time/data_wait_s": 0.1}
        | {"time/step_s": 0.2, "time/samples_per_s": 40.0, "time/busy_s": 3.0, "loss_q": 0.1}
        for step in range(1, 9)
        for split in ("train", "val")
    ]
    for run in ("value", "policy"):
        (good / "e" / run).mkdir(parents=True)
        (good / "e" / run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    def damage(folder: Path, rng: random.Random) -> str:
        return spoil(f"e/{rng.choice(('value', 'policy'))}/metrics.jsonl", lines=True)(folder, rng)

    def read(folder: Path) -> str:
        section = curves.section(experiment(folder), ["policy"])
        return "" if section.body or section.missing else "nothing was said"

    return Door(damage, read)


# --------------------------------------------------------------------------------------------------------------- models


def openpi(good: Path) -> Door:
    import jax

    from hvd.models import weights

    rng = np.random.default_rng(0)
    tree = {"a": {"w": rng.normal(size=(8, 6)).astype(np.float32)}, "b": rng.normal(size=5).astype(np.float32)}
    weights.write(good / "params", jax.tree.map(jax.numpy.asarray, tree))

    def damage(folder: Path, rng: random.Random) -> str:
        files = sorted(path for path in (folder / "params").rglob("*") if path.is_file())
        path = rng.choice(files)
        if rng.random() < 0.06:
            path.unlink()
            return f"{path.name} is gone"
        try:
            json.loads(path.read_bytes())
        except ValueError:
            path.write_bytes(mutations.damaged(rng, path.read_bytes()))
        else:
            path.write_bytes(mutations.document(rng, path.read_bytes()))
        return str(path.relative_to(folder))

    def read(folder: Path) -> str:
        opened = weights.open_checkpoint(folder, "weight_loader")
        place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in opened.arrays.items()}
        weights.match(opened, wanted)
        weights.read(opened, wanted)
        return ""  # openpi's format has no checksums: other numbers cannot be told

    return Door(damage, read)


def message(good: Path) -> Door:
    from openpi_client import msgpack_numpy

    from hvd.serve import msgpack
    from hvd.serve.observation import Refused
    from tests.serve.test_observation import GOOD, LEROBOT, make_reader

    reader = make_reader()
    (good / "message").write_bytes(b"")

    def damage(folder: Path, rng: random.Random) -> str:
        tree: Any = rng.choice((GOOD, LEROBOT)) | {"seed": 3, "num_flow_steps": 7}
        if rng.random() < 0.5:
            odd = (np.arange(3), np.array(["a", "\ud800"]), np.float64(1.5), np.zeros((0, 3), np.uint8), np.array(True))
            way = rng.choice([way for way in mutations.places(tree) if way])
            tree = tree | {way[0]: rng.choice((*odd, *mutations.VALUES))} if len(way) == 1 else tree
        try:
            data = msgpack_numpy.packb(tree)
        except (OverflowError, ValueError):
            data = msgpack_numpy.packb(GOOD)
        if rng.random() < 0.6:
            data = mutations.damaged(rng, data)
        (folder / "message").write_bytes(data)
        return repr(data[:200])

    def read(folder: Path) -> str:
        try:
            request = reader.read(msgpack.unpack((folder / "message").read_bytes()), 1)
        except msgpack.Malformed as error:
            raise Refused(str(error)) from None
        return "" if np.isfinite(request.observation["state"]).all() else "a state that is not finite"

    return Door(damage, read)


def site(good: Path) -> Door:
    from hvd.clusters.slurm import site as sites

    root = Path(__file__).parents[2]
    (good / "site.toml").write_bytes((root / "slurm/site.toml").read_bytes())
    values = (
        '"a b"',
        '"$(id)"',
        '"a\\nb"',
        '""',
        "5",
        "-1",
        "99999999999999999999",
        "true",
        "[]",
        '["a"]',
        "{a=1}",
        "nan",
    )
    values += ("1979-05-27", '"\\u0000"', '"999999999999G"', '"1-2:3:4"', '"' + "x" * 100_000 + '"', "[[1]]", '["#x"]')

    def damage(folder: Path, rng: random.Random) -> str:
        path = folder / "site.toml"
        if rng.random() < 0.4:
            path.write_bytes(mutations.damaged(rng, path.read_bytes()))
            return "bytes"
        rows = path.read_text().splitlines()
        at = rng.choice([i for i, row in enumerate(rows) if " = " in row and not row.startswith("#")])
        rows[at] = f"{rows[at].split(' = ')[0]} = {rng.choice(values)}"
        path.write_text("\n".join(rows + ([rng.choice(rows)] if rng.random() < 0.2 else [])))
        return rows[at][:100]

    def read(folder: Path) -> str:
        os.environ["HVD_SITE"] = str(folder / "site.toml")
        sites.load()
        return ""

    return Door(damage, read)


DOORS: dict[str, Callable[[Path], Door]] = {
    "config": config,
    "owner": owner,
    "advantages": advantages,
    "results": results,
    "metrics": metrics,
    "openpi": openpi,
    "message": message,
    "site": site,
}
