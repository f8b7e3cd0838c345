"""`hvd data push|pull`: a dataset onto the volume of a Kubernetes cluster, results off it, through kubectl.

A pod that has the volume runs `hvd data receive` or `hvd data send`, and `kubectl exec` is the pipe
(hvd.storage.stream). The pod is that of the policy Job, without GPUs and with a container that does nothing.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from hvd import overrides
from hvd.clusters.base import Request
from hvd.clusters.kubernetes import manifests, site
from hvd.clusters.kubernetes.kubectl import Target
from hvd.clusters.kubernetes.names import Manifest, component
from hvd.clusters.kubernetes.queue import COMPONENT, own_container, why_pending
from hvd.errors import EXIT_COMPLETE, EXIT_USER, Failed, UserError
from hvd.fields import NOT_NEGATIVE, option
from hvd.storage import stream

_ABOUT = """push LOCAL REMOTE copies a file or folder onto the volume of the Jobs, pull REMOTE LOCAL off it.

REMOTE is a path below the Jobs' working directory (/storage), such as data/mine or runs/demo. A pod with the volume
does the other half. The launcher's settings count: --kubernetes.image, .overlay, .claim, .namespace, .context, ..."""


@dataclass(frozen=True)
class Copy:
    """What push and pull are told beside the two paths and --kubernetes.NAME."""

    overwrite: bool = option(False, "replace what is there, once all has come")
    timeout: float = option(600.0, NOT_NEGATIVE, "seconds to wait until the pod runs")


def main(argv: Sequence[str]) -> int:
    """`hvd data push|pull FROM TO [--overwrite] [--kubernetes.NAME VALUE]...`; send and receive are the pod's part."""
    if overrides.asks_help(argv):
        overrides.print_help("hvd data push|pull FROM TO", _ABOUT, Copy())
        return EXIT_COMPLETE
    words, options, flags = parse(argv)
    match words:
        case ["push", source, remote]:
            push(Path(source), remote, options, site.load(flags))
        case ["pull", remote, target]:
            pull(remote, Path(target), options, site.load(flags))
        case ["send", path]:
            place = stream.below(Path.cwd(), path)
            with open(sys.stdout.fileno(), "wb", closefd=False) as out:  # that of sys.stdout may have no buffer
                stream.send(place, out)
        case ["receive", path]:
            place = stream.below(Path.cwd(), path)
            print(stream.receive(sys.stdin.buffer, place, overwrite=options.overwrite))
        case _:
            raise UserError("hvd data push LOCAL REMOTE, or hvd data pull REMOTE LOCAL; options come behind the paths")
    return EXIT_COMPLETE


def parse(argv: Sequence[str]) -> tuple[list[str], Copy, list[overrides.Flag]]:
    """(the words before the options, our options, the cluster's settings)."""
    words = list(takewhile(lambda word: not word.startswith("--"), argv))
    options, rest = overrides.take(Copy(), argv[len(words) :])
    return words, options, overrides.split_flags(rest)


def push(source: Path, remote: str, options: Copy, asked: site.Settings) -> None:
    """A file or folder of this machine becomes `remote` on the volume, whole or not at all."""
    source = source.resolve()
    list(stream.entries(source))  # what is wrong with it is said before a pod is made
    words = ["receive", remote, *(["--overwrite"] if options.overwrite else [])]
    with _exec(asked, options, words) as process:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the other side says why it has ended
            number = stream.send(source, process.stdin)
            process.stdin.close()
            if process.stdout.read().split() == [str(number).encode()]:
                print(f"{source} -> {remote} on the volume: {number} files and folders", flush=True)
                return
        raise Failed("the pod has not confirmed it")


def pull(remote: str, target: Path, options: Copy, asked: site.Settings) -> None:
    """What is at `remote` on the volume becomes `target` here, whole or not at all."""
    target = Path(os.path.abspath(target))
    if Path.cwd().is_relative_to(target):
        raise UserError(f"{target}: name the file or folder that {remote} becomes, such as {Path(remote).name}")
    stream.check_free(target, overwrite=options.overwrite)
    with _exec(asked, options, ["send", remote]) as process:
        assert process.stdout is not None
        number = stream.receive(process.stdout, target, overwrite=options.overwrite)
        print(f"{remote} on the volume -> {target}: {number} files and folders", flush=True)


