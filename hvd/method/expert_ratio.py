"""The expert ratio of an experiment: which rows are compared, and the fit on the main process (hvd.method.ratio)."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float32

from hvd import mixture
from hvd.configs import Experiment
from hvd.data.dataset import Dataset
from hvd.data.transforms import InputTransform
from hvd.data.transitions import Transitions
from hvd.errors import UserError
from hvd.method import ratio
from hvd.method.extraction import Outcomes
from hvd.runtime import preemption, watchdog
from hvd.train import stage_data, value_pass
from hvd.train.mesh import Devices
from hvd.train.value_pass import Values

_VERSION = 3  # of hvd.method.ratio: another one makes another table
_FEW_EPISODES, _LITTLE_OVERLAP = 0.1, 0.05
_ROWS = 8_192

type ValuesKey = Callable[[str, Mapping[str, Dataset], Mapping[str, np.ndarray]], str]


@dataclass(frozen=True)
class Compared:
    """The optimal sets (`experts`) beside the weighted ones (`mixed`).

    Attributes:
        key: what the ratio depends on beside V and Q.
        needs_seen: the state alone does not say what the robot sees: there are cameras, or several tasks.
        values_key: hvd.method.advantages.values_key.
    """

    experts: Mapping[str, Dataset]
    mixed: Mapping[str, Dataset]
    key: str
    needs_seen: bool
    values_key: ValuesKey

    @classmethod
    def open(cls, cfg: Experiment, mixed: Mapping[str, Dataset], values_key: ValuesKey) -> "Compared":
        """The experiment's; UserError where it has no optimal set."""
        names = [name for name, _ in cfg.datasets() if mixture.role(cfg, name) == "optimal"]
        if not names:
            raise UserError(f"policy.score {cfg.policy.score!r} compares with demonstrations, and no set is optimal")
        experts = {name: stage_data.open_dataset(cfg, name) for name in names}
        parts: list[Any] = [_VERSION, cfg.seed]
        for name, data in {**experts, **mixed}.items():
            parts += [name, data.digest, hashlib.sha256(Outcomes.of(data).success.tobytes()).hexdigest()]
        tasks = {task for data in (*experts.values(), *mixed.values()) for task in data.tasks}
        seen = bool(cfg.model.cameras) or len(tasks) > 1
        return cls(experts, mixed, hashlib.sha256(json.dumps(parts).encode()).hexdigest(), seen, values_key)

    def fit(
        self, cfg: Experiment, devices: Devices, value_digest: str, values: Mapping[str, Values], shards: epath.Path
    ) -> dict[str, dict[str, Float32[np.ndarray, "n l"]]]:
        """The table's columns `ratio` and `alone` of each weighted set, in the order of its `values`; on the main
        process, which alone has them. Values of the experts' rows are computed where what the model sees counts."""
        rows = {name: data.rows() for name, data in self.experts.items()}
        judged: Mapping[str, Values] = {}
        if self.needs_seen:
            folder = shards / (self.values_key(value_digest, self.experts, rows)[:16] + "-seen")
            judged = value_pass.evaluate(cfg, devices, self.experts, rows, value_pass.Shards(folder, True))
        if not devices.is_main:
            return {}
        print(f"expert ratio: {sum(map(len, rows.values()))} frames of experts", flush=True)
        transform, first, parts = InputTransform.from_config(cfg), 0, []
        for name, data in {**self.experts, **self.mixed}.items():
            of, expert = judged.get(name) or values.get(name), name in self.experts
            at = rows[name] if expert else values[name].rows
            parts.append(_rows(transform, data, at, of.seen if of else None, expert, first))
            first += len(data.all_episodes)
        joined = ratio.Rows(*(np.concatenate([getattr(p, x) for p in parts]) for x in ratio.Rows.__annotations__))
        found = ratio.fit(joined, cfg.levels(), cfg.seed, _progress)
        if found.episodes < _FEW_EPISODES:
            print(
                f"warning: what the expert ratio trusts most comes from few episodes ({found.episodes:.0%} of them in "
                "effect): it may have learned their habits instead of what is right",
                flush=True,
            )
        print(f"expert ratio: {found.overlap:.0%} of the weighted frames look like demonstrations", flush=True)
        if found.overlap < _LITTLE_OVERLAP:
            print(
                "warning: where demonstrations are of another person, speed, place or robot the ratio sees that, not "
                "mistakes (docs/method.md)",
                flush=True,
            )
        ends = np.cumsum([len(p.episode) for p in parts])[len(self.experts) - 1 :]
        spans = zip(self.mixed, ends, ends[1:], strict=False)
        return {name: {"ratio": found.prefix[a:b], "alone": found.alone[a:b]} for name, a, b in spans}


def _rows(
    transform: InputTransform, data: Dataset, at: np.ndarray, seen: np.ndarray | None, expert: bool, first: int
) -> ratio.Rows:
    """The rows `at` of one dataset, whose episodes are numbered from `first`."""
    transitions, parts = Transitions(data, transform.model.action_horizon), []
    for start in range(0, len(at), _ROWS):
        some = at[start : start + _ROWS]
        chunk, state = transitions.chunk(some), data.state[some]
        patches, real = ratio.patches(transform.actions_in(chunk.actions, state), chunk.action_mask)
        parts.append((transform.state(state), patches, real))
    state, patches, real = (np.concatenate(x) for x in zip(*parts, strict=True))
    same, saw = np.full(len(at), expert), np.zeros((len(at), 0)) if seen is None else seen
    episode, candidate = first + data.episode_of[at], ~same & Outcomes.of(data).success[at]
    return ratio.Rows(state, saw.astype(np.float32), patches, real, episode, same, candidate)


def _progress() -> None:
    watchdog.progress()
    if jax.process_count() == 1:
        preemption.check("while the expert ratio was fitted")
