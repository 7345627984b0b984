"""``names.json`` of the atlas: what a user calls the clusters, which are one region, and which are left out.

The file belongs to one set of cluster centres, whose checksum it holds: another run's clusters have other
meanings under the same numbers.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppap.errors import DataError
from ppap.pictures.palette import MAX_COLOURS, palette
from ppap.settings.plain import parse_json

FORMAT = 1
KIND = "ppap names"
ENTRY = ("cluster", "name", "id", "colour", "merge_into", "ignore")
MAX_NAME = 100  # characters
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class Region:
    """One kind of region in masks: a cluster, or several that the user made one."""

    id: int
    """Pixel value in masks."""
    name: str
    colour: tuple[int, int, int]
    """RGB, 0 to 255."""
    clusters: tuple[int, ...]


@dataclass(frozen=True)
class Names:
    """A ``names.json``, merges resolved."""

    regions: tuple[Region, ...]
    """In the order of their ids."""
    region_of: tuple[int | None, ...]
    """Place in ``regions`` of each cluster; None = ignored."""
    path: str
    sha256: str
    """Of the file, for records."""

    def ids(self) -> tuple[int, ...]:
        """Id of each region."""
        return tuple(region.id for region in self.regions)

    def id_of(self) -> tuple[int | None, ...]:
        """Id of each cluster; None = ignored."""
        return tuple(None if place is None else self.regions[place].id for place in self.region_of)

    def colours(self) -> np.ndarray:
        """(regions, 3) uint8 RGB."""
        return np.array([region.colour for region in self.regions], np.uint8)

    def classes(self, class_names: Sequence[str]) -> tuple[int | None, ...]:
        """Class of each cluster, by its name; None = ignored, or the name is no class.

        Raises:
            DataError: no name is a class.
        """
        places = {name.strip().casefold(): c for c, name in enumerate(class_names)}
        found = tuple(
            None if place is None else places.get(self.regions[place].name.casefold())
            for place in self.region_of
        )
        if not any(c is not None for c in found):
            raise DataError(
                f"--names {self.path}: no name is one of the classes, {', '.join(class_names)}; give some of "
                "the clusters such names"
            )
        return found

    def record(self) -> dict[str, Any]:
        """Where names come from, for a legend or a file of results."""
        return {"file": self.path, "sha256": self.sha256}


def probe_checksum(clusters: Tensor) -> str:
    """sha256, in hex, of cluster centres (K, D) as float32: what a ``names.json`` belongs to."""
    values = clusters.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()


def default_colours(count: int) -> np.ndarray:
    """(count, 3) uint8 RGB that clusters have until a user gives others; more than there are repeat."""
    return np.resize(palette(min(count, MAX_COLOURS)), (count, 3))


def read_names(path: str | Path, clusters: Tensor) -> Names:
    """Read and check a ``names.json``.

    A cluster that the file leaves out, or gives no name, is called ``cluster 7``. Clusters of one name are
    one region, as if they were merged into the first of them.

    Args:
        path: of the file.
        clusters: (K, D) centres of the run that it is to be used with.

    Raises:
        DataError: missing or damaged, of another run, or it contradicts itself; the message says where.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"--names {path} cannot be read ({error.strerror or error})") from None
    try:
        stored = parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(
            f"--names {path} is no JSON ({error}); save it again from the atlas of the run"
        ) from None
    if (
        not isinstance(stored, dict)
        or stored.get("kind") != KIND
        or not isinstance(stored.get("clusters"), list)
    ):
        raise DataError(f"--names {path} is no file of names; give one saved from `python -m ppap.atlas RUN`")
    if stored.get("format") != FORMAT:
        raise DataError(f"--names {path} has format {stored.get('format')!r}, this ppap reads {FORMAT}")
    if "probe" not in stored:
        raise DataError(
            f"--names {path} has no probe, the checksum of the clusters that it names; take the file that "
            "`python -m ppap.atlas RUN` saves, and change that"
        )
    if stored["probe"] != probe_checksum(clusters):
        raise DataError(
            f"--names {path} was made for the clusters of another run, or of another checkpoint of this one; "
            "make an atlas of this one, `python -m ppap.atlas RUN`, and name its clusters"
        )
    regions, region_of = _resolved(_entries(stored["clusters"], len(clusters), path), len(clusters), path)
    return Names(regions, region_of, str(path), hashlib.sha256(content).hexdigest())


