"""Pages of docs/: all are listed with what they are for, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

from pi0.base.paths import REPO_ROOT

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
