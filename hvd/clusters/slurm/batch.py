"""The batch script of a Slurm job. slurm/value.sbatch and slurm/awr.sbatch are what this renders by default.

The script is complete by itself: it runs the stage's steps by srun and decides, by what each of their processes said
when it ended (hvd.runtime.job), whether the job is done, goes back into the queue or fails. It needs bash and Slurm's
programs on the node, and hvd in the environment or container only.
"""

import shlex
from dataclasses import dataclass

from hvd.clusters.slurm.site import JOBS_DIR, Site
from hvd.launch import gpu_environment

PLAIN = ".venv/bin/python -m hvd.cli"
NAMES = {"value": "value stage", "policy": "policy stage", "evaluate": "baselines, evaluation and report"}


@dataclass(frozen=True)
class Step:
    """A step of hvd: on "all" tasks of the job, or on "one"."""

    where: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """A job to be.

    Attributes:
        options: of hvd, for all steps (`--config NAME --dotted.field value ...`).
        gpus: of a node; 0 = a job on CPUs.
    """

    stage: str
    steps: tuple[Step, ...]
    options: tuple[str, ...]
    nodes: int
    gpus: int


def directives(request: Request, site: Site) -> dict[str, str | None]:
    """Options of sbatch, in the order in which they are written; None = an option without a value."""
    gpus, tasks = request.gpus, site.tasks_per_node
    found: dict[str, str | None] = {
        "job-name": f"hvd-{request.stage}",
        "nodes": str(request.nodes),
        "ntasks-per-node": str(tasks),
    }
    if gpus:
        found["gpus-per-node"] = f"{site.gres_type}:{gpus}" if site.gres_type else str(gpus)
        found["cpus-per-task"] = str(max(1, site.cpus_per_gpu * gpus // tasks))
        found["mem"] = _times(site.mem_per_gpu, gpus)
    else:
        found["cpus-per-task"] = str(max(1, site.cpus // tasks))
        found["mem"] = site.mem
    found["time"] = site.time
    for name in ("partition", "account", "qos", "constraint", "reservation", "exclude"):
        if value := getattr(site, name):
            found[name] = value
    if site.exclusive:
        found["exclusive"] = None
    if site.grace:
        found["signal"] = f"USR1@{site.grace}"  # to the steps, not to the script
    found["requeue" if site.requeue else "no-requeue"] = None
    found["open-mode"] = "append"
    found["output"] = f"{JOBS_DIR}/%j.log"
    return found


def _times(size: str, factor: int) -> str:
    unit = size.lstrip("0123456789")
    return f"{int(size.removesuffix(unit)) * factor}{unit}"


def render(request: Request, site: Site) -> str:
    """The whole script."""
    flags = directives(request, site)
    head = [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in flags.items()]
    head += [f"#SBATCH {option}" for option in site.extra]
    parts = [
        "#!/bin/bash",
        *head,
        _ABOUT.format(name=NAMES[request.stage], stage=request.stage).rstrip(),
        "",
        f"options=({shlex.join(request.options)})",
        '[ $# = 0 ] || options=("$@")',
        "",
        _RECORDS.format(jobs=JOBS_DIR, node_failures=site.node_failures, grace=site.grace),
        "# --- the environment of the steps",
        *(_environment(request, site)),
        *site.setup,
        "",
        _DECISIONS,
        _STEP.format(command=_command(site)),
        "# --- the stage",
        *(f"step {step.where} {shlex.join(step.args)}" for step in request.steps),
        'end 0 "complete"',
    ]
    return "\n".join(parts) + "\n"


def _environment(request: Request, site: Site) -> list[str]:
    lines = [
        "export HVD_JOB_DIR=$job HVD_GRACE_SECONDS=$grace PYTHONUNBUFFERED=1",
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over by itself",
    ]
    if site.container != "none":
        lines.append(
            "HVD_LIVE_JOBS=$(squeue -h -o %A | tr '\\n' ' ') && export HVD_LIVE_JOBS # no squeue in a container"
        )
    lines.append(
        'if [ -n "${SLURM_GPUS_ON_NODE:-}${SLURM_JOB_GPUS:-}" ]; then\n'
        "  export HVD_EXPECT_GPUS=1 # without any, refuse: jax would train on the CPU and not say so"
    )
    for row in gpu_environment.settings(site.gpu, request.gpus * request.nodes):
        old = f"${{{row.name}:-{row.value}}}" if row.name != "XLA_FLAGS" else f'"{row.value} ${{XLA_FLAGS:-}}"'
        lines += [f"  # {row.reason}", f"  export {row.name}={old}"]
    lines.append("else\n  export JAX_PLATFORMS=cpu\nfi")
    return lines


def _command(site: Site) -> str:
    """srun's arguments after its own: how hvd is called."""
    if site.container == "pyxis":
        mounts = ",".join(["$PWD:$PWD", *site.mounts])
        flags = f'--container-image={site.image} --container-mounts="{mounts}" --container-workdir="$PWD"'
        return f"{flags} --no-container-mount-home {site.command or 'hvd'}"
    if site.container == "apptainer":
        binds = " ".join(f"--bind {mount}" for mount in site.mounts)
        nv = "${HVD_EXPECT_GPUS:+--nv}"
        flags = f'{nv} --pwd "$PWD" --bind "$PWD" {binds + " " if binds else ""}'
        return f"apptainer exec {flags}{site.image} {site.command or 'hvd'}"
    return site.command or PLAIN


_ABOUT = """
# hvd: {name}. `python launch/submit.py --stage {stage}` submits this script; `--dry-run` prints it."""

_RECORDS = """set -o pipefail

# --- the job's records, for `hvd jobs` and for its own next attempt
grace={grace} node_failures={node_failures}
job=$PWD/{jobs}/$SLURM_JOB_ID attempt=${{SLURM_RESTART_COUNT:-0}}
mkdir -p "$job"
: >>"$job/restarts"

now() {{ date -u +%FT%TZ; }}
end() {{ # CODE REASON: the job ends for good
  echo "$(now) $1 $2" >"$job/end"
  echo "hvd: job $SLURM_JOB_ID ends with exit code $1: $2"
  exit "$1"
}}
lost() {{ grep -cE '^[^ ]+ [0-9]+ (node-failure|killed|hang|lost) ' "$job/restarts" || true; }}

if [ "$attempt" -gt 0 ]; then
  # an attempt that left no cause had no time to: its node has gone
  read -r cause 2>/dev/null <"$job/cause" || cause="node-failure the attempt ended without a word"
  echo "$(now) $attempt $cause" >>"$job/restarts"
  [ "$(lost)" -le "$node_failures" ] || end 1 "gave up after $(lost) node failures, killed or hung processes"
fi
rm -rf "$job/cause" "$job/end"
echo "hvd: job $SLURM_JOB_ID, attempt $attempt on $SLURM_JOB_NODELIST: ${{options[*]@Q}}"
"""

_DECISIONS = """# --- what is decided when a step has failed
ask() { (trap '' TERM && exec "$@" 2>/dev/null); } # also when Slurm's SIGTERM comes in between
slurm() { # the job as Slurm has it; its controller may be silent for a moment
  local line try
  for try in 1 2 3 4; do
    line=$(ask scontrol show job -o "$SLURM_JOB_ID") && [ -n "$line" ] && break
    [ "$try" = 4 ] || sleep 3
  done
  echo "$line"
}
cause() { # why the steps were asked to stop, or Slurm ends the attempt
  local job_now end
  job_now=$(slurm)
  end=${job_now##* EndTime=}
  case $job_now in
    *" PreemptTime="[0-9]*) echo "preempted" ;;
    *) if [ -n "$(ask sinfo -h -N -n "$SLURM_JOB_NODELIST" -t down,fail -o %N)" ]; then
         echo "node-failure"
       elif [ $(($(date -d "${end%% *}" +%s 2>/dev/null || echo 9999999999) - $(date +%s))) -le $((grace + 90)) ]; then
         echo "time-limit"
       else
         echo "requeued"
       fi ;;
  esac
}
# Slurm ends the attempt: steps may still save, but this script may be killed before it has their word
trap 'echo "$(cause) ended by Slurm" >"$job/cause"' TERM
again() { # CAUSE TEXT: back into the queue under the same id
  trap '' TERM # Slurm sends it at the requeue that is asked for here, which is not the cause
  echo "$1 $2" >"$job/cause"
  echo "hvd: job $SLURM_JOB_ID goes back into the queue: $1, $2"
  if ask scontrol requeue "$SLURM_JOB_ID"; then exit 143; fi
  end 143 "$1, $2; Slurm does not requeue it: submit it again to go on"
}
infrastructure() { # CAUSE TEXT: the same, so many times
  [ "$(lost)" -lt "$node_failures" ] || end 1 "$2; gave up after $(lost) restarts for such reasons"
  again "$1" "$2"
}
verdict() { # STEP CODE TASKS: by what each process said; one that was killed has said nothing
  local said saved
  said=$(cat "$job"/exit/* 2>/dev/null)
  has() { grep -qx "$1" <<<"$said"; }
  if has 2; then end 2 "$1: a mistake to be mended, see the log"; fi
  if has 1; then end 1 "$1 failed, see the log"; fi
  case $2 in 126 | 127) end 2 "$1 could not be started, see the log" ;; esac
  saved=$([ "$(grep -cxE '0|143' <<<"$said")" = "$3" ] && echo yes)
  case $(slurm) in
    *" JobState=RUNNING "* | *" JobState=SIGNALING "*) ;;
    "") end 143 "$1 ended with $2 and Slurm does not answer: submit it again to go on" ;;
    *" Reason=TimeLimit "*) [ -z "$saved" ] || again time-limit "$1 has saved at the very limit" ;;
    *) # Slurm has decided already: preempted, requeued, cancelled. To requeue a cancelled job would bring it back
      [ -s "$job/cause" ] || echo "$(cause) ended by Slurm" >"$job/cause"
      exit 143 ;;
  esac
  if has 76; then infrastructure hang "$1 made no progress, see the stacks in the log"; fi
  if [ "$2" = 134 ]; then infrastructure lost "$1: a process did not answer JAX's heartbeats"; fi
  if has 75; then infrastructure lost "$1 lost a process or a service"; fi
  [ -z "$saved" ] || again "$(cause)" "$1 has saved"
  infrastructure killed "$1: srun ended with $2"
}
"""

_STEP = """port() {{ # of this node, where process 0 will be: one that nobody listens on
  local candidate
  for candidate in $(shuf -i 12288-32767 -n 50); do
    (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null || break
  done
  echo "$candidate"
}}
step() {{ # one|all NAME ARGUMENT...: a step of hvd on the first task or on all of them
  local tasks=$SLURM_NTASKS where=() code=0 last pid
  [ "$1" = all ] || {{ tasks=1 where=(--nodes=1 --ntasks=1); }}
  [ "$tasks" = 1 ] || {{ where+=(--label); HVD_COORDINATOR_PORT=$(port); export HVD_COORDINATOR_PORT; }}
  shift
  rm -rf "$job/exit"
  echo "hvd: $(now) $1 on $tasks task(s)"
  srun --kill-on-bad-exit=1 --mpi=none "${{where[@]}}" \\
    {command} "$@" "${{options[@]}}" &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done # a trap interrupts wait
  wait "$pid" 2>/dev/null; last=$?
  [ "$last" = 127 ] || code=$last
  [ "$code" = 0 ] || verdict "$1" "$code" "$tasks"
}}
"""
