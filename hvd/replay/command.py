"""hvd replay FILE [--url ws://HOST:PORT]: what a robot asked, asked again; are the answers the same, and as quick?

    with connect("ws://robot-server:8000", record="monday.hvdx") as server: ...      # on the robot, hvd.client
    hvd replay monday.hvdx                                                           # what is in it
    hvd replay monday.hvdx --url ws://127.0.0.1:8000                                 # ask another server

A reply of `hvd serve` names the seed of its noise, and the question is asked with that seed: the same checkpoint gives
the same actions. A server of openpi draws new noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hvd import overrides
from hvd.errors import EXIT_COMPLETE, EXIT_FAILED, UserError
from hvd.fields import AT_LEAST_1, NOT_NEGATIVE, option


@dataclass(frozen=True)
class Options:
    """What `hvd replay` is told."""

    file: str = option("", "a record of hvd.client")
    url: str = option("", "ask this server, ws:// or wss://; empty = say what the record holds")
    first: int = option(1_000_000, AT_LEAST_1, "so many exchanges at most")
    paced: bool = option(False, "ask at the record's own times; else one after another")
    tolerance: float = option(1e-3, NOT_NEGATIVE, "the most that an action may differ, in the dataset's units")


def main(argv: Sequence[str]) -> int:
    """0; 1 where an answer differs by more than the tolerance, or a question is refused that was answered then."""
    if overrides.asks_help(argv):
        overrides.print_help("hvd replay FILE", __doc__ or "", Options())
        return EXIT_COMPLETE
    options = overrides.parse(Options(), argv, positional="file")
    if not options.file:
        raise UserError("give a record: hvd replay FILE")
    from hvd.replay import questions  # numpy, which a help page does without

    if not options.url:
        questions.show(options.file, options.first)
        return EXIT_COMPLETE
    worst, refused = questions.ask_again(options.file, options.url, options.first, options.paced)
    return EXIT_FAILED if refused or worst > options.tolerance else EXIT_COMPLETE
