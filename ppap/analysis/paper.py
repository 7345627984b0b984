"""The paper's result tables (Tables 1 to 6), to stand beside one's own numbers.

``ppap/assets/paper/tables.json`` holds them. A cell is a number, None (the paper gives none) or
:data:`UNKNOWN` (it gives one that this project does not know).
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

UNKNOWN = "unknown"
_FILE = Path(__file__).parent.parent / "assets" / "paper" / "tables.json"

_DATASETS = {
    "cocostuff27": "COCO-Stuff-27",
    "cityscapes": "Cityscapes-27",
    "potsdam": "Potsdam-3",
    "imagenet": "ImageNet-S",
}
_BACKBONES = {"vits8": "ViT-S/8", "vits16": "ViT-S/16", "vitb8": "ViT-B/8", "vitb16": "ViT-B/16"}
METHODS = {"frozen": "DINO", "stego": "STEGO", "hp": "HP", "ppap": "PPAP"}
"""Name of a method in a run's settings -> its name in the paper's tables."""


class Setting(NamedTuple):
    """A benchmark of the paper."""

    dataset: str
    backbone: str


class Table(NamedTuple):
    """One of the paper's tables."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    """Each a method, a backbone, and a cell per column."""

    def find(self, method: str, backbone: str) -> dict[str, Any] | None:
        """Column -> cell of one row; None where the paper has no such row."""
        for name, kind, *cells in self.rows:
            if (name, kind) == (method, backbone):
                return dict(zip(self.columns, cells, strict=True))
        return None


@functools.cache
def table(number: int) -> Table:
    """Table `number`, 1 to 6, of the paper."""
    values = json.loads(_FILE.read_text())["tables"][str(number)]
    return Table(values["title"], tuple(values["columns"]), tuple(tuple(row) for row in values["rows"]))


def setting_of(preset: str) -> Setting | None:
    """The benchmark that a preset such as ``cocostuff27-vits8`` repeats; None for presets of our own."""
    data, _, backbone = preset.partition("-")
    dataset = next((name for start, name in _DATASETS.items() if data.startswith(start)), None)
    if dataset is None or backbone not in _BACKBONES:
        return None
    return Setting(dataset, _BACKBONES[backbone])


def set_quality(setting: Setting) -> dict[str, dict[str, Any]]:
    """Table 6 for one benchmark: method -> column -> cell; empty where it has none."""
    quality = table(6)
    return {
        method: dict(zip(quality.columns[1:], cells, strict=True))
        for method, backbone, dataset, *cells in quality.rows
        if (dataset, backbone) == (setting.dataset, setting.backbone)
    }


def benchmark(setting: Setting) -> Table | None:
    """The table of Tables 1 to 3 that holds a data set's scores; None where there is none."""
    numbers = {"COCO-Stuff-27": 1, "Cityscapes-27": 2, "Potsdam-3": 3}
    return table(numbers[setting.dataset]) if setting.dataset in numbers else None


def neighbour_column(preset: str) -> str | None:
    """Column of Table 4 for a preset of ImageNet-S; None for others."""
    data = preset.partition("-")[0]
    names = {"imagenet_s919": "imagenet_s", "imagenet_s300": "imagenet_s300", "imagenet_s50": "imagenet_s50"}
    return names.get(data)


def text(cell: Any, digits: int = 1) -> str:
    """A cell for a Markdown table."""
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:.{digits}f}"
