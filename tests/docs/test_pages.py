"""What the strict build of the site does not see: links from outside docs/, and the tables that the studies give."""

import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files_and_headings(name: str) -> None:
    text = re.sub(r"`[^`\n]*`", "", (REPOSITORY / name).read_text())
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert (REPOSITORY / file).is_file(), target
        headings = re.findall(r"^#+ (.+)$", (REPOSITORY / file).read_text(errors="replace"), re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}


def test_pages_that_the_code_names_exist() -> None:
    sources = [path for folder in ("src", "examples") for path in (REPOSITORY / folder).rglob("*.*")]
    texts = [path.read_text() for path in sources if path.suffix in (".py", ".sh", ".yaml", ".md")]
    named = {name for text in texts for name in re.findall(r"\bdocs/\w+\.md", text)}
    assert named
    assert not [name for name in named if not (REPOSITORY / name).is_file()]


def test_tables_are_made_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "studies")
    tables = importlib.import_module("tables").TABLES
    placed = [place for page in PAGES for place in re.findall(r"^\[Table (\w+)\]\(", page.read_text(), re.MULTILINE)]
    assert {*placed} == {*tables, "presets"}
    for make in tables.values():
        rows = make().splitlines()
        assert len(rows) > 3
        assert len({row.count(" | ") for row in rows}) == 1
