"""Loading a run and using it."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from hvd import cli
from hvd.data.loader import Batcher, SampleSpec, Source
from hvd.errors import EXIT_USER, UserError
from hvd.train import inference, stage_data, steering
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


@pytest.mark.slow
def test_a_chunk_goes_on_from_what_is_left(policy, monkeypatch):
    """Real-time chunking: its first actions are those that are executed meanwhile."""
    rows = [0, 5, 9]
    state = stage_data.open_dataset(policy.cfg, "optimal").state[rows]
    other = act(policy, rows, seed=3)
    key, prompts = jax.random.key(0), ["carry the tote"] * 3
    guided = policy.act(state, {}, prompts, key, (other[:, 1:], 2))
    near, far = (np.abs(x[:, :2] - other[:, 1:3]).mean() for x in (guided, act(policy, rows)))
    assert near < 0.5 * far
    trained_so = dataclasses.replace(policy.cfg, policy=dataclasses.replace(policy.cfg.policy, prefix_max=2))
    monkeypatch.setattr(policy, "cfg", trained_so)
    given = policy.act(state, {}, prompts, key, (other[:, 1:], 2))
    np.testing.assert_allclose(given[:, :2], other[:, 1:3], atol=1e-5)
    for left, told in (((other[:, 1:], 2), {"guided": True}), ((other[:, 1:], 3), {})):  # told so; longer than trained
        by_guidance = policy.act(state, {}, prompts, key, left, **told)
        assert np.abs(by_guidance[:, :2] - other[:, 1:3]).max() > 1e-3


# ------------------------------------------------------------------------------------- policies that ask the critic


@pytest.fixture(scope="module")
def steered(trained, tmp_path_factory):
    """A copy of the trained policy run, as if it had been trained with an extractor that acts by the critic."""

    def make(name: str, **parameters) -> Path:
        cfg = dataclasses.replace(trained, exp_name="steered", runs_dir=str(tmp_path_factory.mktemp(name)))
        policy = dataclasses.replace(trained.policy, extractor=name, extractor_params=parameters)
        cfg = dataclasses.replace(cfg, policy=policy)
        shutil.copytree(trained.exp_dir, cfg.exp_dir)
        rewrite(Path(cfg.policy_dir), "policy", {"extractor": name, "extractor_params": parameters})
        return Path(cfg.policy_dir)

    return make


def rewrite(folder: Path, part: str, fields: dict, **inputs: str) -> None:
    """Other fields in the config of a complete run, and other digests of what it was trained on."""
    record, proof = folder / "config.yaml", folder / "complete.json"
    tree, found = yaml.safe_load(record.read_text()), json.loads(proof.read_text())
    (tree["config"] if part == "." else tree["config"][part]).update(fields)
    content = yaml.safe_dump(tree).encode()
    record.write_bytes(content)
    found["settings"]["config.yaml"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    found["inputs"] |= inputs
    proof.write_text(json.dumps(found))


def q_of(trained, actions, rows):
    state = stage_data.open_dataset(trained, "optimal").state[rows]
    return inference.load_value(trained.value_dir).ask(state, {}, ["carry the tote"] * len(rows), actions)[1][:, -1]


def test_best_of_n_has_the_highest_q(trained, policy, steered):
    rows = list(range(0, 60, 6))
    folder = steered("best_of_n", n=6.0)
    elsewhere = (folder.parent / "value").rename(folder.parent / "another")
    rewrite(folder, "policy", {}, value="0" * 64)  # it was trained beside yet another one
    best, plain = act(inference.load_policy(folder, value_run=elsewhere), rows), act(policy, rows)
    q_best, q_plain = q_of(trained, best, rows), q_of(trained, plain, rows)
    assert (q_best >= q_plain - 1e-4).all() and (q_best > q_plain + 1e-4).mean() > 0.5


@pytest.mark.slow
def test_the_best_of_one_is_the_policy_itself(policy, steered):
    one = act(inference.load_policy(steered("best_of_n", n=1.0)), [3, 9])
    np.testing.assert_allclose(one, act(policy, [3, 9]), atol=1e-4)


@pytest.mark.slow
def test_a_flow_that_climbs_q_is_moved_so_far_as_it_is_told(trained, policy, steered):
    rows = list(range(0, 60, 6))
    plain = act(policy, rows)
    near, far = (act(inference.load_policy(steered("q_guided", strength=x)), rows) for x in (0.05, 0.3))
    assert (q_of(trained, far, rows) > q_of(trained, plain, rows)).mean() >= 0.8
    moved = [np.abs(x - plain).mean() for x in (near, far)]
    assert 0 < moved[0] < moved[1]


def test_a_conditioned_policy_acts_on_the_words_and_is_guided_by_them(policy, steered):
    rows = [3, 9, 20]
    plain = act(policy, rows)
    state = stage_data.open_dataset(policy.cfg, "optimal").state[rows]
    words = ["advantage base positive torso positive arms positive. carry the tote"] * 3
    told = policy.act(state, {}, words, jax.random.key(0))
    assert np.abs(told - plain).max() > 1e-4
    np.testing.assert_allclose(act(inference.load_policy(steered("condition")), rows), told, atol=1e-5)

    def denoise(params, observation, noise, num_steps, committed, steer):
        """One step of a flow whose velocity is the prompt's first token."""
        velocity = np.ones((6, 2, 4)) * observation["tokenized_prompt"][:, :1, None]
        return noise - steer(noise, jnp.float32(1), jnp.asarray(velocity))

    tokens = {name: {"tokenized_prompt": np.full((3, 2), n)} for name, n in (("told", 5.0), ("plain", 2.0))}
    guided = steering.by_words(denoise, 3.0)
    moved = guided({}, tokens["told"] | {"plain": tokens["plain"]}, jnp.zeros((3, 2, 4)), 1)
    np.testing.assert_allclose(moved, np.full((3, 2, 4), -(2.0 + 3 * (5.0 - 2.0))))


