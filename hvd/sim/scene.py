"""The simulated R1 and its room as a MuJoCo model: primitive geoms only, 21 actuators in the order of robots.R1.

Lengths in metres, angles in radians. The robot has the R1's structure (base x, y, yaw; a four-joint torso that bends;
two six-joint arms with parallel grippers) but not its meshes or exact dimensions.
"""

import mujoco as mj
import numpy as np

from hvd.sim.tasks import Task

PHYSICS_DT = 0.004  # 250 Hz
SUBSTEPS = 25  # per control step: 10 Hz
CONTROL_DT = PHYSICS_DT * SUBSTEPS
ARM_V, TORSO_V = 1.8, 0.9  # joint speed limits, rad/s
BASE_V, BASE_W = 0.6, 1.2  # base speed limits, m/s and rad/s
GRIPPER_STROKE = 0.038  # travel of one finger

LEFT_ARM, LEFT_GRIPPER, BASE, RIGHT_ARM, RIGHT_GRIPPER, TORSO = (
    np.arange(0, 6),
    6,
    np.arange(7, 10),
    np.arange(10, 16),
    16,
    np.arange(17, 21),
)
GRIPPERS = np.array([LEFT_GRIPPER, RIGHT_GRIPPER])
JOINTS = np.setdiff1d(np.arange(21), BASE)  # position-controlled dims, grippers included
SIDES = ("left", "right")
CAMERAS = ("head", "left_wrist", "right_wrist")
OVERVIEW = "overview"  # a fourth, fixed camera, for videos only: policies never see it

SHELF_X, SHELF_HEIGHT = 1.25, 0.32  # the low shelf the object starts on
SHELF_HALF = np.array([0.20, 0.60])
TABLE_XY, TABLE_HEIGHT = np.array([1.25, 1.15]), 0.78  # the table with the goal
GOAL_HALF = np.array([0.15, 0.24])

HOME_TORSO = np.array([0.55, -1.1, 0.55, 0.0])
_HOME_ARM = np.array([0.0, 0.9, -1.7, 0.0, 0.8, 0.0])
# The arms start wide: were the first pose a clamp, the two-arm task could be done with one arm frozen.
HOME_LEFT = _HOME_ARM + [1.0, 0, 0, 0, 0, 0]
HOME_RIGHT = _HOME_ARM - [1.0, 0, 0, 0, 0, 0]
HOME_FINGER = 0.03

# The object's rotation symmetries (quaternions wxyz): a cuboid's half turns; a square bar has quarter turns about z.
_S = np.sqrt(0.5)
HALF_TURNS = np.eye(4)
QUARTER_TURNS = np.array([[_S, 0, 0, _S], [_S, 0, 0, -_S], [0, _S, _S, 0], [0, _S, -_S, 0]])


ARM_JOINTS = {side: tuple(f"{side}_{i + 1}" for i in range(6)) for side in SIDES}
TORSO_JOINTS = tuple(f"torso_{i + 1}" for i in range(4))
BASE_JOINTS = ("base_x", "base_y", "base_yaw")
ACTUATED = (*ARM_JOINTS["left"], "left_fa", *BASE_JOINTS, *ARM_JOINTS["right"], "right_fa", *TORSO_JOINTS)

_GREY, _DARK, _BLACK = [0.75, 0.75, 0.78, 1], [0.3, 0.3, 0.3, 1], [0.15, 0.15, 0.15, 1]
_NO_CONTACT = {"contype": 0, "conaffinity": 0}
_BOX, _CAPSULE, _SPHERE = mj.mjtGeom.mjGEOM_BOX, mj.mjtGeom.mjGEOM_CAPSULE, mj.mjtGeom.mjGEOM_SPHERE

# Per joint: offset from the parent, axis, limits, length of the link that follows.
_TORSO = (
    ([0, 0, 0.30], [0, 1, 0], -0.3, 1.6, 0.33),
    ([0, 0, 0.33], [0, 1, 0], -2.6, 0.3, 0.33),
    ([0, 0, 0.33], [0, 1, 0], -0.8, 1.8, 0.0),
    ([0, 0, 0.06], [0, 0, 1], -1.2, 1.2, 0.0),
)
_ARM = (
    ([0, 0, 0], [0, 0, 1], -1.6, 1.6, 0.0),
    ([0, 0, 0], [0, 1, 0], -1.6, 2.2, 0.28),
    ([0.28, 0, 0], [0, 1, 0], -2.7, 0.05, 0.12),
    ([0.12, 0, 0], [1, 0, 0], -2.8, 2.8, 0.14),
    ([0.14, 0, 0], [0, 1, 0], -1.9, 1.9, 0.06),
    ([0.06, 0, 0], [1, 0, 0], -2.8, 2.8, 0.05),
)


