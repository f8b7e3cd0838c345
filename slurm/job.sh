# shellcheck shell=bash disable=SC2154 # the script that sources this sets options, hvd and the other settings
# The batch program of hvd's jobs: slurm/value.sbatch, slurm/awr.sbatch and what launch/submit.py renders source it.
#
# It runs the stage's steps by srun and decides, by the code that each of their processes left when it ended
# (hvd.runtime.records), whether the job is complete, goes back into the queue or fails. It needs bash and Slurm's
# programs on the node; hvd itself may be in a container.
#
# Set before: options (of hvd, an array), grace (seconds from the signal to the kill), node_failures (restarts for lost
# nodes, killed and hung processes), gpu_settings (NAME=VALUE for jobs that have GPUs; may be unset), container (may be
# unset). Set after, before the first step: hvd (how hvd is called, an array).
set -o pipefail

# --- what the shell or the job that submitted this one has left in the environment and Slurm's programs would obey
unset "${!SQUEUE_@}" "${!SINFO_@}" "${!SCONTROL_@}" SLURM_TIME_FORMAT SLURM_CLUSTERS
unset SLURM_EXPORT_ENV SLURM_TIMELIMIT SLURM_WORKING_DIR SLURM_REMOTE_CWD SLURM_SRUN_MULTI # options of srun
unset SLURM_STDINMODE SLURM_STDOUTMODE SLURM_STDERRMODE SLURM_STEP_GRES SLURM_DEPENDENCY SLURM_IMMEDIATE
unset HVD_COORDINATOR HVD_NUM_PROCESSES HVD_PROCESS_ID HVD_COORDINATOR_PORT HVD_EXPECT_GPUS HVD_LIVE_JOBS_FILE
unset JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID "${!OMPI_@}" "${!PMIX_@}" "${!PMI_@}"
unset HVD_SCHEDULER HVD_JOB_ID
case ${SLURM_CPU_BIND:-} in *mask* | *map*) unset "${!SLURM_CPU_BIND@}" ;; esac # of a step elsewhere
case ${SLURM_MEM_PER_NODE:+1}${SLURM_MEM_PER_CPU:+1}${SLURM_MEM_PER_GPU:+1} in
  11*) unset SLURM_MEM_PER_NODE SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU ;; # one is this job's, and a step has all of it
esac
self=$SLURM_JOB_ID # as scontrol takes it: the number of an array's last job means the whole array
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  case $(scontrol show job -o "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" 2>/dev/null) in
    "JobId=$SLURM_JOB_ID "*) self=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID ;;
  esac
fi
if [ -n "${SLURM_RESTART_COUNT:-}${SLURM_JOB_GPUS:-}${!SLURM_GPUS*}" ]; then
  shown=$(scontrol show job -o "$self" 2>/dev/null)
  case $shown in *" Restarts=0 "*) unset SLURM_RESTART_COUNT ;; esac
  case $shown in
    *gpu*) ;;
    *TRES=*) unset "${!SLURM_GPUS@}" SLURM_JOB_GPUS SLURM_GRES SLURM_CPUS_PER_GPU SLURM_NTASKS_PER_GPU ;;
  esac
fi

# --- the job's records, for `hvd jobs` and for its own next attempt
job=$PWD/slurm/jobs/$SLURM_JOB_ID attempt=${SLURM_RESTART_COUNT:-0}
mkdir -p "$job"
: >>"$job/restarts"

now() { date -u +%FT%TZ; }
end() { # CODE REASON: the job ends for good
  echo "$(now) $1 $2" >"$job/end"
  echo "hvd: job $SLURM_JOB_ID ends with exit code $1: $2"
  exit "$1"
}
failures() { grep -cE '^[^ ]+ [0-9]+ (node-failure|killed|hang|lost) ' "$job/restarts" || true; }

if [ "$attempt" -gt 0 ]; then
  # an attempt that left no cause had no time to: its node has gone
  read -r cause 2>/dev/null <"$job/cause" || cause="node-failure the attempt ended without a record"
  echo "$(now) $attempt $cause" >>"$job/restarts"
  [ "$(failures)" -le "$node_failures" ] || end 1 "gave up after $(failures) node failures, killed or hung processes"
