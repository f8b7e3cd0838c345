"""2 processes x 2 CPU devices train what 1 x 4 does, pi0.5 through both stages, and each resumes the run of the other.

Five steps of pi0 on two processes: tests/train/test_sharding.py.
"""

import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from hvd.errors import EXIT_COMPLETE, EXIT_STOPPED
from hvd.method.table import Advantages
from hvd.train import complete
from tests.train import factory
from tests.train.children import Child, Children
from tests.train.compare import arrays, lines, metrics
from tests.train.test_pi05 import changes

CHANGES = changes(fsdp_devices=2)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(children: Children, step: str, settings: factory.Settings, processes: int) -> list[Child]:
    """The step on 4 devices in all."""
    devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}"}
    if processes == 1:
        return [children.start(step, settings, devices)]
    group = {"HVD_COORDINATOR": f"localhost:{free_port()}", "HVD_NUM_PROCESSES": str(processes)}
    return [
        children.start(step, settings, devices | group | {"HVD_PROCESS_ID": str(index)}) for index in range(processes)
    ]


def end(running: list[Child], code: int) -> None:
    codes = [child.end() for child in running]
    assert codes == [code] * len(running), "\n".join(child.text() for child in running)


def assert_close(ours: str, theirs: str) -> None:
    """Same lines, same visited samples, losses and parameters to float tolerance."""
    found, expected = metrics(ours), metrics(theirs)
    assert len(found) == len(expected) > 0
    for line, wanted in zip(found, expected, strict=True):
        assert line.keys() == wanted.keys() and (line["step"], line["split"]) == (wanted["step"], wanted["split"])
        for name in line.keys() - {"step", "split"}:
            np.testing.assert_allclose(
                line[name], wanted[name], rtol=2e-4, atol=2e-5, err_msg=f"{name} at {line['step']}"
            )
    assert lines(Path(ours, "samples.jsonl")) == lines(Path(theirs, "samples.jsonl"))
    trained, reference = arrays(ours, 12), arrays(theirs, 12)
    assert trained.keys() == reference.keys()
    for name, x in trained.items():
        if name.startswith("params/"):
            np.testing.assert_allclose(x, reference[name], atol=3e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_train_what_one_does(data_folder, tmp_path):
    children = Children(tmp_path)
    runs = {name: str(tmp_path / name) for name in ("one", "two", "both")}
    cfgs = {name: factory.experiment(data_folder, runs_dir=path, **CHANGES) for name, path in runs.items()}

    def settings(name: str, slow_s: float = 0.0) -> factory.Settings:
        return factory.Settings(str(data_folder), {"runs_dir": runs[name], **CHANGES}, slow_s, split_from=1 << 10)

    for step in ("train-value", "train-policy"):
        end(start(children, step, settings("one"), 1), EXIT_COMPLETE)
        end(start(children, step, settings("two"), 2), EXIT_COMPLETE)
    for stage in ("value", "policy"):
        one, two = (getattr(cfgs[name], f"{stage}_dir") for name in ("one", "two"))
        assert_close(two, one)
        started = lines(Path(two, "events.jsonl"))[0]
        assert (started["devices"], started["processes"]) == (4, 2)
        assert started["state_bytes_per_device"] < 0.6 * started["state_bytes"], started  # fsdp really splits by 2
        complete.check_complete(two, stage=stage, cfg=cfgs["two"])

    # the table that the policy stage made on its way, each process with its own rows
    tables = [Advantages.read(cfgs[name].advantages_dir) for name in ("one", "two")]
    for name in ("row", "v", "q", "omega"):
        ours, theirs = (getattr(table, name) for table in tables)
        assert len(ours) > 100
        np.testing.assert_allclose(ours, theirs, atol=2e-3, err_msg=name)

    # stopped in one shape, by a signal to the last process alone, and finished in the other
    both = cfgs["both"]
    for stage, before, after in (("value", 2, 1), ("policy", 1, 2)):
        folder = Path(getattr(both, f"{stage}_dir"))
        running = start(children, f"train-{stage}", settings("both", slow_s=0.3), before)
        assert running[-1].wait_until(lambda f=folder: steps_done(f) >= 6), running[-1].text()
        running[-1].send(signal.SIGTERM)
        end(running, EXIT_STOPPED)
        end(start(children, f"train-{stage}", settings("both"), after), EXIT_COMPLETE)
        assert_close(str(folder), getattr(cfgs["one"], f"{stage}_dir"))
        events = lines(folder / "events.jsonl")
        assert [line["processes"] for line in events if line["event"] == "start"] == [before, after]
        assert 6 <= next(line["step"] for line in events if line["event"] == "stop") < 12


def steps_done(folder: Path) -> int:
    path = folder / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
