"""The command line: ``ppap COMMAND`` and ``python -m ppap.COMMAND`` are the same.

Errors that a user can act on are printed as one short message; the exit code says their kind: 0 done, 2
usage, 3 data, 4 numbers, 75 stopped: what was done is kept, and the line printed says how to
go on.
"""

import codecs
import dataclasses
import importlib
import inspect
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from ppap.errors import DataError, PpapError, UsageError, disk_full, out_of_memory, unknown_name
from ppap.escaping import Visible, visible
from ppap.parallel import explain, launched
from ppap.stopping import Listening

if TYPE_CHECKING:
    import tyro

_ITEM = re.compile(r" |[-*] |\d+\. ")  # what a line begins with that does not go on with the one before
_ASCII = {"±": "+-", "×": "x", "–": "-", "—": "-", "…": "..."}
_OFFLINE = "--offline"
HELP_ALL = "--help-all"
_VARIABLE = "HF_HUB_OFFLINE"  # the hub's own

COMMANDS = {
    "train": "train on generated scenes, or on a folder of images",
    "eval": "measure a checkpoint: cluster and linear probe, without and with CRF",
    "predict": "write segmentation masks of images",
    "export": "write a network as ONNX or TorchScript, or masks as COCO, for CVAT or Datumaro",
    "atlas": "make a page on which to name the clusters of a run",
    "analyze": "thresholds, quality of sets, ablation, sweep, benchmark: the paper's figures and tables",
    "prepare": "check a public data set; make its training crops, cut its tiles",
    "push": "share a run on the Hugging Face Hub",
    "convert": "make a run of a checkpoint of the published code of PPAP, HP or STEGO",
    "pretrain": "train a backbone without labels, on images of your own or on generated scenes",
    "doctor": "show versions, devices and which kernel backend is used",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script ``ppap``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == [_OFFLINE]:  # before the command as well as behind it
        argv = argv[1:2] + argv[:1] + argv[2:]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from ppap import __version__

        print(f"ppap {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        print(f"error: {unknown_name('command', name, COMMANDS)}", file=sys.stderr)
        return UsageError.exit_code
    return run(importlib.import_module(f"ppap.{name}").main, rest)


def _overview() -> str:
    rows = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    return (
        "usage: ppap COMMAND [options]\n\n"
        "Unsupervised semantic segmentation by progressive proxy anchor propagation.\n\n"
        f"commands:\n{rows}\n\n"
        "ppap COMMAND --help lists the options of a command.\n"
        "ppap COMMAND --offline downloads nothing, as with HF_HUB_OFFLINE=1: weights of timm come from the\n"
        "hub's cache, or are refused."
    )


def run(command: Callable[[Sequence[str]], Any], argv: Sequence[str] | None = None) -> int:
    """Call a command; turn errors into one line on stderr and their exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ppap").setLevel(logging.INFO)
    # timm still decorates functions with torch.jit, which torch announces to drop; nothing a user can act on.
    warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
    _printable()
    try:
        _refuse_copies(command)
        given = list(sys.argv[1:] if argv is None else argv)
        with Visible(), Listening(), _lost_workers(), _offline(_OFFLINE in given):
            command([argument for argument in given if argument != _OFFLINE])
        return 0
    except PpapError as error:
        if (rank := explain(error)) is not None:
            text = rank + visible(str(error))
            print(f"error: {text}" if error.exit_code != 75 else text, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if disk_full(error):
            where = getattr(error, "filename", None)
            of = f" of {visible(str(where), one_line=True)}" if where else ""
            print(f"error: the disk{of} is full; make room, or give another folder", file=sys.stderr)
            return DataError.exit_code
        if not out_of_memory(error):
            raise
        reason = visible(str(error).strip() or type(error).__name__).splitlines()[0]
        print(
            f"error: memory is exhausted ({reason}); give a smaller --eval.batch-size, --data.resolution "
            "or --resolution, or fewer --data.workers, as far as the command has them",
            file=sys.stderr,
        )
        return UsageError.exit_code


def _printable() -> None:
    """Let no character that an output's encoding lacks end a command: ± becomes +-, others a ?."""

    def replaced(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        text = error.object[error.start : error.end]
        return "".join(_ASCII.get(character, "?") for character in text), error.end

    codecs.register_error("ppap", replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="ppap")


def _refuse_copies(command: Callable[[Sequence[str]], Any]) -> None:
    """Refuse to be started several times for one piece of work, but for commands that ranks share.

    Raises:
        UsageError: by torchrun, with more than one process.
    """
    count = launched()
    if count > 1 and not getattr(command, "by_ranks", False):
        raise UsageError(
            f"torchrun started {count} processes, and each would do the whole work: ppap train, eval and "
            "predict alone share it; start this command without torchrun, or with --nproc-per-node 1"
        )


@contextmanager
def _offline(asked: bool) -> Iterator[None]:
    """``--offline``: no setting of a run, but a variable, which the processes of a study inherit."""
    before = os.environ.get(_VARIABLE)
    if asked:
        os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        if asked and before is None:
            del os.environ[_VARIABLE]
        elif asked:
            os.environ[_VARIABLE] = before


@contextmanager
def _lost_workers() -> Iterator[None]:
    """Turn torch's error about a loader process that died into a DataError.

    torch raises it from a signal handler, wherever the main process is: no narrower place would do.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = " ".join(str(error).split())
        raise DataError(
            f"a process that loads images was ended from outside, perhaps for its memory or for want of room "
            f"in /dev/shm ({reason}); "
            "give fewer --data.workers, 0 = none; training goes on with ppap train --resume RUN"
        ) from None


def parse(
    kind: Any,
    argv: Sequence[str],
    *,
    command: str,
    description: str,
    default: Any = None,
    brief: Mapping[type, Collection[str]] | None = None,
) -> Any:
    """Parse `argv` into the dataclass `kind` with tyro; exits with 2 on a wrong or unknown option.

    Args:
        kind: dataclass whose fields become options.
        argv: arguments without the program's name.
        command: name after ``ppap``, for the usage line.
        description: text at the top of ``--help``.
        default: instance whose values are the defaults.
        brief: dataclass -> its fields that ``--help`` shows, where only ``--help-all`` shows all.
    """
    import tyro

    args = list(argv)
    if brief is not None and HELP_ALL in args:
        args, brief = ["--help"], None
    if not {*args} & {"-h", "--help"}:
        brief = None  # what is not shown could not be given
    options = {} if default is None else {"default": default}
    with Visible.lifted():
        return tyro.cli(
            kind,
            args=args,
            prog=f"ppap {command}",
            description=flowing(description),
            registry=_flowing_help(brief),
            **options,
        )


def _flowing_help(
    brief: Mapping[type, Collection[str]] | None = None,
) -> "tyro.constructors.ConstructorRegistry":
    """tyro's own rules for dataclasses, but with help texts that fill the width of the terminal.

    With `brief` only the fields that it names are options.
    """
    import tyro

    registry, asking = tyro.constructors.ConstructorRegistry(), False

    @registry.struct_rule
    def flow_help(info: Any) -> Any:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None  # the rules of tyro come next
        asking = True
        try:
            spec = registry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(spec, tyro.constructors.StructConstructorSpec):
            return spec
        fields = [dataclasses.replace(f, helptext=_flowing_text(f.helptext)) for f in spec.fields]
        if brief is not None:
            shown = brief.get(info.type, ())
            fields = [
                f
                if f.name in shown or dataclasses.is_dataclass(f.type)
                else dataclasses.replace(f, type=Annotated[f.type, tyro.conf.Suppress])
                for f in fields
            ]
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


def _flowing_text(text: Any) -> Any:
    """:func:`flowing` of a help text, or of one that tyro reads from the source when it is shown."""
    if callable(text):
        return lambda: _flowing_text(text())
    return text and flowing(text)


def flowing(text: str) -> str:
    """`text` with one line per paragraph; lines that are indented, or begin an item of a list, stay."""
    lines: list[str] = []
    for line in inspect.cleandoc(text).splitlines():
        before = lines[-1] if lines else ""
        if before and line and not before.startswith(" ") and not _ITEM.match(line):
            lines[-1] = f"{before} {line}"
        else:
            lines.append(line)
    return "\n".join(lines)


def required() -> Any:
    """Help shows so what has an empty default only for the command to refuse it with a message of its own."""
    import tyro

    return tyro.conf.arg(help_behavior_hint="(required)")


def first_positional(argv: Sequence[str]) -> str | None:
    """The leading argument if it is no option: commands that take a checkpoint name it first."""
    return argv[0] if argv and not argv[0].startswith("-") else None
