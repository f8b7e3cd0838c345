"""squeue, scontrol, sacct and scancel for tests: they answer from a file, in the words and forms of Slurm 22.05.

As a script it is whichever of the four it is called as; its folder holds jobs.json, and `calls`, what it was asked.
"""

import json
import os
import sys
from pathlib import Path

COMMANDS = ("squeue", "scontrol", "sacct", "scancel")
INVALID = "Invalid job id specified"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
DEFAULT = {
    "state": "RUNNING",
    "reason": "None",
    "nodes": "node1",
    "after": "(null)",
    "name": "hvd-value",
    "folder": "/somewhere",
    "code": "0:0",
    "restarts": 0,
    "starts": None,  # what accounting has: [[state, code, reason], ...]
    "forgotten": False,
    "refused": False,
}


class FakeSlurm:
    """The test's side.

    Attributes:
        settings: down (no controller answers; a number: so many times), strict (one unknown id spoils an answer),
            accounting.
    """

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        script = f"#!{sys.executable} -IS\n" + Path(__file__).read_text()
        for command in COMMANDS:
            path = self.bin / command
            path.write_text(script)
            path.chmod(0o755)
        self.settings = {"down": False, "strict": False, "accounting": False}
        self.jobs: dict[str, dict] = {}
        self.save()

    def job(self, number: str, **what) -> None:
        """Put a job in, or change what is known of it."""
        self._load()
        self.jobs[number] = self.jobs.get(number, dict(DEFAULT)) | what
        self.save()

    def set(self, **what) -> None:
        self._load()
        self.settings |= what
        self.save()

    def state(self, number: str) -> str:
        self._load()
        return self.jobs[number]["state"]

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def _load(self) -> None:
        found = json.loads((self.folder / "jobs.json").read_text())
        self.jobs, self.settings = found["jobs"], found["settings"]

    def save(self) -> None:
        _write(self.folder / "jobs.json", {"jobs": self.jobs, "settings": self.settings})


def _write(path: Path, data: dict) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(data))
    temporary.replace(path)


def _fail(line: str) -> int:
    print(line, file=sys.stderr)
    return 1


def answer(folder: Path, command: str, args: list[str]) -> int:
    path = folder / "jobs.json"
    data = json.loads(path.read_text())
    with (folder / "calls").open("a") as file:
        file.write(" ".join([command, *args]) + "\n")
    settings, jobs = data["settings"], data["jobs"]
    if settings["down"] and command != "sacct":
        if settings["down"] is not True:
            settings["down"] -= 1
            _write(path, data)
        what = {"scancel": f"scancel: error: Kill job error on job id {args[-1]}:"}.get(
            command, "slurm_load_jobs error:"
        )
        return _fail(f"{what} Unable to contact slurm controller (connect failure)")
    known = {number: job for number, job in jobs.items() if not job["forgotten"]}
    if command == "squeue":
        return squeue(known, args, settings["strict"])
    if command == "scontrol":
        return scontrol(known, args[-1])
    if command == "sacct":
        return sacct(jobs, args) if settings["accounting"] else _fail("Slurm accounting storage is disabled")
    number = args[0]
    error = f"scancel: error: Kill job error on job id {number}: "
    if number not in known:
        return _fail(error + INVALID)
    if known[number]["refused"]:
        return _fail(error + "Access/permission denied")
    if known[number]["state"] in ENDED:
        return _fail(error + "Job/step already completing or completed")
    jobs[number] |= {"state": "CANCELLED", "code": "0:15"}
    _write(path, data)
    return 0


def squeue(jobs: dict, args: list[str], strict: bool) -> int:
    if "-j" in args:
        wanted = args[args.index("-j") + 1].split(",")
        absent = [number for number in wanted if number not in jobs]
        if absent and (strict or len(wanted) == 1):
            return _fail(f"slurm_load_jobs error: {INVALID}")
        jobs = {number: job for number, job in jobs.items() if number in wanted}
    letters = {"%T": "state", "%r": "reason", "%N": "nodes", "%E": "after", "%Z": "folder", "%j": "name"}
    for number, job in jobs.items():
        if job["state"] in ENDED and "-t" not in args:
            continue
        line = args[args.index("-o") + 1].replace("%A", number)
        for letter, field in letters.items():
            line = line.replace(letter, job[field])
        print(line)
    return 0


def scontrol(jobs: dict, number: str) -> int:
    if number not in jobs:
        return _fail(f"slurm_load_jobs error: {INVALID}")
    job = jobs[number]
    print(
        f"JobId={number} JobName={job['name']} UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901759 Nice=0 "
        f"Account=(null) QOS=(null) JobState={job['state']} Reason={job['reason']} Dependency={job['after']} Requeue=1 "
        f"Restarts={job['restarts']} BatchFlag=1 Reboot=0 ExitCode={job['code']} RunTime=00:00:02 Partition=main "
        f"ReqNodeList=(null) ExcNodeList=(null) NodeList={job['nodes']} BatchHost=node1 NumNodes=1 Power= "
    )
    return 0


def sacct(jobs: dict, args: list[str]) -> int:
    for number in args[args.index("-j") + 1].split(","):
        for state, code, reason in jobs.get(number, {}).get("starts") or ():
            print(f"{number}|{state}|{code}|node1|{reason}")
    return 0


if __name__ == "__main__":
    sys.exit(answer(Path(sys.argv[0]).resolve().parents[1], Path(sys.argv[0]).name, sys.argv[1:]))
