"""A step that does what its arguments say, in place of `hvd`: python fake_step.py WHAT [ARGUMENT]..."""

import json
import os
import signal
import sys
import time

what, *arguments = sys.argv[1:]

if what == "exit":
    sys.exit(int(arguments[0]))

elif what == "say":
    print(arguments[0])
    print(arguments[1], file=sys.stderr)

elif what == "note":  # appends its environment to a file
    path = arguments[0]
    names = ("HVD_COORDINATOR", "HVD_NUM_PROCESSES", "HVD_PROCESS_ID", "OMP_NUM_THREADS", "HVD_LAUNCHER_PID")
    record = {name: os.environ.get(name) for name in names}
    record |= {"cores": sorted(os.sched_getaffinity(0)), "began": time.time(), "name": arguments[1]}
    time.sleep(float(arguments[2]))
    record["ended"] = time.time()
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")

elif what == "bar":
    for i in range(4):
        print(f"\rwork:  {25 * i}%|####    | {i}/4 [00:00<00:01]", end="", file=sys.stderr, flush=True)
        time.sleep(0.05)
    print(file=sys.stderr)
    print("done")

elif what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)

elif what == "wait":  # until a signal; says which one and ends with the given code; writes READY when it can take one
    path, code = arguments

    def on_signal(number, frame):
        with open(path, "a") as file:
            file.write(signal.Signals(number).name + "\n")
        sys.exit(int(code))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, on_signal)
    with open(path, "a") as file:
        file.write(f"READY {os.getpid()}\n")
    time.sleep(60)
