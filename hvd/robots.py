"""Robots as data: the name and kinematic level of each action dimension, and where recordings hold it.

The order of the levels is root first: a level's Q is conditioned on the actions of the levels before it
(docs/method.md: base -> torso -> arms). All other code takes what it needs of a robot (padding, losses by level,
reports, conversion of recordings) from these tables: a new robot is a new entry of ROBOTS.
"""

from dataclasses import dataclass
from types import MappingProxyType

from hvd.errors import UserError, nearest

ODOMETRY = "obs/odom"  # as a part's state: the velocity of the base, from several keys below this one


@dataclass(frozen=True)
class Level:
    """One kinematic level: its name and its action dimensions."""

    name: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Consecutive action dims that HDF5 recordings (hvd.data.recordings.joylo) hold under one key.

    Attributes:
        names: of the dims.
        action: key of the targets [T, dims].
        state: key of the measured values [T, dims], or ODOMETRY.
        cut: the recordings measure more columns than there are dims; those beyond are dropped.
    """

    names: tuple[str, ...]
    action: str
    state: str
    cut: bool = False


@dataclass(frozen=True)
class Robot:
    """A robot's action layout.

    Attributes:
        name: key in ROBOTS.
        action_names: one name per action dimension, in the order of the recordings.
        levels: kinematic levels, root first; together they hold every dimension exactly once.
        position_dims: dimensions that are absolute joint position targets with the same meaning in the state, so that
            "hold the current pose" and delta actions make sense for them.
        parts: where HDF5 recordings hold the dims, in the order of action_names; () = hvd knows no such recordings.
    """

    name: str
    action_names: tuple[str, ...]
    levels: tuple[Level, ...]
    position_dims: tuple[int, ...]
    parts: tuple[Part, ...] = ()

    def __post_init__(self):
        dims = sorted(d for level in self.levels for d in level.dims)
        if dims != list(range(self.action_dim)):
            raise ValueError(f"robot {self.name}: the levels must hold each of {self.action_dim} dims exactly once")
        if self.parts and tuple(name for part in self.parts for name in part.names) != self.action_names:
            raise ValueError(f"robot {self.name}: the parts must have the names of the action dims, in their order")

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    @property
    def level_names(self) -> tuple[str, ...]:
        return tuple(level.name for level in self.levels)

    @property
    def level_dims(self) -> tuple[tuple[int, ...], ...]:
        return tuple(level.dims for level in self.levels)

    def delta_mask(self) -> tuple[bool, ...]:
        """[action_dim]: true where an action is a joint position and can be expressed relative to the state."""
        return tuple(dim in self.position_dims for dim in range(self.action_dim))


def _range(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


def _mobile_two_arms(name: str, joints: int) -> Robot:
    """The Galaxea layouts, in the recordings' key order: left arm and gripper, base, right arm and gripper, torso."""
    left, right = (
        (
            Part(
                tuple(f"{side}_arm_{i}" for i in range(joints)),
                f"action/{side}_arm",
                f"obs/joint_state/{side}_arm/joint_position",
                cut=True,
            ),
            Part((f"{side}_gripper",), f"action/{side}_gripper", f"obs/gripper_state/{side}_gripper/gripper_position"),
        )
        for side in ("left", "right")
    )
    base = Part(("base_vx", "base_vy", "base_wz"), "action/mobile_base", ODOMETRY)
    torso = Part(tuple(f"torso_{i}" for i in range(4)), "action/torso", "obs/joint_state/torso/joint_position")
    parts = (*left, base, *right, torso)
    n = joints + 1
    levels = (
        Level("base", _range(n, n + 3)),
        Level("torso", _range(2 * n + 3, 2 * n + 7)),
        Level("arms", _range(0, n) + _range(n + 3, 2 * n + 3)),
    )
    positions = _range(0, n) + _range(n + 3, 2 * n + 7)
    return Robot(name, tuple(n for part in parts for n in part.names), levels, positions, parts)


def _b1k() -> Robot:
    """The R1 Pro in the order of the BEHAVIOR challenge: base, torso, left arm and gripper, right arm and gripper."""
    arms = (name for side in ("left", "right") for name in (*(f"{side}_arm_{i}" for i in range(7)), f"{side}_gripper"))
    names = ("base_vx", "base_vy", "base_wz", *(f"torso_{i}" for i in range(4)), *arms)
    levels = (Level("base", _range(0, 3)), Level("torso", _range(3, 7)), Level("arms", _range(7, 23)))
    return Robot("r1_pro_b1k", names, levels, _range(3, 23))


def _moved_by_hand(name: str, hand: tuple[str, ...]) -> Robot:
    """A fixed arm whose actions are steps of its hand, and a gripper."""
    parts = (
        Part(hand, "action/arm", "obs/hand_state/arm/pose"),
        Part(("gripper",), "action/gripper", "obs/gripper_state/gripper/gripper_position"),
    )
    arm = len(hand)
    return Robot(name, (*hand, "gripper"), (Level("arm", _range(0, arm)), Level("gripper", (arm,))), (), parts)


_G1_ARM = ("shoulder_pitch", "shoulder_roll", "shoulder_yaw", "elbow", "wrist_roll", "wrist_pitch", "wrist_yaw")
_G1_HAND = ("pinky", "ring", "middle", "index", "thumb_bend", "thumb_rotation")

_TIDYBOT = {
    "base": ("base_x", "base_y", "base_turn"),
    "arm": tuple(f"arm_{i}" for i in range(7)),
    "gripper": ("gripper",),
}

ROBOTS = MappingProxyType(
    {
        "r1": _mobile_two_arms("r1", 6),
        "r1_pro": _mobile_two_arms("r1_pro", 7),
        "r1_pro_b1k": _b1k(),
        "g1": Robot(
            "g1",
            tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _G1_ARM)
            + tuple(f"{side}_hand_{joint}" for side in ("left", "right") for joint in _G1_HAND),
            (Level("left_arm", _range(0, 7)), Level("right_arm", _range(7, 14)), Level("hands", _range(14, 26))),
            _range(0, 26),
        ),
        "ur5e": _moved_by_hand("ur5e", ("hand_x", "hand_y", "hand_z", "hand_yaw")),  # docs/examples/ur5e_ocbench.py
        "sawyer": _moved_by_hand("sawyer", ("hand_x", "hand_y", "hand_z")),  # docs/examples/sawyer_metaworld.py
        "tidybot": Robot(  # moved by steps of base and joints: docs/examples/tidybot_kinder.py
            "tidybot",
            tuple(name for names in _TIDYBOT.values() for name in names),
            (Level("base", _range(0, 3)), Level("arm", _range(3, 10)), Level("gripper", (10,))),
            (),
            tuple(
                Part(names, f"action/{level}", f"obs/joint_state/{level}/joint_position")
                for level, names in _TIDYBOT.items()
            ),
        ),
    }
)


def get_robot(name: str) -> Robot:
    """The robot called `name`; a UserError that offers the nearest names otherwise."""
    if name not in ROBOTS:
        raise UserError(f"unknown robot {name!r}{nearest(name, ROBOTS)}")
    return ROBOTS[name]
