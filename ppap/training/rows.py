"""The rows of a run's table."""

from ppap.data import Datasets
from ppap.errors import UsageError
from ppap.settings.config import Config
from ppap.settings.presets import preset
from ppap.settings.published import with_method


def comparison_rows(config: Config, data: Datasets) -> tuple[str, ...]:
    """Rows of the comparison; those that only the preset asks for give way where labels are missing.

    Raises:
        UsageError: rows were asked for, and labels that they need are missing.
    """
    rows = config.compare.rows
    if not rows:
        return rows
    missing = None
    if data.val is None or not data.val.labelled:
        missing = "--compare.rows needs validation labels; give labels/val, or leave it out"
    elif not data.train.labelled:
        missing = "--compare.rows needs training labels for its linear probe; give labels/train"
    if missing is None:
        return rows
    if rows != with_method(preset(config.preset), config.method).compare.rows:
        raise UsageError(missing)
    print("comparison: none, for want of labels")
    return ()