fi
rm -rf "$job/cause" "$job/end"
echo "hvd: job $SLURM_JOB_ID, attempt $attempt on $SLURM_JOB_NODELIST: ${options[*]@Q}"

# --- the environment of the steps
export HVD_JOB_DIR=$job HVD_GRACE_SECONDS=$grace PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over by itself
if [ -n "${container:-}" ]; then # there is no squeue in a container
  squeue -h -o %A >"$job/live" && export HVD_LIVE_JOBS_FILE=$job/live
fi
if [ -n "${SLURM_GPUS_ON_NODE:-}${SLURM_JOB_GPUS:-}" ]; then
  export HVD_EXPECT_GPUS=1 # without a GPU the steps refuse to run: jax would train on the CPU and not say so
  for setting in "${gpu_settings[@]}"; do # the user's own values come first
    name=${setting%%=*} value=${setting#*=}
    if [ "$name" = XLA_FLAGS ]; then
      export XLA_FLAGS="$value ${XLA_FLAGS:-}"
    else
      export "$name=${!name:-$value}"
    fi
  done
else
  unset CUDA_VISIBLE_DEVICES
  export JAX_PLATFORMS=cpu
fi

# --- what is decided when a step has failed
ask() { (trap '' TERM && exec "$@" 2>/dev/null); } # also when Slurm's SIGTERM comes in between
job_now() { # the job as Slurm has it; its controller may not answer for a moment
  local line try
  for try in 1 2 3 4; do
    line=$(ask scontrol show job -o "$self") && [ -n "$line" ] && break
    [ "$try" = 4 ] || sleep 3
  done
  echo "$line"
}
cause() { # why the steps were asked to stop, or Slurm ends the attempt
  local shown end
  shown=$(job_now)
  end=${shown##* EndTime=}
  case $shown in
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
# Slurm ends the attempt: steps may still save, but this script may be killed before their processes have ended
trap 'echo "$(cause) ended by Slurm" >"$job/cause"' TERM
again() { # CAUSE TEXT: back into the queue under the same id
  trap '' TERM # Slurm sends it at the requeue that is asked for here; that is not the cause
  echo "$1 $2" >"$job/cause"
  echo "hvd: job $SLURM_JOB_ID goes back into the queue: $1, $2"
  if ask scontrol requeue "$self"; then exit 143; fi
  end 143 "$1, $2; Slurm does not requeue it: submit it again to go on"
}
infrastructure() { # CAUSE TEXT: the same, node_failures times
  [ "$(failures)" -lt "$node_failures" ] || end 1 "$2; gave up after $(failures) restarts for such reasons"
  again "$1" "$2"
}
verdict() { # STEP CODE TASKS: by the code of each process; one that was killed has left none
  local codes saved
  codes=$(cat "$job"/exit/* 2>/dev/null)
  has() { grep -qx "$1" <<<"$codes"; }
  if has 2; then end 2 "$1: a mistake to be mended, see the log"; fi
  if has 1; then end 1 "$1 failed, see the log"; fi
  case $2 in 126 | 127) end 2 "$1 could not be started, see the log" ;; esac
  saved=$([ "$(grep -cxE '0|143' <<<"$codes")" = "$3" ] && echo yes)
  case $(job_now) in
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

# --- a step
port() { # of this node, where process 0 will be: one that is free
  local candidate
  for candidate in $(shuf -i 12288-32767 -n 50); do
    (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null || break
  done
  echo "$candidate"
}
step() { # one|all NAME ARGUMENT...: `hvd NAME` on the first task or on all of them
  local tasks=$SLURM_NTASKS where=() code=0 last pid
  [ "$1" = all ] || { tasks=1 where=(--nodes=1 --ntasks=1); }
  [ "$tasks" = 1 ] || { where+=(--label); HVD_COORDINATOR_PORT=$(port); export HVD_COORDINATOR_PORT; }
  shift
  rm -rf "$job/exit"
  echo "hvd: $(now) $1 on $tasks task(s)"
  srun --export=ALL --kill-on-bad-exit=1 --mpi=none "${where[@]}" "${hvd[@]}" "$1" "${options[@]}" "${@:2}" &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done # a trap interrupts wait
  wait "$pid" 2>/dev/null; last=$?
  [ "$last" = 127 ] || code=$last
  [ "$code" = 0 ] || verdict "$1" "$code" "$tasks"
}
