"""Where the results of an evaluation lie, what they say about the policy's inputs, and how tables are printed."""

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from hvd.configs import Experiment
from hvd.files import write_atomic
from hvd.tables import aligned

NOTHING = "doing_nothing"  # run name of the control: the same seeds, the robot holds its first pose


def folder(cfg: Experiment, run_name: str) -> epath.Path:
    return epath.Path(cfg.exp_dir) / "evaluation" / run_name


def observes(cfg: Experiment) -> dict[str, Any]:
    """What the policy is given, for the tables."""
    keys = cfg.optimal_data.keys.state
    return {
        "proprioception": "observation.state" in keys,
        "object_pose": "observation.environment_state" in keys,
        "images": list(cameras_of(cfg)),
    }


def observes_text(seen: dict[str, Any] | None) -> str:
    if seen is None:
        return "-"
    pose = "state with object pose" if seen["object_pose"] else "state without object pose"
    return f"{pose}, {len(seen['images']) or 'no'} camera{'s' * (len(seen['images']) != 1)}"


def cameras_of(cfg: Experiment) -> dict[str, str]:
    """The policy's cameras -> the simulator's, by the last part of the dataset's key (observation.images.head)."""
    keys = cfg.optimal_data.keys.images
    return {name: keys[name].rsplit(".", 1)[-1] for name in cfg.model.cameras if name in keys}


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """A table of text on stdout; the first row is its header."""
    print("\n".join(aligned(rows)), flush=True)


def write_json(path: epath.PathLike, content: Any) -> None:
    """Write `content` in one step: the file is whole or as it was."""
    write_atomic(path, json.dumps(content, indent=1) + "\n")
