"""Pages of docs/: all are listed with what they are for, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

from pi0.base.paths import REPO_ROOT
from tools.reliability import faults, page

DOCS = REPO_ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """What a link may name behind `#`: GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_list_of_pages_is_complete():
    listed = re.findall(r"^\| \[.+\]\((.+)\) \| to .+ \|$", (DOCS / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(
        ["stages/README.md", *(page.name for page in PAGES if page.stem != "README")]
    )


@pytest.mark.parametrize("page", [REPO_ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_and_headings(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_the_table_of_faults_is_that_of_the_tests():
    assert (DOCS / "reliability.md").read_text() == page(REPO_ROOT / "tests"), "run tools/reliability.py"


def test_a_mark_without_its_two_texts_is_named(tmp_path):
    (tmp_path / "test_x.py").write_text('@pytest.mark.tried("a|b", "c")\ndef test_y():\n    pass\n')
    assert "| a\\|b | c | [`test_y`](../tests/test_x.py) |\n" in page(tmp_path)
    (tmp_path / "test_x.py").write_text('@pytest.mark.tried("a")\ndef test_y():\n    pass\n')
    with pytest.raises(ValueError, match=r"test_x\.py: test_y: the mark tried takes two texts"):
        list(faults(tmp_path))
