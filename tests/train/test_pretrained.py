"""weight_loader: an openpi checkpoint's parameters become the start of a run."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hvd.errors import UserError
from hvd.models import weights
from hvd.train import complete, inputs, mesh, pretrained, state
from hvd.train.state import Graph
from tests.folders import ROOT
from tests.storage.servers import BUCKET, files_below, google_put, google_server, proxy_before
from tests.train import reading
from tests.train.compare import arrays
from tests.train.test_checkpoints import Deeper, Wider, start
from tests.train.test_processes import free_port
from tests.train.test_state import Small


@pytest.fixture
def graph():
    return Graph(Small, lambda path: path[0] == "first")


@pytest.fixture
def openpi(tmp_path, graph) -> Path:
    """A checkpoint as openpi writes it: every path ends in "value"."""
    weights.write(tmp_path / "pi0", jax.tree.map(lambda x: x + 1.0, graph.init(jax.random.key(5))))
    return tmp_path / "pi0"


def load(run, folder, graph):
    return pretrained.load(run, pretrained.open_checkpoint(str(folder)), graph)


def test_loaded_parameters_replace_all_copies(openpi, graph, capsys):
    run, like = start(graph)
    loaded = load(run, openpi, graph)
    expected = jax.tree.map(lambda x: x + 1.0, graph.init(jax.random.key(5)))
    for part in (loaded.trained, loaded.ema, loaded.target):
        np.testing.assert_array_equal(part["rest"]["0"]["kernel"], expected["rest"]["0"]["kernel"])
    np.testing.assert_array_equal(loaded.frozen["first"]["kernel"], expected["first"]["kernel"])
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, like)
    assert jax.tree.map(lambda x: x.dtype, loaded) == jax.tree.map(lambda x: x.dtype, like)
    assert "6 arrays" in capsys.readouterr().out
    assert run.trained["rest"]["0"]["kernel"].is_deleted(), "no device holds both"
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    step(loaded)  # no two leaves are one buffer


def test_frozen_parameters_are_cast(openpi):
    """Kept narrow where the model keeps them so: the same as casting after loading."""
    narrow = Graph(
        Small,
        lambda path: path[0] == "first",
        lambda name, frozen: jnp.dtype("bfloat16" if frozen else "float32"),
    )
    loaded = load(start(narrow)[0], openpi, narrow)
    expected = jax.tree.map(lambda x: x + 1.0, Graph(Small).init(jax.random.key(5)))
    assert loaded.frozen["first"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(loaded.frozen["first"]["kernel"]), np.asarray(expected["first"]["kernel"].astype(jnp.bfloat16))
    )
    assert loaded.trained["rest"]["0"]["kernel"].dtype == loaded.ema["rest"]["0"]["kernel"].dtype == jnp.float32


def test_partial_loading_says_what_is_new(openpi, capsys):
    graph = Graph(Deeper)
    run, _ = start(graph)
    kept = np.array(run.trained["last"]["kernel"])
    loaded = load(run, openpi, graph)
    np.testing.assert_array_equal(loaded.trained["last"]["kernel"], kept)
    np.testing.assert_array_equal(loaded.ema["last"]["kernel"], kept)
    assert "2 initialised: last/{bias, kernel}" in capsys.readouterr().out


def test_what_is_left_over_is_said(openpi, tmp_path, graph, capsys):
    weights.write(tmp_path / "more", {**graph.init(jax.random.key(5)), "unknown": {"w": np.zeros(3)}})
    load(start(graph)[0], tmp_path / "more", graph)
    assert "1 left over in the checkpoint: unknown/w" in capsys.readouterr().out


def test_mismatch_names_the_parameter(openpi):
    graph = Graph(Wider)
    run, _ = start(graph)
    with pytest.raises(UserError, match=r"first/kernel has shape \[3, 4\] in it, the model needs \[5, 4\]"):
        load(run, openpi, graph)
    assert not run.trained["first"]["kernel"].is_deleted()


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no Orbax checkpoint there"):
        pretrained.open_checkpoint(str(tmp_path))


def test_the_runs_own_checkpoint(trained):
    """A policy run's params are in openpi's form too."""
    from hvd.method.policy import make_graph

    graph = make_graph(trained)
    init = state.make_init(graph, optax.sgd(0.1), ema=False, target=False)
    fresh = state.create(init, 3, state.abstract(init, mesh.make_devices(1)))
    loaded = load(fresh, trained.policy_dir + "/checkpoints/12", graph)
    stored = arrays(trained.policy_dir, 12)
    for name, leaf in state.named(loaded.trained).items():
        np.testing.assert_array_equal(leaf, stored[f"params/params/{name}"])


# ------------------------------------------------------------------------------------------------- before it is loaded


def imitation(fresh, **policy):
    return fresh(policy={"weighting": "none", "suboptimal_share": 0.0, **policy})


@pytest.fixture
def google(monkeypatch, tmp_path):
    for name in ("HVD_OFFLINE", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HVD_CACHE", str(tmp_path / "cache"))
    with google_server() as address, proxy_before(*address) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.address)
        yield address, proxy


def test_a_wrong_path_or_url_touches_nothing(fresh, google, tmp_path):
    from hvd.method import policy

    for path, line in (
        (str(tmp_path / "nowhere"), "no Orbax checkpoint there"),
        (f"gs://{BUCKET}/nowhere/params", "there is nothing"),
        ("ftp://host/params", "hvd fetches gs://BUCKET/PATH"),
    ):
        cfg = imitation(fresh, weight_loader=path)
        for ask in (policy.main, lambda c: inputs.check_weights(c, ("policy",))):
            with pytest.raises(UserError, match=rf"^policy.weight_loader {path}: {line}"):
                ask(cfg)
        assert not Path(cfg.runs_dir).exists() or not list(Path(cfg.runs_dir).rglob("config.yaml"))


def test_another_models_checkpoint_touches_nothing(fresh, trained):
    from hvd.method import policy

    cfg = imitation(fresh, weight_loader=trained.policy_dir + "/checkpoints/12")
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=65))
    inputs.check_weights(cfg, ("policy",))
    with pytest.raises(UserError, match=r"input_embedding has shape \[64, 64\] in it, .*: set model.vocab_size 64"):
        policy.main(cfg)
    assert not Path(cfg.policy_dir).exists()


@pytest.mark.slow
def test_a_run_from_a_url(fresh, google, trained, capsys, monkeypatch):
    """Fetched once, trained from; going on and starting again ask the network for nothing."""
    from hvd.method import policy

    address, proxy = google
    source = Path(trained.policy_dir, "checkpoints", "12", "params")
    google_put(address, {f"pi0/params/{name}": data for name, data in files_below(source).items()})
    cfg = imitation(fresh, weight_loader=f"gs://{BUCKET}/pi0/params", num_train_steps=1)
    policy.main(cfg)
    assert "policy.weight_loader gs://models/pi0/params: " in capsys.readouterr().out
    begun, stored = arrays(cfg.policy_dir, 1), arrays(trained.policy_dir, 12)
    name = "params/params/PaliGemma/llm/embedder/input_embedding"
    np.testing.assert_allclose(begun[name], stored[name], atol=1e-2)

    asked = len(proxy.requests)
    longer = imitation(fresh, weight_loader=f"gs://{BUCKET}/pi0/params", num_train_steps=2)
    shutil.rmtree(os.environ["HVD_CACHE"])  # a run that goes on needs no pretrained weights any more
    monkeypatch.setenv("HVD_OFFLINE", "1")
    policy.main(longer)
    complete.check_complete(cfg.policy_dir, stage="policy", cfg=longer)
    assert len(proxy.requests) == asked
    with pytest.raises(UserError, match="HVD_OFFLINE is set"):
        policy.main(longer, overwrite=True)
    complete.check_complete(cfg.policy_dir, stage="policy", cfg=longer)  # --overwrite has deleted nothing


def test_a_value_run_from_a_policys_weights(fresh, trained, capsys):
    from hvd.method import value

    cfg = fresh(value={"weight_loader": trained.policy_dir + "/checkpoints/12", "num_train_steps": 1})
    value.main(cfg)
    out = capsys.readouterr().out
    assert "not taken, being of the policy's own expert" in out and "initialised: " in out
    begun, stored = arrays(cfg.value_dir, 1), arrays(trained.policy_dir, 12)
    name = "params/params/PaliGemma/llm/embedder/input_embedding"
    np.testing.assert_allclose(begun[name], stored[name], atol=1e-2)


# ---------------------------------------------------------------------------------------------------- in many processes


def child(*argv: object, devices: int, **environment: str) -> subprocess.Popen[str]:
    env = os.environ | environment | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "tests.train.reading", *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(*children: subprocess.Popen[str]) -> None:
    texts = [process.communicate(timeout=200)[0] for process in children]
    assert [process.returncode for process in children] == [0] * len(children), "\n".join(texts)


@pytest.mark.slow
def test_written_and_read_is_the_identity(tmp_path):
    """A full and a LoRA model (its frozen half in bfloat16), written from 4 devices, read onto 2."""
    end(child("identity", tmp_path, devices=4))


@pytest.mark.slow
def test_each_process_reads_its_own_part(tmp_path):
    """2 processes x 2 devices: each reads half of the bytes, and no device ever holds a whole large array."""
    end(child("write", tmp_path / "params", devices=4))
    group = {"HVD_COORDINATOR": f"localhost:{free_port()}", "HVD_NUM_PROCESSES": "2"}
    outs = [tmp_path / f"{i}.json" for i in range(2)]
    end(
        *(
            child("read", tmp_path / "params", out, devices=2, HVD_PROCESS_ID=str(i), **group)
            for i, out in enumerate(outs)
        )
    )
    for found in (json.loads(out.read_text()) for out in outs):
        assert found["right"] and found["devices"] == 4
        assert found["parts"]["PaliGemma/llm/large"] == [[4, 1024, 512]] * 2
        assert found["parts"]["head/kernel"] == [[512, 1024]] * 2
        assert 0.3 * reading.SIZE < found["bytes"] < 0.6 * reading.SIZE, found
        assert found["held"] < 0.3 * reading.SIZE
