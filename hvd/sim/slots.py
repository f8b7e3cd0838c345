"""How a teleoperator makes its mistakes: one at a time, the others waiting for its end, or one of each level at a time.

A mistake replaces the actions of its level only; the arms move as if the torso did its part. OneSlot: while a mistake
that will be noticed lasts, the task stands still and the other levels act as if all were well. Concurrent: a level's
mistake does not stop the others, which go on with the task from where things really are; what they do only because they
are held up is written down as waiting.
"""

import abc
from typing import Any

import numpy as np

from hvd.sim.kinematics import BODY, Pose, base_velocity, rot_z
from hvd.sim.mistakes import LEVELS, Log, PlannedMistake
from hvd.sim.scene import BASE, LEFT_ARM, RIGHT_ARM, TORSO

ARMS = np.concatenate([LEFT_ARM, RIGHT_ARM])
# A mistake is noted where it changed the action by more than this: base m/s (rad/s), torso rad; arms always.
_WRONG_BASE, _WRONG_TORSO = 0.1, 0.1
_BRIEF = ("too_high", "too_wide", "releases_early")  # they end with the attempt that they spoil, not by themselves
# Concurrent mistakes:
_HOPELESS = 28  # control steps of a phase with a mistake that is not noticed, after which the attempt is over
_NEAR, _NEAR_ERRING = 0.05, 0.08  # metres from the hands to where they should be
_SETTLES = 5  # control steps after a mistake before the attempt may be judged
_USUAL = 12  # control steps of a phase beside the base's way; a level that stands still for longer is held up
_STILL = {"base": (BASE, 0.03), "torso": (TORSO, 0.01), "arms": (ARMS, 0.03)}  # base m/s, rad/s; joints rad in a step