@contextlib.contextmanager
def _exec(asked: site.Settings, options: Copy, words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """`hvd data WORDS` in the pod, its pipes here. Failed in the block: what the pod says is the error instead."""
    pod = pod_of(asked)
    target = Target(asked.context, pod["metadata"].get("namespace", ""))
    name = pod["metadata"]["name"]
    print(f"kubernetes: {target.describe()}, pod {name}", flush=True)
    _, refused = target.hand_over("create", manifests.to_yaml([pod]))
    if refused:
        raise UserError(f"the cluster refuses the pod: {refused}")
    try:
        _await_ready(target, name, options.timeout)
        command = target.command("exec", "-i", name, "--", "hvd", "data", *words)
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
            try:
                yield process
            except Failed as error:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it may be about to say why it has ended
                    process.wait(5)
                raise _end(process.poll(), said, error) from error
            finally:
                process.kill()
                for pipe in (process.stdin, process.stdout):
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close() if pipe else None
                process.wait()
    finally:
        with contextlib.suppress(Failed):
            target.ask("delete", "pod", name, "--ignore-not-found", "--wait=false", "--grace-period=1")


def _end(code: int | None, said: Any, error: Failed) -> UserError | Failed:
    """What the other side has said of its end, else the error itself."""
    said.seek(0)
    lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    for line in lines:
        kind, colon, text = line.partition(": ")
        if colon and kind in ("error", "failed"):
            return (UserError if kind == "error" and code == EXIT_USER else Failed)(f"on the volume: {text}")
    return Failed(f"{error} ({lines[-1]})" if lines else str(error))


def _await_ready(target: Target, name: str, seconds: float) -> None:
    """Until the pod runs; says what it waits for. Failed after so long, or when it has ended."""
    end, said = time.monotonic() + seconds, ""
    while True:
        pod = json.loads(target.ask("get", "pod", name, "-o", "json"))
        if any(one.get("ready") for one in pod["status"].get("containerStatuses", ())):
            return
        why = why_pending(pod) or pod["status"].get("phase", "")
        if why != said:
            print(f"pod {name}: {why}", flush=True)
        said = why
        if pod["status"].get("phase") in ("Failed", "Succeeded") or time.monotonic() > end:
            raise Failed(f"pod {name} does not run: {why or 'no reason given'} (--timeout {seconds:g})")
        time.sleep(0.5)


def pod_of(asked: site.Settings) -> Manifest:
    """A pod with the volume and the place of the Jobs, for a day at most."""
    options = ("--config", "demo")
    docs = manifests.render(Request(overrides.experiment(options), "policy", options), asked)
    (job,) = [doc for doc in docs if doc["kind"] == "Job" and component(doc) == "policy"]
    template, own = job["spec"]["template"], own_container(job)
    kept = ("image", "workingDir", "securityContext", "volumeMounts", "imagePullPolicy")
    limits = {"memory": "2Gi"} | ({"cpu": str(asked.cpu_limit)} if asked.cpu_limit > 0 else {})
    container = {name: own[name] for name in kept if name in own} | {
        "name": "data",
        "command": ["sleep", "86400"],
        "resources": {"requests": {"cpu": "250m", "memory": "256Mi"}, "limits": limits},
    }
    spec = {name: value for name, value in template["spec"].items() if name not in ("initContainers", "subdomain")}
    spec |= {"containers": [container], "activeDeadlineSeconds": 86400, "terminationGracePeriodSeconds": 1}
    metadata = {
        "name": f"hvd-data-{secrets.token_hex(4)}",
        **{name: job["metadata"][name] for name in ("namespace",) if name in job["metadata"]},
        "labels": template["metadata"]["labels"] | {COMPONENT: "data"},
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
