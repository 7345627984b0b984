"""Dense CRF on real frames and on noise: the native implementation against pydensecrf.

``python -m bench.crf_parity --root CAMVID`` prints, per size, how many labels are equal and how far
probabilities are apart. The root holds ``images/*/NAME`` and ``labels/*/NAME.png``.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bench.crf_pictures import logits_of
from ppap.kernels import dense_crf

SIZES = ((320, 320), (240, 400), (333, 517))
CLASSES = 12


def frames(root: Path, count: int, size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """(image (H, W, 3) uint8, logits (12, H, W)) of frames spread over the set."""
    paths = sorted(root.glob("images/*/*"))
    if not paths:
        raise SystemExit(f"there are no images/*/* below {root}; give --root")
    height, width = size
    for seed, path in enumerate(paths[:: max(len(paths) // count, 1)][:count]):
        image = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        label = root / "labels" / path.parent.name / f"{path.stem}.png"
        classes = np.array(Image.open(label).resize((width, height), Image.Resampling.NEAREST)).astype(
            np.int64
        )
        yield torch.from_numpy(np.array(image)), logits_of(torch.from_numpy(classes) % CLASSES, CLASSES, seed)


def noise(count: int, size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of random colours with logits of vertical stripes."""
    height, width = size
    stripes = (torch.arange(width) * CLASSES // width).expand(height, width)
    for seed in range(count):
        image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield torch.from_numpy(image), logits_of(stripes, CLASSES, seed)


def compare(pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[list[float], float]:
    """Largest difference of every image, share of all pixels with equal labels."""
    differences, equal = [], []
    for image, logits in pairs:
        q, wanted = (dense_crf(image, logits, impl=impl) for impl in ("cpp", "pydensecrf"))
        differences.append((q - wanted).abs().max().item())
        equal.append((q.argmax(dim=0) == wanted.argmax(dim=0)).float().mean().item())
    return differences, float(np.mean(equal))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder with images/*/* and labels/*/*.png")
    parser.add_argument("--frames", type=int, default=30, help="frames per size (default 30)")
    parser.add_argument("--noise", type=int, default=3, help="images of random colours per size (default 3)")
    options = parser.parse_args()
    print("| image | size | images | largest difference of a probability (median) | equal labels |")
    print("|---|---|---:|---:|---:|")
    for size in SIZES:
        sets = {
            "frame": frames(options.root, options.frames, size),
            "random colours": noise(options.noise, size),
        }
        for name, pairs in sets.items():
            count = options.frames if name == "frame" else options.noise
            bar = tqdm(pairs, desc=f"{name} {size}", total=count, leave=False, disable=None)
            differences, equal = compare(bar)
            print(
                f"| {name} | {size[0]} x {size[1]} | {len(differences)} | {max(differences):.1e} "
                f"({np.median(differences):.1e}) | {100 * equal:.4f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
