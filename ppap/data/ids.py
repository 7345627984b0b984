"""Which ids of label files are classes: ignored ids leave them, gaps are closed, names follow.

Files keep their own ids, and so do masks and reports: ``Classes.ids`` has the id of each class.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ppap.data.base import Datasets
from ppap.data.deep import Reading
from ppap.errors import DataError
from ppap.settings.config import DataConfig

NO_ID = -1
"""In place of an id: a class, and so a cluster, that no id of the labels belongs to."""
_MADE_UP = re.compile(r"class \d+|no id \(\d+\)")
_SHOWN = 12  # ids in one line


@dataclass(frozen=True)
class Classes:
    """The classes of a data set and the ids that files have for them."""

    ids: tuple[int, ...]
    """Stored id of each class; -1 = none."""
    ignored: tuple[int, ...]
    """Stored ids that are left out."""
    names: tuple[str, ...]
    """One per class."""
    notes: tuple[str, ...] = ()
    """What a user must know, each half a sentence."""
    stray: tuple[int, ...] = ()
    """Ids of the labels that are neither classes nor ignored."""


def choose_classes(present: Sequence[int], config: DataConfig) -> Classes:
    """Classes of labels that hold the ids `present`.

    Without a number of classes every id that is present and not ignored is one. A number C, or C names, mean
    the ids 0 to C - 1, of which ignored ones drop out with their names; where the labels have higher ids, the
    first C that are not ignored, or the C that there are.

    Args:
        present: ids that occur, ignored ones included; sorted.
        config: ``label_ids``, ``classes``, ``class_names`` and ``ignore_ids``.

    Raises:
        DataError: nothing but ignored ids, or 255 of which nobody knows whether it is a class.
    """
    ignored = _ignored(config)
    if config.label_ids:
        ids = [NO_ID if i in ignored else i for i in config.label_ids]
        stray = [i for i in present if i not in ignored and i not in ids]
        return Classes(tuple(ids), ignored, _names(ids, config.class_names), (), tuple(stray))
    count, notes = config.classes or len(config.class_names), []
    kept = [i for i in present if i not in ignored]
    if list(present) == [0, 255] and count != 1:
        kept, ignored = [0, 255], tuple(i for i in ignored if i != 255)
        notes.append("masks of 0 and 255: two classes (--data.classes 1 leaves 255 out)")
    elif not kept:
        ids = " ".join(map(str, ignored))
        raise DataError(f"the labels hold only ignored ids ({ids}); change --data.ignore-ids")
    else:
        _refuse_doubtful(present, kept, config, count)
    ids, stray = _of_count(kept, ignored, count, bool(config.class_names)) if count else (kept, [])
    by_id = len(config.class_names) == count and list(ids) == [i for i in range(count) if i not in ignored]
    names = [config.class_names[i] for i in ids] if config.class_names and by_id else config.class_names
    if count and len(ids) < count:
        notes.append(f"ids {_listed([i for i in range(count) if i in ignored])} of {count} are ignored")
    if list(ids) != list(range(len(ids))):
        notes.append(f"classes are the ids {_listed(ids)}")
    return Classes(tuple(ids), ignored, _names(ids, names), tuple(notes), tuple(stray))


def reading_of(info: dict[str, Any]) -> Reading:
    """How a checkpoint's run read pictures; earlier versions took them as stored."""
    facts = info.get("files") or {}
    return Reading(
        tuple(facts.get("bands", ())), tuple(facts.get("value_range", ())), facts.get("exif", "apply")
    )


def _files_as_read(data: DataConfig, facts: dict[str, Any]) -> DataConfig:
    """Settings of the files' reading as a checkpoint has them."""
    if not facts:  # a checkpoint of an earlier version: 16 bits were taken whole
        return replace(data, value_range=data.value_range or (0, 65535))
    colours = tuple("#{:02x}{:02x}{:02x}".format(*colour) for colour in facts["label_colours"])
    return replace(
        data,
        label_colours=colours,
        bands=tuple(facts["bands"]),
        value_range=tuple(facts["value_range"]) or (0, 65535),
        exif=facts["exif"],
    )


