"""Tokenisation against openpi's arrays."""

import json
import re

import pytest
from numpy.testing import assert_array_equal

from hvd.configs import ModelConfig
from hvd.data.tokenizer import Tokenizer
from tests.models.golden import cases, load, section

pytestmark = pytest.mark.optimised

PROMPTS = (
    "pick up the red block",
    "  pick_up the\nred block ",
    "open the drawer, close the drawer and put the cup on the plate",
    "",
)


@cases("tokenizer_*.npz")
def test_tokenizer(case):
    a = load(case)
    found = re.search(r"in order: (\[.*?\])\s*$", section(case), re.MULTILINE | re.DOTALL)
    prompts = json.loads(found.group(1)) if found else PROMPTS
    model = re.search(r"\b([\w.]+\.model)\b", section(case))
    path = case.parent / (model.group(1) if model else "tiny_sp.model")
    for name in [name for name in a if name.startswith("tok_")]:
        which, length = name.split("_")[1:]
        tokenizer = Tokenizer(ModelConfig(tokenizer_path=str(path), max_token_len=int(length)))
        if which == "state":
            ids, mask = tokenizer.encode(prompts[:1], a["state"][None])
        else:
            ids, mask = tokenizer.encode([prompts[int(which)]])
        assert_array_equal(ids[0], a[name])
        assert_array_equal(mask[0], a[f"mask_{which}_{length}"])
