"""Meshes, the parameter rule against openpi's, and the environment of a group of processes."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from hvd.errors import Stopped, UserError
from hvd.train import mesh, preemption
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
    for name, value in zip(mesh.ENVIRONMENT, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        mesh.initialize()


def test_poll(monkeypatch):
    devices = mesh.make_devices(1)
    devices.poll("here")
    assert devices.flag().tolist() == [0] * devices.count
    monkeypatch.setattr(preemption, "_received", ["SIGTERM"])
    assert devices.flag().tolist() == [1] * devices.count
    with pytest.raises(Stopped, match="by SIGTERM here"):
        devices.poll("here")