def build_model(task: Task, offscreen: int = 320) -> mj.MjModel:
    """The compiled model of `task`; `offscreen` is the largest picture side that OpenGL will be asked for."""
    spec = mj.MjSpec()
    spec.compiler.degree = False
    spec.option.timestep = PHYSICS_DT
    spec.option.integrator = mj.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mj.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 5
    spec.option.iterations = 20
    quality = spec.visual.quality
    quality.shadowsize = quality.offsamples = 0  # shadows and multisampling cost 100x on a software renderer
    quality.numslices, quality.numstacks = 12, 6  # of spheres and capsules: plenty at 96 pixels
    spec.visual.global_.offwidth = spec.visual.global_.offheight = offscreen
    _room(spec)
    _robot(spec)
    if task.furnish is not None:
        task.furnish(spec)
    if spec.body("object") is None:
        _object(spec, task)
    return spec.compile()


def _room(spec: mj.MjSpec) -> None:
    world = spec.worldbody
    sun = mj.mjtLightType.mjLIGHT_DIRECTIONAL
    world.add_light(pos=[0, 0, 4], dir=[0.2, 0.2, -1], type=sun, castshadow=False, diffuse=[0.6] * 3, specular=[0] * 3)
    world.add_geom(name="floor", type=mj.mjtGeom.mjGEOM_PLANE, size=[5, 5, 0.1], rgba=[0.55, 0.55, 0.5, 1])
    shelf = [SHELF_X + 0.05, 0, SHELF_HEIGHT / 2]
    world.add_geom(name="shelf", type=_BOX, pos=shelf, size=[*SHELF_HALF, SHELF_HEIGHT / 2], rgba=[0.5, 0.35, 0.2, 1])
    table = [*TABLE_XY, TABLE_HEIGHT / 2]
    world.add_geom(name="table", type=_BOX, pos=table, size=[0.25, 0.4, TABLE_HEIGHT / 2], rgba=[0.2, 0.3, 0.55, 1])
    goal = [*TABLE_XY, TABLE_HEIGHT + 0.001]
    world.add_geom(name="goal", type=_BOX, pos=goal, size=[*GOAL_HALF, 0.001], rgba=[0.2, 0.8, 0.3, 1], **_NO_CONTACT)
    # Behind the robot's right shoulder, high enough to see shelf, table and robot at once.
    eye, look_at = np.array([-0.9, -1.6, 2.1]), np.array([0.9, 0.5, 0.45])
    forward = (look_at - eye) / np.linalg.norm(look_at - eye)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    world.add_camera(name=OVERVIEW, pos=eye, xyaxes=[*right, *np.cross(right, forward)], fovy=50)


def _robot(spec: mj.MjSpec) -> None:
    base = spec.worldbody.add_body(name="base", gravcomp=1)
    for name, axis, limit, kind in (
        ("base_x", [1, 0, 0], 4, mj.mjtJoint.mjJNT_SLIDE),
        ("base_y", [0, 1, 0], 4, mj.mjtJoint.mjJNT_SLIDE),
        ("base_yaw", [0, 0, 1], 7, mj.mjtJoint.mjJNT_HINGE),
    ):
        _joint(base, name, axis, (-limit, limit), damping=1, armature=1, kind=kind)
    base.add_geom(type=_BOX, pos=[0, 0, 0.14], size=[0.25, 0.22, 0.12], mass=40, rgba=[0.2, 0.2, 0.22, 1])
    body = base
    for name, (pos, axis, low, high, length) in zip(TORSO_JOINTS, _TORSO, strict=True):
        body = body.add_body(name=f"{name}_link", pos=pos, gravcomp=1)
        _joint(body, name, axis, (low, high), damping=60, armature=0.5)
        if length:
            ends = [0, 0, 0.03, 0, 0, length - 0.03]
            body.add_geom(type=_CAPSULE, fromto=ends, size=[0.06, 0, 0], mass=4, rgba=_GREY, **_NO_CONTACT)
        else:
            body.add_geom(type=_SPHERE, size=[0.05, 0, 0], mass=0.5, rgba=_GREY, **_NO_CONTACT)
    chest = body
    chest.add_geom(type=_BOX, pos=[0, 0, 0.12], size=[0.07, 0.13, 0.12], mass=6, rgba=_GREY, **_NO_CONTACT)
    chest.add_geom(type=_BOX, pos=[0, 0, 0.33], size=[0.05, 0.06, 0.05], mass=1, rgba=_DARK, **_NO_CONTACT)
    chest.add_camera(name="head", pos=[0.07, 0, 0.33], xyaxes=[0, -1, 0, 0.60, 0, 0.80], fovy=75)
    for side, sign in (("left", 1), ("right", -1)):
        _arm(spec, chest, side, sign)
    for i, joints in enumerate((ARM_JOINTS["left"], ARM_JOINTS["right"])):
        if i == 1:  # between the arms, as in the R1's action order
            for name, gain, force in (("base_x", 900.0, 900.0), ("base_y", 900.0, 900.0), ("base_yaw", 400.0, 300.0)):
                _velocity_actuator(spec, name, gain, force)
        for n, name in enumerate(joints):
            _position_actuator(spec, name, *((300.0, 20.0, 80.0) if n < 3 else (120.0, 6.0, 25.0)))
        _position_actuator(spec, f"{SIDES[i]}_fa", 900.0, 20.0, 25.0)
    for name in TORSO_JOINTS:
        _position_actuator(spec, name, 4000.0, 300.0, 900.0)


