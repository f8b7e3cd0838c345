"""Options of sbatch: which of them mean the same, and what the environment would make of them without being asked.

sbatch lets SBATCH_* variables, of a site's module or of a shell, win over the #SBATCH lines of the script. The SLURM_*
variables of a job that submits another one go into that one and become options of its srun.
"""

import os
import re
from collections.abc import Iterable, Mapping

# Of each kind a job has one: the site's own words for it (`extra`) replace what we would write.
_KINDS = {
    "gpus": "gpus-per-node gpus gpus-per-task gpus-per-socket gres tres-per-task G",
    "mem": "mem mem-per-cpu mem-per-gpu",
    "cpus": "cpus-per-task cpus-per-gpu c",
    "requeue": "requeue no-requeue",
    "output": "output error o e",
    "clusters": "clusters cluster M",
    "time": "time t",
    "partition": "partition p",
    "account": "account A",
    "qos": "qos q",
    "constraint": "constraint C",
    "exclude": "exclude x",
    "nodes": "nodes N",
    "array": "array a",
}
_KIND = {option: kind for kind, options in _KINDS.items() for option in options.split()}
_VARIABLES = {"TIMELIMIT": "time", "MEM_PER_NODE": "mem", "ARRAY_INX": "array"}
_NEVER = ("array", "wait", "immediate")  # options that would make another thing of any job of ours
# The launcher's --nodes and slurm.tasks_per_node say these, or they are of no use to it.
REFUSED = ("nodes", "ntasks", "n", "ntasks-per-node", "wait", "W", "test-only", "wrap", "parsable")
_ABOUT_SBATCH = ("DEBUG", "VERBOSE", "EXIT_ERROR", "IGNORE_PBS")  # no options of a job
# How Slurm is reached; the rest of SLURM_* is about the job that we are in.
_ACCESS = re.compile(r"SLURM_(CONF|CONF_SERVER|JWT|SACK_\w+|ROOT|HOME|PREFIX|CLUSTERS)$")


def kind(option: str) -> str:
    """Of an option without dashes, or as it is written: `--mem=5G` and `mem-per-cpu` are both "mem"."""
    found = re.match(r"--([\w-]+)|-(\w)", option)
    name = (found[1] or found[2]) if found else option
    if name in ("gres", "tres-per-task") and found and not re.search(r"\b(gres/)?gpu\b", option.partition("=")[2]):
        return name  # of something else: licences, shared memory
    return _KIND.get(name, name)


def gpus_of_a_node(option: str, nodes: int, tasks: int) -> int | None:
    """How many an option such as `--gres=gpu:a100:4` asks for; None for options that do not say.

    Args:
        tasks: of a node.
    """
    if found := re.fullmatch(r"--gres=(?:.*,)?gpu((?::[^,:()]+)*)(?:\(.*\))?(?:,.*)?", option):
        last = found[1].rpartition(":")[2]
        return int(last) if last.isdigit() else 1
    found = re.fullmatch(r"--(gpus|gpus-per-node|gpus-per-task)=(?:.*:)?(\d+)", option)
    number = int(found[2]) if found else 0
    return {"gpus": number // nodes, "gpus-per-task": number * tasks}.get(found[1], number) if found else None


def foreign(written: Iterable[str], env: Mapping[str, str] = os.environ) -> tuple[list[str], list[str]]:
    """(variables that sbatch must not see, SBATCH_* variables that hold beside what is written).

    Args:
        written: the options of the script.
    """
    kinds = {*map(kind, written), "gpus", *_NEVER}  # a job without GPUs says nothing of them
    against, beside = [], []
    for name in sorted(env):
        if name.startswith("SBATCH_"):
            word = name.removeprefix("SBATCH_")
            option = _VARIABLES.get(word, word.lower().replace("_", "-"))
            if word not in _ABOUT_SBATCH:
                (against if kind(f"--{option}={env[name]}") in kinds else beside).append(name)
        elif name.startswith("SLURM_") and "SLURM_JOB_ID" in env and not _ACCESS.match(name):
            against.append(name)
    if "clusters" in kinds and "SLURM_CLUSTERS" in env:
        against.append("SLURM_CLUSTERS")
    return against, beside
