"""Meshes, the parameter rule against openpi's, and the environment of a group of processes."""

import dataclasses
import json
import os
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from hvd.errors import Stopped, UserError
from hvd.experiments import get_config
from hvd.method import policy
from hvd.runtime import preemption, processes
from hvd.train import mesh, run_dir, state
from hvd.train.mesh import Devices


def abstract(fsdp: int) -> Devices:
    return Devices(AbstractMesh((1, fsdp), ("data", "fsdp")))  # pyright: ignore[reportArgumentType]


def spec(devices: Devices, shape: tuple[int, ...], dtype="float32") -> list:
    found = list(devices.parameter(shape, dtype).spec)
    return found + [None] * (len(shape) - len(found))


@pytest.mark.parametrize(
    "shape, dtype, expected",
    [
        ((1024, 1024), "float32", [None, "fsdp"]),  # 4 MiB; of equal axes the later
        ((1024, 1024), "bfloat16", [None, None]),  # 2 MiB
        ((2048, 1024), "bfloat16", ["fsdp", None]),
        ((4, 2048, 1024), "float32", [None, "fsdp", None]),
        ((4_000_000,), "float32", [None]),  # a vector
        ((2049, 1023, 8), "float32", [None, None, "fsdp"]),  # the largest axis that can be divided
        ((2049, 1023), "float32", [None, None]),
        ((), "int32", []),
    ],
)
def test_parameter_rule(shape, dtype, expected):
    assert spec(abstract(8), shape, dtype) == expected
    assert spec(abstract(1), shape, dtype) == [None] * len(shape)


def test_parameter_rule_is_openpis(golden):
    path = golden / "fsdp_specs_trainstate.json"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    for name, case in json.loads(path.read_text()).items():
        devices = abstract(int(name.rpartition("fsdp")[2]))
        for leaf, shape, dtype, expected, _ in case["leaves"]:
            wanted = expected + [None] * (len(shape) - len(expected))
            assert spec(devices, tuple(shape), dtype) == wanted, (name, leaf)


def test_mesh_of_this_process():
    devices = mesh.make_devices(1)
    assert devices.mesh.axis_names == ("data", "fsdp") and devices.count == len(jax.devices())
    placed = devices.place_batch({"a": np.arange(4.0), "b": {"c": np.zeros((4, 2), np.uint8)}})
    assert placed["a"].sharding == devices.batch and placed["b"]["c"].dtype == np.uint8
    assert devices.is_main and devices.from_main(np.arange(3)).tolist() == [0, 1, 2]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """As much of a device as the layout needs."""

    id: int
    process_index: int


def gpus(*per_process: int) -> list[Gpu]:
    return [Gpu(8 * i + j, i) for i, count in enumerate(per_process) for j in range(count)]


def groups(devices: list[Gpu], fsdp: int, nodes=None) -> list[list[int]]:
    return [[d.process_index for d in row] for row in mesh.arrange(devices, fsdp, nodes)]


def test_groups_stay_inside_a_node():
    """One process per GPU, numbered across the nodes in turn: neighbours in the mesh are neighbours in a node."""
    nodes = {i: "ab"[i % 2] for i in range(8)}
    assert groups(gpus(*[1] * 8), 0, nodes) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert groups(gpus(*[1] * 8)[::-1], 2, nodes) == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert groups(gpus(4, 4), 0) == [[0] * 4, [1] * 4]  # a process per node
    assert groups(gpus(8), 0, {0: "a"}) == [[0] * 8]


def test_a_group_across_nodes_is_said(capsys):
    assert groups(gpus(2, 2), 2) == [[0, 0], [1, 1]] and not capsys.readouterr().out
    assert groups(gpus(2, 2), 4) == [[0, 0, 1, 1]]
    said = capsys.readouterr().out
    assert said.startswith("fsdp_devices 4: groups reach across nodes of 2 devices") and said.count("\n") == 1


def test_uneven_nodes_and_processes():
    with pytest.raises(UserError, match="all processes need equally many devices, there are 4 on process 0, 2 on pro"):
        mesh.arrange(gpus(4, 2), 2)
    with pytest.raises(UserError, match="fsdp_devices 0 needs nodes of equally many devices, these have 4, 2: set a"):
        mesh.arrange(gpus(2, 2, 2), 0, {0: "a", 1: "a", 2: "b"})


def test_a_process_loads_the_rows_of_its_place():
    order = mesh.arrange(gpus(1, 1, 1, 1), 2, {0: "a", 1: "b", 2: "a", 3: "b"})
    places = [mesh.place_in(order, index) for index in range(4)]
    assert places == [(0, 4), (2, 4), (1, 4), (3, 4)]
    assert mesh.make_devices(1).place_of_process == (0, 1)


def test_processes_of_this_machine_share_a_node():
    assert len(mesh._node_digest()) == 16 and mesh._node_digest() == mesh._node_digest()
    assert mesh._nodes() == {0: 0}