def _arm(spec: mj.MjSpec, chest, side: str, sign: int) -> None:
    body = chest.add_body(name=f"{side}_shoulder", pos=[0.05, sign * 0.20, 0.18], gravcomp=1)
    for i, (pos, axis, low, high, length) in enumerate(_ARM):
        if i:
            body = body.add_body(name=f"{side}_link{i + 1}", pos=pos, gravcomp=1)
        upper = i < 3
        _joint(body, f"{side}_{i + 1}", axis, (low, high), damping=8 if upper else 3, armature=0.1 if upper else 0.03)
        contact = _NO_CONTACT if upper else {}
        if length:
            body.add_geom(
                type=_CAPSULE,
                fromto=[0, 0, 0, length, 0, 0],
                size=[0.04 if upper else 0.032, 0, 0],
                mass=1.2 if upper else 0.5,
                rgba=_GREY,
                **contact,
            )
        else:
            body.add_geom(type=_SPHERE, size=[0.05, 0, 0], mass=0.5, rgba=_GREY, **_NO_CONTACT)
    body.add_geom(name=f"{side}_palm", type=_BOX, pos=[0.07, 0, 0], size=[0.02, 0.05, 0.018], mass=0.2, rgba=_DARK)
    # Above the palm and looking past it: it must see the finger tips and what lies beyond them.
    body.add_camera(name=f"{side}_wrist", pos=[0.03, 0, 0.09], xyaxes=[0, -1, 0, 0.38, 0, 0.92], fovy=85)
    body.add_site(name=f"{side}_hand", pos=[0.135, 0, 0], size=[0.01, 0, 0], group=5)  # not drawn
    for finger, fsign in (("fa", 1), ("fb", -1)):
        part = body.add_body(name=f"{side}_{finger}", pos=[0.13, fsign * 0.012, 0], gravcomp=1)
        limits = (0, GRIPPER_STROKE)
        _joint(part, f"{side}_{finger}", [0, fsign, 0], limits, damping=5, armature=0.02, kind=mj.mjtJoint.mjJNT_SLIDE)
        part.add_geom(
            name=f"{side}_{finger}",
            type=_BOX,
            size=[0.045, 0.007, 0.02],
            mass=0.05,
            rgba=_BLACK,
            friction=[1.5, 0.05, 0.001],
            condim=4,
            priority=1,
        )
    spec.add_exclude(bodyname1=f"{side}_link4", bodyname2=f"{side}_link6")
    mirror = [0, 1] + [0] * (mj.mjNEQDATA - 2)
    spec.add_equality(type=mj.mjtEq.mjEQ_JOINT, name1=f"{side}_fa", name2=f"{side}_fb", data=mirror)


def _object(spec: mj.MjSpec, task: Task) -> None:
    body = spec.worldbody.add_body(name="object", pos=[SHELF_X, 0, SHELF_HEIGHT + task.half[2]])
    body.add_freejoint(name="object")
    body.add_geom(
        name="object",
        type=_BOX,
        size=task.half,
        mass=task.mass,
        rgba=task.rgba,
        friction=[1.2, 0.02, 0.001],
        condim=4,
    )


def _joint(body, name, axis, limits, *, damping, armature, kind=mj.mjtJoint.mjJNT_HINGE) -> None:
    body.add_joint(name=name, type=kind, axis=axis, range=limits, limited=True, damping=damping, armature=armature)


def _position_actuator(spec: mj.MjSpec, joint: str, kp: float, kv: float, force: float) -> None:
    spec.add_actuator(
        name=joint,
        target=joint,
        trntype=mj.mjtTrn.mjTRN_JOINT,
        gaintype=mj.mjtGain.mjGAIN_FIXED,
        gainprm=[kp] + [0] * 9,
        biastype=mj.mjtBias.mjBIAS_AFFINE,
        biasprm=[0, -kp, -kv] + [0] * 7,
        forcerange=[-force, force],
        forcelimited=True,
    )


def _velocity_actuator(spec: mj.MjSpec, joint: str, kv: float, force: float) -> None:
    spec.add_actuator(
        name=joint,
        target=joint,
        trntype=mj.mjtTrn.mjTRN_JOINT,
        gainprm=[kv] + [0] * 9,
        biastype=mj.mjtBias.mjBIAS_AFFINE,
        biasprm=[0, 0, -kv] + [0] * 7,
        forcerange=[-force, force],
        forcelimited=True,
    )
