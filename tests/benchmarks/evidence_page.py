"""docs/evidence.md from the archives: for each matrix its tables (between two marks) and figures. Nothing is trained.

python -m tests.benchmarks.evidence_page
"""

import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hvd.benchmark import matrix, page, work

HERE = Path(__file__).parent
ARCHIVES = HERE / "evidence"
DOCS = HERE.parents[1] / "docs"
PAGE = DOCS / "evidence.md"
MATRICES = ("evidence", "ocbench", "kinder", "metaworld")


def done(folder: Path) -> Iterator[tuple[str, matrix.Matrix, list[work.Done]]]:
    """Each matrix and what the archives, unpacked into `folder`, have of it, if anything."""
    for archive in sorted(ARCHIVES.glob("*.tar.xz")):
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    for name in MATRICES:
        asked = matrix.read(str(HERE / f"{name}.toml"))
        items = matrix.items(asked, run=False)
        if found := [one for item in items if (one := work.finished(folder, item)) is not None]:
            yield name, asked, found


def written(text: str, name: str, asked: matrix.Matrix, found: list[work.Done]) -> str:
    """The page with the tables of a matrix between its marks."""
    begin, end = (f"<!-- tests/benchmarks/{name}.toml {which} -->\n" for which in ("begins", "ends"))
    before, _, rest = text.partition(begin)
    _, *parts = page.markdown(asked, found, "python -m tests.benchmarks.evidence_page").split("\n\n")
    part = "\n\n".join(f"#{each}" if each.startswith("##") else each for each in parts)
    return before + begin + part + end + rest.partition(end)[2]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, asked, found in done(Path(folder)):
            PAGE.write_text(written(PAGE.read_text(), name, asked, found))
            for kind, figure in page.figures(asked, found).items():
                path = DOCS / "figures" / f"{name}-{kind}.svg"
                figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
                print(path)


if __name__ == "__main__":
    main()
