"""Structured mistakes of the scripted teleoperator: wrong in one way, at one kinematic level, for a stretch of frames.

Zero-mean noise is no test of a value-guided method: imitation averages it away. These are the mistakes people make,
often enough that imitation copies them. A mistake replaces the actions of one level only; the other levels do what they
would have done. The frames in which it changed the action are written down (Log) and go into the label sidecar.
"""

from dataclasses import dataclass, field

import numpy as np

from hvd.data.labels import Mistake


@dataclass(frozen=True)
class PlannedMistake:
    """One mistake that the operator will make.

    Attributes:
        level: "base", "torso" or "arms" (level names of robots.R1).
        kind: what is done wrong; hvd.sim.teleoperator acts on it.
        phase: the phase of the task in which it begins,
        delay: so many steps after the phase began.
        offset: metres: of the base's goal (forward, left), or of the hands (outwards, up).
        frames: after how many steps the operator notices; 0 = never: the attempt fails and the recording ends.
    """

    level: str
    kind: str
    phase: str
    delay: int = 0
    offset: tuple[float, float] = (0.0, 0.0)
    frames: int = 0

    @property
    def noticed(self) -> bool:
        return self.frames > 0


@dataclass
class Log:
    """Collects the frames in which a mistake's action differed from the right one."""

    mistakes: list[Mistake] = field(default_factory=list)
    _open: tuple[PlannedMistake, int, int] | None = None  # plan, first wrong frame, last wrong frame

    def wrong(self, plan: PlannedMistake, frame: int) -> None:
        first = frame if self._open is None else self._open[1]
        self._open = (plan, first, frame)

    def close(self) -> None:
        """The mistake is over (noticed, or the recording ends)."""
        if self._open is not None:
            plan, first, last = self._open
            self.mistakes.append(Mistake(plan.level, first, last + 1, plan.kind))
            self._open = None


# How often: an episode of the mixed set has one mistake at a random level, sometimes a second one later, rarely none.
_P_NONE, _P_SECOND, _P_NOTICED = 0.1, 0.25, 0.45
_LEVELS = ("base", "torso", "arms")
_ORDER = ("approach", "reach", "grasp", "lift", "back_away", "sidestep", "advance", "lower")


@dataclass(frozen=True)
class Sizes:
    """How large the mistakes of a carrying task are: ranges in metres, drawn from uniformly.

    Attributes:
        out_of_reach: how far off the base stands at the shelf. Torso and arms must not be able to make up for it: an
            attempt that fails late, with most sub-tasks done, would say little against the base.
        too_high, too_wide: how far the hands are off when they reach.
        to_either_side: "too wide" is to the left or to the right, not outwards.
        released_early_in: the phases in which letting go is a mistake.
    """

    out_of_reach: tuple[float, float]
    too_high: tuple[float, float]
    too_wide: tuple[float, float]
    to_either_side: bool = False
    released_early_in: tuple[str, ...] = ("lift", "back_away", "sidestep", "advance")


def carry_mistakes(rng: np.random.Generator, sizes: Sizes) -> tuple[PlannedMistake, ...]:
    """The mistakes of one episode of the mixed set, in the order in which they will happen."""
    if rng.random() < _P_NONE:
        return ()
    levels = list(rng.permutation(_LEVELS))[: 2 if rng.random() < _P_SECOND else 1]
    plans = sorted((_sample(rng, str(level), sizes) for level in levels), key=lambda plan: _ORDER.index(plan.phase))
    if len(plans) == 2 and plans[0].phase == plans[1].phase:
        return (plans[0],)
    return tuple(plans)


def _sample(rng: np.random.Generator, level: str, sizes: Sizes) -> PlannedMistake:
    noticed = bool(rng.random() < _P_NOTICED)
    frames = int(rng.integers(12, 28)) if noticed else 0
    side = float(rng.choice([-1, 1]))
    kind = str(rng.choice(_KINDS[level]))
    if kind in ("stops_short", "off_to_side"):
        phase = str(rng.choice(["approach", "advance"], p=[0.7, 0.3]))
        fatal = not noticed and phase == "approach"
        size = float(rng.uniform(*(sizes.out_of_reach if fatal else (0.30, 0.42))))
        return PlannedMistake(
            level, kind, phase, 0, (-size, 0.0) if kind == "stops_short" else (0.0, size * side), frames
        )
    if kind == "detour":
        phase = str(rng.choice(["approach", "sidestep"]))
        return PlannedMistake(
            level, kind, phase, int(rng.integers(4, 9)), (-0.35, 0.5 * side), int(rng.integers(14, 26))
        )
    if kind == "no_bend":
        return PlannedMistake(level, "late_bend" if noticed else kind, "approach", 0, (0.0, 0.0), frames)
    if kind == "no_rise":
        return PlannedMistake(level, "late_rise" if noticed else kind, "lift", 0, (0.0, 0.0), frames)
    if kind == "too_high":
        return PlannedMistake(level, kind, "reach", 0, (0.0, float(rng.uniform(*sizes.too_high))), frames)
    if kind == "too_wide":
        wide = float(rng.uniform(*sizes.too_wide)) * (side if sizes.to_either_side else 1)
        return PlannedMistake(level, kind, "reach", 0, (wide, 0.0), frames)
    if kind == "hesitates":
        phase = str(rng.choice(["reach", "lower"]))
        return PlannedMistake(level, kind, phase, 2, (0.0, 0.0), int(rng.integers(14, 28)))
    # Released over the shelf the object can be taken again; anywhere else it falls to the floor.
    phase = "lift" if noticed else str(rng.choice(sizes.released_early_in))
    return PlannedMistake(level, kind, phase, int(rng.integers(3, 7)), (0.0, 0.0), frames)


_KINDS = {
    "base": ("stops_short", "stops_short", "off_to_side", "off_to_side", "detour"),
    "torso": ("no_bend", "no_rise"),
    "arms": ("too_high", "too_wide", "releases_early", "hesitates"),
}
