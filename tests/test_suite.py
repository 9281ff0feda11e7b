"""The tests themselves: what holds for their files."""

import ast

import pytest

from pi0.base.paths import REPO_ROOT

FILES = sorted((REPO_ROOT / "tests").rglob("*.py"))


def imported(source: str) -> set[str]:
    """Every module that the code may import, with the names that it takes from packages."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_tests_share_is_in_tests_support_and_not_in_a_test_module(path):
    modules = [part for name in imported(path.read_text(encoding="utf-8")) for part in name.split(".")]
    assert [part for part in modules if (REPO_ROOT / "tests" / f"{part}.py").is_file()] == []
