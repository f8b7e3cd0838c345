"""Requests in other clients' words, and what else they want of a reply. Imports no jax.

The BEHAVIOR challenge's evaluator (OmniGibson) speaks openpi's protocol with names of its own: it sends
`robot_r1::proprio`, cameras as `robot_r1::...::rgb` with an alpha channel, and more than a policy looks at; before an
episode {"reset": True}, which has no reply. It executes `action`, or `action_chunk` where the request said
__action_chunk_size__.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

from hvd.serve.observation import Refused, whole_number

CHUNK = "__action_chunk_size__"


class NoReply(Exception):
    """A message that asks for nothing."""


@dataclass(frozen=True)
class Translation:
    """How one server's clients name things.

    Attributes:
        aliases: their key -> ours.
        others: keys that nobody knows are left out; else they are refused.
        single: every reply has `action` too, the first one of the chunk.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    others: bool = False
    single: bool = False

    def request(self, message: Any, known: tuple[str, ...], horizon: int) -> tuple[Any, int]:
        """The message in our words, and how many actions `action_chunk` of the reply has (0: there is none).

        Raises:
            NoReply: it asks for nothing.
            Refused: two of its keys mean the same, or more actions are asked for than the `horizon` of a chunk.
        """
        if not isinstance(message, dict):
            return message, 0
        if set(message) == {"reset"}:
            raise NoReply
        found: dict[Any, Any] = {}
        for theirs, value in message.items():
            ours = self.aliases.get(theirs, theirs)
            if ours in found:
                raise Refused(f"{theirs!r} and another key both mean {ours!r}; send one of them")
            if not (self.others and ours not in known and ours != CHUNK):
                found[ours] = value
        size = whole_number(found, CHUNK, 0, 0, horizon)
        found.pop(CHUNK, None)
        return found, size

    def reply(self, actions: Float32[np.ndarray, "*b k a"], size: int) -> dict[str, np.ndarray]:
        """What the reply has beside `actions`."""
        more = {"action_chunk": actions[..., :size, :]} if size else {}
        return more | ({"action": actions[..., 0, :]} if size or self.single else {})
