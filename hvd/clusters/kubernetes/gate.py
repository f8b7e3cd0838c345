"""`hvd gate`: release a paused Kubernetes Job once another one is complete and its run is proven to be whole.

The policy Job waits with `parallelism: 0`, so that it holds no GPU. The gate is a small Job beside it: it waits for the
value Job, verifies the run on the shared storage (that Kubernetes calls the Job Complete does not prove it), and then
sets the policy Job's parallelism. It stays until that Job has ended, because `kubectl apply` of the same file sets the
parallelism to 0 again. The gate then releases the policy again, which goes on where it saved. The evaluation's Job
waits behind the policy Job in the same way.

It asks the cluster's REST interface itself: the image holds no kubectl (80 MB), and needs two calls of it.
"""

import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvd import overrides
from hvd.clusters.kubernetes.queue import KubernetesJob
from hvd.configs import Experiment
from hvd.errors import EXIT_COMPLETE, Failed, UserError
from hvd.fields import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, option
from hvd.method import value_run
from hvd.train.complete import check_complete

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_ANSWER_S = 20.0
_SETTLE_S = 5.0  # what a node wrote last may not be on this side of a network file system yet


class Api:
    """The Jobs of the pod's own namespace, by the cluster's REST interface and the pod's service account."""

    def __init__(self, server: str, account: Path):
        self._account = account
        self._base = f"{server}/apis/batch/v1/namespaces/{self._file('namespace')}/jobs"
        tls = [urllib.request.HTTPSHandler(context=_tls(account / "ca.crt"))] if server.startswith("https") else []
        # not by the proxy of the pod's environment, which is for the world outside
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), *tls)

    @classmethod
    def of_this_pod(cls) -> "Api":
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not (ACCOUNT / "token").exists():
            raise UserError("hvd gate runs in a pod of a Kubernetes cluster, with the token of its service account")
        return cls(f"https://{f'[{host}]' if ':' in host else host}:{port}", ACCOUNT)

    def read(self, name: str) -> KubernetesJob | None:
        """The Job; None where there is none."""
        return self._ask("GET", name)

    def set_parallelism(self, name: str, number: int) -> KubernetesJob | None:
        """The Job as it is now; None where there is none. Changes nothing where it has that number already."""
        return self._ask("PATCH", name, {"spec": {"parallelism": number}})

    def _file(self, name: str) -> str:
        return (self._account / name).read_text().strip()

    def _ask(self, method: str, name: str, body: dict | None = None) -> KubernetesJob | None:
        """The answer, asked for until there is one: an API server may restart. UserError where it is a refusal."""
        complained = False
        while True:
            request = urllib.request.Request(
                f"{self._base}/{name}",
                method=method,
                data=None if body is None else json.dumps(body).encode(),
                headers={
                    "Authorization": f"Bearer {self._file('token')}",  # read anew: the kubelet renews it
                    "Accept": "application/json",
                    "Content-Type": "application/merge-patch+json",
                },
            )
            try:
                with self._opener.open(request, timeout=_ANSWER_S) as answer:
                    return KubernetesJob(json.load(answer))
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code in (401, 403):
                    raise UserError(
                        f"the gate's service account may not {method} Job {name}: {_text(error)}"
                    ) from error
                problem = f"{error.code} {_text(error)}"
            except (OSError, ValueError) as error:  # ValueError: half an answer
                problem = str(error)
            if not complained:
                print(f"the cluster's API does not answer ({problem}); asking again until it does", flush=True)
            complained = True
            time.sleep(2)


def _tls(authority: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority))
    # Python 3.13 wants extensions in it that the authorities of many clusters do not have
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _text(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)


@dataclass(frozen=True)
class Gate:
    """What the gate is told; other options say which experiment."""

    value_job: str = option("", "the Job to wait for; none: only the run is verified")
    policy_job: str = option("", "the Job to release; needed")
    pods: int = option(1, AT_LEAST_1, "parallelism of the policy Job")
    evaluate_job: str = option("", "the Job to release once the policy Job is complete; none: there is no evaluation")
    appear: float = option(600.0, NOT_NEGATIVE, "seconds to wait for a Job that is not there yet")
    every: float = option(2.0, POSITIVE, "seconds between two questions")


