"""Imports go down: no room knows of one above it, the kernels know of nothing, and no room of a command."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = ["kernels", "errors", "escaping", "stopping", "parallel", "cli"]
ROOMS = ["settings", "pictures", "data", "runs", "nets", "methods", "evaluation", "reports", "exports"]
ROOMS += ["training", "preparation", "pretraining", "analysis"]
COMMANDS = [
    "train",
    "eval",
    "predict",
    "export",
    "atlas",
    "analyze",
    "prepare",
    "push",
    "convert",
    "pretrain",
    "doctor",
]
ORDER = GROUND + ROOMS + COMMANDS


def imported(path: Path, package: list[str]) -> Iterator[list[str]]:
    """What a file of a package imports, at its top or inside functions, as the parts of dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = node.module.split(".") if node.module else []
            yield from ([*start, *module, alias.name] for alias in node.names)


def test_every_part_has_its_place():
    found = (path for path in (ROOT / "ppap").iterdir() if path.suffix == ".py" or any(path.glob("*.py")))
    assert sorted(ORDER) == sorted({"kernels", *(path.stem for path in found)} - {"__init__"})


@pytest.mark.parametrize("part", ORDER)
def test_imports_go_down(part):
    base = ROOT if part == "kernels" else ROOT / "ppap"
    files = sorted((base / part).rglob("*.py")) or [base / f"{part}.py"]
    below = ORDER[: ORDER.index(part)]
    allowed = {part} if part in GROUND[:2] else {part, *below} - (set(COMMANDS) - {part})
    for path in files:
        names = imported(path, ["ppap", *path.relative_to(base).parent.parts])
        used = {room for name in names if name[0] == "ppap" for room in name[1:2]} & set(ORDER)
        assert used <= allowed, path


def test_an_op_has_one_name_everywhere():
    for op in ("proxy_average", "relation_masks", "masked_log_softmax"):
        files = [f"kernels/{op}/{backend}_impl.py" for backend in ("torch", "triton", "cuda", "native")]
        files += [f"kernels/{op}/reference.py", f"kernels/{op}/triton_kernels.py", f"tests/test_{op}.py"]
        files += [f"csrc/cpu/{op}.inc", f"csrc/cuda/{op}.cu", f"bench/test_{op}.py"]
        assert not [file for file in files if not (ROOT / file).exists()]
    for op in ("propagate", "contrastive_loss", "ppap_loss", "dense_crf"):
        assert (ROOT / "kernels" / op / "__init__.py").exists() and (ROOT / f"tests/test_{op}.py").exists()


def test_the_walk_to_a_kernel_leads_to_files():
    """CONTRIBUTING: from `ppap_loss(...)` to the body of each of its kernels."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    walk = text.split("## From `ppap_loss(...)`")[1].split("\n## ")[0]
    names = re.findall(r"`((?:kernels|csrc)/[\w/.]+\.\w+)`", walk)
    assert len(names) > 15 and not [name for name in names if not (ROOT / name).exists()]


LONGEST = {"file": 400, "function": 60}


def lines_of(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    return lines - (function.body[0].end_lineno - function.body[0].lineno + 1)


@pytest.mark.parametrize("room", ["ppap", "kernels", "csrc", "bench", "tests"])
def test_files_and_functions_are_short(room):
    files = [
        path
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".cpp", ".inc", ".cu", ".cuh", ".h")
    ]
    texts = {path: path.read_text() for path in files}
    assert not [path for path, text in texts.items() if text.count("\n") > LONGEST["file"]]
    for path in (path for path in files if path.suffix == ".py" and path.name != "triton_kernels.py"):
        nodes = ast.walk(ast.parse(texts[path]))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        assert not [node.name for node in functions if lines_of(node) > LONGEST["function"]], path
