"""What the expert ratio's classifiers may see: the state, what the frozen value model reads V from, or both.

    python -m tests.benchmarks.ratio_features --config demo [--FIELD VALUE ...]

Of a simulated experiment whose value run and table are there. AUC of wrong chunks against clean ones of the joint
ratio, over all and within successes, and of each level's ratio at the onset of its mistakes against other levels'.
The value model has seen all episodes (its features are not cross-fitted); the classifiers never those that they judge.
"""

import dataclasses
import sys
import tempfile
import time

import numpy as np
from etils import epath

from hvd import mixture, overrides
from hvd.data.transforms import InputTransform
from hvd.evaluate import scores
from hvd.evaluate.credit import read_frames, separation
from hvd.method import expert_ratio, ratio
from hvd.robots import get_robot
from hvd.train import mesh, stage_data, value_pass


def main() -> None:
    cfg = overrides.experiment(sys.argv[1:])
    sets = {name: stage_data.open_dataset(cfg, name) for name, _ in cfg.datasets()}
    sets = dict(sorted(sets.items(), key=lambda one: mixture.role(cfg, one[0]) != "optimal"))
    rows = {name: data.rows() for name, data in sets.items()}
    with tempfile.TemporaryDirectory() as folder:
        shards = value_pass.Shards(epath.Path(folder), True)
        values = value_pass.evaluate(cfg, mesh.start(cfg), sets, rows, shards)
    transform, first, parts = InputTransform.from_config(cfg), 0, []
    for name, data in sets.items():
        expert = mixture.role(cfg, name) == "optimal"
        parts.append(expert_ratio._rows(transform, data, values[name].rows, values[name].seen, expert, first))
        first += len(data.all_episodes)
    whole = ratio.Rows(*(np.concatenate([getattr(p, x) for p in parts]) for x in ratio.Rows.__annotations__))
    frames, names = read_frames(cfg), get_robot(cfg.robot).level_names
    assert frames is not None
    print(
        f"{len(whole.state)} frames; the state has {whole.state.shape[1]} numbers, the features {whole.seen.shape[1]}\n"
    )
    print("| sees | all | within successes | " + " | ".join(f"{name}, who" for name in names) + " | CPU-s |")
    print("|---|---|---|" + "---|" * (len(names) + 1))
    nothing, all_alike = whole.seen[:, :0], np.concatenate([whole.state, whole.seen], axis=1)
    variants = {
        "state": (whole.state, nothing),
        "features": (whole.seen, nothing),
        "both, alike": (all_alike, nothing),
        "both, the features as much as one number of the state": (whole.state, whole.seen),
    }
    for name, (state, seen) in variants.items():
        began = time.process_time()
        found = ratio.fit(dataclasses.replace(whole, state=state, seen=seen), cfg.levels(), cfg.seed)
        took = time.process_time() - began
        joint, alone = (x[~whole.expert][frames.at] for x in (found.prefix[:, -1:], found.alone))
        cells = [scores.judged(frames, joint)[kind] for kind in ("all", "success")]
        for i in range(alone.shape[1]):
            cells.append(separation(-alone[:, i], frames.episode, frames.onset[:, i], scores._others(frames, i)))
        shown = [f"{c['mean']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" if c else "-" for c in cells]
        print(f"| {name} | {' | '.join(shown)} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()
