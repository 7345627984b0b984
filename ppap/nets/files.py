"""Files of tensors: read whole and safely, in one piece or in shards; and written."""

import argparse
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ppap.errors import DataError
from ppap.runs.disk import sha256_of, to_disk
from ppap.settings.plain import parse_json

FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Names under which a directory holds its weights, in the order of preference."""
INDEX = ".index.json"
"""What transformers adds to a name for the list of its shards."""
CHECKSUMS = "ppap-checksums.json"
"""What an exported backbone has beside its files: the sha256 of each."""
INDICES = tuple(name + INDEX for name in FILES[:2])


def one_line(error: BaseException, limit: int = 300) -> str:
    """Kind and text of an error on one line of at most about ``limit`` characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= limit else text[:limit] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def weights_file(folder: Path) -> Path | None:
    """The file of weights, or the index of its shards, in a directory; None if there is none."""
    names = (name for pair in zip(FILES[:2], INDICES, strict=True) for name in pair)
    return next((folder / name for name in (*names, *FILES[2:]) if (folder / name).is_file()), None)


def read_file(path: Path) -> Any:
    """What a file of weights holds, on the CPU, in its own types; an index brings all its shards.

    Args:
        path: ``.safetensors``, anything of ``torch.save`` (read with ``weights_only=True``), or an index of
            shards, ``.index.json``.

    Returns:
        A dict of tensors, or whatever ``torch.save`` was given.

    Raises:
        DataError: the file, or a shard, is missing, cannot be read, is refused or incomplete.
    """
    if path.name.endswith(INDEX):
        return _read_shards(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return safetensors.torch.load_file(path)
        # DINO's full checkpoints hold their command line as a Namespace: plain data, allowed for this read
        # alone.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is damaged, or holds Python objects other than tensors and is refused for safety "
            f"({one_line(error)}); save the network's state dict alone with torch.save"
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise DataError(
            f"cannot read weights from {path} ({one_line(error)}); is the file complete?"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A new ``.safetensors`` with the permissions of any new file: safetensors lets its owner alone read it.

    Args:
        path: where to.
        tensors: contiguous, on the CPU.
        metadata: of the file's header.

    Raises:
        OSError: the disk refuses.
    """
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(dict(tensors), path, metadata)
    path.chmod(mode)


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        DataError: it cannot be read, or is no object.
    """
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; wanted an object")
    return content


def write_checksums(folder: Path) -> None:
    """Write :data:`CHECKSUMS` of the files in a folder, and see everything to the disk.

    Raises:
        OSError: the disk refuses.
    """
    files = sorted(folder.iterdir())
    text = json.dumps({file.name: sha256_of(file) for file in files}, indent=2) + "\n"
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")
    for file in (*files, folder / CHECKSUMS):
        to_disk(file)


def compare_checksums(folder: Path) -> None:
    """Compare the files of a folder with its :data:`CHECKSUMS`; folders of other makers have none.

    Raises:
        DataError: a file is missing or differs, or the list itself is cut.
    """
    if not (folder / CHECKSUMS).exists():
        return
    remedy = "copy the whole folder again, or, where a pretraining writes there, give the command again"
    listed = read_json(folder / CHECKSUMS)
    if FILES[0] not in listed:
        raise DataError(f"{folder / CHECKSUMS} is damaged: it lists no {FILES[0]}; {remedy}")
    for name, checksum in listed.items():
        try:
            found = sha256_of(folder / Path(name).name)
        except OSError as error:
            raise DataError(f"cannot read {folder / name} ({error.strerror or error}); {remedy}") from None
        if found != checksum:
            raise DataError(f"{folder / name} differs from its checksum in {CHECKSUMS}; {remedy}")


def shards(index: Path) -> dict[str, list[str]]:
    """File name of every shard of an index -> names of its tensors.

    Raises:
        DataError: no index, or one that names files elsewhere.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(n, str) for n in places.values()):
        raise DataError(f"{index} lists no shards; wanted weight_map: tensor -> file name")
    found: dict[str, list[str]] = {}
    for tensor, name in places.items():
        if Path(name).name != name:
            raise DataError(f"{index} names a shard {name!r}; wanted a file beside it, without a folder")
        found.setdefault(name, []).append(tensor)
    return found


def _read_shards(index: Path) -> dict[str, Tensor]:
    listed = shards(index)
    missing = [name for name in listed if not (index.parent / name).is_file()]
    if missing:
        raise DataError(
            f"{index}: {len(missing)} of {len(listed)} shards are missing beside it: {', '.join(missing[:3])}"
        )
    tensors: dict[str, Tensor] = {}
    for name, wanted in listed.items():
        content = read_file(index.parent / name)
        lacking = [key for key in wanted if key not in content] if isinstance(content, dict) else wanted
        if lacking:
            raise DataError(
                f"{index.parent / name} lacks {len(lacking)} tensors that {index.name} places there, such as "
                f"{lacking[0]}; is the download complete?"
            )
        tensors |= content
    return tensors
