"""Supported and tested versions are stated in ``[tool.ppap.versions]``; everything else says the same."""

import re

import pytest

from bench import versions
from bench.aot_table import Table

ROOT = versions.PROJECT.parent
STATED = versions.settings()["tool"]["ppap"]["versions"]


def test_requirements_are_the_oldest_versions():
    project = versions.settings()["project"]
    assert project["requires-python"] == f">={STATED['python']['oldest']}"
    for package in ("torch", "triton"):
        (requirement,) = [text for text in project["dependencies"] if re.match(rf"{package}\b", text)]
        assert requirement.split(";")[0] == f"{package}>={STATED[package]['oldest']}"


@pytest.mark.parametrize("package", STATED)
def test_the_readme_has_its_line(package):
    stated = STATED[package]
    title = {"python": "Python", "torch": "PyTorch", "triton": "Triton"}[package]
    line = f"| {title} | {stated['oldest']} and later | {', '.join(stated['tested'])} |"
    assert line in (ROOT / "README.md").read_text().splitlines()


def test_the_readme_names_no_other_python():
    assert re.findall(r"Python (3\.\d+) or later", (ROOT / "README.md").read_text()) == [
        STATED["python"]["oldest"]
    ]


def test_the_oldest_supported_versions_are_tested():
    for package in ("torch", "triton"):
        assert STATED[package]["tested"][0] == f"{STATED[package]['oldest']}.0"


def test_the_report_of_the_compilers_has_every_tested_triton():
    assert list(Table.read(ROOT / "bench" / "results" / "aot.md").columns) == STATED["triton"]["tested"]


def test_overlays_hold_both_ends():
    assert versions.overlay("oldest")[:2] == ["torch==2.11.0", "triton==3.6.0"]
    assert versions.overlay("newest")[0] == f"triton=={STATED['triton']['tested'][-1]}"
    text = (ROOT / ".ci" / "run").read_text()
    assert "make test-oldest" in text and "make test-newest" in text
