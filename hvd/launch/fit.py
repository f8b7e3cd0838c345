"""Before a job is queued: would it fit its devices? Asks `hvd plan`, a process of its own; imports no jax.

A job is refused only on certain knowledge: what its state and gradients alone need, or the GPU compiler's own figure.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

from hvd.clusters import local
from hvd.errors import EXIT_COMPLETE, EXIT_USER, UserError
from hvd.plan import devices as plan_devices

COMMAND = (sys.executable, "-m", "hvd.cli", "plan")
_STAGES = {"all": "both", "value": "value", "policy": "policy"}


def check(stage: str, options: Sequence[str], devices: str, nodes: int) -> None:
    """Raise UserError, with what would make it fit, where a stage cannot fit; a line where nothing can be said.

    Args:
        stage: of the launcher.
        options: the user's, for `hvd` (`--config NAME --dotted.field value ...`).
        devices: of a node, as `--devices` of `hvd plan` takes them; "" = this machine's GPUs (then `nodes` share them).
    """
    if not devices:
        devices, why = of_this_machine()
        nodes = 1
        if not devices:
            if why:
                print(f"memory: not planned, {why}", flush=True)
            return
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


def of_this_machine() -> tuple[str, str]:
    """(its GPUs as `8xh100-80gb`, "") or ("", why not: "" where it has none); asks nvidia-smi."""
    wanted = local.gpus()
    if not wanted:
        return "", ""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "", "nvidia-smi does not tell the GPUs' names; --devices does"
    rows = [[part.strip() for part in line.split(",", 2)] for line in done.stdout.splitlines() if line.count(",") >= 2]
    kinds = [name for index, uuid, name in rows if index in wanted or uuid in wanted]
    if not kinds or len(set(kinds)) > 1:
        return (
            "",
            f"the GPUs are of several kinds or unknown ({', '.join(sorted(set(kinds))) or 'none'}); see --devices",
        )
    name = plan_devices.name_of(kinds[0])
    if name is None:
        return "", f"{kinds[0]} is not in the table of devices"
    return f"{len(kinds)}x{name}", ""
