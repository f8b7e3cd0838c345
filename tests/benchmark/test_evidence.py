"""docs/evidence.md says what the archives say."""

from tests.benchmarks import evidence_page


def test_the_page_has_the_tables_of_all_archives(tmp_path):
    text, items = evidence_page.PAGE.read_text(), 0
    for name, asked, found in evidence_page.done(tmp_path):
        items += len(found)
        assert len(found) % (len(asked.policies) + 3) == 0, "an archive lacks items"  # data, value run, table
        assert evidence_page.written(text, name, asked, found) == text, "python -m tests.benchmarks.evidence_page"
    assert items == len(list((tmp_path / "items").iterdir())), "an archive has what no matrix asks for"
