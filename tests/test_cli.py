"""The command line as a whole: help, exit codes, doctor."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from ppap import cli, doctor
from ppap.analyze import ANALYSES
from ppap.data.loading import whole_loader
from ppap.errors import DataError, NumberError, Stopped, UsageError
from ppap.kernels import dispatch
from ppap.reports.installation import PACKAGES

ROOT = Path(__file__).parent.parent


def test_overview_and_version(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"ppap \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_unknown_commands_name_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([command, "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: ppap {command}" in text and "None" not in text.splitlines()[2]


def test_help_texts_fill_their_lines():
    text = cli.flowing("""One
        two
        (three).

        Names:
          a  first
          b  second

        Last
        line:
        - an item
        - another.""")
    wanted = "One two (three).\n\nNames:\n  a  first\n  b  second\n\nLast line:\n- an item\n- another."
    assert text == wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Options of two lines
    (in one)."""

    size: int = 3
    """A side
    [pixels]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options."""

    rate: float = 0.1
    """A rate
    (of something).

    And more."""
    part: Section = dataclasses.field(default_factory=Section)


def test_help_of_options_does_not_keep_the_lines_of_the_source(capsys):
    default = Options(rate=0.2, part=Section(size=5))
    with pytest.raises(SystemExit):
        cli.parse(Options, ["--help"], command="test", description="A test.", default=default)
    text = capsys.readouterr().out
    for line in ("A rate (of something).", "And more. (default: 0.2)", "A side [pixels]. (default: 5)"):
        assert line in text
    found = cli.parse(Options, ["--part.size=7"], command="test", description="A test.", default=default)
    assert found == Options(rate=0.2, part=Section(size=7))


@pytest.mark.parametrize(
    "command", [["predict"], ["prepare"], *(["analyze", name] for name in ANALYSES)], ids=" ".join
)
def test_help_says_what_is_required(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert "(required)" in text and "default: ''" not in text
    positional = text.partition("options")[0]
    assert "default: )" not in positional


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("a"), 2),
        (DataError("a"), 3),
        (NumberError("a"), 4),
        (Stopped("a"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error, code, capsys):
    def command(argv):
        raise error

    assert cli.run(command, []) == code
    assert "Traceback" not in capsys.readouterr().err


class Killed(Dataset):
    """Its loader process ends as if for want of memory."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_a_killed_loader_process_is_one_line(capsys):
    assert cli.run(lambda argv: list(whole_loader(Killed(), workers=1)), []) == 3
    errors = capsys.readouterr().err
    assert "ended from outside" in errors and "--data.workers" in errors and errors.count("\n") == 1


def test_a_bug_is_not_dressed_up():
    def command(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        cli.run(command, [])


def test_doctor_lists_what_the_package_depends_on():
    listed = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("]")[0]
    assert set(PACKAGES) == set(re.findall(r'"([a-z-]+)', listed))


def test_doctor_says_what_is_used_and_why_not(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    doctor.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert "TRITON_INTERPRET" not in found["variables"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor.report()["variables"]["TRITON_INTERPRET"] == "1"
    assert found["backends"]["torch"] == "available"
    assert set(found["auto"]["cpu"]) == set(dispatch.OPS)
    for name, reason in found["backends"].items():
        assert reason == "available" or len(reason) > 10, f"{name} without a reason"
    doctor.main([])
    text = capsys.readouterr().out
    assert "kernel backends" in text and "PPAP_BACKEND" in text


def test_the_readme_lists_every_variable_and_only_those():
    table = re.findall(r"^\| `(PPAP_\w+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert sorted(table) == sorted(dispatch.VARIABLES)


def test_no_device_is_written_as_a_literal_call():
    for folder in ("ppap", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert ".cuda()" not in path.read_text(), f"{path} moves tensors to a fixed device"


def test_torch_load_is_always_safe():
    for folder in ("ppap", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for call in re.findall(r"torch\.load\([^\n]*(?:\n[^\n]*){0,3}", path.read_text()):
                assert "weights_only=True" in call, f"{path}: torch.load without weights_only=True"
