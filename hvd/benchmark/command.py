"""hvd benchmark FILE --out FOLDER: a matrix of policies on simulated tasks, trained and tried out; tables and a page.

    hvd benchmark tests/benchmarks/evidence.toml --out runs/evidence
    hvd benchmark tests/benchmarks/evidence.toml --out runs/evidence --tables

The same command goes on where it was stopped or killed, and does nothing twice. It leaves results.parquet (every
rollout), report.html and tables.md in the folder. `--tables` makes these from what is done already.
"""

import io
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd import files, overrides
from hvd.errors import EXIT_COMPLETE, UserError
from hvd.fields import AT_LEAST_1, option


@dataclass(frozen=True)
class Options:
    """What `hvd benchmark` is told."""

    file: str = option("", "the matrix, a TOML file (hvd/benchmark/matrix.py describes it)")
    out: str = option("", "the folder for everything that is made")
    at_a_time: int = option(2, AT_LEAST_1, "items side by side, each on its share of the cores")
    only: tuple[str, ...] = option((), "TASK-SEED, such as tote-21: only these data sets; the others another time")
    tables: bool = option(False, "run nothing: make the tables and the page from what is done")
    dry_run: bool = option(False, "list what would be done")


def main(argv: Sequence[str]) -> int:
    """Do what is left of the matrix; 0 when all of it is done, 1 when items failed, 143 when a signal stopped it."""
    if overrides.asks_help(argv):
        overrides.print_help("hvd benchmark FILE --out FOLDER", __doc__ or "", Options())
        return EXIT_COMPLETE
    # what they import is slow, and a help page does without
    from hvd.benchmark import analysis, matrix, page
    from hvd.benchmark.work import Work, finished

    options = overrides.parse(Options(), argv, positional="file")
    if not options.file or not options.out:
        raise UserError("give the matrix and a folder: hvd benchmark FILE --out FOLDER")
    asked, out = matrix.read(options.file), Path(options.out).expanduser()
    work = matrix.items(asked, run=not options.tables)
    now = [item for item in work if not options.only or item.name.startswith(tuple(f"{x}-" for x in options.only))]
    if not now:
        raise UserError(f"--only {' '.join(options.only)}: no data set of {options.file} is called so")
    if options.dry_run:
        print("\n".join(f"{item.name}: {', '.join(item.steps)}" for item in now if not finished(out, item)))
        return EXIT_COMPLETE
    code = EXIT_COMPLETE
    if not options.tables:
        with files.disk_errors(out, "choose another --out"):
            out.mkdir(parents=True, exist_ok=True)
            code = Work(out.resolve(), now, options.at_a_time).run()
    done = [found for item in work if (found := finished(out, item)) is not None]
    if any(found.cell for found in done):
        command = shlex.join(["hvd", "benchmark", options.file, "--out", options.out])
        buffer = io.BytesIO()
        import pyarrow.parquet

        pyarrow.parquet.write_table(analysis.table(done), buffer)
        files.write_atomic(out / "results.parquet", buffer.getvalue())
        files.write_atomic(out / "tables.md", page.markdown(asked, done, command))
        files.write_atomic(out / "report.html", page.html(asked, done))
        print(page.text(asked, done), flush=True)
        left = len(work) - len(done)
        print(f"\n{left or 'nothing'} of {len(work)} items left; {os.fspath(out / 'report.html')}", flush=True)
    elif options.tables:
        raise UserError(f"{out}: no policy of {options.file} is done")
    return code
