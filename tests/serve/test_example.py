"""The example loop of docs/examples, for some seconds of real time, with a server that holds the robot's pose."""

import runpy
import sys

import numpy as np

from hvd.sim.scene import BASE
from tests.folders import ROOT
from tests.serve.test_replay import running


def test_the_loop_drives_the_simulated_robot_in_time(monkeypatch, capsys, tmp_path):
    asked = []

    def hold(request):
        asked.append(set(request))
        state = request["observation.state"].copy()
        state[BASE] = 0
        return {"actions": np.tile(state, (20, 1))}

    with running(hold, {"robot": "r1"}) as url:
        words = ["r1_loop.py", "--url", url, "--seconds", "3", "--record", str(tmp_path / "x")]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(ROOT / "docs/examples/r1_loop.py"), run_name="__main__")
    out = capsys.readouterr().out
    ticks = int(out.split()[0])
    assert 20 <= ticks <= 31 and "0 of 0 episodes succeeded" in out
    assert 2 <= len(asked) <= 4  # every ten actions
    assert asked[0] == {"observation.state", "observation.environment_state", "prompt"}
    assert (tmp_path / "x").stat().st_size > 1000
