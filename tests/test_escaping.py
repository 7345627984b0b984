"""Names of files and classes, and what weights say of themselves, stay text: on terminals and in reports."""

import io
import sys

import pytest

from ppap.cli import run as command
from ppap.errors import DataError
from ppap.escaping import markdown, visible
from ppap.nets.backbone import build_backbone
from ppap.predict import main as predict
from ppap.pretraining.export import export_backbone
from ppap.train import main as train
from tests.methods import MODEL
from tests.runs import TINY, make_folder

HOSTILE = "a\x1b]0;owned\x07\x1b[2J | <img src=x onerror=alert(1)> [x](javascript:y) ![p](http://h/p) `*b*` "
HOSTILE += "\u202e\x9b"


@pytest.mark.parametrize(
    "text", ["class 0", "runs/my_run-3", "Straße, 50 %", "a/b_c.png (1)", "line\n\tnext", ""]
)
def test_plain_names_stay(text):
    assert visible(text) == text
    assert "\n" in text or markdown(text) == text


def test_controls_are_written_out():
    assert visible("a\x1b[31m\x00\r\x7f\x9b\u202eb") == "a\\x1b[31m\\x00\\r\\x7f\\x9b\\u202eb"
    assert visible("a\nb") == "a\nb" and visible("a\nb", one_line=True) == "a\\nb"


def test_nothing_of_a_name_is_markdown():
    text = markdown(HOSTILE + "\n# head\n```")
    assert "\n" not in text and "<" not in text and "\x1b" not in text
    for mark in "|[]`*":
        assert f"\\{mark}" in text and mark not in text.replace(f"\\{mark}", "")
    assert markdown("_x_ a_b") == "\\_x\\_ a_b" and markdown("&lt;") == "&amp;lt;"


def test_a_report_shows_them_as_they_are(tmp_path, capsys):
    root = make_folder(tmp_path / "data <b>")
    backbone = build_backbone(MODEL)
    export_backbone(backbone, tmp_path / "vit", HOSTILE)
    argv = ["folder", *TINY[4:], f"--data.root={root}", "--data.ignore-ids", "9", "--train.steps=1"]
    argv = [a for a in argv if not a.startswith(("--model.weights", "--model.backbone"))]
    argv = [a for a in argv if not a.startswith("--model.") or "condition" in a]
    argv += [f"--model.weights={tmp_path / 'vit'}", "--data.class-names", HOSTILE, "<script>", "c"]
    out = tmp_path / "run*<i>"
    assert command(train, [*argv, f"--train.out={out}"]) == 0
    printed, report = capsys.readouterr(), (out / "report.md").read_text()
    assert "\\x1b]0;owned" in printed.out and "data <b>" in printed.out
    for text in (printed.out, report):
        assert not {*"\x1b\x07\x9b\u202e"} & {*text}
    assert "\\](javascript" in report and "\\`\\*b" in report
    for raw in ("<img", "<script", "<b>", "<i>"):
        assert raw not in "".join(report.split("```")[::2]), raw
    assert "# run\\*&lt;i&gt;" in report


def test_errors_and_lists_of_files_reach_no_terminal_raw(tmp_path, capsys):
    name = "a\x1b[2J\x9b.png"
    (tmp_path / name).write_bytes(b"no image")
    assert command(predict, [str(tmp_path / "none\x1b"), str(tmp_path / name), "--out=x"]) == 3
    printed = capsys.readouterr()
    assert "\x1b" not in printed.err + printed.out and "\\x1b" in printed.err

    def fails(argv):
        print(f"found {name}")
        raise DataError(f"{name}: bad")

    assert command(fails, []) == 3
    printed = capsys.readouterr()
    assert printed.out == "found a\\x1b[2J\\x9b.png\n" and printed.err == "error: a\\x1b[2J\\x9b.png: bad\n"


def test_the_stream_is_put_back(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    assert command(lambda argv: print("\x1b"), []) == 0
    assert sys.stdout is stream and stream.getvalue() == "\\x1b\n"
