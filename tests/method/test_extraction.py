"""Extractors: known scores and outcomes in, the expected rows and weights out."""

import dataclasses

import numpy as np
import pytest

from hvd import checks, overrides
from hvd.data.tokenizer import Tokenizer
from hvd.errors import UserError
from hvd.method import condition, extraction
from hvd.method.extraction import Outcomes
from hvd.method.table import Advantages
from tests.published import PUBLISHED


@pytest.mark.parametrize("kind", ["filter", "soft"])
def test_weighting_none_is_imitation_whatever_would_go_by_a_score(kind):
    words = [
        "--config",
        "demo",
        "--policy.extractor",
        kind,
        "--policy.extractor_params",
        "{}",
        "--policy.score",
        "ratio",
    ]
    asked, plain = (overrides.experiment([*words, *more]) for more in ((), ("--policy.weighting", "none")))
    assert extraction.needs_ratio(asked) and not extraction.needs_ratio(plain)
    assert extraction.label(plain) == "none, reward only" and not extraction.extractor(plain)[0].needs_value(plain)


def parse(text: str):
    cfg = overrides.experiment(["--config", "demo", *PUBLISHED, *text.split()])
    checks.check_config(cfg)
    return cfg


N = 8
RISING = np.arange(N, dtype=np.float32)


def table(**columns) -> Advantages:
    """Rows 0..7 of a set of 9; Q and ratios as given [8, 3], V = 0."""
    zeros = np.zeros((N, 3), np.float32)
    fixed = {
        "levels": ("base", "torso", "arms"),
        "dataset": np.full(N, "suboptimal", object),
        "split": np.full(N, "train"),
        "episode": np.zeros(N, np.int64),
        "frame": np.arange(N),
        "row": np.arange(N),
        "v": np.zeros(N, np.float32),
        "q": zeros,
        "a": zeros,
        "omega": zeros + 2,
    }
    return Advantages(**fixed | columns)


def outcomes(success=True, rewarded=True) -> Outcomes:
    return Outcomes(np.broadcast_to(np.asarray(success), N + 1).copy(), np.broadcast_to(rewarded, N + 1).copy())


def extracted(text: str, made: Advantages | None, of: Outcomes):
    return extraction.extract(parse(text), made, {"suboptimal": of})["suboptimal"]


def columns(*levels) -> np.ndarray:
    return np.stack(levels, axis=1).astype(np.float32)


def test_the_filter_keeps_each_levels_upper_part():
    q = columns(RISING, RISING[::-1], np.zeros(N))
    got = extracted("--policy.extractor filter --policy.extractor_params.quantile 0.5", table(q=q), outcomes())
    np.testing.assert_array_equal(got.weights[:N, 0] > 0, RISING >= 4)
    np.testing.assert_array_equal(got.weights[:N, 1] > 0, RISING < 4)
    assert got.keep is not None and got.keep.tolist() == [True] * N + [False]  # each row has some level's weight
    np.testing.assert_allclose(got.weights[:N].mean(axis=0), 1, rtol=1e-6)  # over the kept rows, whatever was dropped


def test_the_gate_comes_before_the_quantile():
    half = np.arange(N + 1) >= 4
    flags = "--policy.extractor filter --policy.score_levels joint --policy.extractor_params.quantile 0.5"
    got = extracted(f"{flags} --policy.gate success", table(q=columns(*[RISING] * 3)), outcomes(success=half))
    assert got.keep is not None and np.flatnonzero(got.keep).tolist() == [6, 7]
    got = extracted(f"{flags} --policy.gate reward", table(q=columns(*[RISING] * 3)), outcomes(rewarded=~half))
    assert got.keep is not None and np.flatnonzero(got.keep).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ("own", columns(RISING, 2 * RISING, 4 * RISING)),
        ("chain", columns(RISING, RISING, 2 * RISING)),
        ("joint", columns(4 * RISING, 4 * RISING, 4 * RISING)),
        ("mean", columns(*[7 / 3 * RISING] * 3)),
    ],
)
def test_scores_of_levels(levels, expected):
    q = columns(RISING, 2 * RISING, 4 * RISING)
    cfg = parse(f"--policy.extractor filter --policy.score_levels {levels}")
    np.testing.assert_allclose(extraction.score(cfg, table(q=q)), expected, rtol=1e-6)


def test_the_ratio_has_levels_of_its_own():
    made = table(ratio=columns(RISING, 3 * RISING, 5 * RISING), alone=columns(RISING, -RISING, RISING * 0))
    flags = "--policy.extractor filter --policy.score ratio --policy.score_levels"
    np.testing.assert_array_equal(extraction.score(parse(f"{flags} own"), made), made.alone)
    chain = extraction.score(parse(f"{flags} chain"), made)
    np.testing.assert_allclose(chain, columns(RISING, 2 * RISING, 2 * RISING))
    both = extraction.score(parse(f"{flags} own".replace("ratio", "both")), dataclasses.replace(made, q=made.alone))
    np.testing.assert_allclose(both[:, 1], RISING[::-1] / 7)


