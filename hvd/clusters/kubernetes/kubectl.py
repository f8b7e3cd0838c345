"""The user's kubectl, called here only."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass

from hvd.clusters.base import Unreachable
from hvd.errors import UserError

_ANSWER_S = 120.0
_SAID = 1500  # characters of an answer: a refused change shows both objects in full
_SILENCE = re.compile(r"connection refused|no such host|timeout|unable to connect", re.IGNORECASE)


def available() -> bool:
    """Does kubectl know a cluster? Asks no cluster."""
    if not shutil.which("kubectl"):
        return False
    asked = subprocess.run(["kubectl", "config", "current-context"], capture_output=True, text=True, check=False)
    return asked.returncode == 0 and bool(asked.stdout.strip())


@dataclass(frozen=True)
class Target:
    """The cluster and namespace that kubectl speaks to; "" = its current context's."""

    context: str = ""
    namespace: str = ""

    def ask(self, *argv: str) -> str:
        """What it prints.

        Raises:
            Unreachable: it failed; its last line is in the text.
        """
        done = self._run(*argv)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise Unreachable(f"kubectl {argv[0]}: {lines[-1] if lines else f'exit code {done.returncode}'}")
        return done.stdout

    def hand_over(self, verb: str, manifests: str, *flags: str) -> tuple[list[str], str]:
        """`kubectl apply` or `kubectl create` of YAML: (what it has created, as kind/name, and all of its complaint).

        The complaint is "" where the cluster has taken everything.

        Raises:
            Unreachable: it does not answer.
        """
        done = self._run(verb, "-f", "-", *flags, stdin=manifests)
        created = [line.split()[0] for line in done.stdout.splitlines() if re.fullmatch(r"\S+ created", line)]
        if not done.returncode:
            return created, ""
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("Warning")]
        text = " ".join(lines) or f"kubectl ended with {done.returncode}"
        if _SILENCE.search(text) and not created:
            raise Unreachable(f"kubectl {verb}: {text[:_SAID]}")
        return created, text if len(text) <= _SAID else f"{text[:_SAID]}..."

    def may(self, verb: str, kind: str) -> bool:
        """Does the cluster allow it to the user? True where it does not say."""
        return self._run("auth", "can-i", verb, kind).stdout.strip() != "no"

    def show(self, *argv: str) -> None:
        """What it prints goes to our own output, as it comes."""
        subprocess.run(["kubectl", *argv, *self._flags()], check=False)

    def command(self, verb: str, *argv: str) -> list[str]:
        """The command line of such a call; options of ours stand before what is behind a --."""
        return ["kubectl", verb, *self._flags(), *argv]

    def describe(self) -> str:
        """`context lab (https://10.0.0.1:6443), namespace robots`. UserError: an unknown context; asks no cluster."""
        done = self._run("config", "view", "--minify", "-o", "json")
        if done.returncode and self.context:
            raise UserError(f"kubernetes.context {self.context}: {done.stderr.strip().splitlines()[-1]}")
        try:
            found = json.loads(done.stdout)
            context, cluster = found["contexts"][0], found["clusters"][0]["cluster"]
            namespace = self.namespace or context["context"].get("namespace") or "default"
            return f"context {context['name']} ({cluster['server']}), namespace {namespace}"
        except (ValueError, LookupError, TypeError):
            return f"kubectl's own cluster, namespace {self.namespace or 'of that'}"

    def _flags(self) -> list[str]:
        context = ["--context", self.context] if self.context else []
        return [*context, *(["--namespace", self.namespace] if self.namespace else [])]

    def _run(self, *argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = ["kubectl", *argv, *self._flags()]
        try:
            return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
        except FileNotFoundError:
            raise UserError("there is no kubectl on this machine, which --cluster kubernetes needs") from None
        except subprocess.TimeoutExpired:
            raise Unreachable(f"kubectl {argv[0]} did not answer within {_ANSWER_S:.0f} s") from None


CURRENT = Target()
