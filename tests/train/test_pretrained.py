"""weight_loader: an openpi checkpoint's parameters become the start of a run."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from hvd.errors import UserError
from hvd.train import mesh, pretrained, state
from hvd.train.state import Graph
from tests.train.compare import arrays
from tests.train.test_checkpoints import Deeper, Wider, start
from tests.train.test_state import Small


@pytest.fixture
def graph():
    return Graph(Small, lambda path: path[0] == "first")


@pytest.fixture
def openpi(tmp_path, graph) -> Path:
    """A checkpoint as openpi writes it: every path ends in "value"."""
    import orbax.checkpoint as ocp

    params = jax.tree.map(lambda x: x + 1.0, graph.init(jax.random.key(5)))
    ocp.PyTreeCheckpointer().save(tmp_path / "pi0", {"params": jax.tree.map(lambda x: {"value": x}, params)})
    return tmp_path / "pi0"


def test_loaded_parameters_replace_all_copies(openpi, graph, capsys):
    run, _ = start(graph)
    loaded = pretrained.load(run, str(openpi), graph)
    expected = jax.tree.map(lambda x: x + 1.0, graph.init(jax.random.key(5)))
    for part in (loaded.trained, loaded.ema, loaded.target):
        np.testing.assert_array_equal(part["rest"]["0"]["kernel"], expected["rest"]["0"]["kernel"])
    np.testing.assert_array_equal(loaded.frozen["first"]["kernel"], expected["first"]["kernel"])
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, run)
    assert "6 arrays" in capsys.readouterr().out


def test_partial_loading_says_what_is_new(openpi, capsys):
    graph = Graph(Deeper)
    run, _ = start(graph)
    loaded = pretrained.load(run, str(openpi), graph)
    np.testing.assert_array_equal(loaded.trained["last"]["kernel"], run.trained["last"]["kernel"])
    assert "2 initialised: last/bias, last/kernel" in capsys.readouterr().out


def test_mismatch_names_the_parameter(openpi):
    graph = Graph(Wider)
    with pytest.raises(UserError, match=r"first/kernel has shape \[3, 4\] in it, the model needs \[5, 4\]"):
        pretrained.load(start(graph)[0], str(openpi), graph)


def test_nothing_there(tmp_path, graph):
    run, _ = start(graph)
    assert pretrained.load(run, "", graph) is run
    with pytest.raises(UserError, match="no Orbax checkpoint there"):
        pretrained.load(run, str(tmp_path), graph)


def test_the_runs_own_checkpoint(trained):
    """A policy run's params are in openpi's form too."""
    from hvd.train.policy import make_graph

    graph = make_graph(trained)
    init = state.make_init(graph, optax.sgd(0.1), ema=False, target=False)
    fresh = state.create(init, 3, state.abstract(init, mesh.make_devices(1)))
    loaded = pretrained.load(fresh, trained.policy_dir + "/checkpoints/12", graph)
    stored = arrays(trained.policy_dir, 12)
    for name, leaf in state.named(loaded.trained).items():
        np.testing.assert_array_equal(leaf, stored[f"params/params/{name}"])


def test_openpis_tiny_checkpoint(golden, capsys):
    """Every array of a checkpoint that openpi wrote finds its place in a tree of the same names."""
    folder = golden / "orbax_tiny" / "4"
    if not folder.exists():
        pytest.skip("no orbax_tiny")
    arrays = np.load(golden / "pi0_tiny.npz")
    names = {name[2:]: arrays[name] for name in arrays.files if name.startswith("p/")}
    shapes = state.nest({tuple(n.split("/")): jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in names.items()})

    class Named(Graph):
        """As much of a graph as loading needs."""

        def __init__(self):
            pass

        def split(self, params):
            return params, {}

    devices = mesh.make_devices(1)
    params = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), devices.replicated), shapes)
    blank = state.TrainState(np.int32(0), params, {}, (), {}, {})
    loaded = pretrained.load(blank, str(folder), Named())
    for name, leaf in state.named(loaded.trained).items():
        np.testing.assert_array_equal(leaf, names[name])
    assert f"{len(names)} arrays" in capsys.readouterr().out
