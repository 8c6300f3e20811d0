"""The documentation: every snippet and every example runs, every local link leads somewhere, versions agree."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
METHODS = ROOT / "docs" / "methods"
SECTIONS = ["What it is", "Equation", "When to use it", "Cost", "Usage", "Results"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)")


def snippets() -> Iterator[Any]:
    """Each python block of the README and of the pages in docs, with its page and first line."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start(1)].count("\n") + 1
            yield pytest.param(page, line, match[1], id=f"{page.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize(("page", "line", "code"), list(snippets()))
def test_snippet_runs(page: Path, line: int, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    padded = "\n" * (line - 1) + code  # so that a traceback names the line of the page
    namespace = {"__name__": "__main__"}
    exec(compile(padded, str(page), "exec", dont_inherit=True), namespace)
    assert len(namespace) > 2, "the snippet defines nothing"


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_example_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, "--iterations", "2"])
    described = runpy.run_path(str(path), run_name="__main__")
    assert described["__doc__"]
    assert "before" in (printed := capsys.readouterr().out)
    assert "after" in printed


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_local_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name} links to {target}, which is not there"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name} links to {target}, but {found.name} has no such heading"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_every_method_has_a_page_of_the_same_sections() -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in METHODS.glob("*.md") if page.stem != "README"}
    assert set(pages) == {*fewstep.algorithms.__all__, "baselines"}
    table = (METHODS / "README.md").read_text(encoding="utf-8")
    for name, text in pages.items():
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS, name
        assert "```python" in text, f"{name} has no snippet"
        assert f"| [{name}]({name}.md) |" in table, f"{name} is missing in the table"


def test_links_are_found() -> None:
    assert LINK.findall('[a](b.md) ![c](d.png "title") [e](f#g)') == ["b.md", "d.png", "f#g"]


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert (released[0], cited) == (version, [version])
