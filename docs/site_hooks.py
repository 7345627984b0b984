"""Pages of the site that are made of other files: the README as its first page, notebooks as Markdown."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs: add what is made."""
    files.append(File.generated(config, "index.md", content=first_page((ROOT / "README.md").read_text())))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        page = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, page, content=notebook_page(json.loads(notebook.read_text()))))
    return files


def first_page(readme: str) -> str:
    """The README with links as they are seen from docs/; those that leave docs/ become their text."""
    readme = re.sub(r"\]\(docs/", "](", readme)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?:CONTRIBUTING|bench/)[^)]*\)", r"\1", readme)


def notebook_page(notebook: dict[str, Any]) -> str:
    """The cells of a notebook, code and text, as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(parts) + "\n"
