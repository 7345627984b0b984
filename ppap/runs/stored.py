"""Settings and results as a run wrote them down: read with the hash that stands beside them, or refused."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppap.errors import DataError
from ppap.settings.config import hashes_of
from ppap.settings.plain import parse_json


def read_settings(path: Path) -> dict[str, Any]:
    """A file of settings, ``config`` and their ``hash``, such as ``RUN/config.json``.

    Settings that were edited are refused and not used: the run's weights, metrics and report are those of
    other ones.

    Args:
        path: the file.

    Returns:
        All that it holds.

    Raises:
        DataError: it cannot be read, is cut, or its settings are not those of its hash; the message names it.
    """
    return check_settings(_parsed(path, _REMEDY), path)


def check_settings(record: Any, path: Path) -> dict[str, Any]:
    """The content of a file of settings, which are those of the hash that stands beside them.

    Raises:
        DataError: they are not, or one of the two is missing; the message names the file.
    """
    if not (isinstance(record, dict) and isinstance(record.get("config"), dict) and "hash" in record):
        raise DataError(f"{path} is cut or damaged: it has no settings with their hash; {_REMEDY}")
    if record["hash"] not in hashes_of(record["config"]):
        raise DataError(
            f"{path} was edited or is damaged: its settings are not those of its hash {record['hash']}; "
            f"{_REMEDY}. Settings are changed on the command line: of a new run all, of --resume some"
        )
    return record


_REMEDY = (
    "copy it again from where the run was made, or give a checkpoint folder, which has settings of its own"
)


_SEAL = "sha256"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Results for a JSON file that is read again: with the checksum of all the rest."""
    values = json.loads(json.dumps(values))  # as they will be read: keys are text
    return {**values, _SEAL: _checksum(values)}


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """What :func:`sealed` returned, without its checksum; files of earlier versions have none.

    Args:
        path: the file.
        remedy: what to do about one that is damaged.

    Raises:
        DataError: it cannot be read, is cut, or is not what was written; the message names it.
    """
    record = _parsed(path, remedy)
    if not isinstance(record, dict):
        raise DataError(f"{path} is damaged: it holds no object; {remedy}")
    checksum = record.pop(_SEAL, None)
    # A checksum whose name alone is damaged is not one of an earlier version.
    like = difflib.get_close_matches(_SEAL, record, n=1) if checksum is None else []
    if like or (checksum is not None and checksum != _checksum(record)):
        raise DataError(f"{path} was edited or is damaged: it differs from its checksum; {remedy}")
    return record


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _parsed(path: Path, remedy: str) -> Any:
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from None
    except ValueError:
        raise DataError(f"{path} is cut or damaged: it is no JSON; {remedy}") from None
