"""docs/evidence.md says what the archives of the claim say."""

from tests.benchmarks import evidence_page


def test_the_page_has_the_tables_of_all_archives(tmp_path):
    asked, found = evidence_page.done(tmp_path)
    page = evidence_page.PAGE.read_text()
    assert len(found) == 12 * len(list(evidence_page.ARCHIVES.glob("*.tar.xz"))), "an archive lacks items"
    assert evidence_page.written(page, evidence_page.tables(asked, found)) == page, (
        "python -m tests.benchmarks.evidence_page"
    )
