"""Checkpoints: what is restored is what was saved, even when training went on meanwhile; other models are named."""

import dataclasses
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hvd.errors import UserError
from hvd.train import checkpoints, mesh, state
from hvd.train.checkpoints import Checkpoints
from hvd.train.state import Graph, TrainState
from tests.train.test_state import Small


@pytest.fixture
def graph():
    return Graph(Small, lambda path: path[0] == "first")


def start(graph, *, ema=True, target=True, optimizer=None) -> tuple[TrainState, TrainState]:
    init = state.make_init(graph, optimizer or optax.adam(1e-3), ema=ema, target=target)
    like = state.abstract(init, mesh.make_devices(1))
    return state.create(init, 0, like), like


_bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("ema", [True, False])
def test_saved_while_training_goes_on(graph, tmp_path, ema):
    """The step donates the buffers that are being written: what is stored must be what they held at the save."""
    run, like = start(graph, ema=ema)
    if ema:
        run = dataclasses.replace(run, ema=jax.tree.map(lambda x: 2 * x, run.ema))
    saves = Checkpoints(tmp_path, graph, 0)
    for step in (1, 2, 3):
        kept = jax.tree.map(lambda x: np.array(x, copy=True), run)
        saves.save(step, run, {"sums": {"loss": 0.1}, "count": step})
        for _ in range(3):
            run = _bump(run)
    saves.wait()
    assert saves.latest() == 3 and [p.name for p in saves.folder.iterdir()] == ["3"]
    found, loop = saves.restore(3, like)
    assert same(found, kept) and loop == {"sums": {"loss": 0.1}, "count": 3}
    params = checkpoints.restore_params(tmp_path, 3, state.join(like.trained, like.frozen))
    assert same(params, state.join(kept.ema if ema else kept.trained, kept.frozen))
    saves.close()


def test_an_older_float32_checkpoint_fits_narrow_frozen_parameters(graph, tmp_path):
    """Frozen parameters that were saved as float32 are cast; what is trained, and its averages, are as they were."""

    def narrow(name, frozen):
        return jnp.dtype("bfloat16" if frozen else "float32")

    run, _ = start(graph)
    saves = Checkpoints(tmp_path, graph, 0)
    saves.save(1, run, {})
    saves.wait()
    saves.close()
    lean = Graph(Small, lambda path: path[0] == "first", narrow)
    made, like = start(lean)
    assert {x.dtype for x in jax.tree.leaves(made.frozen)} == {jnp.dtype("bfloat16")}
    saves = Checkpoints(tmp_path, lean, 0)
    found, _ = saves.restore(1, like)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, like)
    assert same(found.frozen, jax.tree.map(lambda x: x.astype(jnp.bfloat16), run.frozen))
    assert same(dataclasses.replace(found, frozen={}), dataclasses.replace(run, frozen={}))
    saves.save(2, found, {})
    saves.wait()
    assert same(saves.restore(2, like)[0], found), "and kept so"
    saves.close()


def test_kept_checkpoints(graph, tmp_path):
    run, _ = start(graph)
    saves = Checkpoints(tmp_path, graph, 4)
    for step in range(1, 11):
        saves.save(step, run, {})
    saves.wait()
    assert sorted(int(p.name) for p in saves.folder.iterdir()) == [4, 8, 10]
    saves.close()


class Wider(Small):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.first = nnx.Linear(5, 4, rngs=rngs)


class Deeper(Small):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)


@pytest.mark.parametrize(
    "model, problem",
    [
        (Wider, r"first/kernel has shape \[3, 4\] in it, the model needs \[5, 4\]"),
        (Deeper, "last/bias is not in it"),
    ],
)
def test_checkpoint_of_another_model(graph, tmp_path, model, problem):
    run, _ = start(graph)
    with_other = Graph(model)
    saves = Checkpoints(tmp_path, graph, 0)
    saves.save(1, run, {})
    saves.wait()
    like = start(with_other)[1]
    for restore in (
        lambda: saves.restore(1, like),
        lambda: checkpoints.restore_params(tmp_path, 1, state.join(like.trained, like.frozen)),
    ):
        with pytest.raises(UserError, match=f"is a checkpoint of another model: params/{problem}") as error:
            restore()
        assert str(tmp_path) in str(error.value)
    saves.close()


def test_checkpoint_of_another_optimiser(graph, tmp_path):
    run, _ = start(graph, optimizer=optax.sgd(0.1))
    saves = Checkpoints(tmp_path, graph, 0)
    saves.save(1, run, {})
    saves.wait()
    with pytest.raises(UserError, match="train_state is a checkpoint of another model: opt_state/0/count is not in it"):
        saves.restore(1, start(graph)[1])
    saves.close()


