"""The method's tables: a new entry, with a parameter of its own, is a change of its one table and of nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvd import checks, overrides
from hvd.errors import UserError
from hvd.fields import POSITIVE
from hvd.method import advantages, extraction, objectives, weights
from hvd.method.extraction import EXTRACTORS, Extracted, Extractor
from hvd.method.objectives import OBJECTIVES, Objective
from hvd.method.parameters import Parameter
from hvd.method.table import Advantages
from hvd.method.weights import WEIGHTINGS, Weighting
from tests.published import PUBLISHED


def parse(text: str):
    cfg = overrides.experiment(["--config", "demo", *PUBLISHED, *text.split()])
    checks.check_config(cfg)
    return cfg


def huber(u, p):
    return jnp.where(jnp.abs(u) <= p["kappa"], u**2 / 2, p["kappa"] * (jnp.abs(u) - p["kappa"] / 2))


def huber_omega(a, p):
    return jnp.minimum(1.0, p["kappa"] / jnp.maximum(jnp.abs(a), 1e-6))


@pytest.fixture
def with_huber(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "huber", Objective(huber, huber_omega, {"kappa": Parameter(2.0, POSITIVE)}))


@pytest.mark.parametrize("method", OBJECTIVES)
def test_omega_is_the_slope_of_f_over_the_advantage(method):
    """IDQL's identity, for every entry: |f'(A)| / |A|."""
    f, omega = objectives.objective(parse(f"--model.method {method} --value.exp_clip_log 100"))
    a = jnp.array([-2.0, -0.3, 0.4, 1.5])
    np.testing.assert_allclose(omega(a), np.abs(jax.vmap(jax.grad(f))(a)) / np.abs(a) / _scale(method), rtol=1e-4)


def _scale(method: str) -> float:
    return 2.0 if method == "expectile" else 1.0  # u^2 without its half: a constant factor of all weights


def test_an_objective_with_a_parameter(with_huber):
    cfg = parse("--model.method huber --model.method_params.kappa 0.5")
    f, _ = objectives.objective(cfg)
    np.testing.assert_allclose(f(jnp.array([0.25, 3.0])), [0.25**2 / 2, 0.5 * 2.75], rtol=1e-6)
    np.testing.assert_allclose(weights.omega(jnp.array([0.25, -2.0]), cfg), [1.0, 0.25], rtol=1e-6)
    assert objectives.parameters(parse("--model.method huber")) == {"kappa": 2.0}


def test_its_parameter_is_part_of_the_table_and_of_the_run(with_huber):
    from hvd.train import run_dir

    one, two = (parse(f"--model.method huber --model.method_params.kappa {kappa}") for kappa in (0.5, 0.6))
    assert advantages.weighting_key(one) != advantages.weighting_key(two)
    for stage in ("value", "policy"):
        assert run_dir.differing(one, two, stage) == ["model.method_params.kappa: 0.6 -> 0.5"]


@pytest.mark.parametrize(
    "text, line",
    [
        (
            "--model.method_params.kapa 1",
            "model.method_params.kapa: objective 'huber' has no such parameter; nearest: k",
        ),
        ("--model.method_params.kappa 0", "model.method_params.kappa 0.0 must be positive"),
        ("--model.method_params.kappa nan", "model.method_params.kappa nan is not a finite number"),
        ("--model.method_params.kappa many", "--model.method_params.kappa: 'many' is not a number"),
    ],
)
def test_a_wrong_parameter_is_one_line(with_huber, text, line):
    with pytest.raises(UserError) as error:
        parse(f"--model.method huber {text}")
    assert str(error.value).startswith(line)


def test_a_weighting_with_a_parameter(monkeypatch):
    def softplus(a, p, of_objective):
        return jnp.logaddexp(0.0, a / p["width"])

    monkeypatch.setitem(WEIGHTINGS, "softplus", Weighting(softplus, {"width": Parameter(1.0, POSITIVE)}))
    cfg = parse("--policy.weighting softplus --policy.weighting_params.width 2")
    np.testing.assert_allclose(weights.omega(jnp.array([0.0, 4.0]), cfg), np.log1p(np.exp([0.0, 2.0])), rtol=1e-5)
    assert advantages.weighting_key(cfg)["parameters"] == {"width": 2.0}


def test_an_extractor_with_a_parameter(monkeypatch):
    """It keeps the rows whose smallest advantage is above a quantile, unweighted."""

    def best(cfg, p, table, outcomes):
        least = np.nan_to_num(table.by_row("a", outcomes.frames).min(axis=1), nan=-np.inf)
        ones = np.ones((outcomes.frames, len(table.levels)), np.float32)
        return Extracted(ones, least >= np.quantile(least, p["below"]))

    monkeypatch.setitem(EXTRACTORS, "best", Extractor(best, {"below": Parameter(0.5)}))
    cfg = parse("--policy.extractor best --policy.extractor_params.below 0.75")
    kept = extraction.extract(cfg, small_table(), {"suboptimal": outcomes(8)})["suboptimal"]
    assert kept.keep is not None and kept.keep.tolist() == [False] * 6 + [True] * 2
    np.testing.assert_array_equal(kept.weights, 1.0)


def test_the_weighted_extractor_gives_omega_to_each_row():
    got = extraction.extract(parse(""), small_table(), {"suboptimal": outcomes(9)})["suboptimal"]
    np.testing.assert_array_equal(got.weights[:8], small_table().omega)
    assert np.isnan(got.weights[8]).all() and got.keep is None


def test_an_unknown_extractor_is_refused():
    from hvd.method import value_run

    with pytest.raises(UserError, match=r"policy\.extractor 'wieghted' is not one of weighted, .*; nearest: weighted"):
        value_run.needed(parse("--policy.extractor wieghted"))


def test_no_table_needs_jax():
    """Login nodes read the names."""
    import subprocess
    import sys

    code = (
        "import sys; from hvd.method import extraction, objectives, value_run, weights\n"
        "from hvd import checks, overrides\n"
        "checks.check_config(overrides.experiment(['--config', 'demo'])); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def outcomes(frames: int) -> extraction.Outcomes:
    return extraction.Outcomes(np.ones(frames, bool), np.ones(frames, bool))


def small_table() -> Advantages:
    a = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)
    rows = np.arange(8)
    names = np.full(8, "suboptimal", object)
    return Advantages(("x", "y", "z"), names, names, rows, rows, rows, a[:, 0], a, a, np.exp(a))
