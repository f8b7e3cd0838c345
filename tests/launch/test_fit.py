"""The launcher's question to `hvd plan`: what is refused, what goes on, and what is said."""

import json
import sys

import pytest

from hvd.clusters.local import cluster as local
from hvd.clusters.local import runner
from hvd.errors import UserError
from hvd.launch import fit, submit

DEMO = ["--config", "demo"]


@pytest.fixture
def plans(monkeypatch, tmp_path):
    """Makes `hvd plan` print these plans and exit so; the arguments that it was given come back."""
    asked = tmp_path / "asked"

    def prints(found: object, code: int = 0):
        text = found if isinstance(found, str) else json.dumps({"plans": found})
        program = (
            f"import sys; open({str(asked)!r}, 'w').write(' '.join(sys.argv[1:])); print({text!r}); sys.exit({code})"
        )
        monkeypatch.setattr(fit, "COMMAND", (sys.executable, "-c", program))
        return asked

    return prints


def plan(fits, **changes):
    about = {"config": "pi0_r1", "stage": "policy", "devices": "2xrtx4090-24gb", "conclusion": "needs 30 of 20 GiB"}
    return about | {"fits": fits, "advice": "", "nodes": 1} | changes


def test_what_fits_is_told_and_goes_on(plans, capsys):
    asked = plans([plan(True, conclusion="fits: 9 of 20 GiB")])
    fit.check("policy", ["--config", "pi0_r1"], "2xrtx4090-24gb", 3)
    assert capsys.readouterr().out == "memory: policy stage on 2xrtx4090-24gb: fits: 9 of 20 GiB\n"
    assert asked.read_text() == ("--json --certain --devices 2xrtx4090-24gb --nodes 3 --stage policy --config pi0_r1")


def test_what_may_fit_goes_on(plans, capsys):
    plans([plan(None, conclusion="may fit")])
    fit.check("all", DEMO, "2xrtx4090-24gb", 1)
    assert "may fit" in capsys.readouterr().out


def test_what_cannot_fit_is_refused_with_the_advice(plans):
    plans([plan(True, stage="value"), plan(False, advice="--policy.remat full")], code=2)
    with pytest.raises(UserError) as error:
        fit.check("all", DEMO, "2xrtx4090-24gb", 1)
    line = "pi0_r1, policy stage on 2xrtx4090-24gb needs 30 of 20 GiB; it fits with: --policy.remat full"
    assert str(error.value) == f"{line} (--no-plan submits it all the same)"
    plans([plan(False)], code=2)
    with pytest.raises(UserError, match="nothing that was tried makes it fit"):
        fit.check("policy", DEMO, "2xrtx4090-24gb", 1)


def test_a_mistake_stops_and_a_failed_plan_does_not(plans, capsys):
    plans("", code=2)
    with pytest.raises(UserError, match="the plan found a mistake"):
        fit.check("value", DEMO, "1xh100-80gb", 1)
    plans("Traceback", code=1)
    fit.check("value", DEMO, "1xh100-80gb", 1)
    assert "could not be made" in capsys.readouterr().out


def test_unknown_devices_are_a_mistake_before_anything_runs(plans):
    asked = plans([])
    with pytest.raises(UserError, match="unknown device 'h10'; nearest: h100-80gb"):
        fit.check("value", DEMO, "8xh10", 1)
    assert not asked.exists()


@pytest.mark.parametrize(
    "visible, rows, want, why",
    [
        ([], "", "", ""),
        (["0", "1"], "0, GPU-a, NVIDIA H100 80GB HBM3\n1, GPU-b, NVIDIA H100 80GB HBM3\n", "2xh100-80gb", ""),
        (["1"], "0, GPU-a, NVIDIA L4\n1, GPU-b, NVIDIA GeForce RTX 4090\n", "1xrtx4090-24gb", ""),
        (["GPU-b"], "0, GPU-a, NVIDIA L4\n1, GPU-b, NVIDIA GeForce RTX 4090\n", "1xrtx4090-24gb", ""),
        (["0", "1"], "0, GPU-a, NVIDIA L4\n1, GPU-b, NVIDIA GeForce RTX 4090\n", "", "several kinds"),
        (["0"], "0, GPU-a, NVIDIA Quadro X\n", "", "not in the table"),
        (["7"], "0, GPU-a, NVIDIA L4\n", "", "several kinds or unknown (none)"),
    ],
)
def test_this_machines_gpus(monkeypatch, tmp_path, capsys, visible, rows, want, why):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint({rows!r}, end='')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(runner, "gpus", lambda: visible)
    assert local.hardware() == want
    reason = capsys.readouterr().err
    assert why in reason and bool(why) == bool(reason)


def test_without_nvidia_smi_the_job_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(runner, "gpus", lambda: ["0"])
    assert local.hardware() == ""
    assert capsys.readouterr().err == "memory: not planned, nvidia-smi does not tell the GPUs' names; --devices does\n"


def test_submit_refuses_before_it_starts_anything(plans, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    plans([plan(False, config="demo")], code=2)
    assert submit.main(["--stage", "value", "--devices", "1xrtx4090-24gb"]) == 2
    assert capsys.readouterr().err.startswith("error: demo, policy stage on 2xrtx4090-24gb needs 30 of 20 GiB")
    assert not list(tmp_path.rglob("*.log")) and not (tmp_path / "runs").exists()