def test_unfinished_save_is_no_checkpoint(graph, tmp_path):
    run, _ = start(graph)
    saves = Checkpoints(tmp_path, graph, 0)
    saves.save(1, run, {})
    saves.wait()
    saves.close()
    for name in ("2.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-123"):
        (saves.folder / name / "params").mkdir(parents=True)
    again = Checkpoints(tmp_path, graph, 0)
    assert again.latest() == 1
    again.save(2, run, {})
    again.wait()
    assert again.latest() == 2
    again.close()


# ------------------------------------------------------------------------------------- going on from what is whole


@pytest.fixture
def saved(graph, tmp_path):
    """A run with the checkpoints 2 and 4."""
    run, _ = start(graph)
    saves = Checkpoints(tmp_path, graph, 2)
    for step in (2, 4):
        saves.save(step, run, {})
    saves.wait()
    saves.close()
    return saves.folder


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


BROKEN = {
    "one bit of an array": lambda f: flip(largest(f)),
    "one bit of the loop's state": lambda f: flip(f / "loop" / "metadata"),
    "an array cut in half": lambda f: os.truncate(largest(f), largest(f).stat().st_size // 2),
    "no description of the parameters": lambda f: (f / "params" / "_METADATA").unlink(),
    "no optimiser state": lambda f: shutil.rmtree(f / "train_state"),
    "an empty folder": lambda f: (shutil.rmtree(f), f.mkdir()),
    "a copy that broke off, no manifest": lambda f: (shutil.rmtree(f / "train_state"), (f / "manifest.json").unlink()),
    "the manifest is no manifest": lambda f: (f / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_the_newest_whole_checkpoint_is_gone_on_from(graph, tmp_path, saved, damage, capsys):
    BROKEN[damage](tmp_path / "checkpoints" / "4")
    saves = Checkpoints(tmp_path, graph, 2)
    assert saves.newest_whole() == 2
    said = capsys.readouterr().out
    assert said.startswith("warning: checkpoint 4: ") and said.count("\n") == 1 and "4.broken" in said
    assert {p.name for p in saved.iterdir()} == {"2", "4.broken"}, "nothing is deleted"
    saves.look_again()
    run, like = start(graph)
    assert same(saves.restore(2, like)[0], run)
    saves.save(4, run, {})
    saves.wait()
    assert saves.newest_whole() == 4
    saves.close()


def test_where_no_checkpoint_is_whole_nothing_is_touched(graph, tmp_path, saved):
    for step in ("2", "4"):
        flip(largest(tmp_path / "checkpoints" / step))
    saves = Checkpoints(tmp_path, graph, 2)
    with pytest.raises(UserError, match=r"checkpoints/4/.* is corrupted.*no other checkpoint is whole"):
        saves.newest_whole()
    assert {p.name for p in saved.iterdir()} == {"2", "4"}
    saves.close()


def test_a_checkpoint_of_an_older_version_has_no_manifest(graph, tmp_path, saved):
    (tmp_path / "checkpoints" / "4" / "manifest.json").unlink()
    saves = Checkpoints(tmp_path, graph, 2)
    assert saves.newest_whole() == 4
    run, like = start(graph)
    assert same(saves.restore(4, like)[0], run)
    os.truncate(tmp_path / "checkpoints" / "4" / "params" / "_METADATA", 20)
    with pytest.raises(UserError, match=r"checkpoint .*/4 cannot be read .*move it away"):
        saves.restore(4, like)
    saves.close()


def test_a_new_run_has_no_checkpoint_to_check(graph, tmp_path):
    saves = Checkpoints(tmp_path, graph, 2)
    assert saves.newest_whole() == 0
    saves.close()


def test_what_was_kept_for_ever_stays_under_another_keep_period(graph, tmp_path, capsys):
    run, _ = start(graph)
    saves = Checkpoints(tmp_path, graph, 2)
    for step in (2, 3, 4, 5):
        saves.save(step, run, {})
    saves.wait()
    saves.close()
    checkpoints.keep_older(tmp_path, 2, 5)
    assert "the checkpoints 2, 4 in" in capsys.readouterr().out
    for first in (6, 9):  # also for the run after the next one, which has no other keep_period any more
        saves = Checkpoints(tmp_path, graph, 5)
        for step in range(first, first + 3):
            saves.save(step, run, {})
        saves.wait()
        saves.close()
        checkpoints.keep_older(tmp_path, 5, 5)
    assert sorted(int(p.name) for p in saves.folder.iterdir()) == [2, 4, 5, 10, 11]
    assert capsys.readouterr().out == ""


def test_a_keep_period_that_keeps_less_than_it_seems_to_is_said(capsys):
    for save, keep in ((7, 0), (5, 10), (10, 10)):
        checkpoints.say_kept("policy", save, keep)
    assert capsys.readouterr().out == ""
    checkpoints.say_kept("policy", 7, 10)
    assert "policy.keep_period 10 is no multiple of policy.save_interval 7" in (said := capsys.readouterr().out)
    assert "multiples of 70 are kept" in said and said.count("\n") == 1
