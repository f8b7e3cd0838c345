"""Doors of a run: its config, owner, advantages, checkpoints; and the command line."""

import dataclasses
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import yaml

from tests.fuzz import mutations
from tests.fuzz.door import Door, now_and_then, spoil, spoil_parquet
from tests.train import factory


def config(good: Path) -> Door:
    from hvd.train import run_dir as runs

    runs.write_config(good, factory.experiment(Path("x")), "policy", {"optimal": "0" * 64})
    name = runs.CONFIG
    whole = yaml.safe_load((good / name).read_bytes())

    def damage(folder: Path, rng: random.Random) -> str:
        path, lot = folder / name, rng.random()
        data = path.read_bytes()
        if lot < 0.4:
            data = mutations.damaged(rng, data)
        elif lot < 0.5:
            data = rng.choice(mutations.WHOLE)
        else:
            tree = mutations.changed(rng, whole)
            try:
                data = yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False).encode()
            except UnicodeEncodeError:  # half of a pair
                data = json.dumps(tree).encode()
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

    heartbeat.SILENT_SECONDS = heartbeat.LOOK_SECONDS = 0.01  # how long a claim is watched for a sign of life
    claim = dataclasses.asdict(owners.myself()) | {"machine": "another", "host": "h", "pid": 1}
    (good / owners.OWNER).write_text(json.dumps(claim))
    (good / heartbeat.FILE).write_text("1\n")

    def read(folder: Path) -> str:
        owners.claim(folder)
        owners.release(folder)
        return ""

    def damage(folder: Path, rng: random.Random) -> str:
        if rng.random() < 0.2:
            return spoil(heartbeat.FILE)(folder, rng)
        return spoil(owners.OWNER)(folder, rng)

    return Door(damage, read)


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
    draw = now_and_then()

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
        if draw():
            report.distributions(factory.experiment(folder), table)
        weights = table.of("suboptimal").by_row("omega", n)
        finite = np.isfinite(table.omega).all() and weights.shape[1] == len(table.levels)
        same = hashlib.sha256((folder / PARQUET).read_bytes()).hexdigest() == digest
        return "" if finite and (not same or np.array_equal(table.v, floats[0])) else "other numbers"

    return Door(damage, read)


def checkpoint(good: Path) -> Door:
    """A complete run: what complete.json and a checkpoint's manifest prove."""
    from etils import epath

    from hvd.data import normalize
    from hvd.data.running_stats import NormStats
    from hvd.errors import UserError
    from hvd.train import complete, manifest
    from hvd.train import run_dir as runs

    run, cfg, rng = good / "run", factory.experiment(good), np.random.default_rng(0)
    stats = {"state": NormStats(*rng.uniform(1, 2, (2, 4))), "actions": NormStats(*rng.uniform(1, 2, (2, 21)))}
    for name in ("params/_METADATA", "params/d/a", "params/d/b", "train_state/_METADATA", "loop/metadata"):
        (run / "checkpoints/12" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "checkpoints/12" / name).write_bytes(rng.bytes(200))
    runs.write_config(run, cfg, "policy", {"optimal": "0" * 64})
    normalize.save(epath.Path(run / runs.NORM_STATS), stats)
    manifest.write(epath.Path(run / "checkpoints/12"))
    hashed = runs.config_hash(cfg, "policy")
    inputs = {"optimal": "0" * 64, "norm_stats": runs.stats_digest(stats)}
    complete.write_complete(run, stage="policy", step=12, config_hash=hashed, inputs=inputs, finite=True)
    files = sorted(path.relative_to(good) for path in run.rglob("*") if path.is_file())
    before = {name: (good / name).read_bytes() for name in files}
    told = [name for name in files if name.name in (complete.runs.COMPLETE, manifest.NAME)]

    def damage(folder: Path, rng: random.Random) -> str:
        path = rng.choice(told if rng.random() < 0.6 else files)
        if path.suffix == ".json":
            return f"{path}: " + spoil(str(path))(folder, rng)
        if rng.random() < 0.1:
            (folder / path).unlink()
            return f"{path} is gone"
        (folder / path).write_bytes(mutations.damaged(rng, before[path]))
        return str(path)

    def read(folder: Path) -> str:
        there = {path: folder / path for path in before}
        changed = {path for path, at in there.items() if not at.exists() or at.read_bytes() != before[path]}
        step = epath.Path(folder / "run/checkpoints/12")
        wrong = []
        try:
            saved = manifest.read(step)
            if saved is not None and saved.keys() >= manifest.names(step) - {manifest.NAME}:
                manifest.check_present(step, saved)
                manifest.check_digests(step, saved, manifest.NAME)
                wrong = [path for path in changed if "12" in path.parts and path.name != manifest.NAME]
        finally:
            found = complete.check_complete(folder / "run", stage="policy", cfg=cfg)
        if found.step != 12 or not found.finite:
            raise UserError(f"step {found.step}")
        return f"taken as whole: {wrong or changed}" if wrong or changed - set(told) else ""

    return Door(damage, read)


def overrides(good: Path) -> Door:
    """Command lines of experiments, of the conversion and of the server."""
    from hvd import overrides as lines
    from hvd.checks import check_config
    from hvd.data.convert_plan import ConvertConfig
    from hvd.fields import leaves
    from hvd.serve.command import ServeOptions

    (good / "argv").write_bytes(b"")
    flags = {"experiment": leaves(type(factory.experiment(good)))}
    flags |= {"convert": leaves(ConvertConfig), "serve": leaves(ServeOptions)}

    def value(rng: random.Random) -> str:
        found = rng.choice(mutations.VALUES)
        return found if isinstance(found, str) else json.dumps(found)[:5000]

    def damage(folder: Path, rng: random.Random) -> str:
        kind = rng.choice(("experiment", "experiment", "convert", "serve"))
        argv = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            name = rng.choice(sorted(flags[kind]))
            if rng.random() < 0.15:
                name = rng.choice((f"{name}.x", f"no_{name}", name.replace("_", "-"), name[:-1], "", "=", f"{name}=1"))
            argv += [f"--{name}", *(value(rng) for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3))))]
        (folder / "argv").write_text(json.dumps([kind, *argv]))
        return repr(argv)[:200]

    def read(folder: Path) -> str:
        kind, *argv = json.loads((folder / "argv").read_text())
        if kind != "experiment":
            start = ConvertConfig() if kind == "convert" else ServeOptions()
            found, rest = lines.take(start, argv)
            if rest:
                lines.parse(start, rest)
            return _others(start, found, argv)
        start = lines.experiment(["--config", "demo"])
        found = lines.experiment(["--config", "demo", *argv])
        check_config(found)
        return _others(start, found, argv)

    def _others(start: object, found: object, argv: list[str]) -> str:
        """A field that changed though no flag names it."""
        named = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
        for name, leaf in leaves(type(start)).items():
            before, now = leaf.of(start), leaf.of(found)
            follows = name.endswith(("_data.root", "_data.repo_id")) and named & {"runs_dir", "exp_name", "sim.task"}
            if (
                before != now
                and not follows
                and not any(name == each.replace("no_", "") or each.startswith(name) for each in named)
            ):
                return f"{name} became {now!r:.100}"
            if isinstance(now, float) and not np.isfinite(now) and before != now:
                return f"{name} became {now}"
        return ""

    return Door(damage, read)
