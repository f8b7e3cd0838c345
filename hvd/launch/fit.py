"""Before a job is queued: would it fit its devices? Asks `hvd plan`, a process of its own; imports no jax.

A job is refused only on certain knowledge: what its state and gradients alone need, or the GPU compiler's own figure.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

from hvd.errors import EXIT_COMPLETE, EXIT_USER, UserError
from hvd.plan import devices as plan_devices

COMMAND = (sys.executable, "-m", "hvd.cli", "plan")
_STAGES = {"all": "both", "value": "value", "policy": "policy", "evaluate": "policy"}


def check(stage: str, options: Sequence[str], devices: str, nodes: int) -> None:
    """Raise UserError, with what would make it fit, where a stage cannot fit; a line where nothing can be said.

    Args:
        stage: of the launcher.
        options: tell `hvd` the config.
        devices: of a node, as `--devices` of `hvd plan` takes them.
    """
    plan_devices.parse(devices, nodes)
    asked = ["--json", "--certain", "--devices", devices, "--nodes", str(nodes), "--stage", _STAGES[stage]]
    done = subprocess.run([*COMMAND, *asked, *options], stdout=subprocess.PIPE, text=True, check=False)
    try:
        plans = json.loads(done.stdout.strip().splitlines()[-1])["plans"]
    except (ValueError, IndexError, KeyError):
        plans = []
    if done.returncode not in (EXIT_COMPLETE, EXIT_USER) or not plans:
        if done.returncode == EXIT_USER:  # it has said what is wrong; so would the job
            raise UserError("the plan found a mistake (above); mend it, or plan nothing with --no-plan")
        print("memory: the plan could not be made (above); the job goes on", flush=True)
        return
    for plan in plans:
        if plan["fits"] is False:
            better = f"it fits with: {plan['advice']}" if plan["advice"] else "nothing that was tried makes it fit"
            name = f"{plan['config']}, {plan['stage']} stage on {plan['devices']}"
            raise UserError(f"{name} {plan['conclusion']}; {better} (--no-plan submits it all the same)")
        print(f"memory: {plan['stage']} stage on {plan['devices']}: {plan['conclusion']}", flush=True)
