"""Checkpoints: a folder that alone serves to predict, to evaluate and to continue.

Holds ``model.safetensors`` (every weight, frozen ones too), ``config.json`` (settings and what the network
is), ``state.pt`` (optimisers, counters and random generators; plain containers, loaded with
``weights_only=True``) and ``manifest.json`` (sha256 of each). It is written beside its place and renamed, so
that a stop at any moment leaves the old one or the new one.
"""

import hashlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppap.errors import DataError, NumberError, UsageError
from ppap.runs.disk import sha256_of, to_disk
from ppap.runs.info import Info, wrong_info
from ppap.runs.kept import is_kept, step_folders
from ppap.runs.stored import read_settings
from ppap.settings.plain import parse_json

FORMAT = 2
FILES = ("model.safetensors", "config.json", "state.pt")
_TRIES = 5
_AGAIN = "another process saved there meanwhile, or the folder is damaged: give the command again"


@dataclass
class Checkpoint:
    """Contents of a checkpoint folder."""

    path: Path
    tensors: dict[str, Tensor]
    """Weights by name: ``backbone.*``, what the method trains and keeps, ``linear.*, cluster.*``."""
    info: dict[str, Any]
    """``config`` (all settings), ``backbone`` (spec), ``origin``, ``classes``, ``class_names``,
    ``assignment``, ``step``."""
    manifest: dict[str, Any]
    """Checksum of each file, as it was when the weights were read: a later save replaces the folder."""
    selection: str = "given by its folder"
    """Why this one was taken, in words."""

    @property
    def sha256(self) -> str:
        """Checksum of the file of weights, as the manifest has it and :func:`load_checkpoint` verified it."""
        return self.manifest["model.safetensors"]

    def state(self) -> dict[str, Any]:
        """Optimisers, counters and generators, for resuming.

        Raises:
            DataError: the file is missing, damaged, or of another save than the weights.
        """
        path = self.path / "state.pt"
        if "state.pt" not in self.manifest:
            raise DataError(
                f"{self.path} was shared without its optimisers, so that it serves predict and eval alone; "
                "train anew, or get the run's own folder"
            )
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}); {_AGAIN}") from None
        if hashlib.sha256(content).hexdigest() != self.manifest["state.pt"]:
            raise DataError(f"{path} is not the one that the weights were saved with; {_AGAIN}")
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            raise DataError(
                f"{path} cannot be read ({_first_line(error)}); resume from another one"
            ) from None


