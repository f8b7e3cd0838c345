"""A kubectl that writes down its calls and says what the test wants (a real cluster: tests/clusters)."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hvd.clusters import base

PROGRAM = """#!{python}
import json, pathlib, sys
here = pathlib.Path({folder!r})
args = sys.argv[1:]
text = sys.stdin.read() if "-" in args else ""
with (here / "calls").open("a") as file:
    file.write(json.dumps([args, text]) + "\\n")
names = [" ".join(args[:2]), args[0] + " --dry-run" if "--dry-run=server" in args else args[0]]
said = next((here / name for name in names if (here / name).exists()), None)
code, answer, error = json.loads(said.read_text()) if said else (0, '{{"items": []}}', "")
print(answer)
print(error, file=sys.stderr)
sys.exit(code)
"""
Object = dict[str, Any]


class Kubectl:
    def __init__(self, folder: Path):
        self._folder = folder
        program = folder / "bin" / "kubectl"
        program.parent.mkdir(parents=True)
        program.write_text(PROGRAM.format(python=sys.executable, folder=str(folder)))
        program.chmod(0o755)
        self.answer("config", "a-cluster")

    def answer(self, to: str, text: str, code: int = 0, error: str = "") -> None:
        """From now on, to calls that begin with these words; "apply --dry-run" is one of them. With a code and no
        `error` the text is what it complains of."""
        said = [code, "", text] if code and not error else [code, text, error]
        (self._folder / to).write_text(json.dumps(said))

    def has(self, jobs: list[Object], pods: list[Object] = [], log: str = "") -> None:  # noqa: B006
        for kind, items in (("jobs", jobs), ("pods", pods)):
            self.answer(f"get {kind}", json.dumps({"items": items}))
        self.answer("logs", log)

    def calls(self, *first: str) -> list[tuple[list[str], str]]:
        """(arguments, input) of the calls so far, or of those with such a first word."""
        lines = (self._folder / "calls").read_text().splitlines() if (self._folder / "calls").exists() else []
        return [(args, text) for args, text in map(json.loads, lines) if not first or args[0] in first]


@pytest.fixture
def kubectl(tmp_path, monkeypatch) -> Kubectl:
    """The working directory is one without slurm/jobs."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'kubectl' / 'bin'}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_WAIT_S", (0.01, 0.05))
    return Kubectl(tmp_path / "kubectl")


def a_job(name: str, component: str, *, condition: str = "", args: tuple[str, ...] = (), **spec) -> Object:
    """A Job as the API has it; one with a condition ended on 2026-01-01."""
    end = {"type": condition, "status": "True", "reason": "BackoffLimitExceeded"}
    return {
        "metadata": {
            "name": name,
            "creationTimestamp": f"2026-01-01T00:00:0{len(name) % 10}Z",
            "labels": {"app.kubernetes.io/component": component},
        },
        "spec": {"parallelism": 1, **spec, "template": {"spec": {"containers": [{"args": list(args)}]}}},
        "status": {"conditions": [end | {"lastTransitionTime": "2026-01-01T00:00:00Z"}] if condition else []},
    }


def live(doc: Object, *, condition: str = "", parallelism: int | None = None) -> Object:
    """A Job as the API has it once kubectl has applied the manifest."""
    made = a_job(doc["metadata"]["name"], "", condition=condition)
    spec = doc["spec"] | ({} if parallelism is None else {"parallelism": parallelism})
    applied = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(doc)}
    metadata = made["metadata"] | doc["metadata"] | {"annotations": applied}
    return {"metadata": metadata, "spec": copy.deepcopy(spec), "status": made["status"]}


def a_gate(condition: str = "") -> Object:
    args = ("gate", "--value-job", "hvd-value", "--policy-job", "hvd-awr", "--pods", "1", "--config", "demo")
    return a_job("hvd-awr-gate", "gate", condition=condition, args=args)


def a_pod(job: str, phase: str, **status) -> Object:
    return {
        "metadata": {"name": f"{job}-abc", "labels": {"job-name": job}, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"nodeName": "node1"},
        "status": {"phase": phase, **status},
    }


def terminated(code: int, message: str = "", reason: str = "Error") -> list[Object]:
    """Of containerStatuses and initContainerStatuses."""
    return [{"state": {"terminated": {"exitCode": code, "message": message, "reason": reason}}}]