def main(argv: Sequence[str]) -> int:
    """`hvd gate [--value-job NAME] --policy-job NAME [--pods N] --config NAME ...`; 0 once the policy Job has ended."""
    if overrides.asks_help(argv):
        about = (
            "In a pod: wait for the value Job, verify its run, release the policy Job, then the evaluation's likewise."
        )
        overrides.print_help("hvd gate --policy-job NAME --config NAME", about, Gate(), overrides.Choice())
        return EXIT_COMPLETE
    options, rest = overrides.take(Gate(), argv)
    if not options.policy_job:
        raise UserError("--policy-job NAME is missing: the Job to release")
    cfg = overrides.experiment(rest)
    api = Api.of_this_pod()
    if options.value_job:
        await_complete(api, options.value_job, appear=options.appear, every=options.every)
    if value_run.own_needed(cfg):
        verify(cfg.value_dir, "value", cfg)
    ended = hold_open(api, options.policy_job, options.pods, appear=options.appear, every=options.every)
    if options.evaluate_job:
        if ended is None or ended.state != "COMPLETED":
            why = f"failed: {ended.reason}" if ended is not None else "has been deleted"
            raise Failed(f"Job {options.policy_job}, which Job {options.evaluate_job} waits for, {why}")
        verify(cfg.policy_dir, "policy", cfg)
        hold_open(api, options.evaluate_job, 1, appear=options.appear, every=options.every)
    return EXIT_COMPLETE


def await_complete(api: Api, name: str, *, appear: float, every: float) -> None:
    """Until the Job is complete.

    Raises:
        Failed: it has failed, or is not there after `appear` seconds, or has been deleted before it had ended.
    """
    began, seen = time.monotonic(), False
    print(f"waiting for Job {name}", flush=True)
    while True:
        job = api.read(name)
        if job is None and seen:
            raise Failed(f"Job {name} has been deleted before it was complete: apply both again")
        if job is None and time.monotonic() - began > appear:
            raise Failed(f"there is no Job {name} after {appear:.0f} s: apply it, then this gate's Job again")
        if job is not None and job.state == "FAILED":
            raise Failed(f"Job {name} failed, so the policy does not start: {job.reason}")
        if job is not None and job.state == "COMPLETED":
            return
        seen = job is not None
        time.sleep(every)


def verify(folder: str, stage: Literal["value", "policy"], cfg: Experiment) -> None:
    """The stage's run is there, whole, finite, of this config. UserError names what is wrong."""
    try:
        run = check_complete(folder, stage=stage, cfg=cfg)
    except UserError:
        time.sleep(_SETTLE_S)
        run = check_complete(folder, stage=stage, cfg=cfg)
    print(f"{folder}: complete at step {run.step}, {len(run.files)} files verified", flush=True)


def hold_open(api: Api, name: str, pods: int, *, appear: float, every: float) -> KubernetesJob | None:
    """Keep the Job's parallelism at `pods` until it has ended (the Job is returned) or is deleted (None).

    Raises:
        Failed: there is no such Job after `appear` seconds.
    """
    began, generation = time.monotonic(), None
    while True:
        job = api.set_parallelism(name, pods)
        if job is None and generation is not None:
            print(f"Job {name} has been deleted", flush=True)
            return None
        if job is None and time.monotonic() - began > appear:
            raise Failed(f"there is no Job {name} to release after {appear:.0f} s")
        if job is not None:
            if job.ended:
                print(f"Job {name}: {job.state}{f', {job.reason}' if job.reason else ''}", flush=True)
                return job
            now = job.job["metadata"].get("generation", 0)
            if generation is None:
                print(f"Job {name} is released: {pods} pod(s)", flush=True)
            elif now != generation:
                print(f"Job {name} is released again: it had been changed", flush=True)
            generation = now
        time.sleep(every)
