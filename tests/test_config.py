"""Settings: refusals, round trips, presets."""

import dataclasses

import pytest

from ppap.errors import UsageError
from ppap.settings.config import (
    CompareConfig,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
    config_hash,
    from_dict,
    to_dict,
)
from ppap.settings.presets import PRESETS, preset
from ppap.settings.pretraining import PretrainOptimConfig


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    config = preset(name)
    assert config.preset == name
    assert from_dict(to_dict(config)) == config
    assert config_hash(config) == config_hash(from_dict(to_dict(config)))


def test_the_folder_preset_leaves_to_the_data_what_depends_on_it():
    config = preset("folder")
    assert (config.model.condition, config.loss.phi0, config.loss.psi0) == ("auto", "auto", "auto")
    assert (config.optim.lr, config.optim.projection_lr) == ("auto", 1e-3)
    assert (config.eval.cluster_init, config.train.least_steps) == ("linkage", 400)


def test_the_preset_of_vits16_has_the_published_values():
    config = preset("cocostuff27-vits16")
    loss = config.loss
    assert (loss.phi0, loss.psi0, loss.steps, loss.sigma_pos, loss.sigma_amb) == (0.55, 0.15, 2, 3.0, 4.0)
    assert (loss.temperature, loss.base_temperature, loss.chunk, loss.anchor_divisor) == (0.8, 0.07, 784, 4)
    assert (config.model.condition, config.eval.cluster_init, config.optim.projection_lr) == (
        "none",
        "random",
        None,
    )
    optim = config.optim
    assert (optim.name, optim.lr, optim.weight_decay, optim.clip_norm) == ("adamw", 1e-3, 0.01, 10.0)
    assert (optim.linear_lr, optim.cluster_lr) == (1e-3, 1e-3)
    assert (config.train.batch_size, config.train.epochs, config.train.seed) == (64, 5, 0)
    assert (config.data.resolution, config.data.eval_resolution) == (224, 320)
    assert config.model.guidance_dropout == 0.1


def test_the_hash_tells_settings_apart():
    config = preset("demo")
    other = dataclasses.replace(config, train=TrainConfig(seed=1))
    assert config_hash(config) != config_hash(other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(resolution=3), "--data.resolution is 3"),
        (lambda: DataConfig(classes=0), "--data.classes is 0"),
        (lambda: DataConfig(ignore_ids=(300,)), "--data.ignore-ids is"),
        (lambda: DataConfig(classes=3, class_names=("a",)), "one name for each of the 3"),
        (lambda: LossConfig(sigma_pos=0), "--loss.sigma-pos is 0"),
        (lambda: LossConfig(temperature=-1), "--loss.temperature is -1"),
        (lambda: TrainConfig(batch_size=0), "--train.batch-size is 0"),
        (lambda: OptimConfig(lr=1e38), r"--optim.lr is 1e\+38; give a positive number up to 1e\+06"),
        (lambda: OptimConfig(cluster_lr=float("nan")), "--optim.cluster-lr is nan"),
        (lambda: OptimConfig(weight_decay=float("inf")), "--optim.weight-decay is inf; give 0 to"),
        (lambda: CompareConfig(lr=1e38), "--compare.lr is 1e"),
        (lambda: PretrainOptimConfig(lr=1e38), "--optim.lr is 1e"),
    ],
)
def test_impossible_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_fields_name_the_nearest():
    with pytest.raises(UsageError, match="no field 'tempereture'; did you mean 'temperature'"):
        from_dict({"loss": {"tempereture": 1}})
    with pytest.raises(UsageError, match="--train.seed|batch-size is 0"):
        from_dict({"train": {"batch_size": 0}})


def test_unknown_presets_name_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'folder'.*demo, folder"):
        preset("fodler")


def test_every_field_is_documented():
    import inspect

    for section in dataclasses.fields(Config):
        default = getattr(Config(), section.name)
        if dataclasses.is_dataclass(default):
            source = inspect.getsource(type(default))
            for field in dataclasses.fields(default):
                after = source.split(f"    {field.name}:", 1)[1].split("\n", 1)[1].lstrip()
                assert after.startswith('"""'), f"{section.name}.{field.name} has no help text"
