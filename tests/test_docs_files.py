"""docs/files.md, docs/reliability.md: every row is a test of the files that its heading names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["files", "reliability"])
def test_every_row_is_a_test(page):
    parts = re.split(r"^## ", (ROOT / f"docs/{page}.md").read_text(), flags=re.MULTILINE)[1:]
    parts = [part for part in parts if "`tests/test_" in part.splitlines()[0]]
    assert len(parts) == {"files": 4, "reliability": 7}[page]
    for part in parts:
        head, *lines = part.splitlines()
        tests = "".join((ROOT / path).read_text() for path in re.findall(r"`(tests/\w+\.py)`", head))
        rows = [line for line in lines if line.startswith("|")][2:]
        assert rows
        for row in rows:
            names = re.findall(r"`(\w+)`", row.rsplit("|", 2)[1])
            assert names and all(f"def {name}(" in tests for name in names), row


def test_readme_leads_there():
    text = (ROOT / "README.md").read_text()
    assert "docs/files.md" in text and "docs/reliability.md" in text
