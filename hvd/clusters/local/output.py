"""What a step prints, on its way to the terminal and to its log: lines are lines, progress bars do not flood either."""

import codecs
import re
from io import TextIOBase
from typing import IO

TextFile = IO[str] | TextIOBase

_BAR_BLOCKS = re.compile(r"\|[^|\n]*\|")


class Stream:
    """One pipe of one process.

    Text that ends in a newline is a line; of what a carriage return rewrites only the last state counts, and is kept
    in `bar` until it is a line. Lines go to `log` and, with `prefix`, to `screen`; with `raw` the screen gets every
    byte as it comes, so that a terminal draws the bar itself.
    """

    def __init__(self, screen: TextFile | None, log: TextFile, prefix: str = "", raw: bool = False):
        self.bar = ""
        self._screen, self._log, self._prefix, self._raw = screen, log, prefix, raw
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._partial = ""

    def feed(self, chunk: bytes) -> None:
        """Take what the process wrote; b"" ends the stream."""
        text = self._decoder.decode(chunk, final=not chunk)
        if self._raw and self._screen is not None and text:
            self._screen.write(text)
            self._screen.flush()
        *lines, self._partial = (self._partial + text).split("\n")
        if not chunk and self._partial:
            lines.append(self._partial)
            self._partial = ""
        for line in lines:
            self._line(line)
        if "\r" in self._partial:
            states = [state for state in self._partial.split("\r") if state.strip()]
            self.bar = states[-1] if states else ""
            self._partial = "\r" + self.bar

    def _line(self, line: str) -> None:
        states = [state for state in line.split("\r") if state.strip()]
        text = states[-1].rstrip() if states else ""
        if "\r" in line:
            self.bar = ""
        print(text, file=self._log, flush=True)
        if not self._raw and self._screen is not None and text:
            print(self._prefix + text, file=self._screen, flush=True)


def short(bar: str) -> str:
    """A progress bar without its blocks: `value:  45%|####  | 450/1000 [...]` -> `value: 45% 450/1000 [...]`."""
    return " ".join(_BAR_BLOCKS.sub(" ", bar).split())