def test_mistakes():
    devices = Devices(AbstractMesh((2, 2), ("data", "fsdp")))  # pyright: ignore[reportArgumentType]
    devices.check_batch(8, 2, "value")
    for rows in (0, 6):
        with pytest.raises(UserError, match=rf"value\.batch_size {rows} cannot be divided over the 4 devices: "):
            devices.check_batch(rows, 1, "value")
    with pytest.raises(UserError, match=r"over the 4 devices in 2 micro-batches .*: choose a multiple of 8"):
        devices.check_batch(12, 2, "value")
    with pytest.raises(UserError, match="fsdp_devices 3 does not divide the 1 devices"):
        mesh.make_devices(3, jax.devices()[:1])


@pytest.mark.parametrize(
    "values, message",
    [
        (("a:1", None, None), "HVD_NUM_PROCESSES is not set, but HVD_COORDINATOR is"),
        (("a:1", "two", "0"), "must be whole numbers"),
        (("a:1", "2", "2"), "HVD_PROCESS_ID 2 is not below HVD_NUM_PROCESSES 2"),
    ],
)
def test_half_an_environment(monkeypatch, values, message):
    for name, value in zip(processes.ENVIRONMENT, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        mesh.initialize()


def test_processes_that_run_other_code_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(mesh.multihost_utils, "process_allgather", lambda mine: np.stack([mine, others(mine)]))
    others = lambda told: told  # noqa: E731
    assert len(set(mesh._nodes().values())) == 1
    mine = run_dir.running()
    monkeypatch.setenv("HVD_IMAGE", "registry/hvd@sha256:" + "b" * 64)
    assert run_dir.running() == f"{mine}, image registry/hvd@sha256:{'b' * 64}"
    others = lambda told: np.frombuffer(told.tobytes().replace(b"b" * 64, b"a" * 64), np.uint8)  # noqa: E731
    with pytest.raises(UserError, match=r"process 1 runs hvd .*sha256:a{64}, process 0 runs hvd .*sha256:b{64}: bring"):
        mesh._nodes()


def test_poll(monkeypatch):
    devices = mesh.make_devices(1)
    devices.poll("here")
    assert devices.flag().tolist() == [0] * devices.count
    monkeypatch.setattr(preemption, "_received", ["SIGTERM"])
    assert devices.flag().tolist() == [1] * devices.count
    with pytest.raises(Stopped, match="by SIGTERM here"):
        devices.poll("here")


def test_deterministic_sets_the_flag_before_the_backend(monkeypatch):
    flag = "--xla_gpu_deterministic_ops=true"
    monkeypatch.setenv("XLA_FLAGS", "--a=b")
    mesh.be_deterministic()
    assert os.environ["XLA_FLAGS"] == "--a=b", "a CPU needs none"
    jax.config.update("jax_platforms", None)
    try:
        for _ in range(2):
            mesh.be_deterministic()
        assert os.environ["XLA_FLAGS"] == f"--a=b {flag}"
        monkeypatch.delenv("XLA_FLAGS")
        mesh.be_deterministic()
        assert os.environ["XLA_FLAGS"] == flag
    finally:
        jax.config.update("jax_platforms", "cpu")


@pytest.mark.parametrize("config", ["pi0_r1", "pi0_r1_lora"])
@pytest.mark.parametrize("fsdp", [2, 8])
def test_the_real_state_lies_where_openpis_does(golden, config, fsdp):
    """Every array of pi0's state, by name: parameters, averages, both moments. One difference: the scales of frozen
    norms are float32 here and bfloat16 there; they are small and on every device either way.
    """
    path = golden / "fsdp_specs_trainstate.json"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    case = json.loads(path.read_text())[f"{'lora_both' if 'lora' in config else 'full'}_fsdp{fsdp}"]
    cfg = get_config(config)
    cfg = dataclasses.replace(cfg, policy=dataclasses.replace(cfg.policy, ema_decay=0.0 if "lora" in config else 0.99))
    devices = abstract(fsdp)
    like = state.abstract(policy.make_program(cfg, devices, 21).init, devices)
    opt_state: Any = like.opt_state
    moments = opt_state[1][0]
    ours = {
        ".params": state.named(state.join(like.trained, like.frozen)),
        ".ema_params": state.named(like.ema),
        ".opt_state[1][0].mu": state.named(moments.mu),
        ".opt_state[1][0].nu": state.named(moments.nu),
    }
    for leaf, shape, dtype, expected, _ in case["leaves"]:
        if not shape:
            continue  # counters
        name = "/".join(re.findall(r"\['([^']+)'\]", leaf))
        found = ours[leaf.partition("['")[0]].pop(name)
        assert found.shape == tuple(shape), leaf
        narrow_norm = dtype == "bfloat16" and "norm" in name
        assert found.dtype == ("float32" if narrow_norm else dtype), leaf
        if narrow_norm:
            assert not any(expected), leaf
        places = list(found.sharding.spec)
        assert places + [None] * (len(shape) - len(places)) == expected + [None] * (len(shape) - len(expected)), leaf
        assert not places or places[0] is None or len(shape) == 2, "the scan over layers slices their axis"
    assert not any(ours.values()), ours
