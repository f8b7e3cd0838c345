"""Which critic knows who erred? Value runs that differ in one thing, on data whose mistakes are labelled.

    python -m tests.benchmarks.who_erred OUT [--tasks tote drawer --seed 44 --steps 1500]

AUC at the onset of each level's mistakes against the onsets of other levels' mistakes, for

    own              A_i = Q_i - V, as published
    marginal         Q_i - Q_{i-1}
    counterfactual   Q(s, a) - the mean of Q(s, a with level i's actions those of a chunk from a state nearby)
    ratio            the expert ratio: of level i alone, and given its parents (chain)

of the published critic, with another discount, with chunks of 10 and 5 actions (Q over a prefix), with targets that
bootstrap after 2 and 4 chunks, with a state that holds those of 5 and 10 frames ago too, and of three value runs
together (their mean). Everything is kept in OUT, and done once.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hvd import overrides
from hvd.configs import Experiment
from hvd.data.loader import Batcher, SampleSpec, Source
from hvd.evaluate.credit import Frames, read_frames, separation
from hvd.method.table import Advantages
from hvd.robots import get_robot
from hvd.train import inference, stage_data

VARIANTS = {
    "published": (),
    "seed 1": ("--seed", "1"),
    "seed 2": ("--seed", "2"),
    "gamma .9": ("--value.gamma", "0.9"),
    "gamma .95": ("--value.gamma", "0.95"),
    "prefix of 10": ("--model.action_horizon", "10"),
    "prefix of 5": ("--model.action_horizon", "5", "--evaluate.execute_steps", "5"),
    "2-chunk return": (),
    "4-chunk return": (),
    "history": ("--model.action_dim", "96"),
}
AGO = (5, 10)  # frames: how old the further states of "history" are
HVD = "import sys; from hvd import cli; sys.exit(cli.main())"
LONG_RETURN = """
from hvd.data.transitions import Transitions
def outcome(self, rows, own=Transitions.outcome):
    return own(Transitions(self.dataset, {chunks} * self.horizon, self.gamma), rows)
