"""What the expert ratio assumes, and what it is worth where that is not so (docs/method.md).

    python -m tests.benchmarks.ratio_assumptions

A small world whose mistakes are known (tests/train/test_ratio.py): AUC of wrong chunks against right ones among the
mixed rows, by data seeds; "overlap" and "episodes" are what `hvd advantages` warns by.
"""

import numpy as np

from hvd.method import ratio
from tests.train.test_ratio import auc, joined, world

SEEDS = (1, 2, 3)
EXPERTS, MIXED = {"episodes": 15, "wrong": False}, {"episodes": 40, "wrong": True}
CASES = {
    "as assumed": ({}, {}),
    "demonstrations of a style of their own, .7": ({"styles": (0.7,)}, {}),
    "demonstrations of a style of their own, 1.5": ({"styles": (1.5,)}, {}),
    "demonstrations at twice the speed": ({"speed": 2.0}, {}),
    "demonstrations at another place": ({"place": 2.0}, {}),
    "mixed data of two styles, one that of the demonstrations": ({}, {"styles": (0.0, 1.5)}),
    "mixed data of three styles, one that of the demonstrations": ({}, {"styles": (-1.0, 0.0, 1.0)}),
    "demonstrations err as often": ({"wrong": True}, {}),
    "mixed data twice as noisy": ({}, {"noise": 0.6}),
    "both three times as noisy": ({"noise": 0.9}, {"noise": 0.9}),
}


def main() -> None:
    print("| demonstrations and mixed data | AUC | overlap | episodes |\n|---|---|---|---|")
    for name, (experts, mixed) in CASES.items():
        rows = []
        for seed in SEEDS:
            others = world(**MIXED | mixed, seed=100 + seed)
            data = joined(world(**EXPERTS | experts, seed=seed), others)
            found = ratio.fit(data, [(0,), (1,)], seed)
            joint = found.prefix[~data.expert, -1]
            rows.append((auc(-joint, others[3].any(axis=1)), found.overlap, found.episodes))
        shown = (f"{np.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in zip(*rows, strict=True))
        print(f"| {name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
