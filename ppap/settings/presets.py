"""Named runs: a preset is a function that returns the whole config; options change single fields.

Values of the published code carry the table they come from (arXiv 2407.12463 and its code).
"""

from collections.abc import Callable
from dataclasses import replace

from ppap.errors import unknown_name
from ppap.settings.config import (
    CompareConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from ppap.settings.published import hp_elsewhere, hp_for, stego_elsewhere, stego_for


def demo() -> Config:
    """Generated scenes and the embedded backbone: PPAP beside its baselines in three minutes on a CPU."""
    return Config(
        preset="demo",
        data=DataConfig(
            kind="scenes", resolution=128, eval_resolution=128, scenes_size=128, cache_features=True
        ),
        model=ModelConfig(weights="embedded", condition="auto"),
        loss=_loss(chunk=256),
        optim=OptimConfig(lr="auto", cluster_lr=5e-3, linear_lr=5e-3),
        eval=EvalConfig(batch_size=16, pictures=4, cluster_init="kmeans"),
        compare=CompareConfig(rows=("colour", "frozen", "conditioned", "fixed", "ppap"), starts=3),
        train=TrainConfig(batch_size=16, steps=150, val_every=0, save_every=50),
    )


def folder() -> Config:
    """A folder of images, any backbone: features conditioned, thresholds and rate chosen without labels."""
    # With twice the images of the other presets sets of half as many clusters are as large. So many steps
    # because the linear score falls at first (docs/results/what-decides.md).
    loss = replace(_loss(), positives=0.4, temperature=0.4)
    return Config(
        preset="folder",
        data=DataConfig(
            kind="folder",
            eval_resolution=224,
            interpolation="bilinear",
            cache_features=True,
            cache_limit_gib=32.0,
        ),
        model=ModelConfig(condition="auto"),
        loss=loss,
        hp=hp_elsewhere(loss.anchor_divisor),
        stego=stego_elsewhere(),
        optim=OptimConfig(
            name="adamw", lr="auto", projection_lr=1e-3, weight_decay=0.01, linear_lr=5e-3, cluster_lr=5e-3
        ),
        eval=EvalConfig(cluster_init="linkage"),
        # Wide features need a gentler, longer linear probe: at a rate of 0.05 all rows lose 4 points of mIoU.
        # One clustering lies 2 points from the next (docs/results/what-decides.md): means of five.
        compare=CompareConfig(
            rows=("frozen", "conditioned", "ppap"), starts=3, clusterings=5, steps=600, lr=0.005
        ),
        train=TrainConfig(batch_size=32, epochs=5, least_steps=400, val_every=0),
    )


def camvid() -> Config:
    """CamVid frames (11 classes) with a small ViT that ppap pretrain made of them; give --data.root."""
    names = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
    return Config(
        preset="camvid",
        data=DataConfig(
            kind="folder",
            classes=11,
            class_names=tuple(names.split()),
            ignore_ids=(11, 255),
            resolution=224,
            eval_resolution=224,
            interpolation="bilinear",
            cache_features=True,
        ),
        model=ModelConfig(weights="runs/camvid-vit/backbone"),
        loss=_loss(),
        optim=OptimConfig(lr="auto", cluster_lr=5e-3, linear_lr=5e-3),
        eval=EvalConfig(cluster_init="kmeans"),
        compare=CompareConfig(rows=("colour", "frozen", "fixed", "ppap"), starts=3),
        train=TrainConfig(batch_size=8, steps=200, val_every=0),
    )


def _loss(chunk: int = 784) -> LossConfig:
    """The loss where thresholds choose themselves.

    Temperature and size of the sets were chosen on MSRC-21 (docs/results/what-decides.md).
    """
    return LossConfig(
        phi0="auto",
        psi0="auto",
        positives=0.8,
        steps=2,
        sigma_pos=3.0,
        sigma_amb=4.0,
        temperature=0.2,
        chunk=chunk,
        anchor_divisor=8,
    )


def cocostuff27_vits8() -> Config:
    """COCO-Stuff-27 with DINO ViT-S/8, as the published code sets it (59.0 accuracy, 27.2 mIoU, Table 1).

    The code takes DINO's file dino_deitsmall8_300ep_pretrain.pth, whose weights are not those that timm calls
    vit_small_patch8_224.dino; give it by --model.weights to repeat the table.
    """
    return _benchmark(
        "cocostuff27-vits8",
        DataConfig(kind="cocostuff27"),
        "vit_small_patch8_224.dino",
        LossConfig(
            phi0=0.55, psi0=0.2, steps=2, sigma_pos=3.0, sigma_amb=3.0, temperature=0.8, anchor_divisor=16
        ),
        OptimConfig(name="adamw", lr=1e-3, weight_decay=0.1, linear_lr=1e-3, cluster_lr=5e-3),
        TrainConfig(epochs=5, val_every=100, selection="best"),
    )


def cocostuff27_vits16() -> Config:
    """COCO-Stuff-27 with DINO ViT-S/16, as the published code sets it (62.9 accuracy, 26.5 mIoU, Table 1)."""
    return _benchmark(
        "cocostuff27-vits16",
        DataConfig(kind="cocostuff27"),
        "vit_small_patch16_224.dino",
        LossConfig(
            phi0=0.55, psi0=0.15, steps=2, sigma_pos=3.0, sigma_amb=4.0, temperature=0.8, anchor_divisor=4
        ),
        OptimConfig(name="adamw", lr=1e-3, weight_decay=0.01, linear_lr=1e-3, cluster_lr=1e-3),
        TrainConfig(epochs=5, val_every=100, selection="best"),
    )


def cityscapes_vits8() -> Config:
    """Cityscapes-27 with DINO ViT-S/8, as the published code sets it (82.0 accuracy, 19.6 mIoU, Table 2).

    For the weights see :func:`cocostuff27_vits8`.
    """
    return _benchmark(
        "cityscapes-vits8",
        DataConfig(kind="cityscapes27"),
        "vit_small_patch8_224.dino",
        LossConfig(
            phi0=0.6, psi0=0.2, steps=3, sigma_pos=3.0, sigma_amb=3.0, temperature=0.8, anchor_divisor=16
        ),
        OptimConfig(name="adam", lr=1e-3, weight_decay=0.0, linear_lr=1e-3, cluster_lr=1e-3),
        TrainConfig(epochs=30, val_every=50, selection="best"),
    )


def cityscapes_vitb8() -> Config:
    """Cityscapes-27 with DINO ViT-B/8, as the published code sets it (83.3 accuracy, 21.2 mIoU, Table 2)."""
    return _benchmark(
        "cityscapes-vitb8",
        DataConfig(kind="cityscapes27"),
        "vit_base_patch8_224.dino",
        LossConfig(
            phi0=0.6, psi0=0.2, steps=3, sigma_pos=3.0, sigma_amb=2.0, temperature=0.1, anchor_divisor=16
        ),
        OptimConfig(name="adam", lr=1e-3, weight_decay=0.0, linear_lr=1e-3, cluster_lr=1e-3),
        TrainConfig(epochs=30, val_every=50, selection="best"),
    )


def potsdam_vitb8() -> Config:
    """Potsdam-3 with DINO ViT-B/8, as the published code sets it (83.2 accuracy, 71.0 mIoU, Table 3)."""
    return _benchmark(
        "potsdam-vitb8",
        DataConfig(kind="potsdam3"),
        "vit_base_patch8_224.dino",
        LossConfig(
            phi0=0.55, psi0=0.15, steps=1, sigma_pos=5.0, sigma_amb=3.0, temperature=0.07, anchor_divisor=16
        ),
        OptimConfig(name="adam", lr=5e-4, weight_decay=0.0, linear_lr=1e-3, cluster_lr=1e-3),
        TrainConfig(epochs=40, val_every=20, selection="best"),
    )


def _benchmark(
    name: str, data: DataConfig, weights: str, loss: LossConfig, optim: OptimConfig, train: TrainConfig
) -> Config:
    """What the published presets share: 64 crops of 224 pixels, chunks of 784 patches, the CRF's image."""
    return Config(
        preset=name,
        data=replace(data, resolution=224, eval_resolution=320, interpolation="nearest"),
        model=ModelConfig(weights=weights, guidance_dropout=0.1),
        loss=replace(loss, chunk=784, base_temperature=0.07),
        hp=hp_for(data.kind).method,
        stego=stego_for(data.kind, weights).method,
        optim=replace(optim, clip_norm=10.0),
        eval=EvalConfig(crf_image="published"),
        train=replace(train, batch_size=64, seed=0),
    )


def imagenet_s919_vits16() -> Config:
    """ImageNet-S with DINO ViT-S/16; the paper has a result (25.7 mIoU, Table 4) but no settings: ours."""
    return _imagenet_s(919, epochs=2)


def imagenet_s300_vits16() -> Config:
    """ImageNet-S300 with DINO ViT-S/16; the paper has a result (37.3 mIoU, Table 4) but no settings: ours."""
    return _imagenet_s(300, epochs=6)


def imagenet_s50_vits16() -> Config:
    """ImageNet-S50 with DINO ViT-S/16; the paper has a result (59.3 mIoU, Table 4) but no settings: ours."""
    return _imagenet_s(50, epochs=36)


def _imagenet_s(classes: int, epochs: int) -> Config:
    """COCO-Stuff's settings for the same backbone, for about as many steps (38,160 there).

    Images are resized bilinearly, as the evaluation by neighbours does; no validation label enters before the
    end.
    """
    base = cocostuff27_vits16()
    return replace(
        base,
        preset=f"imagenet_s{classes}-vits16",
        data=replace(base.data, kind="imagenet_s", classes=classes, interpolation="bilinear"),
        eval=EvalConfig(),
        train=replace(base.train, epochs=epochs, val_every=0, selection="last"),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "folder": folder,
    "camvid": camvid,
    "cocostuff27-vits8": cocostuff27_vits8,
    "cocostuff27-vits16": cocostuff27_vits16,
    "cityscapes-vits8": cityscapes_vits8,
    "cityscapes-vitb8": cityscapes_vitb8,
    "potsdam-vitb8": potsdam_vitb8,
    "imagenet_s919-vits16": imagenet_s919_vits16,
    "imagenet_s300-vits16": imagenet_s300_vits16,
    "imagenet_s50-vits16": imagenet_s50_vits16,
}


def preset(name: str) -> Config:
    """The config called `name`.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]()


def describe() -> str:
    """One line per preset, for help texts."""
    first = {name: make.__doc__.strip().splitlines()[0] for name, make in PRESETS.items()}
    return "\n".join(f"  {name:<21} {line}" for name, line in first.items())
