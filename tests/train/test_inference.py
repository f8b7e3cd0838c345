"""Loading a run and using it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from hvd.data.loader import Batcher, SampleSpec, Source
from hvd.errors import UserError
from hvd.train import inference, stage_data
from tests.train.compare import arrays


@pytest.fixture(scope="module")
def policy(trained):
    return inference.load_policy(trained)


def act(policy, rows, seed=0):
    state = stage_data.open_dataset(policy.cfg, "optimal").state[rows]
    return policy.act(state, {}, ["carry the tote"] * len(rows), jax.random.key(seed))


def test_policy_acts_in_raw_units(policy):
    actions = act(policy, [0, 5, 9])
    assert actions.shape == (3, 4, 21) and actions.dtype == np.float32 and np.isfinite(actions).all()
    np.testing.assert_array_equal(actions, act(policy, [0, 5, 9]))
    assert not np.array_equal(actions, act(policy, [0, 5, 9], seed=1))
    data = stage_data.open_dataset(policy.cfg, "optimal").actions
    assert np.abs(actions.mean() - data.mean()) < 3 * data.std()


def test_padded_dims_do_nothing(policy):
    """Whatever the initial noise of padded dims were, they stay 0 and have no velocity."""
    head = policy.params["action_out_proj"]
    assert not np.any(head["kernel"][:, 21:]) and not np.any(head["bias"][21:])
    assert np.any(head["kernel"][:, :21])
    assert inference.pad_mask(policy.cfg).tolist() == [1.0] * 21 + [0.0] * 11


def test_policy_uses_the_averaged_parameters(trained, policy):
    stored = arrays(trained.policy_dir, 12)
    name = "state_proj/kernel"
    np.testing.assert_array_equal(policy.params["state_proj"]["kernel"], stored[f"params/params/{name}"])
    assert not np.array_equal(stored[f"params/params/{name}"], stored[f"train_state/trained/{name}"])


def test_from_a_folder_alone(trained, policy):
    """A run folder knows all it needs: no config is given."""
    alone = inference.load_policy(trained.policy_dir)
    np.testing.assert_array_equal(act(alone, [3]), act(policy, [3]))


def test_value_function(trained):
    model = inference.load_value(trained.value_dir)
    data = stage_data.open_dataset(trained, "optimal")
    rows = np.arange(5)
    batcher = Batcher([Source(data, rows, 0)], SampleSpec(model.transform, num_levels=3))
    batch = batcher.batch(np.zeros(5, int), rows)
    v, q = model(batch["observation"], batch["actions"], batch["action_mask"])
    assert v.shape == (5,) and q.shape == (5, 3) and np.isfinite(q).all()


def test_incomplete_runs_are_not_used(copied):
    Path(copied.policy_dir, "complete.json").unlink()
    with pytest.raises(UserError, match="is not complete"):
        inference.load_policy(copied)


def test_wrong_kind_of_run(trained):
    with pytest.raises(UserError, match="holds a value run, not a policy run"):
        inference.load_policy(trained.value_dir)


def test_wrong_config(trained):
    cfg = dataclasses.replace(trained, policy=dataclasses.replace(trained.policy, beta=1.0))
    with pytest.raises(UserError, match=r"policy\.beta: 3\.0 -> 1\.0"):
        inference.load_policy(cfg)
