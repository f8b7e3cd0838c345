"""The user's kubectl, called here only. Cluster, namespace and credentials are those of its current context."""

import re
import shutil
import subprocess

from hvd.clusters.base import Unreachable
from hvd.errors import UserError

_ANSWER_S = 120.0
_SILENCE = re.compile(r"connection refused|no such host|timeout|unable to connect", re.IGNORECASE)


def available() -> bool:
    """Does kubectl know a cluster? Asks no cluster."""
    if not shutil.which("kubectl"):
        return False
    asked = subprocess.run(["kubectl", "config", "current-context"], capture_output=True, text=True, check=False)
    return asked.returncode == 0 and bool(asked.stdout.strip())


def ask(*argv: str) -> str:
    """What it prints.

    Raises:
        Unreachable: it failed; its last line is in the text.
    """
    done = _run(*argv)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Unreachable(f"kubectl {argv[0]}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def apply(manifests: str, *flags: str) -> str:
    """`kubectl apply` of YAML; what it prints.

    Raises:
        UserError: the cluster refuses them.
        Unreachable: it does not answer.
    """
    done = _run("apply", "-f", "-", *flags, stdin=manifests)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Warning")]
        text = lines[0] if lines else f"kubectl ended with {done.returncode}"
        raise (Unreachable if _SILENCE.search(text) else UserError)(f"the cluster refuses the manifests: {text}")
    return done.stdout


def show(*argv: str) -> None:
    """What it prints goes to our own output, as it comes."""
    subprocess.run(["kubectl", *argv], check=False)


def _run(*argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["kubectl", *argv], input=stdin, capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except FileNotFoundError:
        raise UserError("there is no kubectl on this machine, which --cluster kubernetes needs") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"kubectl {argv[0]} did not answer within {_ANSWER_S:.0f} s") from None
