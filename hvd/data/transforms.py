"""From raw robot numbers and camera frames to the model's inputs, and from its outputs back. The loader, the rollouts
and a served policy use the same `InputTransform`, so that training and acting cannot differ.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, UInt8
from PIL import Image

from hvd.configs import Experiment, ModelConfig, NormConfig
from hvd.data import normalize
from hvd.data.tokenizer import Tokenizer
from hvd.errors import UserError
from hvd.robots import Robot, get_robot

Observation = dict[str, Any]
"""Numpy arrays: state [B,action_dim], images {camera: uint8 [B,S,S,3]}, image_masks {camera: bool [B]},
tokenized_prompt int32 [B,L], tokenized_prompt_mask bool [B,L]; where a policy is guided by its prompt's words
(hvd.method.condition) also plain: the last two without these words."""


class InputTransform:
    """Raw observation and actions <-> the model's, for one experiment.

    Args:
        stats: "state" and "actions" statistics with the robot's dims.
        tokenizer: of the prompts.
    """

    def __init__(
        self,
        model: ModelConfig,
        norm: NormConfig,
        robot: Robot,
        stats: Mapping[str, normalize.NormStats],
        tokenizer: Tokenizer,
    ):
        self._told, self._without = "", False
        self.model, self.norm, self.robot, self.stats, self.tokenizer = model, norm, robot, dict(stats), tokenizer
        self._delta_mask = np.asarray(robot.delta_mask())
        normalize.check_delta(norm, robot, stats["state"].dim)
        for name, each in stats.items():
            if each.dim > model.action_dim:
                raise UserError(f"model.action_dim {model.action_dim} is smaller than the {each.dim} dims of {name}")

    @classmethod
    def from_config(cls, cfg: Experiment, stats: Mapping[str, normalize.NormStats] | None = None) -> "InputTransform":
        """With the experiment's shared statistics (unless given) and its tokenizer."""
        stats = normalize.load_shared(cfg) if stats is None else stats
        return cls(cfg.model, cfg.norm, get_robot(cfg.robot), stats, Tokenizer(cfg.model))

    def telling(self, told: str, without: bool) -> "InputTransform":
        """The same with `told` before every prompt of an observation, which also has the prompts `without` it, under
        "plain"."""
        other = copy.copy(self)
        other._told, other._without = told, without
        return other

    def state(self, state: Float[np.ndarray, "b s"]) -> Float32[np.ndarray, "b d"]:
        """Normalised and zero-padded state."""
        return self._inwards(state, "state")

    def actions_in(
        self, actions: Float[np.ndarray, "b k a"], state: Float[np.ndarray, "b s"]
    ) -> Float32[np.ndarray, "b k d"]:
        """Raw absolute actions -> (delta,) normalised, zero-padded; `state` is raw."""
        if self.norm.delta_actions:
            actions = normalize.delta(actions, state, self._delta_mask)
        return self._inwards(actions, "actions")

    def actions_out(
        self, actions: Float[np.ndarray, "b k d"], state: Float[np.ndarray, "b s"]
    ) -> Float32[np.ndarray, "b k a"]:
        """The model's actions [B,K,action_dim] -> raw absolute actions [B,K,A]; `state` is raw."""
        stats = self.stats["actions"]
        raw = normalize.unnormalize(np.asarray(actions)[..., : stats.dim], stats, self.norm.mode, self.norm.std_floor)
        if self.norm.delta_actions:
            raw = normalize.absolute(raw, state, self._delta_mask)
        return raw.astype(np.float32)

    def observation(
        self,
        state: Float[np.ndarray, "b s"],
        images: Mapping[str, UInt8[np.ndarray, "b h w 3"]],
        prompts: Sequence[str],
    ) -> Observation:
        """A batch of raw observations as the model takes them; cameras that are not in `images` are masked."""
        plain = {"plain": self._tokens(prompts, state)} if self._without else {}
        size, b = self.model.image_size, len(state)
        pictures, masks = {}, {}
        for camera in self.model.cameras:
            masks[camera] = np.full(b, camera in images)
            if camera in images:
                pictures[camera] = resize_with_pad(images[camera], size, size)
            else:
                pictures[camera] = np.zeros((b, size, size, 3), np.uint8)
        return {
            "state": self.state(state),
            "images": pictures,
            "image_masks": masks,
            **self._tokens([self._told + prompt for prompt in prompts], state),
            **plain,
        }

    def _tokens(self, prompts: Sequence[str], state: Float[np.ndarray, "b s"]) -> Observation:
        tokens, mask = self.prompts(prompts, state)
        return {"tokenized_prompt": tokens, "tokenized_prompt_mask": mask}

    def prompts(
        self, prompts: Sequence[str], state: Float[np.ndarray, "b s"]
    ) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Token ids of each prompt, and where they are real; `state` is raw.

        The bins are those of the float64 numbers: float32 would round some over an edge.
        """
        return self.tokenizer.encode(prompts, self._spelled(state))

    def cut_prompts(self, prompts: Sequence[str], state: Float[np.ndarray, "b s"] | None = None) -> dict[str, str]:
        """The prompts that the model sees in part, each with a line about it; without `state`, for the longest one."""
        middle = np.zeros((len(prompts), self.stats["state"].dim)) if self.model.spells_state else None  # three digits
        spelled = middle if state is None else self._spelled(state)
        lines = self.tokenizer.too_long([self._told + prompt for prompt in prompts], spelled)
        return {told.removeprefix(self._told): line for told, line in lines.items()}

    def _spelled(self, state: Float[np.ndarray, "b s"]) -> Float64[np.ndarray, "b s"] | None:
        if not self.model.spells_state:
            return None
        return normalize.normalize(state, self.stats["state"], self.norm.mode, self.norm.std_floor)

    def _inwards(self, x: np.ndarray, name: str) -> np.ndarray:
        stats = self.stats[name]
        if x.shape[-1] != stats.dim:
            raise UserError(f"{name} has {x.shape[-1]} dims but its norm stats {stats.dim}: those of another robot?")
        out = np.zeros((*x.shape[:-1], self.model.action_dim), np.float32)
        out[..., : stats.dim] = normalize.normalize(x, stats, self.norm.mode, self.norm.std_floor)
        return out


def resize_with_pad(
    images: UInt8[np.ndarray, "b h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "b height width 3"]:
    """Resize without distortion (PIL, bilinear with antialiasing), then pad with black, the odd pixel at the end."""
    b, h, w, _ = images.shape
    if (h, w) == (height, width):
        return images
    ratio = max(w / width, h / height)
    inner_h, inner_w = int(h / ratio), int(w / ratio)
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    out = np.zeros((b, height, width, 3), np.uint8)
    for i in range(b):
        resized = Image.fromarray(images[i]).resize((inner_w, inner_h), Image.Resampling.BILINEAR)
        out[i, top : top + inner_h, left : left + inner_w] = np.asarray(resized)
    return out