def save_checkpoint(
    folder: Path, tensors: dict[str, Tensor], info: dict[str, Any], state: dict[str, Any]
) -> None:
    """Write a checkpoint to `folder`, replacing an older one only when the new one is complete.

    Raises:
        NumberError: a weight is not finite.
        DataError: the disk refuses; the older checkpoint stays.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NumberError(f"weights {name} are not finite; {folder} was not written, the older one stays")
    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(tensors, aside / "model.safetensors")
        (aside / "config.json").write_text(json.dumps({"format": FORMAT, **info}, indent=2) + "\n")
        # Through Python's own file: torch's writer ends on a full disk by a RuntimeError about positions.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        (aside / "state.pt").write_bytes(buffer.getbuffer())
        manifest = {name: sha256_of(aside / name) for name in FILES}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for name in (*FILES, "manifest.json"):
            to_disk(aside / name)
        replace_folder(aside, folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror or error
        raise DataError(f"cannot write {folder}: {reason}; free space or change --train.out") from None
    except SafetensorError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(
            f"cannot write {folder}: {_first_line(error)}; free space or change --train.out"
        ) from None


def write_shared(checkpoint: Checkpoint, info: dict[str, Any], folder: Path) -> None:
    """A checkpoint for other people: weights and settings, without optimisers, which are pickled.

    Args:
        checkpoint: whose weights are copied.
        info: what stands in its ``config.json``.
        folder: empty folder to write to.

    Raises:
        DataError: the disk refuses.
    """
    try:
        shutil.copyfile(checkpoint.path / "model.safetensors", folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"format": FORMAT, **info}, indent=2) + "\n")
        manifest = {name: sha256_of(folder / name) for name in ("model.safetensors", "config.json")}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}; free space") from None
    if manifest["model.safetensors"] != checkpoint.sha256:
        raise DataError(f"{checkpoint.path} changed while it was copied; give the command again")


def replace_folder(aside: Path, folder: Path) -> None:
    """Put the complete folder `aside` into the place of `folder`, which may exist."""
    # A folder cannot be renamed over another: between the two renames only `.NAME.old` is complete, which
    # standing() finds.
    old = _older(folder)
    if folder.exists():
        # Only now: after a stop between the renames, `old` is the one checkpoint there is.
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(aside, folder)
    to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def standing(folder: Path) -> Path:
    """Where the folder that :func:`replace_folder` puts to `folder` is: there, or where a kill left it."""
    return _older(folder) if not folder.exists() and _older(folder).exists() else folder


def exists(run: Path, name: str = "last") -> bool:
    """Whether a run directory has a checkpoint of this name, whole or damaged.

    Whoever removes a run that "has not saved yet" asks here: after a kill between the two renames of
    :func:`replace_folder` there is no folder of that name, and still a complete checkpoint.
    """
    kept = step_folders(run / "checkpoints") if name == "last" else []
    return standing(run / "checkpoints" / name).exists() or bool(kept)


def _older(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def find_checkpoint(path: str | Path, name: str | None = None) -> tuple[Path, str]:
    """Folder of a checkpoint, given that folder or a run directory, and why it was taken.

    Args:
        path: checkpoint folder, or run directory with ``checkpoints/{best,last}``.
        name: ``best`` or ``last``, for run directories; None = what the run's ``--train.selection`` says, or
            the other one where that is missing.

    Raises:
        DataError: nothing there looks like a checkpoint, or the run's ``config.json`` is cut or was edited.
    """
    path = standing(Path(path))
    if not path.exists():
        raise DataError(f"there is no checkpoint or run directory at {path}; check the path")
    if (path / "manifest.json").exists():
        return path, "given by its folder"
    chosen = _selection(path)
    selection = name or chosen
    for candidate in (name,) if name else (selection, {"best": "last", "last": "best"}[selection]):
        folder = path / "checkpoints" / candidate
        for found in (folder, _older(folder)):
            if (found / "manifest.json").exists():
                why = f"asked for: {name}" if name else _REASONS[selection, candidate]
                return found, why
    # Of a run whose last checkpoint was removed by hand, or lost with a part of the disk.
    kept = step_folders(path / "checkpoints") if name != "best" else []
    if kept:
        return kept[-1], f"the newest of those that --train.keep kept, {kept[-1].name}: there is no last one"
    wanted = f"checkpoints/{name or '{best,last}'}"
    raise DataError(
        f"{path} holds neither manifest.json nor {wanted}; give a run directory or a checkpoint folder"
    )


_REASONS = {
    ("last", "last"): "the last step, as --train.selection last decided beforehand",
    (
        "best",
        "best",
    ): "the best sum of the four validation scores, as --train.selection best says: validation "
    "labels chose it",
    ("best", "last"): "the last step: there is no best one, for want of labelled validation images",
    ("last", "best"): "the best one: there is no last one",
}
"""(What the run selects, what there is) -> the reason."""


def _selection(run: Path) -> str:
    """What a run directory's settings select; those of a pretraining select nothing.

    Raises:
        DataError: the settings are cut or were edited.
    """
    file = run / "config.json"
    if not file.exists():
        return "last"
    return read_settings(file)["config"].get("train", {}).get("selection", "last")


def load_checkpoint(path: str | Path, name: str | None = None) -> Checkpoint:
    """Read and verify a checkpoint.

    Args:
        path, name: as for :func:`find_checkpoint`.

    Raises:
        DataError: missing, damaged or of an unknown format; the message names the file.
    """
    for _ in range(_TRIES):
        folder, selection = find_checkpoint(path, name)
        before, error = _manifest_of(folder), None
        try:
            checkpoint = _read(folder, selection)
        except (DataError, OSError, SafetensorError) as caught:
            error = caught
        # A run that goes on may have put its next one there while the files of this one were read.
        if before is not None and before == _manifest_of(folder):
            break
    else:
        replaced = f"{folder} was replaced {_TRIES} times while it was read; give the command again later"
        error = error or DataError(replaced)
    if isinstance(error, SafetensorError):
        reason = _first_line(error)
        raise DataError(f"{folder / FILES[0]} is no file of weights ({reason}); copy it again")
    if error is not None:
        raise error
    return checkpoint


def weights_checksum(path: str | Path) -> str:
    """Checksum of the weights that :func:`load_checkpoint` would read, as the manifest has it.

    Raises:
        DataError: no such checkpoint, or a damaged manifest.
    """
    manifest = find_checkpoint(path)[0] / "manifest.json"
    return str(_read_json(manifest).get("model.safetensors"))


def _manifest_of(folder: Path) -> bytes | None:
    try:
        return (folder / "manifest.json").read_bytes()
    except OSError:
        return None


def _read(folder: Path, selection: str) -> Checkpoint:
    """Read and verify the files of a checkpoint; see :func:`load_checkpoint`."""
    manifest = _read_json(folder / "manifest.json")
    for file in FILES:
        if file == "state.pt" and file not in manifest:  # shared, see write_shared
            continue
        if not (folder / file).exists():
            raise DataError(f"{folder / file} is missing; copy the whole checkpoint folder")
        if manifest.get(file) != sha256_of(folder / file):
            raise DataError(f"{folder / file} differs from its checksum in manifest.json; copy it again")
    info = _read_json(folder / "config.json")
    if info.get("format") != FORMAT:
        found = info.get("format")
        older = isinstance(found, int) and found < FORMAT
        remedy = "train again, or use the ppap that wrote it" if older else "update ppap"
        raise DataError(f"{folder} has checkpoint format {found!r}, this ppap reads {FORMAT}; {remedy}")
    tensors = load_file(folder / "model.safetensors")
    if wrong := wrong_info(info, tensors):
        raise DataError(f"{folder / 'config.json'} cannot be used: {wrong}; copy the whole folder again")
    return Checkpoint(folder, tensors, Info(info, folder / "config.json"), manifest, selection)


def check_unsaved(run: Path) -> None:
    """Refuse to start a run anew that has a checkpoint; asked, as :func:`check_newest`, under its lock.

    Raises:
        UsageError: another process saved one meanwhile.
    """
    if exists(run):
        raise UsageError(
            f"{run} was continued by another process meanwhile; give the command again to go on from what it "
            "saved"
        )


def check_newest(checkpoint: Checkpoint, run: Path) -> None:
    """Refuse to go on from a checkpoint that is no longer the last one of its run.

    Whoever continues a run asks here once it holds the run's lock: another process may have continued it,
    saved and ended between the reading of the checkpoint and the lock.

    Raises:
        UsageError: the run has another one.
        DataError: the run has none.
    """
    if is_kept(checkpoint.path):  # asked for, and not the last one
        return
    folder, _ = find_checkpoint(run, "last")
    if _read_json(folder / "manifest.json") != checkpoint.manifest:
        raise UsageError(
            f"{run} was continued by another process since step {checkpoint.info['step']} was read; "
            "give the command again to go on from what it saved"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({_first_line(error)}); copy it again") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
