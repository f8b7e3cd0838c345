"""Where the results of an evaluation lie, their forms, what they say about the policy's inputs, how tables are made."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

from etils import epath
from msgspec import Meta, Struct

from hvd import documents
from hvd.configs import Experiment
from hvd.documents import Count
from hvd.errors import UserError
from hvd.files import write_shared
from hvd.tables import aligned

NOTHING = "doing_nothing"  # run name of the control: the same seeds, the robot holds its first pose


Number = Annotated[float, Meta(ge=-1e30, le=1e30)]


class Interval(Struct):
    mean: Number
    low: Number
    high: Number


class _Estimate(Interval):
    n: Count


class _Success(_Estimate):
    count: Count


class _Observes(Struct):
    object_pose: bool
    images: list[str]


class _Episode(Struct):
    seed: Count
    success: bool
    stage: Count
    steps: Count
    video: Annotated[str, Meta(pattern=r"^(videos/\w+\.mp4)?$")]
    dropped: bool = False


class _Rollouts(Struct):
    run_name: str
    task: str
    prompt: str
    observes: _Observes | None
    seeds: list[int]
    num_rollouts: Count
    horizon: Count
    execute_steps: Count
    action_horizon: Count
    success: _Success
    stage: Interval
    subtasks: Annotated[dict[str, Number], Meta(min_length=1, max_length=100)]
    episodes: list[_Episode]
    weighting: str | None = None
    policy_digest: str | None = None


class _ActionError(Struct):
    normalised: Number
    raw: Number


class _HeldOut(Struct):
    action_error: Annotated[dict[str, _ActionError], Meta(min_length=1)]
    value_rank: _Estimate | None


class _Offline(Struct):
    run_name: str
    datasets: Annotated[dict[str, _HeldOut], Meta(min_length=1)]
    weighting: str | None = None
    policy_digest: str | None = None


_FORMS: dict[Any, type] = {"rollouts": _Rollouts, "offline": _Offline}


def read_results(path: epath.PathLike) -> dict[str, Any]:
    """A results.json; UserError when it is not one, or that of another run than the folder's name says."""
    found = documents.read(path, dict[str, Any])
    kind, advice = found.get("kind"), "delete it and run `hvd evaluate` again"
    if not isinstance(kind, str) or kind not in _FORMS:
        raise UserError(f"{path}: kind is neither of {', '.join(_FORMS)}: {advice}")
    try:
        documents.convert(found, _FORMS[kind], str(path))
    except UserError as error:
        raise UserError(f"{error}: {advice}") from None
    if found["run_name"] != epath.Path(path).parent.name:
        raise UserError(f"{path}: run_name is {found['run_name']!r}, not its folder's name: {advice}")
    return found


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
    write_shared(path, json.dumps(content, indent=1) + "\n")
