"""Acceptance B2: five steps are the same on every mesh, in micro-batches, over processes, and after a change of mesh.

Adam's eps is large there, so that what is compared is not the rounding of gradients that are zero.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from hvd.train import gradients, mesh
from tests.train import meshes
from tests.train.test_processes import free_port

CASES = ("policy", "policy-lora", "policy-pi05", "value")
ROOT = Path(__file__).parents[2]


def start(out: Path, devices: int, environment: dict[str, str]) -> subprocess.Popen:
    """tests.train.meshes in a process with so many devices, which writes `out`."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "tests.train.meshes", str(out)]
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            command, env=os.environ | flags | environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )


def read(out: Path) -> dict[str, dict[str, np.ndarray]]:
    """<case>/<mesh> -> its arrays."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(out) as arrays:
        for name in arrays.files:
            case, where, rest = name.split("/", 2)
            found.setdefault(f"{case}/{where}", {})[rest] = arrays[name]
    return found


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.startswith("params/"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("meshes") / "one.npz"
    assert start(out, 8, {}).wait(1500) == 0, out.with_suffix(".log").read_text()
    return read(out)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_meshes_agree(one_process):
    for case in CASES:
        single = one_process[f"{case}/1x1"]
        trained = [name for name in single if name.startswith("params/trained/")]
        moved = max(np.abs(single[name] - single[name.replace("trained", "ema")]).max() for name in trained)
        assert len(trained) > 30 and moved > 1e-4, "there is something to compare"
        for where in meshes.CASES[case][3][1:]:
            assert_same(one_process[f"{case}/{where}"], single)
            parts = meshes.MESHES[where][1]
            assert one_process[f"{case}/{where}"]["share"] < 1.1 / parts, "the state is really split"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_micro_batches_are_one_batch(one_process):
    for case in ("policy", "value"):
        assert_same(one_process[f"{case}-4/2x4"], one_process[f"{case}/1x1"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_resumed_on_another_mesh(one_process):
    """Saved on 2x4 after two steps."""
    for case in CASES:
        for where in {"4x2", "1x1"} & set(meshes.CASES[case][3]):
            assert_same(one_process[f"{case}/resumed-{where}"], one_process[f"{case}/1x1"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_processes_agree(one_process, tmp_path):
    group = {"HVD_COORDINATOR": f"localhost:{free_port()}", "HVD_NUM_PROCESSES": "2"}
    outs = [tmp_path / f"{index}.npz" for index in range(2)]
    running = [start(out, 4, group | {"HVD_PROCESS_ID": str(index)}) for index, out in enumerate(outs)]
    codes = [process.wait(1200) for process in running]
    assert codes == [0, 0], "\n".join(out.with_suffix(".log").read_text() for out in outs)
    found = read(outs[0])
    for case in ("policy", "policy-lora", "value"):
        assert_same(found[f"{case}/2 processes"], one_process[f"{case}/1x1"])
        assert found[f"{case}/2 processes"]["share"] < 1.1 / 4


def test_parts_of_a_batch_and_back():
    devices = mesh.make_devices(1)
    batch = {"a": np.arange(12.0), "b": {"c": np.arange(24).reshape(12, 2)}}
    parts = jax.jit(lambda x: gradients.split(x, 3, devices))(batch)
    assert jax.tree.map(np.shape, parts) == {"a": (3, 4), "b": {"c": (3, 4, 2)}}
    assert sorted(np.asarray(parts["a"]).ravel()) == list(range(12))
    again = jax.jit(lambda x: gradients.merge(x, devices))(parts)
    jax.tree.map(np.testing.assert_array_equal, again, batch)


def test_the_cases_are_uneven():
    """No micro-batch of the comparison has the whole batch's shares of the two datasets."""
    rows = (np.arange(meshes.ROWS) >= meshes.OPTIMAL).reshape(4, -1).mean(axis=1)
    assert (rows != rows.mean()).all()
