"""Hashed words, and the tokenizer's mistakes."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hvd.configs import ModelConfig
from hvd.errors import UserError
from hvd.models.tokenizer import BOS, PAD, UNK, Tokenizer


def config(**fields) -> ModelConfig:
    return ModelConfig(tokenizer="words", **{"vocab_size": 512, "max_token_len": 8, **fields})


def test_words():
    ids, mask = Tokenizer(config()).encode(["Pick up\nthe_tote ", "pick  up the tote", "", "a b c d e f g h i"])
    assert ids.dtype == np.int32 and ids.shape == mask.shape == (4, 8)
    assert_array_equal(ids[0], ids[1])
    assert_array_equal(mask.sum(axis=1), [5, 5, 1, 8])
    assert_array_equal(ids[:, 0], BOS)
    assert np.all(ids[~mask] == PAD) and np.all(ids[:, 1:][mask[:, 1:]] > UNK)
    assert len(set(ids[3])) == 8


def test_ids_never_change():
    """A checkpoint's embeddings belong to these ids."""
    ids, _ = Tokenizer(config()).encode(["Pick up the_tote, now"])
    assert_array_equal(ids[0], [BOS, 287, 355, 198, 234, 219, 153, PAD])


def test_mistakes(tmp_path):
    broken = tmp_path / "broken.model"
    broken.write_text("not a model")
    for fields, text in (
        ({"tokenizer": "paligemma", "tokenizer_path": ""}, "tokenizer_path is empty"),
        ({"tokenizer": "paligemma", "tokenizer_path": str(tmp_path / "none.model")}, "no file .*none.model"),
        ({"tokenizer": "paligemma", "tokenizer_path": str(broken)}, "broken.model is no sentencepiece model"),
        ({"vocab_size": 4}, "vocab_size 4 leaves no id"),
    ):
        with pytest.raises(UserError, match=text):
            Tokenizer(ModelConfig(**{"tokenizer": "words", "vocab_size": 512, **fields}))