class Slots(abc.ABC):
    """The mistakes of `operator` (hvd.sim.teleoperator.Teleoperator), to be made as `plans` say.

    Attributes:
        active: the mistakes that are being made, by level.
        log: the mistakes made so far, with frames.
    """

    def __init__(self, operator: Any, plans: tuple[PlannedMistake, ...]):
        self.operator, self.env, self.log = operator, operator.env, Log()
        self.active: dict[str, PlannedMistake] = {}
        self._plans, self._steps = list(plans), dict.fromkeys(LEVELS, 0)
        self._waypoint = np.zeros(3)
        # Where the torso should be, while a mistake keeps it elsewhere: as it was when the mistake began
        self._right_torso: np.ndarray | None = None
        self._held_torso = np.zeros(4)

    @property
    @abc.abstractmethod
    def counts(self) -> bool:
        """Whether the phase's clock goes on."""

    @property
    @abc.abstractmethod
    def holds_up(self) -> bool:
        """Whether a mistake keeps the task where it is."""

    @abc.abstractmethod
    def may_go(self) -> bool:
        """Whether the task may enter another phase."""

    @abc.abstractmethod
    def late(self, steps: int, most: int, after_mistake: int) -> bool:
        """Whether the hands have had so many steps for a phase that the next one begins anyway."""

    @abc.abstractmethod
    def start(self) -> None:
        """Before a control step: take up the mistakes whose time has come."""

    @abc.abstractmethod
    def end(self, action: np.ndarray) -> None:
        """After a control step's `action` was chosen: end the mistakes that are noticed."""

    @abc.abstractmethod
    def arrive(self, goal: np.ndarray, speed: float) -> tuple[np.ndarray, float, float]:
        """The base's velocity towards `goal` (x, y, yaw), the distance to go and the yaw error, as it believes."""

    def body(self, action: np.ndarray, targets: dict[str, Pose], torso: np.ndarray) -> float:
        """Sets torso and arms of `action` towards the hands' `targets`; returns the largest hand error in metres, of an
        operator who believes that all goes well."""
        command, right = self.env.command[BODY], self._right_torso
        if right is not None:  # the arms move as if the torso had done its part
            command = np.concatenate([right, command[4:]])
        q, error = self.operator.ik.solve(command, targets, torso)
        action[BODY] = q
        if right is not None:
            self._right_torso = right = q[:4]
            plan = self.active.get("torso")
            if plan is not None:
                lean = [0, 0, plan.offset[0], 0]
                action[TORSO] = self._held_torso + lean if plan.kind == "leans" else self.env.command[TORSO]
                if np.abs(right - action[TORSO]).max() > _WRONG_TORSO:
                    self.log.wrong(plan, self.env.time)
        self._wrong_arms(action, targets, torso)
        return error

    def give_up(self) -> None:
        """The operator stands still for good: that is part of the mistakes that made it so."""
        for plan in self.active.values():
            self.log.wrong(plan, self.env.time)

    @property
    def all_noticed(self) -> bool:
        return all(plan.noticed for plan in self.active.values())

    @property
    def releasing(self) -> bool:
        """Whether a gripper is letting go too early."""
        plan = self.active.get("arms")
        if plan is None or plan.kind != "releases_early":
            return False
        self.log.wrong(plan, self.env.time)
        return True

    def entered(self, phase: str) -> None:
        """The task enters `phase`. A mistake made before the grasp that did no harm is over."""
        if phase == "back_away":
            for plan in [plan for plan in self.active.values() if plan.phase in ("approach", "reach")]:
                self.clear(plan.level)

    def _catch_up(self) -> None:
        """The torso is where it should be: the arms need not pretend any longer."""
        right = self._right_torso
        if right is not None and "torso" not in self.active and np.abs(right - self.env.command[TORSO]).max() < 0.1:
            self._right_torso = None

    def clear(self, *levels: str) -> None:
        """The active mistakes (of `levels`) are over."""
        for level in levels or tuple(self.active):
            del self.active[level]
            self.log.close(level)

    def _take_up(self, plan: PlannedMistake) -> None:
        self._plans.remove(plan)
        self.active[plan.level], self._steps[plan.level] = plan, 0
        if plan.level == "torso":
            self._right_torso = self._held_torso = self.env.command[TORSO].copy()
        if plan.kind == "detour":
            pose = self.env.base_pose()
            self._waypoint = pose + [*(rot_z(pose[2])[:2, :2] @ plan.offset), 0]

    def _is_due(self, plan: PlannedMistake) -> bool:
        return plan.phase == self.operator.phase and self.operator.steps >= plan.delay

    def _wrong_base(self, plan: PlannedMistake, goal: np.ndarray, speed: float) -> tuple[np.ndarray, float, float]:
        """As `arrive`: on the way to where a detour goes, or to where the base believes that it should be."""
        if plan.kind == "detour":
            return base_velocity(self.env, self._waypoint, speed)
        return base_velocity(self.env, goal + [*(rot_z(goal[2])[:2, :2] @ plan.offset), 0], speed)

    def _wrong_arms(self, action: np.ndarray, targets: dict[str, Pose], torso: np.ndarray) -> None:
        plan, operator = self.active.get("arms"), self.operator
        if plan is None or (plan.kind == "releases_early" and not operator.let_go):
            return
        if plan.kind == "hesitates":
            action[ARMS] = self.env.command[ARMS]
        else:
            wide, up = (operator.let_go, 0.0) if plan.kind == "releases_early" else plan.offset
            shifted = {side: operator.shift_hand(side, pose, wide, up) for side, pose in targets.items()}
            start = np.concatenate([action[TORSO], self.env.command[ARMS]])
            action[ARMS] = operator.ik.solve(start, shifted, torso, torso_free=False)[0][4:]
        self.log.wrong(plan, self.env.time)


class OneSlot(Slots):
    """One mistake at a time, in the order of the plans."""

    @property
    def counts(self) -> bool:  # the arms go on while the torso lags behind
        return not self.holds_up or self._right_torso is not None

    @property
    def holds_up(self) -> bool:
        if not self.active:
            return self._right_torso is not None
        (plan,) = self.active.values()
        return plan.noticed and plan.kind not in _BRIEF

    def may_go(self) -> bool:
        return not self.holds_up

    def late(self, steps: int, most: int, after_mistake: int) -> bool:
        return steps > (after_mistake if self.active else most)

    def start(self) -> None:
        if not self.active and self._right_torso is None and self._plans and self._is_due(self._plans[0]):
            self._take_up(self._plans[0])

    def end(self, action: np.ndarray) -> None:
        """A mistake that holds the task up ends by itself; the torso then catches up before the task goes on."""
        for plan in list(self.active.values()):
            self._steps[plan.level] += 1
            if self.holds_up and self._steps[plan.level] >= plan.frames:
                self.clear()
            return
        self._catch_up()

    def arrive(self, goal: np.ndarray, speed: float) -> tuple[np.ndarray, float, float]:
        right = base_velocity(self.env, goal, speed)
        plan = self.active.get("base")
        if plan is None:
            return right
        wrong = self._wrong_base(plan, goal, speed)
        if np.abs(wrong[0] - right[0]).max() > _WRONG_BASE:
            self.log.wrong(plan, self.env.time)
        return (wrong[0], *right[1:]) if plan.kind == "detour" else wrong