def _entries(stored: Sequence[Any], count: int, path: Path) -> dict[int, Mapping[str, Any]]:
    """Cluster -> its entry, each field checked."""
    entries: dict[int, Mapping[str, Any]] = {}
    for place, entry in enumerate(stored):
        where = f"--names {path}, entry {place + 1}"
        if not isinstance(entry, dict) or not _is_cluster(entry.get("cluster"), count):
            raise DataError(f"{where}: cluster is not one of 0 to {count - 1}")
        where = f"--names {path}, cluster {entry['cluster']}"
        if unknown := entry.keys() - {*ENTRY}:
            raise DataError(f"{where}: {sorted(unknown)[0]!r} is unknown; valid: {', '.join(ENTRY)}")
        if entry["cluster"] in entries:
            raise DataError(f"{where} is there twice; remove one entry")
        _check_entry(entry, count, where)
        entries[entry["cluster"]] = entry
    return entries


def _check_entry(entry: Mapping[str, Any], count: int, where: str) -> None:
    name, number, colour, target = (entry.get(key) for key in ("name", "id", "colour", "merge_into"))
    if name is not None and (not isinstance(name, str) or len(name) > MAX_NAME):
        raise DataError(f"{where}: the name is no text of at most {MAX_NAME} characters")
    if number is not None and not _is_cluster(number, MAX_COLOURS):
        raise DataError(f"{where}: id is {number!r}; give 0 to {MAX_COLOURS - 1}, or null for its number")
    if colour is not None and not (isinstance(colour, str) and _COLOUR.fullmatch(colour)):
        raise DataError(f"{where}: colour is {colour!r}; give one such as #1a2b3c, or null")
    if target is not None and (not _is_cluster(target, count) or target == entry["cluster"]):
        raise DataError(f"{where}: merge_into is {target!r}; give another cluster, or null")
    if not isinstance(entry.get("ignore", False), bool):
        raise DataError(f"{where}: ignore is {entry['ignore']!r}; give true or false")


def _is_cluster(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _resolved(
    entries: Mapping[int, Mapping[str, Any]], count: int, path: Path
) -> tuple[tuple[Region, ...], tuple[int | None, ...]]:
    """Regions in the order of their ids, and the place of each cluster's."""
    heads = [_head(k, entries, path) for k in range(count)]
    first: dict[str, int] = {}
    for k in sorted({*heads}):
        name = _name(entries, k).casefold()
        if name and not entries.get(k, {}).get("ignore"):
            heads = [first.setdefault(name, k) if head == k else head for head in heads]
    ignored = {k for k in heads if entries.get(k, {}).get("ignore")}
    colours, found = default_colours(count), []
    for k in sorted({*heads} - ignored):
        entry = entries.get(k, {})
        number = k if entry.get("id") is None else entry["id"]
        colour = entry.get("colour")
        rgb = colours[k].tolist() if colour is None else bytes.fromhex(colour[1:])
        clusters = tuple(c for c, head in enumerate(heads) if head == k)
        found.append(Region(number, _name(entries, k) or f"cluster {k}", tuple(rgb), clusters))
    found.sort(key=lambda region: region.id)
    for one, other in zip(found, found[1:], strict=False):
        if one.id == other.id:
            raise DataError(
                f"--names {path}: {one.name!r} and {other.name!r} (clusters {one.clusters[0]} and "
                f"{other.clusters[0]}) share the id {one.id}; give one of them another, or merge them"
            )
    if not found:
        raise DataError(f"--names {path} ignores every cluster; leave one at least")
    place = {cluster: i for i, region in enumerate(found) for cluster in region.clusters}
    return tuple(found), tuple(place.get(k) for k in range(count))


def _name(entries: Mapping[int, Mapping[str, Any]], cluster: int) -> str:
    return (entries.get(cluster, {}).get("name") or "").strip()


def _head(cluster: int, entries: Mapping[int, Mapping[str, Any]], path: Path) -> int:
    """The cluster that one is merged into in the end; an ignored one is merged into none.

    Raises:
        DataError: merges go round in a circle.
    """
    seen = [cluster]
    while not entries.get(seen[-1], {}).get("ignore"):
        target = entries.get(seen[-1], {}).get("merge_into")
        if target is None:
            break
        if target in seen:
            circle = " -> ".join(map(str, [*seen[seen.index(target) :], target]))
            raise DataError(
                f"--names {path}: clusters are merged in a circle, {circle}; end one of the merges"
            )
        seen.append(target)
    return seen[-1]
