"""Prompts to token ids: PaliGemma's sentencepiece vocabulary as openpi uses it, or hashed words for tiny models."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Bool, Float, Int

from hvd.configs import ModelConfig
from hvd.errors import Failed, UserError
from hvd.storage import cache as storage

PAD, EOS, BOS, UNK = 0, 1, 2, 3  # ids of "words"; the same as PaliGemma's


class Tokenizer:
    """Prompts to ids of fixed length.

    "paligemma": bos, the prompt's pieces, the pieces of a newline (the separator PaliGemma was trained with).
    "words": bos, then one id per word, a hash of its letters; needs no file.

    Args:
        cfg: its fields tokenizer, tokenizer_path, vocab_size and max_token_len.

    Raises:
        UserError: a sentencepiece file that is missing, broken or not to be had, or a vocabulary that is too small.
        Failed: the network does not answer.
    """

    def __init__(self, cfg: ModelConfig):
        if cfg.vocab_size <= UNK + 1:
            raise UserError(
                f"model.vocab_size {cfg.vocab_size} leaves no id for words; the first {UNK + 1} are reserved"
            )
        self.length, self.vocab_size = cfg.max_token_len, cfg.vocab_size
        self._pieces = _load(cfg) if cfg.tokenizer == "paligemma" else None

    def encode(
        self, prompts: Sequence[str], states: Float[np.ndarray, "b s"] | None = None
    ) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Token ids int32 [b, max_token_len], padded with 0 on the right, and where they are real.

        Prompts that are too long are cut (`too_long` tells). With `states` (normalised to [-1, 1]) the prompt takes
        pi0.5's form, which spells out each state dim as one of 256 bins.
        """
        ids = np.zeros((len(prompts), self.length), np.int32)
        mask = np.zeros((len(prompts), self.length), bool)
        for i, prompt in enumerate(prompts):
            row = self._encode(prompt, None if states is None else states[i])[: self.length]
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return ids, mask

    def too_long(self, prompts: Sequence[str], states: Float[np.ndarray, "b s"] | None = None) -> dict[str, str]:
        """The prompts that `encode` cuts, each with a line about it."""
        rows = [None] * len(prompts) if states is None else states
        lengths = {prompt: len(self._encode(prompt, row)) for prompt, row in zip(prompts, rows, strict=True)}
        return {
            prompt: f"prompt {prompt[:100]!r} has {tokens} tokens and is cut to the first {self.length}: what follows "
            "them the model never sees (model.max_token_len)"
            for prompt, tokens in lengths.items()
            if tokens > self.length
        }

    def _encode(self, prompt: str, state: Float[np.ndarray, "s"] | None) -> list[int]:
        text = prompt.strip().replace("_", " ").replace("\n", " ")
        end = "\n"
        if state is not None:
            bins = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1
            text, end = f"Task: {text}, State: {' '.join(map(str, bins))};\nAction: ", ""
        if self._pieces is not None:
            bos = [self._pieces.bos_id()]
            return bos + self._pieces.encode(text) + (self._pieces.encode(end) if end else [])
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return [BOS, *(_word_id(word, self.vocab_size) for word in words)]


def _word_id(word: str, vocab_size: int) -> int:
    """An id above the special ones that is the same on every machine and in every run."""
    digest = hashlib.sha256(word.encode()).digest()
    return UNK + 1 + int.from_bytes(digest[:8], "big") % (vocab_size - UNK - 1)


def _file(cfg: ModelConfig) -> Path:
    """The vocabulary file: the one that is named, fetched once where it is a URL; PaliGemma's own if none is."""
    path = cfg.tokenizer_path or storage.PALIGEMMA_TOKENIZER
    if storage.is_url(path):
        try:
            return storage.fetch(path, "model.tokenizer_path")
        except (UserError, Failed) as error:
            raise type(error)(f"{error}; {storage.TOKENIZER_ADVICE}") from error
    if not Path(path).expanduser().is_file():
        raise UserError(f"model.tokenizer_path: no file {path}")
    return Path(path).expanduser()


def _load(cfg: ModelConfig) -> sentencepiece.SentencePieceProcessor:
    path = _file(cfg)
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"model.tokenizer_path: {path} is no sentencepiece model") from error
    if pieces.vocab_size() > cfg.vocab_size:
        raise UserError(f"model.vocab_size {cfg.vocab_size} is smaller than the {pieces.vocab_size()} pieces of {path}")
    return pieces
