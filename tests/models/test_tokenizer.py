"""Hashed words, and the tokenizer's mistakes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hvd.configs import ModelConfig
from hvd.data.tokenizer import BOS, PAD, UNK, Tokenizer
from hvd.errors import UserError
from hvd.experiments import get_config
from tests.storage.servers import google_put, google_server, proxy_before


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


def test_a_prompt_that_is_cut_is_told():
    tokenizer = Tokenizer(config())
    long = "put the cup on the shelf by the door"
    assert list(tokenizer.too_long(["put the cup away", long])) == [long]
    assert "has 10 tokens and is cut to the first 8" in tokenizer.too_long([long])[long]


def test_g1_reads_its_own_task():
    assert not Tokenizer(get_config("g1").model).too_long(["Pick up the yellow bottle on the table."])


def test_ids_never_change():
    """A checkpoint's embeddings belong to these ids."""
    ids, _ = Tokenizer(config()).encode(["Pick up the_tote, now"])
    assert_array_equal(ids[0], [BOS, 287, 355, 198, 234, 219, 153, PAD])


def test_mistakes(tmp_path):
    broken = tmp_path / "broken.model"
    broken.write_text("not a model")
    for fields, text in (
        ({"tokenizer": "paligemma", "tokenizer_path": str(tmp_path / "none.model")}, "no file .*none.model"),
        ({"tokenizer": "paligemma", "tokenizer_path": str(broken)}, "broken.model is no sentencepiece model"),
        ({"vocab_size": 4}, "vocab_size 4 leaves no id"),
    ):
        with pytest.raises(UserError, match=text):
            Tokenizer(ModelConfig(**{"tokenizer": "words", "vocab_size": 512, **fields}))


@pytest.fixture
def served(golden, tmp_path, monkeypatch):
    """(small vocabulary, proxy before a server that has it where PaliGemma's lies)."""
    small = golden / "tiny_sp.model"
    if not small.exists():
        pytest.skip("HVD_GOLDEN: no tiny_sp.model")
    for name in ("HVD_OFFLINE", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HVD_CACHE", str(tmp_path / "cache"))
    with google_server() as address, proxy_before(*address) as proxy:
        google_put(address, {"paligemma_tokenizer.model": small.read_bytes()}, bucket="big_vision")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.address)
        yield small, proxy


def test_paligemmas_vocabulary_is_fetched_once(served, tmp_path, monkeypatch):
    small, proxy = served
    want = Tokenizer(ModelConfig(tokenizer_path=str(small))).encode(["pick up the block"])
    for path in ("", "gs://big_vision/paligemma_tokenizer.model"):
        assert_array_equal(Tokenizer(ModelConfig(tokenizer_path=path)).encode(["pick up the block"]), want)
    assert len(proxy.reads) == 1
    monkeypatch.setenv("HVD_OFFLINE", "1")
    asked = len(proxy.requests)
    assert_array_equal(Tokenizer(ModelConfig()).encode(["pick up the block"]), want)
    assert len(proxy.requests) == asked
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match="HVD_OFFLINE is set") as error:
        Tokenizer(ModelConfig())
    assert len(str(error.value).splitlines()) == 1
    assert "gs://big_vision/paligemma_tokenizer.model" in str(error.value)
    assert str(error.value).endswith("name it: --model.tokenizer_path FILE")


def test_a_vocabulary_that_the_store_does_not_have(served):
    with pytest.raises(UserError, match=r"model.tokenizer_path gs://big_vision/none: there is nothing; or bring"):
        Tokenizer(ModelConfig(tokenizer_path="gs://big_vision/none"))


def test_home_in_the_path(served, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(served[0], Path.home() / "sp.model")
    assert Tokenizer(ModelConfig(tokenizer_path="~/sp.model")).encode(["a"])[1].any()