Transitions.outcome = outcome
"""
NEAR = 8  # chunks that level i's actions are taken from
RATIO = ("--policy.extractor", "filter", "--policy.score", "ratio")
PUBLISHED = ("--policy.extractor", "weighted", "--policy.extractor_params", "{}", "--policy.gate", "none")


def options(out: Path, task: str, seed: int, steps: int, variant: str) -> list[str]:
    """Of the experiment of a variant; all variants of a task share its data."""
    data, name = out / f"{task}-{seed}", f"{task}-{seed}-{variant.replace(' ', '_')}"
    found = ["--config", "demo", "--runs_dir", str(out), "--exp_name", name, "--assets_dir", str(data / "assets")]
    found += ["--sim.task", task, "--sim.operator", "bad_level", "--sim.num_optimal", "5", "--sim.num_mixed", "240"]
    found += ["--sim.seed", str(seed), "--seed", str(seed), "--sim.image_size", "0", *PUBLISHED]
    found += ["--sim.operator_noise", "steady" if task in ("pick", "stow") else "clumsy"]
    found += ["--value.num_train_steps", str(steps), *VARIANTS[variant]]
    for role, folder in (("optimal", "optimal"), ("suboptimal", "mixed")):
        found += [f"--{role}_data.root", str(data / ("remembering" if variant == "history" else "datasets") / folder)]
    return found + (list(RATIO) if variant in ("published", "history") else [])


def hvd(step: str, words: list[str], variant: str) -> None:
    code = (LONG_RETURN.format(chunks=variant[0]) if variant.endswith("return") else "") + HVD
    subprocess.run([sys.executable, "-c", code, step, *words], check=True, stdout=subprocess.DEVNULL)


def remember(source: Path, to: Path) -> None:
    """A copy of a dataset whose environment state goes on with all states of AGO (the first one before an episode)."""
    shutil.copytree(source, to, ignore=shutil.ignore_patterns(".hvd_cache"))
    names = ("observation.environment_state", "observation.state")
    for path in to.glob("data/**/*.parquet"):
        rows = pq.read_table(path)
        states = [np.stack(rows[name].to_numpy()) for name in names]
        age, at = rows["frame_index"].to_numpy(), np.arange(len(rows))
        states = [states[0], *(state[at - np.minimum(age, ago)] for ago in AGO for state in states)]
        column = rows.schema.get_field_index(names[0])
        wide = pa.array(list(np.concatenate(states, axis=1)), pa.list_(pa.float32()))
        pq.write_table(rows.set_column(column, names[0], wide), path)
    info = json.loads((to / "meta/info.json").read_text())
    info["features"][names[0]]["shape"] = [sum(state.shape[1] for state in states)]
    (to / "meta/info.json").write_text(json.dumps(info))


def runs_of(out: Path, task: str, seed: int, steps: int) -> dict[str, Experiment]:
    """The value runs and tables of all variants."""
    found = {}
    for variant in VARIANTS:
        words, made = options(out, task, seed, steps, variant), out / f"{task}-{seed}"
        if variant == "history" and not (made / "remembering").exists():
            for folder in ("optimal", "mixed"):
                remember(made / "datasets" / folder, made / "remembering" / folder)
        for step in ("prepare" if variant == "published" else "norm-stats", "train-value", "advantages"):
            hvd(step, words, variant)
        found[variant] = overrides.experiment(words)
    return found


def counterfactual(cfg: Experiment, frames: Frames, table: Advantages) -> np.ndarray:
    """[n, l]: what each level's own actions add to Q of the whole chunk, the other levels' kept; 0 away from onsets."""
    data, model = stage_data.open_dataset(cfg, "suboptimal"), inference.load_value(cfg)
    batcher = Batcher([Source(data, data.rows(), 0)], SampleSpec(model.transform, num_levels=len(cfg.levels())))
    rows, asked = table.row[frames.at], np.flatnonzero(frames.onset.any(axis=1))
    state = (data.state[rows] - data.state[rows].mean(axis=0)) / np.maximum(data.state[rows].std(axis=0), 1e-3)
    length = np.square(state).sum(axis=1)
    found = np.zeros((len(rows), len(cfg.levels())))
    for at in np.array_split(asked, -(-len(asked) // 256)):
        far = length[None] - 2 * state[at] @ state.T
        far[frames.episode[at, None] == frames.episode[None]] = np.inf
        near = np.argpartition(far, NEAR, axis=1)[:, :NEAR]
        batch = batcher.batch(np.zeros(len(at), np.int32), rows[at])
        _, q = model(batch["observation"], batch["actions"], batch["action_mask"])
        for k in range(NEAR):
            other = batcher.batch(np.zeros(len(at), np.int32), rows[near[:, k]])["actions"]
            for i, level in enumerate(cfg.levels()):
                actions = np.array(batch["actions"])
                actions[:, :, list(level)] = np.asarray(other)[:, :, list(level)]
                _, changed = model(batch["observation"], actions, batch["action_mask"])
                found[at, i] += (q[:, -1] - changed[:, -1]) / NEAR
    return found


def scores(runs: dict[str, Experiment], frames: Frames) -> Iterator[tuple[str, np.ndarray]]:
    """(name, [n, l]) for the frames of the published run."""
    tables = {name: Advantages.read(cfg.advantages_dir).of("suboptimal") for name, cfg in runs.items()}
    first = tables["published"]
    wanted = list(zip(first.episode[frames.at], first.frame[frames.at], strict=True))
    own, marginal, at_of = {}, {}, {}
    for name, table in tables.items():
        place = {key: row for row, key in enumerate(zip(table.episode, table.frame, strict=True))}
        at = at_of[name] = np.array([place[key] for key in wanted])
        own[name] = (table.q - table.v[:, None])[at]
        marginal[name] = np.diff(table.q, axis=1, prepend=table.v[:, None])[at]
    for name in VARIANTS:
        if not name.startswith("seed"):
            yield f"{name}: own", own[name]
            yield f"{name}: marginal", marginal[name]
    for kind, of in (("own", own), ("marginal", marginal)):
        yield f"three runs: {kind}", np.mean([of[name] for name in ("published", "seed 1", "seed 2")], axis=0)
    yield "published: counterfactual", counterfactual(runs["published"], frames, first)
    for name in ("published", "history"):
        table = tables[name]
        assert table.ratio is not None and table.alone is not None
        yield f"{name}: ratio alone", table.alone[at_of[name]]
        yield f"{name}: ratio chain", np.diff(table.ratio, axis=1, prepend=np.float32(0))[at_of[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["tote", "drawer"])
    parser.add_argument("--seed", type=int, default=44)
    parser.add_argument("--steps", type=int, default=1_500)
    asked = parser.parse_args()
    for task in asked.tasks:
        runs = runs_of(asked.out, task, asked.seed, asked.steps)
        frames = read_frames(runs["published"])
        assert frames is not None
        names = get_robot(runs["published"].robot).level_names
        print(f"\n| {task}, data seed {asked.seed} | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}", flush=True)
        for name, score in scores(runs, frames):
            cells = []
            for i in range(len(names)):
                others = np.delete(frames.onset, i, axis=1).any(axis=1) & ~frames.onset[:, i]
                e = separation(-score[:, i].astype(np.float32), frames.episode, frames.onset[:, i], others)
                cells.append("-" if e is None else f"{e['mean']:.2f} [{e['low']:.2f}, {e['high']:.2f}]")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
