"""Policies that are told how good their action is: the words before a prompt (policy.extractor condition).

As in RECAP (Physical Intelligence 2025, pi*0.6): each chunk is trained with a binary word of its advantage, which is
left out at random; while it acts the policy is told that it is good. Here a word a level, or one for all of them.
Imports no jax. Letters in shapes: n rows, l levels.
"""

import itertools

import numpy as np
from jaxtyping import Bool, Int

from hvd.configs import Experiment
from hvd.errors import UserError

WORDS = ("negative", "positive")


def texts(cfg: Experiment) -> tuple[str, ...]:
    """What may stand before a prompt: "" where it is left out, then each case in the order of `which`; the last one
    says that everything is good. The levels have one word where they have one score."""
    if cfg.policy.score_levels in ("joint", "mean"):
        return ("", *(f"advantage {word}. " for word in WORDS))
    names = cfg.level_names()
    cases = itertools.product(WORDS, repeat=len(names))
    return ("", *(f"advantage {' '.join(f'{a} {b}' for a, b in zip(names, case, strict=True))}. " for case in cases))


def check(cfg: Experiment, tokens: Int[np.ndarray, "n t"]) -> None:
    """Raise UserError where the model cannot tell the texts apart; `tokens` are those of `texts`."""
    if len(np.unique(tokens, axis=0)) < len(tokens):
        raise UserError(
            "policy.extractor condition: two of the texts before the prompts have the same tokens; set "
            f"model.vocab_size (now {cfg.model.vocab_size}) or model.max_token_len ({cfg.model.max_token_len}) higher"
        )


def which(cfg: Experiment, good: Bool[np.ndarray, "n l"]) -> Int[np.ndarray, " n"]:
    """For each row the number of its text in `texts`."""
    if cfg.policy.score_levels in ("joint", "mean"):
        return np.where(good.all(axis=1), 2, 1)
    return np.asarray(1 + good.astype(np.int64) @ (1 << np.arange(good.shape[1])[::-1]), np.int64)
