"""Whole-body robot policies from recordings of mixed quality, by hierarchical value-decomposed offline RL.

What a notebook needs; `import hvd` itself is quick, and the first use of a name imports what that name needs:

    policy = hvd.load_policy("runs/demo/policy")             # policy.act(state, images, prompts, key) -> actions
    value = hvd.load_value("runs/demo/value")                # value.ask(state, images, prompts, actions) -> V, Q
    dataset = hvd.open_dataset("runs/demo/datasets/mixed")   # dataset.state, .actions, .episodes, .frames(camera, rows)
    curves = hvd.read_metrics("runs/demo/policy")            # curves["train"]["loss"] -> (steps, values)
    table = hvd.read_advantages("runs/demo")                 # table.v, .q, .a, .omega: one row a frame

Mistakes are `hvd.errors.UserError`, one line each, as on the command line.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvd.data.dataset import open_dataset
    from hvd.method.table import read_advantages
    from hvd.train.inference import load_policy, load_value
    from hvd.train.metrics import read_metrics

_MODULES = {
    "load_policy": "hvd.train.inference",
    "load_value": "hvd.train.inference",
    "open_dataset": "hvd.data.dataset",
    "read_advantages": "hvd.method.table",
    "read_metrics": "hvd.train.metrics",
}
__all__ = ["load_policy", "load_value", "open_dataset", "read_advantages", "read_metrics"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hvd' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
