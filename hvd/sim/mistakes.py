"""Structured mistakes of the scripted teleoperator: wrong in one way, at one kinematic level, for a stretch of frames.

Zero-mean noise is no test of a value-guided method: imitation averages it away. These are the mistakes people make,
often enough that imitation copies them. A mistake replaces the actions of one level only; the other levels do what they
would have done. The frames in which it changed the action are written down (Log) and go into the label sidecar.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hvd.data.labels import Mistake, Waiting


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
    """Collects the frames in which a mistake's action differed from the right one, and those of waiting."""

    mistakes: list[Mistake] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)
    # by level: plan, first wrong frame, last wrong frame
    _open: dict[str, tuple[PlannedMistake, int, int]] = field(default_factory=dict)

    def wrong(self, plan: PlannedMistake, frame: int) -> None:
        first = self._open[plan.level][1] if plan.level in self._open else frame
        self._open[plan.level] = (plan, first, frame)

    def is_wrong(self, level: str, frame: int) -> bool:
        return level in self._open and self._open[level][2] == frame

    def waits(self, level: str, frame: int) -> None:
        for i, span in enumerate(self.waiting):
            if (span.level, span.end) == (level, frame):
                self.waiting[i] = Waiting(level, span.start, frame + 1)
                return
        self.waiting.append(Waiting(level, frame, frame + 1))

    def close(self, *levels: str) -> None:
        """The mistakes (of `levels`) are over: noticed, or the recording ends."""
        for level in levels or tuple(self._open):
            if level in self._open:
                plan, first, last = self._open.pop(level)
                self.mistakes.append(Mistake(level, first, last + 1, plan.kind))


# How often: an episode of the mixed set has one mistake at a random level, sometimes a second one later, rarely none.
_P_NONE, _P_SECOND, _P_NOTICED = 0.1, 0.25, 0.45
LEVELS: tuple[str, ...] = ("base", "torso", "arms")
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


@dataclass(frozen=True)
class Way:
    """One way to go wrong: ranges (metres; steps) that are drawn from uniformly.

    Attributes:
        ahead, up, aside: the offset of PlannedMistake: (aside, up) of the hands, (ahead, aside) of the others.
        either_side: `aside` is to the left or to the right.
        late: what `kind` is called when it is noticed, if not the same.
    """

    kind: str
    ahead: tuple[float, float] = (0.0, 0.0)
    aside: tuple[float, float] = (0.0, 0.0)
    up: tuple[float, float] = (0.0, 0.0)
    either_side: bool = False
    delay: tuple[int, int] = (0, 0)
    late: str = ""


@dataclass(frozen=True)
class Opportunity:
    """A place in the task at which a level may err.

    Attributes:
        phases: one of them, at random.
        ways: one of them, at random.
        frames: frames of wrong action until the mistake is noticed, a range.
        final: the attempt fails where it is not noticed; other mistakes are always noticed.
        share: of the episodes whose operator is bad at this level.
        hopeless: it cannot be noticed in time.
    """

    level: str
    phases: tuple[str, ...]
    ways: tuple[Way, ...]
    frames: tuple[int, int]
    final: bool = True
    share: float = 1.0
    hopeless: bool = False

    def plan(self, rng: np.random.Generator, noticed: float, slowly: float = 1.0) -> PlannedMistake:
        """A mistake made here; a final one is noticed with probability `noticed`, each after `slowly` times as long."""
        way = self.ways[rng.integers(len(self.ways))]
        seen = not self.hopeless and (not self.final or bool(rng.random() < noticed))
        ahead, aside, up = (float(rng.uniform(*each)) for each in (way.ahead, way.aside, way.up))
        if way.either_side and rng.random() < 0.5:
            aside = -aside
        return PlannedMistake(
            self.level,
            way.late if seen and way.late else way.kind,
            str(rng.choice(self.phases)),
            int(rng.integers(way.delay[0], way.delay[1] + 1)),
            (aside, up) if self.level == "arms" else (ahead, aside),
            round(slowly * rng.integers(self.frames[0], self.frames[1] + 1)) if seen else 0,
        )


def casual_mistakes(
    opportunities: tuple[Opportunity, ...],
) -> Callable[[np.random.Generator], tuple[PlannedMistake, ...]]:
    """What a casual operator does in a task of these opportunities, as often as in a carrying one."""

    def mistakes(rng: np.random.Generator) -> tuple[PlannedMistake, ...]:
        if rng.random() < _P_NONE:
            return ()
        levels = rng.permutation(LEVELS)[: 2 if rng.random() < _P_SECOND else 1]
        mine = [[o for o in opportunities if o.level == level] for level in levels]
        chosen = {opportunities.index(each[rng.integers(len(each))]) for each in mine}
        return tuple(opportunities[i].plan(rng, _P_NOTICED) for i in sorted(chosen))

    return mistakes


def carry_opportunities(sizes: Sizes) -> tuple[Opportunity, ...]:
    """Where the levels may err in a task that carries an object from the shelf to the table."""

    def away(least: float, most: float) -> tuple[Way, Way]:
        return Way("stops_short", ahead=(-most, -least)), Way("off_to_side", aside=(least, most), either_side=True)

    high, wide = (
        Way("too_high", up=sizes.too_high),
        Way("too_wide", aside=sizes.too_wide, either_side=sizes.to_either_side),
    )
    detour = Way("detour", ahead=(-0.35, -0.35), aside=(0.5, 0.5), either_side=True, delay=(4, 8))
    releases = Way("releases_early", delay=(3, 6))
    return (
        Opportunity("base", ("approach",), away(0.4, 0.65), (15, 30)),
        Opportunity("base", ("sidestep",), (detour,), (14, 26), final=False),
        Opportunity("base", ("advance",), away(0.30, 0.42), (15, 30)),
        Opportunity("torso", ("approach",), (Way("no_bend", late="late_bend"),), (15, 30)),
        Opportunity("torso", ("lift",), (Way("late_rise"),), (15, 30), final=False),
        Opportunity("torso", ("sidestep",), (Way("leans", ahead=(0.25, 0.4), delay=(4, 8)),), (15, 30), final=False),
        Opportunity("arms", ("reach",), (high, wide), (12, 28)),
        Opportunity("arms", sizes.released_early_in[1:], (releases,), (1, 1), share=0.4, hopeless=True),
        Opportunity("arms", ("sidestep",), (Way("sags", up=(-0.1, -0.06), delay=(4, 8)),), (15, 30), final=False),
        Opportunity("arms", ("lower",), (Way("hesitates", delay=(2, 2)),), (14, 28), final=False),
    )


def carry_mistakes(rng: np.random.Generator, sizes: Sizes) -> tuple[PlannedMistake, ...]:
    """The mistakes of one episode of the mixed set, in the order in which they will happen."""
    if rng.random() < _P_NONE:
        return ()
    levels = list(rng.permutation(LEVELS))[: 2 if rng.random() < _P_SECOND else 1]
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