class Concurrent(Slots):
    """A mistake of each level at a time. A mistake lasts for so many frames of wrong action as its plan says."""

    def __init__(self, operator: Any, plans: tuple[PlannedMistake, ...]):
        super().__init__(operator, plans)
        self._phase, self._clock = "", 0  # the phase, and control steps since it began
        self._at_fault: set[str] = set()  # levels that did wrong in this phase
        self._arms_lagged = False  # for a mistake in this phase
        self._settling = 0  # control steps that the body still needs after a mistake
        self._due, self._error = 0.0, 0.0  # control steps that this phase usually takes; the hands' real error, metres

    @property
    def counts(self) -> bool:
        return not self.holds_up or self.operator.steps < _USUAL

    @property
    def holds_up(self) -> bool:
        return self._settling > 0 or any(plan.noticed and plan.kind not in _BRIEF for plan in self.active.values())

    def may_go(self) -> bool:
        """While base or torso err, and after the arms did: when the hands are really where they should be."""
        arms = self.active.get("arms")
        if arms is not None:
            return arms.kind in _BRIEF
        erring = bool(self.active) or self._right_torso is not None
        return (not erring and not self._arms_lagged) or self._error < (_NEAR_ERRING if erring else _NEAR)

    def late(self, steps: int, most: int, after_mistake: int) -> bool:
        lasting = any(plan.kind not in _BRIEF for plan in self.active.values())
        return not lasting and steps > (after_mistake if self.active else most)

    def start(self) -> None:
        operator = self.operator
        self._clock += 1
        if operator.phase != self._phase:
            self._phase, self._clock, self._due = operator.phase, 0, 0.0 if operator.phase == "give_up" else _USUAL
            self._at_fault = set(self.active) if operator.phase == "give_up" else set()
            self._arms_lagged = False
        for plan in tuple(self._plans):
            behind = plan.level == "torso" and self._right_torso is not None
            if plan.level not in self.active and not behind and self._is_due(plan):
                self._take_up(plan)
        if self._clock > _HOPELESS and not self.all_noticed and operator.phase != "give_up":
            operator.give_up()

    def end(self, action: np.ndarray) -> None:
        self._note_waiting(action)
        for level, plan in list(self.active.items()):
            if self.log.is_wrong(level, self.env.time):
                self._at_fault.add(level)
                self._arms_lagged = self._arms_lagged or (level == "arms" and plan.kind not in _BRIEF)
                self._steps[level] += 1
            if plan.noticed and plan.kind not in _BRIEF and self._steps[level] >= plan.frames:
                self.clear(level)
                self._settling = _SETTLES
        self._catch_up()
        catching_up = self._right_torso is not None and "torso" not in self.active
        self._settling = _SETTLES if catching_up else max(self._settling - 1, 0)

    def _note_waiting(self, action: np.ndarray) -> None:
        """A level waits when it stands still, while the phase takes longer than usual and another level erred in it."""
        wrong = {level for level in LEVELS if self.log.is_wrong(level, self.env.time)}
        if self._clock <= self._due:
            return
        still = self.env.as_action(self.env.command)
        still[BASE] = 0
        for level, (dims, most) in _STILL.items():
            if (self._at_fault | wrong) - {level} and level not in wrong | set(self.active):
                if np.abs(action - still)[dims].max() < most:
                    self.log.waits(level, self.env.time)

    def arrive(self, goal: np.ndarray, speed: float) -> tuple[np.ndarray, float, float]:
        velocity, distance, turn = base_velocity(self.env, goal, speed)
        if self._clock == 0:
            self._due = _USUAL + 10 * distance / speed
        plan = self.active.get("base")
        if plan is not None:
            wrong, _, _ = self._wrong_base(plan, goal, speed)
            if np.abs(wrong - velocity).max() > _WRONG_BASE:
                self.log.wrong(plan, self.env.time)
            velocity = wrong
        return velocity, distance, turn

    def body(self, action: np.ndarray, targets: dict[str, Pose], torso: np.ndarray) -> float:
        self._error = max(float(np.linalg.norm(at - self.env.hand_position(side))) for side, (at, _) in targets.items())
        return super().body(action, targets, torso)