@pytest.mark.slow
def test_guidance_by_words_in_a_whole_policy(policy, steered):
    """Guidance 1 is the told policy; more goes further in the same direction in one flow step."""
    rows = [3, 9, 20]
    near, far = (act(inference.load_policy(steered("condition", guidance=w)), rows) for w in (1.0, 1.000001))
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert np.abs(act(inference.load_policy(steered("condition", guidance=3.0)), rows) - near).max() > 1e-3


def test_a_policy_acts_by_no_value_run_that_does_not_fit(steered, trained, capsys):
    folder = steered("best_of_n", n=2.0)
    value = folder.parent / "value"

    def refused(why: str, part: str = "model", fields: dict | None = None, **inputs: str) -> None:
        shutil.copytree(trained.value_dir, value, dirs_exist_ok=True)
        rewrite(value, part, fields or {}, **inputs)
        with pytest.raises(UserError, match=why):
            inference.load_policy(folder, value_run=value)

    refused("its robot is 'r1_pro_b1k', the policy's 'r1'", ".", {"robot": "r1_pro_b1k"})
    refused(r"its levels is \(\(0, 1\), \(2,\)\)", fields={"hierarchical_actions": [[0, 1], [2]]})
    refused("its model.max_token_len is 9, the policy's", fields={"max_token_len": 9})
    refused("it has other norm stats", norm_stats="0" * 64)
    (value / "complete.json").unlink()
    with pytest.raises(UserError, match="value is not complete"):
        inference.load_policy(folder, value_run=value)
    shutil.copytree(trained.value_dir, value, dirs_exist_ok=True)
    rewrite(folder, "policy", {}, value="0" * 64)
    with pytest.raises(UserError, match="acts by the value run that it was trained beside"):
        inference.load_policy(folder)
    assert cli.main(["serve", "--run", trained.policy_dir, "--value-run", str(value), "--port", "0"]) == EXIT_USER
    (line,) = capsys.readouterr().err.splitlines()
    assert "acts by none (policy.extractor weighted); leave it out, or take a policy" in line


@pytest.mark.parametrize("name, number", [("best_of_n", {"n": 3.0}), ("q_guided", {"strength": 0.1})])
def test_any_policy_can_be_told_to_act_by_its_value_run(trained, policy, steered, name, number):
    """As one that was trained to, and that one can be told not to; both also in 8 bits."""
    rows, folder = [3, 9, 20], steered(name, **number)
    want = act(inference.load_policy(folder), rows)
    told = inference.load_policy(trained, extractor=name, extractor_params=number)
    np.testing.assert_allclose(act(told, rows), want, atol=1e-5)
    assert told.acts_by == name and np.abs(want - act(policy, rows)).max() > 1e-4
    alone = inference.load_policy(folder, extractor="none")
    np.testing.assert_allclose(act(alone, rows), act(policy, rows), atol=1e-5)
    narrow = inference.load_policy(folder, int8=True)
    assert alone.acts_by == "" and narrow.weight_bytes < told.weight_bytes
    np.testing.assert_array_equal(*(jax.tree.leaves(p.params["critic"])[0] for p in (narrow, told)))
    if name == "q_guided":  # the best of several may be another one
        assert 1e-6 < np.abs(act(narrow, rows) - want).max() < 0.05


def test_who_cannot_be_told_how_to_act(trained, steered):
    with pytest.raises(UserError, match=r"trained with policy\.extractor condition, which tells it how good"):
        inference.load_policy(steered("condition"), extractor="best_of_n")
    with pytest.raises(UserError, match=r"extractor_params\.strength: extractor 'best_of_n' has no such"):
        inference.load_policy(trained, extractor="best_of_n", extractor_params={"strength": 1.0})
    folder = steered("best_of_n", n=2.0)
    proof = json.loads((folder / "complete.json").read_text())
    del proof["inputs"]["value"]
    (folder / "complete.json").write_text(json.dumps(proof))
    with pytest.raises(UserError, match="was trained beside no value run: name the one to act by"):
        inference.load_policy(folder, extractor="best_of_n")
