"""A tiny engine of any method, and images for it."""

from dataclasses import replace

import torch

from ppap.data import build_datasets
from ppap.methods.engine import Engine, build_engine
from ppap.settings.config import DataConfig, ModelConfig, TrainConfig
from tests.runs import settled_demo

MODEL = ModelConfig(
    backbone="vit_tiny_patch16_224", weights="random", patch_size=8, width=24, depth=2, heads=2, image_size=32
)
DATA = DataConfig(
    kind="scenes", scenes_train=12, scenes_val=4, scenes_size=32, resolution=32, eval_resolution=32, workers=0
)


def tiny_engine(method: str, steps: int = 6, **sections) -> Engine:
    """A ViT of two blocks with 12 scenes of 32 pixels (16 patches) as ``images``; batches of 2."""
    train = TrainConfig(batch_size=2, steps=steps)
    config = replace(settled_demo(), method=method, model=MODEL, data=DATA, train=train, **sections)
    engine = build_engine(config, 8, torch.device("cpu"))
    engine.images = build_datasets(DATA, ("train",)).train
    return engine


def tiny_images(count: int) -> torch.Tensor:
    """Normalised scenes (count, 3, 32, 32)."""
    dataset = build_datasets(DATA, ("train",)).train
    return torch.stack([dataset[i]["image"] for i in range(count)])
