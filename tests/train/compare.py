"""Are two runs the same run? Parameters and optimiser state bit by bit, metrics and visited samples line by line."""

import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp


def arrays(run_dir: str | Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, as numpy, by item and path."""
    found = {}
    for item in ("params", "train_state"):
        path = Path(run_dir).absolute() / "checkpoints" / str(step) / item
        handler = ocp.PyTreeCheckpointHandler()
        tree = handler.metadata(path).tree
        restore = ocp.checkpoint_utils.construct_restore_args(tree)
        restore = {k: _as_numpy(v) for k, v in restore.items()} if isinstance(restore, dict) else restore
        flat = _flat(handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore)))
        found |= {f"{item}/{name}": np.asarray(value) for name, value in flat.items()}
    return found


def _as_numpy(tree):
    if isinstance(tree, dict):
        return {k: _as_numpy(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_as_numpy(v) for v in tree]
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _flat(tree, prefix=""):
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {} if tree is None else {prefix: tree}
    return {k: v for key, value in items for k, v in _flat(value, f"{prefix}/{key}" if prefix else str(key)).items()}


def lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(run_dir: str | Path) -> list[dict]:
    """metrics.jsonl without what depends on the machine."""
    found = lines(Path(run_dir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in found]


def assert_same_run(run: str | Path, other: str | Path, step: int) -> None:
    ours, theirs = arrays(run, step), arrays(other, step)
    assert ours.keys() == theirs.keys() and len(ours) > 50, f"arrays {sorted(ours.keys() ^ theirs.keys())[:3]}"
    different = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert not different, f"{len(different)} of {len(ours)} arrays differ, such as {different[:3]}"
    told, expected = metrics(run), metrics(other)
    different = [pair for pair in zip(told, expected, strict=False) if pair[0] != pair[1]]
    assert told == expected, f"{len(told)} and {len(expected)} lines of metrics, such as {different[:1]}"
    samples = lines(Path(run) / "samples.jsonl")
    steps = [line["step"] for line in samples]
    assert steps == list(range(step)), f"samples of steps {steps}"
    assert samples == lines(Path(other) / "samples.jsonl"), "other samples"
