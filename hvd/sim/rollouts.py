"""Seeded rollouts of a policy in the simulator: several environments in step, one policy call for all of them."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8

from hvd.data.video import Codec, encode_video
from hvd.errors import UserError
from hvd.files import replacing
from hvd.sim import scene
from hvd.sim.env import Env
from hvd.sim.render import Backend, Cameras

Act = Callable[..., np.ndarray]
"""(state [B,S], images {camera: uint8 [B,h,w,3]}, B prompts, (first seed of the batch, number of the call)) -> raw
absolute actions [B,K,21]. The last argument names the policy's noise: the same numbers, the same actions. With
chunking "guided" and "prefix" a fifth one: actions of the last chunk that are not executed yet [B,n,21], and the delay
in steps."""
Chunking = Literal["replace", "ensemble", "guided", "prefix"]

_OBSERVED = {"observation.state": Env.state, "observation.environment_state": Env.environment_state}
_OLDER = 0.01  # ensembling: the n-th oldest chunk counts exp(-n * _OLDER)
_FILM = Codec("libx264", "veryfast", crf=28, group=50)  # for watching: small, not quick to seek in


@dataclass(frozen=True)
class RolloutSpec:
    """What a group of rollouts shares.

    Attributes:
        state_keys: what the policy's state is made of (KeyMap.state), concatenated.
        cameras: the policy's camera -> the simulator's.
        image_size: of the policy's pictures, before its own resizing.
        execute_steps: actions of a chunk that are executed before the next one is asked for.
        delay: control steps until it is there; meanwhile the old one is executed further.
        chunking: replace: then the new one is executed, from its `delay`-th action on; ensemble: the mean of all chunks
            that have an action for a step, older ones counting a little more (Zhao et al. 2023); guided, prefix: as
            replace, and the policy is told what is not executed yet.
        videos: seed -> mp4 file to write.
    """

    task: str
    horizon: int
    execute_steps: int
    state_keys: tuple[str, ...] = ("observation.state",)
    cameras: Mapping[str, str] = field(default_factory=dict)
    image_size: int = 96
    backend: Backend = "opengl"
    videos: Mapping[int, str | os.PathLike[str]] = field(default_factory=dict)
    delay: int = 0
    chunking: Chunking = "replace"

    def __post_init__(self):
        for key in self.state_keys:
            if key not in _OBSERVED:
                raise UserError(f"keys.state {key!r}: the simulator observes {', '.join(_OBSERVED)}")
        for camera in self.cameras.values():
            if camera not in scene.CAMERAS:
                raise UserError(f"keys.images: the simulator has no camera {camera!r}, only {', '.join(scene.CAMERAS)}")


@dataclass(frozen=True)
class Rollout:
    """How one rollout ended; `stage`: the most sub-tasks that were completed at once."""

    seed: int
    success: bool
    dropped: bool
    stage: int
    steps: int


def roll_out_group(spec: RolloutSpec, seeds: Sequence[int], act: Act) -> list[Rollout]:
    """One rollout per seed, all with the same policy calls. The result depends on `seeds` as a whole: the policy's
    noise is drawn for the group."""
    envs = [Env(spec.task, spec.horizon) for _ in seeds]
    for env, seed in zip(envs, seeds, strict=True):
        env.reset(seed)
    films = {i: _Film(envs[i], spec.backend) for i, seed in enumerate(seeds) if seed in spec.videos}
    eyes = [Cameras(env.model, spec.image_size, spec.image_size, spec.backend) for env in envs[: bool(spec.cameras)]]
    prompts = [env.task.prompt for env in envs]
    try:
        running, chunks = list(range(len(envs))), _Chunks(spec)
        while running:
            if chunks.wanted:
                # Rollouts that are over stay in the batch: another batch size would be compiled anew.
                seen = _states(spec, envs), _images(spec, envs, eyes), prompts, (int(seeds[0]), chunks.asked)
                chunks.add(act(*seen, *chunks.left))
            for i in running:
                if i in films:
                    films[i].shoot()
            actions = chunks.next()
            running = [i for i in running if not envs[i].step(actions[i].astype(np.float64)).done]
        for i, film in films.items():
            film.write(spec.videos[seeds[i]])
    finally:
        for open_one in (*eyes, *films.values()):
            open_one.close()
    return [
        Rollout(int(seed), env.success, env.dropped, env.best_stage, env.time)
        for env, seed in zip(envs, seeds, strict=True)
    ]


class _Chunks:
    """Which action is next, out of chunks that come `spec.delay` steps after their question."""

    def __init__(self, spec: RolloutSpec):
        self._spec, self.asked, self._step = spec, 0, 0
        self._known: list[tuple[int, np.ndarray]] = []  # step of the question, chunk; the last one may not be there yet

    @property
    def wanted(self) -> bool:
        return not self._known or self._step == self._known[-1][0] + self._spec.execute_steps

    @property
    def left(self) -> tuple[tuple[np.ndarray, int], ...]:
        """The fifth argument of Act, where there is one."""
        if self._spec.chunking not in ("guided", "prefix") or not self._known:
            return ()
        begun, chunk = self._known[-1]
        return ((chunk[:, self._step - begun :], self._spec.delay),)

    def add(self, chunk: np.ndarray) -> None:
        execute, delay = self._spec.execute_steps, self._spec.delay
        if chunk.shape[1] < execute + delay:
            raise UserError(
                f"evaluate.execute_steps {execute} and delay {delay} are more than the {chunk.shape[1]} of a chunk"
            )
        self._known = [known for known in self._known if self._step - known[0] < known[1].shape[1]]
        self._known.append((self._step, chunk))
        self.asked += 1

    def next(self) -> np.ndarray:
        """The next action of each environment [B,21]. The robot waits for the first chunk."""
        at_step = [
            chunk[:, self._step - asked]
            for i, (asked, chunk) in enumerate(self._known)
            if self._step - asked < chunk.shape[1] and (i == 0 or self._step - asked >= self._spec.delay)
        ]
        self._step += 1
        if self._spec.chunking != "ensemble" or len(at_step) == 1:
            return at_step[-1]
        return np.average(at_step, axis=0, weights=np.exp(-_OLDER * np.arange(len(at_step))))


def _states(spec: RolloutSpec, envs: Sequence[Env]) -> Float32[np.ndarray, "b s"]:
    return np.stack([np.concatenate([_OBSERVED[key](env) for key in spec.state_keys]) for env in envs])


def _images(spec: RolloutSpec, envs: Sequence[Env], eyes: Sequence[Cameras]) -> dict[str, UInt8[np.ndarray, "b h w 3"]]:
    """One renderer draws all environments: their models are the same."""
    return {name: np.stack([eyes[0].image(env.data, camera) for env in envs]) for name, camera in spec.cameras.items()}


class _Film:
    """Frames of one rollout: the room, and beside it what the robot's three cameras see."""

    def __init__(self, env: Env, backend: Backend):
        self._env = env
        height = 240 if backend == "opengl" else 120  # ray casting takes its time per pixel
        self._large = Cameras(env.model, height, height, backend)
        self._small = Cameras(env.model, height // 3, height // 3, backend)
        self._frames: list[np.ndarray] = []

    def shoot(self) -> None:
        room = self._large.image(self._env.data, scene.OVERVIEW)
        seen = [self._small.image(self._env.data, name) for name in scene.CAMERAS]
        self._frames.append(np.concatenate([room, np.concatenate(seen)], axis=1))

    def close(self) -> None:
        self._large.close()
        self._small.close()

    def write(self, path: str | os.PathLike[str]) -> None:
        with replacing(Path(path)) as temporary:
            encode_video(temporary, [np.stack(self._frames)], round(1 / scene.CONTROL_DT), _FILM)
