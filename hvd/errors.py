"""The user's mistakes, and the exit codes that launchers, Slurm and Kubernetes act on. Imports nothing heavy."""

import difflib
from collections.abc import Iterable

EXIT_COMPLETE = 0
EXIT_FAILED = 1  # anything that is neither of the others: a bug, a broken machine
EXIT_USER = 2  # the user's mistake: never retried
EXIT_LOST = 75  # another process of the run, or a service it needs, has gone (EX_TEMPFAIL): worth a few more attempts
EXIT_HUNG = 76  # no progress for too long (hvd.runtime.watchdog): worth a few more attempts
EXIT_STOPPED = 143  # stopped by a signal after saving: run me again (128 + SIGTERM)


def one_line(text: str, most: int = 4_000) -> str:
    """`text` for a terminal or a log: one line of at most about `most` characters, control characters as \\x1b.

    Its end is kept, where the advice stands.
    """
    text = " ".join(text.split())
    if len(text) > most:
        text = f"{text[: most - 500]} ... {text[-500:]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _OneLine(Exception):
    def __init__(self, message: str):
        super().__init__(one_line(message))


class UserError(_OneLine):
    """Something the user can mend. Its text is one line that names the file or field and what to do; exit code 2."""


class Failed(_OneLine):
    """The run cannot go on, and it is not the user's mistake (a non-finite loss). Its text is one line; exit code 1."""


class Lost(_OneLine):
    """Something outside that the run needs has gone: a companion, the scheduler. One line; exit code 75."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by a signal and has saved; exit code 143. A signal comes anywhere, also where a library
    or a reader takes every Exception for a damaged file, and in asyncio's loops, which keep every other error."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Names like `name` for the end of an error line: '; nearest: a, b' or '; known: a, b, c'."""
    known = list(known)
    found = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if found:
        return "; nearest: " + ", ".join(found)
    return "; known: " + ", ".join(sorted(known)[:12])