def _ignored(config: DataConfig) -> tuple[int, ...]:
    """Ids left out; 255, ignored by default, is not where it is named as a class."""
    named = 255 in config.label_ids and config.ignore_ids == (255,)
    return () if named else config.ignore_ids


def _refuse_doubtful(present: Sequence[int], kept: Sequence[int], config: DataConfig, count: int) -> None:
    """Refuse 255 where it may be a class or not."""
    listed = " ".join(map(str, present))
    steps = len(present) - 1
    even = [255 * k / max(steps, 1) for k in range(len(present))]
    if (
        255 in config.ignore_ids
        and not count
        and 2 <= steps < 128
        and all(abs(i - at) < 1 for i, at in zip(present, even, strict=True))
    ):
        others = " ".join(map(str, kept))
        raise DataError(
            f"the labels hold the evenly spaced ids {_listed(present)}: grey levels, of which 255 would be "
            f"ignored; give --data.label-ids {listed} if 255 is a class, --data.label-ids {others} if not"
        )
    if 255 in kept and len(kept) > 2 and kept[:-1] == list(range(len(kept) - 1)) and not count:
        raise DataError("id 255 is in the labels; ignore it with --data.ignore-ids 255")


def _of_count(
    kept: Sequence[int], ignored: Sequence[int], count: int, named: bool
) -> tuple[list[int], list[int]]:
    """Ids of the classes where there is to be a number of them, and the ids that are too many."""
    below = [i for i in range(count) if i not in ignored]
    first = [i for i in range(256) if i not in ignored][:count]
    if max(kept) < count:
        return below, []
    if set(kept) <= set(first):
        return first, []
    if len(kept) == count or (len(kept) < count and not named):
        return [*kept, *[NO_ID] * (count - len(kept))], []
    return below, [i for i in kept if i >= count]


def _names(ids: Sequence[int], names: Sequence[str]) -> tuple[str, ...]:
    if names:
        return tuple(names)
    return tuple(f"class {i}" if i != NO_ID else f"no id ({c})" for c, i in enumerate(ids))


def _listed(ids: Sequence[int]) -> str:
    found = [str(i) for i in ids if i != NO_ID]
    more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return ", ".join(found[:_SHOWN] + more)


def label_facts(data: Datasets) -> dict[str, Any]:
    """How labels are read, for a checkpoint; ``label_ids`` is None where there are none."""
    splits = [split for split in (data.train, data.val) if split is not None]
    labelled = any(split.labelled for split in splits)
    ids = list(splits[0].ids) if labelled else None
    return {"label_ids": ids, "ignored_ids": list(splits[0].ignored_ids), "files": splits[0].facts}


def trained_without_labels(info: dict[str, Any]) -> bool:
    """Whether a checkpoint's run had no labels at all; earlier versions did not store ``label_ids``."""
    return not info.get("label_ids") and not info["labelled"] and info["assignment"] is None


def as_trained(data: DataConfig, info: dict[str, Any]) -> DataConfig:
    """Settings that read labels by the rule of a checkpoint, whatever ids the labels at hand hold.

    Args:
        data: settings of the run.
        info: of the checkpoint. Without any labels in training the settings come back as they are.
    """
    if data.kind != "folder":
        return replace(data, classes=info["classes"], class_names=tuple(info["class_names"]))
    ids, ignored = info.get("label_ids"), info.get("ignored_ids", data.ignore_ids)
    data = _files_as_read(data, info.get("files") or {})
    if trained_without_labels(info):
        return data
    if ids is None:  # a checkpoint of an earlier version: ignored ids were classes without a pixel
        ids = [NO_ID if c in ignored else c for c in range(info["classes"])]
    names = tuple(info["class_names"])  # also those of a legend
    names = () if all(_MADE_UP.fullmatch(name) for name in names) else names
    return replace(data, classes=len(ids), label_ids=tuple(ids), ignore_ids=tuple(ignored), class_names=names)