def test_soft_weights_are_the_clipped_ratio():
    made = table(ratio=columns(*[np.log(RISING + 1)] * 3), alone=columns(*[np.log(RISING + 1)] * 3))
    got = extracted("--policy.extractor soft --policy.score ratio", made, outcomes())
    np.testing.assert_allclose(got.weights[:N, 0], (RISING + 1) / 4.5, rtol=1e-5)
    clipped = extracted(
        "--policy.extractor soft --policy.score ratio --policy.extractor_params.clip 1", made, outcomes()
    )
    np.testing.assert_allclose(clipped.weights[:N, 0].max() / clipped.weights[0, 0], 4.5, rtol=1e-5)


def test_normalised_weights_have_mean_one():
    omega = columns(RISING + 1, RISING + 1, np.full(N, 7.0))
    got = extracted("--policy.extractor normalised", table(omega=omega), outcomes())
    np.testing.assert_allclose(got.weights[:N], omega / omega.mean(axis=0), rtol=1e-6)


def test_a_gate_alone_is_imitation_of_what_it_lets_through():
    half = np.arange(N + 1) >= 4
    got = extracted("--policy.weighting none --policy.gate success", None, outcomes(success=half))
    assert got.keep is not None and got.keep.tolist() == half.tolist() and (got.weights == 1).all()


def test_conditioned_rows_are_told_which_levels_are_good():
    """The upper 30 % of each level, in the text's order of cases; every row is trained on."""
    q = columns(RISING, RISING[::-1], np.zeros(N))
    flags = "--policy.extractor condition --policy.extractor_params.quantile 0.7"
    got = extracted(flags, table(q=q), outcomes())
    assert got.good is not None and got.keep is None and (got.weights == 1).all()
    told = [condition.texts(parse(flags))[i] for i in condition.which(parse(flags), got.good)]
    assert told[0] == "advantage base negative torso positive arms positive. "
    assert told[7] == "advantage base positive torso negative arms positive. "
    joint = parse(f"{flags} --policy.score_levels joint")
    good = extraction.extract(joint, table(q=columns(*[RISING] * 3)), {"suboptimal": outcomes()})["suboptimal"].good
    assert good is not None and condition.which(joint, good).tolist() == [1] * 5 + [2, 2, 2] + [1]
    assert condition.texts(joint) == ("", "advantage negative. ", "advantage positive. ")


def test_texts_that_the_model_cannot_tell_apart_are_refused():
    cfg = parse("--policy.extractor condition --model.max_token_len 2")
    with pytest.raises(UserError, match=r"have the same tokens; set model\.vocab_size"):
        condition.check(cfg, Tokenizer(cfg.model).encode(condition.texts(cfg))[0])


def test_a_closed_gate_is_said():
    with pytest.raises(UserError, match=r"policy\.gate 'success' lets no frame .* through"):
        extracted("--policy.extractor filter --policy.gate success", table(), outcomes(success=False))


def test_what_a_policy_learns_from_has_a_name():
    assert extraction.label(parse("")) == "hvd"
    words = "--policy.extractor filter --policy.score ratio --policy.score_levels joint --policy.gate success"
    assert extraction.label(parse(words)) == "filter ratio joint, success only"


WRONG = np.zeros((N + 1, 3))
WRONG[1, 0], WRONG[2, 1], WRONG[3, 2] = 0.5, 0.2, 0.05  # the last one is too little to count


def labelled(levels, horizon, waiting):
    assert levels == ("base", "torso", "arms") and horizon == 20
    return WRONG + waiting * np.eye(N + 1, 3, k=-5)


def test_the_oracle_leaves_out_each_levels_labelled_mistakes():
    """Without a value run; what is left weighs 1 on average."""
    of = dataclasses.replace(outcomes(), wrong=labelled)
    got = extracted("--policy.extractor oracle", None, of)
    assert [np.flatnonzero(column == 0).tolist() for column in got.weights.T] == [[1], [2], []]
    np.testing.assert_allclose(got.weights[:, 0].mean(), 1, rtol=1e-6)
    flat = extracted("--policy.extractor oracle --policy.score_levels joint", None, of)
    assert [np.flatnonzero(column == 0).tolist() for column in flat.weights.T] == [[1, 2]] * 3
    assert flat.keep is not None and np.flatnonzero(~flat.keep).tolist() == [1, 2]
    waiting = extracted("--policy.extractor oracle --policy.oracle_waiting true", None, of)
    assert [np.flatnonzero(column == 0).tolist() for column in waiting.weights.T] == [[1, 5], [2, 6], [7]]
    one = extracted("--policy.extractor oracle --model.network_type q", None, of)
    assert one.weights.shape == (N + 1, 1) and np.flatnonzero(one.weights[:, 0] == 0).tolist() == [1, 2]
    assert extraction.label(parse("--policy.extractor oracle --policy.score_levels joint")) == "oracle joint"


def test_an_oracle_without_labels_is_refused():
    with pytest.raises(UserError, match="name no mistakes"):
        extracted("--policy.extractor oracle", None, outcomes())
