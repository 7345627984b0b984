"""End-to-end rates, each beside its floor: what the stage cannot do without, on data that is at hand.

    python -m bench.pipeline --resolution 224 320

The pictures are generated scenes, written as JPEG with their labels and read again, as a user's own; the
network is a ViT-S/16 with random weights, unless ``--weights`` says otherwise. The floor of caching,
evaluation and prediction is the bare forward pass of the backbone over as many images; that of a training
step from the cache is the method's forward and backward pass on a batch that is there (block, projection,
loss kernels), without reading, probes and optimisers; from images both. Every round times all stages and
floors in turn, and the best round of each counts.
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.machine import DEVICE, best_times, device_name
from ppap.data import Datasets, build_datasets, val_loader
from ppap.data.loading import stream
from ppap.data.scenes import ScenesDataset
from ppap.data.transforms import Geometry
from ppap.evaluation.evaluate import evaluate
from ppap.evaluation.predictor import Predictor
from ppap.methods.engine import Engine, build_engine
from ppap.nets.feature_cache import cache_features
from ppap.nets.model import build_net, patch_rows
from ppap.pictures.drawing import save_index_png
from ppap.reports.prediction import MaskOptions, check_images, write_masks
from ppap.settings.config import Config
from ppap.settings.presets import folder

Timed = dict[str, tuple[Callable[[], object], str | None]]
"""Stage -> what runs it once over all images, and the name of its floor; floors have none."""

FORWARD, STEP = "bare forward of the backbone", "forward and backward of the method"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.pipeline",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Images per second of caching features, training, evaluation and prediction, each "
        "beside its floor in the same run.",
    )
    parser.add_argument(
        "--resolution", type=int, nargs="+", default=[224, 320], help="side of the images [pixels]"
    )
    parser.add_argument("--images", type=int, default=32, help="of each stage; a multiple of --batch")
    parser.add_argument("--batch", type=int, default=8, help="images at once, in every stage")
    parser.add_argument("--rounds", type=int, default=3, help="the best of which counts")
    parser.add_argument("--weights", default="random", help="backbone, as --model.weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args(argv)
    if options.batch < 1 or options.images < options.batch or options.images % options.batch:
        parser.error(f"--images {options.images} is no multiple of --batch {options.batch}")
    if options.rounds < 1 or min(options.resolution) < 32:
        parser.error("give --rounds of at least 1 and --resolution of at least 32")
    return options


def write_pictures(root: Path, count: int, size: int) -> None:
    """A folder of scenes as ``ppap train folder`` reads it, training and validation alike."""
    for split in ("train", "val"):
        scenes = ScenesDataset(Geometry(size), split, count, size, seed=0)
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            picture, ids = scenes.load(i)
            picture.save(root / "images" / split / f"{i:04d}.jpg", quality=90)
            save_index_png(ids, root / "labels" / split / f"{i:04d}.png")


def settings(root: Path, resolution: int, batch: int, weights: str) -> Config:
    """Those of the preset ``folder``, with numbers where it leaves the choice to the run."""
    config = folder()
    size = {"resolution": resolution, "eval_resolution": resolution}
    backbone = "vit_small_patch16_224" if weights == "random" else config.model.backbone
    config = replace(
        config,
        data=replace(config.data, root=str(root), **size),
        model=replace(config.model, backbone=backbone, weights=weights, condition="none"),
        optim=replace(config.optim, lr=3e-4),
        eval=replace(config.eval, batch_size=batch),
        train=replace(config.train, batch_size=batch, steps=1),
    )
    phi0, psi0 = _thresholds(config)
    return replace(config, loss=replace(config.loss, phi0=phi0, psi0=psi0))


@torch.no_grad()
def _thresholds(config: Config) -> tuple[float, float]:
    """Cosines that 3 % and half of all pairs of a batch's patches exceed."""
    net, images = build_net(config.model), build_datasets(config.data).train
    batch = next(iter(val_loader(images, config.train.batch_size)))
    rows = torch.nn.functional.normalize(patch_rows(net.features(batch["image"])), dim=1)[::7]
    cosines = (rows @ rows.T).flatten()[:: max(len(rows) ** 2 // 10**6, 1)]
    return float(cosines.quantile(0.97)), float(cosines.quantile(0.5))


def stages(engine: Engine, data: Datasets, place: Path, images: int) -> Timed:
    """What is timed, floors first.

    Args:
        engine: network and probes.
        data: as many training and validation images.
        place: empty folder to work in.
        images: how many each stage goes through.
    """
    config, size = engine.config, {"patch_size": engine.net.backbone.patch_size, "device": DEVICE}
    batch, steps = config.train.batch_size, images // config.train.batch_size
    caching = {"batch_size": batch, "device": DEVICE, "workers": config.data.workers}
    cached = cache_features(engine.net, data.train, root=place / "kept", **caching)
    held = next(iter(val_loader(data.train, batch)))["image"].to(DEVICE)
    tokens = next(iter(val_loader(cached, batch)))

    def forward() -> None:
        for _ in range(steps):
            engine.frozen_code(held)

    def method() -> None:
        engine.train()
        for _ in range(steps):
            engine.method.step(tokens, 0).loss.backward()
            engine.net.zero_grad(set_to_none=True)

    def cache() -> None:
        shutil.rmtree(place / "anew", ignore_errors=True)
        cache_features(engine.net, data.train, root=place / "anew", **caching)

    def train(source) -> Callable[[], None]:
        batches = stream(engine.start(source))
        engine.train_step(next(batches)[2], 0)  # loaders start

        def run() -> None:
            for _ in range(steps):
                engine.train_step(next(batches)[2], 0)

        return run

    def measured(crf: str) -> Callable[[], object]:
        chosen = replace(config.eval, crf=crf)
        workers = config.data.workers
        return lambda: evaluate(engine.code_of, engine.probes, data.val, chosen, workers=workers, **size)

    return {
        FORWARD: (forward, None),
        STEP: (method, None),
        "caching features": (cache, FORWARD),
        "training from images": (train(data.train), f"{FORWARD} + {STEP}"),
        "training from the cache": (train(cached), STEP),
        "evaluation": (measured("none"), FORWARD),
        "evaluation with CRF": (measured("native"), FORWARD),
        "prediction": (predict(engine, data, place, batch), FORWARD),
    }


def predict(engine: Engine, data: Datasets, place: Path, batch: int) -> Callable[[], None]:
    """Masks and overlays of the validation images, as ``ppap predict`` writes them."""
    predictor = Predictor(engine, data.val.class_names, None)
    options = MaskOptions(resolution=engine.config.data.eval_resolution, batch_size=batch)
    root = Path(engine.config.data.root) / "images/val"
    files = {path.stem: path for path in sorted(root.iterdir())}
    sizes, _ = check_images(files.values(), predictor, options)

    def run() -> None:
        shutil.rmtree(place / "masks", ignore_errors=True)
        write_masks(place / "masks", files, sizes, predictor, options, set())

    return run


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def table(timed: Timed, seconds: dict[str, float], images: int) -> list[dict[str, float | str | None]]:
    """A row for each stage: images/s, and the share of its floor's rate that it reaches."""
    rows: list[dict[str, float | str | None]] = []
    for name, (_, floor) in timed.items():
        least = sum(seconds[part] for part in floor.split(" + ")) if floor else None
        share = least / seconds[name] if least else None
        rows.append({"stage": name, "images/s": images / seconds[name], "floor": floor, "share": share})
    return rows


def markdown(rows: Sequence[dict[str, float | str | None]], resolution: int) -> str:
    """The rows as a table."""
    lines = [f"| {resolution} px | images/s | of its floor's rate |", "|---|---:|---:|"]
    for row in rows:
        share = "floor" if row["share"] is None else f"{100 * row['share']:.0f} %"
        lines.append(f"| {row['stage']} | {row['images/s']:.1f} | {share} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = arguments(argv)
    setting = f"{device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(
        f"{setting}; {options.images} images, batches of {options.batch}, weights {options.weights}",
        flush=True,
    )
    found = {}
    for resolution in options.resolution:
        with tempfile.TemporaryDirectory() as place:
            with _quietly():
                write_pictures(Path(place) / "data", options.images, resolution)
                config = settings(Path(place) / "data", resolution, options.batch, options.weights)
                data = build_datasets(config.data)
                engine = build_engine(config, data.train.classes, DEVICE)
                timed = stages(engine, data, Path(place), options.images)
            with _quietly():
                seconds = best_times({name: run for name, (run, _) in timed.items()}, options.rounds)
            found[resolution] = table(timed, seconds, options.images)
        print(f"\n{markdown(found[resolution], resolution)}", flush=True)
    if options.json:
        asked = {"images": options.images, "batch": options.batch, "weights": options.weights}
        options.json.write_text(json.dumps({"setting": setting, **asked, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
