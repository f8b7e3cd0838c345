"""docs/evidence.md from the claim's archives: its tables (between the two marks) and figures. Nothing is trained.

python -m tests.benchmarks.evidence_page
"""

import tarfile
import tempfile
from pathlib import Path

from hvd.benchmark import matrix, page, work

HERE = Path(__file__).parent
FILE, ARCHIVES = HERE / "evidence.toml", HERE / "evidence"
DOCS = HERE.parents[1] / "docs"
PAGE = DOCS / "evidence.md"
BEGIN, END = "<!-- tests/benchmarks/evidence_page.py begins -->\n", "<!-- tests/benchmarks/evidence_page.py ends -->\n"


def done(folder: Path) -> tuple[matrix.Matrix, list[work.Done]]:
    """The matrix and what the archives, unpacked into `folder`, have of it."""
    for archive in sorted(ARCHIVES.glob("*.tar.xz")):
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    asked = matrix.read(str(FILE))
    return asked, [found for item in matrix.items(asked) if (found := work.finished(folder, item)) is not None]


def tables(asked: matrix.Matrix, found: list[work.Done]) -> str:
    """The part between the marks."""
    _, about, *sections = page.markdown(asked, found, "python -m tests.benchmarks.evidence_page").split("\n\n")
    return "\n\n".join([BEGIN + about, *sections]) + END


def written(page_text: str, part: str) -> str:
    """The page with another part between the marks."""
    before, _, rest = page_text.partition(BEGIN)
    return before + part + rest.partition(END)[2]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        asked, found = done(Path(folder))
    PAGE.write_text(written(PAGE.read_text(), tables(asked, found)))
    for name, figure in page.figures(asked, found).items():
        path = DOCS / "figures" / f"evidence-{name}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
