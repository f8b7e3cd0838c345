"""What a client may ask: one message of a client -> the model's inputs, or one line that names the wrong key.

Keys, LeRobot's and openpi's side by side:

    state                               the whole state, raw; or the dataset's columns, joined as in training:
    observation.state, ...              the columns that the run's KeyMap names
    images {camera: uint8 image}        by the model's camera names, or by the last part of the dataset's keys
    observation.images.head, ...        the dataset's keys
    prompt, or task                     may be left out where the server has a default
    seed, or noise [K,action_dim]       of the initial noise, to make a reply reproducible
    num_flow_steps                      Euler steps
    prev_chunk_left_over [n,A]          raw actions that are not executed yet, the first is executed now; and
    inference_delay                     how many of them will be over when the reply is there (hvd.models.chunking)
    deadline_ms                         milliseconds from its arrival until which the reply is of use

State and images may all have a leading batch axis; row i of a batch then gets the noise of a single request with
seed + i. Imports no jax.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8, UInt32

from hvd import mixture
from hvd.configs import Experiment, KeyMap
from hvd.data.columns import parse_column
from hvd.data.transforms import InputTransform, Observation
from hvd.errors import UserError, nearest
from hvd.models.chunking import Committed, Given, commit
from hvd.robots import get_robot

MAX_FLOW_STEPS = 100
MAX_SEED = 2**31 - 1
MAX_PROMPT = 4_096  # characters
MAX_DEADLINE_MS = 3_600_000
_EXTRAS = ("prompt", "task", "seed", "noise", "num_flow_steps")
_EXTRAS += ("prev_chunk_left_over", "inference_delay", "deadline_ms")


class Refused(UserError):
    """A request that cannot be answered; its text is one line for the client."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One request, ready for the model. b is 1 unless the client sent a batch.

    Attributes:
        observation: the model's inputs, numpy, b rows (hvd.data.transforms).
        state: raw, for delta actions.
        seeds: of each row's noise; unused where `noise` is given.
        batched: the reply has a batch axis too.
        warning: about a prompt that the model sees in part; "" = there is none.
        deadline: seconds after its arrival until which the answer is of use; infinite = always.
    """

    observation: Observation
    state: Float32[np.ndarray, "b s"]
    seeds: UInt32[np.ndarray, " b"]
    noise: Float32[np.ndarray, "b k a"] | None
    num_flow_steps: int
    batched: bool
    warning: str = ""
    committed: Committed | Given | None = None
    deadline: float = math.inf

    @property
    def rows(self) -> int:
        return len(self.state)

    @property
    def kind(self) -> tuple[int, type]:
        """Requests of one kind can be computed together: flow steps, and the form of the committed actions."""
        return self.num_flow_steps, type(self.committed)


class RequestReader:
    """Reads the requests for one policy.

    Args:
        cfg: of the run.
        default_prompt: for requests without a prompt; "" = there is none.
        num_flow_steps: for requests that name none; 0 = the run's.
        max_rows: of a batch of one request.
        chunking: whether requests may carry committed actions.
    """

    def __init__(
        self,
        cfg: Experiment,
        transform: InputTransform,
        *,
        default_prompt: str = "",
        num_flow_steps: int = 0,
        max_rows: int = 8,
        chunking: bool = False,
    ):
        self.cfg, self._transform = cfg, transform
        self.default_prompt, self._max_rows, self.chunking = default_prompt, max_rows, chunking
        self.num_flow_steps = num_flow_steps or cfg.policy.num_flow_steps
        if self.num_flow_steps > MAX_FLOW_STEPS:
            raise UserError(
                f"policy.num_flow_steps {self.num_flow_steps} of the run: a server takes at most {MAX_FLOW_STEPS}; "
                "give --num-flow-steps"
            )
        keys = key_map(cfg)
        self._columns = [(column, *parse_column(column)) for column in keys.state]
        self.state_keys = tuple(dict.fromkeys(name for _, name, _ in self._columns))
        self.state_dim = transform.stats["state"].dim
        # what the model was trained to see; its other cameras are masked, as they were in training
        self.cameras = {camera: keys.images[camera] for camera in cfg.model.cameras if camera in keys.images}
        self._short = {key.rsplit(".", 1)[-1]: camera for camera, key in self.cameras.items()}
        self._short |= {camera: camera for camera in self.cameras}
        self._by_key = {key: camera for camera, key in self.cameras.items()}
        self.known = ("state", *self.state_keys, "images", *self._by_key, *_EXTRAS)

    def read(self, message: Any, seed: int) -> Request:
        """The request in a decoded message; `seed` is of its noise if it names none. Raises `Refused`."""
        if not isinstance(message, dict):
            raise Refused(f"the message is a {type(message).__name__}; an observation is a dict")
        for key in message:
            if key not in self.known:
                name = (key if isinstance(key, str) else repr(key))[:80]
                raise Refused(f"unknown key {name!r}{nearest(name, self.known)}")
        state, batched = self._state(message)
        images = self._images(message, len(state), batched)
        prompts = self._prompts(message, len(state), batched)
        seeds, noise = self._noise(message, len(state), batched, seed)
        steps = whole_number(message, "num_flow_steps", self.num_flow_steps, 1, MAX_FLOW_STEPS)
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                observation = self._transform.observation(state, images, prompts)
        except UserError as error:
            raise Refused(str(error)) from None
        if not np.isfinite(observation["state"]).all():
            raise Refused("state is so large that its normalised form is not finite: is it in the dataset's units?")
        cut = self._transform.cut_prompts(prompts, state)
        committed, warning = self._committed(message, state, batched), next(iter(cut.values()), "")
        asked = "deadline_ms" in message
        deadline = whole_number(message, "deadline_ms", 1, 1, MAX_DEADLINE_MS) / 1e3 if asked else math.inf
        return Request(observation, state, seeds, noise, steps, batched, warning, committed, deadline)

    def _state(self, message: Mapping[str, Any]) -> tuple[Float32[np.ndarray, "b s"], bool]:
        """[b,S], and whether the client sent a batch."""
        given = [key for key in self.state_keys if key in message]
        joined = " + ".join(column for column, _, _ in self._columns)
        if "state" in message and "state" not in self.state_keys:
            if given:
                raise Refused(f"state and {given[0]!r} are both there; send one of them")
            value = _numbers("state", message["state"])
        else:
            missing = [key for key in self.state_keys if key not in message]
            if missing and not given:
                raise Refused(f"state is missing: send 'state' [{self.state_dim}], or {joined}")
            if missing:
                raise Refused(f"{missing[0]!r} is missing: the state is {joined}")
            parts = [self._column(name, dims, message) for _, name, dims in self._columns]
            if len({part.shape[:-1] for part in parts}) > 1:
                raise Refused(f"{joined}: some have a batch axis and some have none, or of another length")
            value = np.concatenate(parts, axis=-1)
        name = "state" if not given else joined
        if value.ndim not in (1, 2) or value.shape[-1] != self.state_dim:
            raise Refused(
                f"{name} has shape {list(value.shape)}; expected [{self.state_dim}] (or [b, {self.state_dim}])"
            )
        if value.ndim == 2 and not 1 <= len(value) <= self._max_rows:
            raise Refused(f"{name} is a batch of {len(value)}; this server takes 1 to {self._max_rows} rows at once")
        if not np.isfinite(value).all():
            place = np.argwhere(~np.isfinite(value))[0].tolist()
            raise Refused(f"{name} is NaN or infinite (in float32) at {place}; expected finite numbers")
        return value.reshape(-1, self.state_dim), value.ndim == 2

    def _column(self, name: str, dims: list[int] | None, message: Mapping[str, Any]) -> Float32[np.ndarray, "*b d"]:
        value = _numbers(name, message[name])
        if not value.ndim:  # a column of one number per frame
            value = value[None]
        if dims is None:
            return value
        if max(dims) >= value.shape[-1]:
            raise Refused(f"{name!r} has {value.shape[-1]} dims; dim {max(dims)} is used")
        return value[..., dims]

    def _images(self, message: Mapping[str, Any], rows: int, batched: bool) -> dict[str, UInt8[np.ndarray, "b h w 3"]]:
        found: dict[str, np.ndarray] = {}
        inside = message.get("images", {})
        if not isinstance(inside, dict):
            raise Refused(f"images is a {type(inside).__name__}; expected a dict of cameras: {self._camera_list()}")
        named = [(f"images[{name!r}]" if isinstance(name, str) else f"images[{name!r:.40}]", name) for name in inside]
        for place, name in named:
            if name not in self._short:
                raise Refused(f"{place[:100]}: unknown camera; expected {self._camera_list()}")
        pictures = [(place, self._short[name], inside[name]) for place, name in named]
        pictures += [(repr(key), camera, message[key]) for key, camera in self._by_key.items() if key in message]
        for place, camera, picture in pictures:
            if camera in found:
                raise Refused(f"{place}: camera {camera} is there twice; send it once")
            found[camera] = self._image(place, picture, rows, batched)
        for camera, key in self.cameras.items():
            if camera not in found:
                raise Refused(
                    f"camera {camera} is missing: send images[{camera!r}] or {key!r}, uint8 [height, width, 3]"
                )
        return found

    def _image(self, place: str, value: Any, rows: int, batched: bool) -> UInt8[np.ndarray, "b h w 3"]:
        expected = "uint8 [height, width, 3] or [3, height, width]" + (f" for each of {rows} rows" if batched else "")
        if not isinstance(value, np.ndarray):
            raise Refused(f"{place} is a {type(value).__name__}; expected an array, {expected}")
        if value.dtype != np.uint8:
            hint = "; openpi_client.image_tools.convert_to_uint8 turns 0..1 into it" if value.dtype.kind == "f" else ""
            raise Refused(f"{place} is {value.dtype}; expected {expected}{hint}")
        if value.shape[-1:] == (4,):
            value = value[..., :3]  # without alpha
        if value.ndim == 3 + batched and value.shape[-1] != 3 and value.shape[-3] == 3:
            value = np.moveaxis(value, -3, -1)
        if value.ndim != 3 + batched or value.shape[-1] != 3 or (batched and len(value) != rows):
            raise Refused(f"{place} has shape {list(value.shape)}; expected {expected}")
        height, width = value.shape[-3:-1]
        longest = max(height, width)
        size = self.cfg.model.image_size
        if not height or not width or min(height, width) * size < longest:
            raise Refused(f"{place} is {height} x {width}; nothing would be left of it at {size} x {size}")
        return np.ascontiguousarray(value).reshape(rows, height, width, 3)

    def _camera_list(self) -> str:
        return ", ".join(self.cameras) or "none, this policy sees no image"

    def _prompts(self, message: Mapping[str, Any], rows: int, batched: bool) -> list[str]:
        if "prompt" in message and "task" in message:
            raise Refused("prompt and task are both there; send one of them")
        name = "task" if "task" in message else "prompt"
        value = message.get(name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "U":
            value = value.tolist()
        if batched and isinstance(value, list):
            if len(value) != rows:
                raise Refused(f"{name} has {len(value)} texts for {rows} rows")
            return [self._prompt(name, text) for text in value]
        return [self._prompt(name, value)] * rows

    def _prompt(self, name: str, value: Any) -> str:
        if value is None or (isinstance(value, str) and not value):
            if not self.default_prompt:
                raise Refused("prompt is missing, and this server has no default: send 'prompt' (or 'task'), a text")
            return self.default_prompt
        if not isinstance(value, str):
            raise Refused(f"{name} is a {type(value).__name__}; expected a text")
        if len(value) > MAX_PROMPT:
            raise Refused(f"{name} has {len(value)} characters; at most {MAX_PROMPT}")
        return value

    def _noise(
        self, message: Mapping[str, Any], rows: int, batched: bool, seed: int
    ) -> tuple[UInt32[np.ndarray, " b"], Float32[np.ndarray, "b k a"] | None]:
        first = whole_number(message, "seed", seed, 0, MAX_SEED)
        seeds = ((first + np.arange(rows, dtype=np.int64)) % (MAX_SEED + 1)).astype(np.uint32)
        if "noise" not in message:
            return seeds, None
        if "seed" in message:
            raise Refused("seed and noise are both there; send one of them")
        noise = _numbers("noise", message["noise"])
        single = (self.cfg.model.action_horizon, self.cfg.model.action_dim)
        expected = (rows, *single) if batched else single
        if noise.shape != expected:
            raise Refused(f"noise has shape {list(noise.shape)}; expected {list(expected)}")
        if not np.isfinite(noise).all():
            raise Refused("noise is NaN or infinite (in float32); expected finite numbers")
        return seeds, noise.reshape(rows, *single)

    def _committed(
        self, message: Mapping[str, Any], state: Float32[np.ndarray, "b s"], batched: bool
    ) -> Committed | Given | None:
        left, delay = "prev_chunk_left_over", "inference_delay"
        if left not in message:
            if delay in message:
                raise Refused(f"{delay} is there without {left}: send the actions that are not executed yet")
            return None
        if not self.chunking:
            raise Refused(f"{left}: this server was started without --real-time-chunking true")
        horizon, dims = self.cfg.model.action_horizon, len(get_robot(self.cfg.robot).action_names)
        value = _numbers(left, message[left])
        if value.ndim != 2 + batched or value.shape[-1] != dims or (batched and len(value) != len(state)):
            rows = f" for each of {len(state)} rows" if batched else ""
            raise Refused(f"{left} has shape {list(value.shape)}; expected [1 to {horizon}, {dims}]{rows}")
        count = value.shape[-2]
        if not 1 <= count <= horizon or not np.isfinite(value).all():
            raise Refused(f"{left} has {count} actions; expected 1 to {horizon}, of finite numbers")
        actions = self._transform.actions_in(value.reshape(len(state), count, dims), state)
        return commit(actions, whole_number(message, delay, 0, 0, count), horizon, self.cfg.policy.prefix_max)


def key_map(cfg: Experiment) -> KeyMap:
    """How the run's data name the model's inputs: of the optimal set, or of the first one that it was trained on."""
    return cfg.sets()[mixture.names(cfg, "policy")[0]].keys


def _numbers(name: str, value: Any) -> Float32[np.ndarray, "*n"]:
    """An array, or lists, of numbers as float32; what does not fit into float32 becomes infinite."""
    if not isinstance(value, np.ndarray | np.number | list | float | int) or isinstance(value, bool):
        raise Refused(f"{name!r} is a {type(value).__name__}; expected an array of numbers")
    inside = [value]
    while inside:  # before numpy makes an array of it: of a long text among short ones it makes a huge one
        part = inside.pop()
        if isinstance(part, list):
            inside += part
        elif isinstance(part, np.ndarray) and part.dtype.kind not in "iuf":
            raise Refused(f"{name!r} is an array of {part.dtype}; expected numbers")
        elif isinstance(part, bool) or not isinstance(part, int | float | np.number | np.ndarray):
            raise Refused(f"{name!r} holds a {type(part).__name__}; expected an array of numbers")
    try:
        array = np.asarray(value)
    except ValueError:
        raise Refused(f"{name!r} has rows of different lengths; expected an array of numbers") from None
    if array.dtype.kind not in "iuf":
        raise Refused(f"{name!r} is an array of {array.dtype}; expected numbers")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def whole_number(message: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """The number in a message; Refused where it is none from `low` to `high`."""
    value = message.get(name, default)
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise Refused(f"{name} is {value!r:.40}; expected a whole number from {low} to {high}")
    return int(value)


def default_prompt(cfg: Experiment) -> str:
    """The prompt of the run's datasets if they are here and have exactly one between them, else ""."""
    from hvd.data.layout import read_layout

    prompts: set[str] = set()
    for name in mixture.names(cfg, "policy"):
        try:
            prompts |= set(read_layout(cfg.sets()[name].path()).tasks.values())
        except UserError:  # the data are not on this machine: the prompts are not known
            return ""
    return prompts.pop() if len(prompts) == 1 else ""
