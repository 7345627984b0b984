"""Results measured before, in another folder, such as the published ones: ``--known quality.json``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.quality.settings import SHARED
from ppap.analysis.study import FREE
from ppap.errors import DataError, UsageError
from ppap.reports.sharing import public_config
from ppap.runs.rundir import changed_settings, option_names
from ppap.settings.config import Config, from_dict
from ppap.settings.methods import HEADS


@dataclass(frozen=True)
class Known:
    """What a ``quality.json`` holds; by default nothing.

    Attributes:
        results: data set -> row -> seed -> scores [%].
        sets: data set -> rows of ``sets.json`` of ``ppap analyze sets``.
        configs: data set -> settings, without the names of folders.
    """

    results: dict[str, dict[str, dict[int, Any]]] = field(default_factory=dict)
    sets: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, Config] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> "Known":
        """Of a file; nothing where there is none to read.

        Raises:
            DataError: it cannot be read, or is no ``quality.json``.
        """
        if path is None:
            return cls()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            results = {
                name: {
                    row: {int(seed): scores for seed, scores in seeds.items()} for row, seeds in rows.items()
                }
                for name, rows in found["results"].items()
            }
            configs = {name: from_dict(config) for name, config in found["facts"]["configs"].items()}
            return cls(results, dict(found["sets"]), configs)
        except OSError as error:
            raise DataError(f"--known {path} cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"--known {path} is no quality.json of bench.quality; give one") from None

    def check(self, path: Path | None, name: str, config: Config) -> None:
        """Refuse to set runs of other settings beside each other.

        Those that all runs share count for every data set, and those of a method where runs of it are known:
        the lines above the tables speak for all.

        Raises:
            UsageError: those of the data set `name` had others than `config`, or those of a method had.
        """
        for other, before in self.configs.items():
            changed = changed_settings(before, public_config(config), FREE)
            changed = [setting for setting in changed if self._counts(setting, other, name)]
            if changed:
                raise UsageError(
                    f"--known {path}: its runs of {other} had another {option_names(changed)}; leave it out, "
                    "or give the same"
                )

    def _counts(self, setting: str, other: str, name: str) -> bool:
        """Whether a setting of the runs of `other` must be that of new ones of `name`."""
        if setting in SHARED.values():
            return True
        section = setting.split(".")[0]
        return bool(self.results.get(other, {}).get(section)) if section in HEADS else other == name

    def without(self, name: str, rows: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """Names of the runs that are left to do."""
        known = self.results.get(name, {})
        return [f"{row}-{seed}" for seed in seeds for row in rows if seed not in known.get(row, {})]

    def join(self, name: str, rows: dict[str, dict[int, Any]]) -> dict[str, dict[int, Any]]:
        """Rows of a data set, and those that are known of it."""
        known = self.results.get(name, {})
        return {
            row: dict(sorted({**known.get(row, {}), **rows.get(row, {})}.items()))
            for row in {**known, **rows}
        }
