"""Settings of pretraining: impossible values and presets."""

import pytest

from ppap.settings.pretraining import ObjectiveConfig, SourceConfig, ViewsConfig, preset


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ViewsConfig, {"global_scale": (0.5, 0.2)}),
        (ViewsConfig, {"mask_share": (0.0, 0.5)}),
        (ViewsConfig, {"grey": 2.0}),
        (ObjectiveConfig, {"image_weight": 0.0, "mask_weight": 0.0, "dense_weight": 0.0}),
        (ObjectiveConfig, {"student_temperature": 0.0}),
        (SourceConfig, {"resolution": 4}),
    ],
)
def test_impossible_values_are_refused(kind, values):
    with pytest.raises(ValueError, match="give"):
        kind(**values)


def test_presets_are_valid_and_named():
    for name in ("scenes", "folder"):
        assert preset(name).preset == name
