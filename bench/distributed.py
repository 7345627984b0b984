"""The same run on 1, 2 and 4 processes, losses side by side: ``make distributed``. Needs no GPU.

Each run is ``ppap train`` as a user starts it, all but the first by torchrun with gloo, on generated scenes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 8
RANKS = (1, 2, 4)
RUN = [
    *("demo", "--data.scenes-train=24", "--data.scenes-val=4", "--data.scenes-size=64", "--data.workers=0"),
    *("--data.resolution=64", "--data.eval-resolution=64", "--data.no-cache-features", "--eval.pictures=0"),
    *("--train.batch-size=10", "--train.log-every=1", f"--train.steps={STEPS}", "--train.val-every=0"),
    *("--train.device=cpu", "--compare.rows"),
]


def losses(folder: Path, ranks: int, *more: str) -> list[float]:
    """Losses of every step of a run of that many processes."""
    out = folder / f"{ranks}{''.join(more)}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launch if ranks > 1 else []), "-m", "ppap.train", *RUN, *more]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(
        [*command, f"--train.out={out}"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def main() -> None:
    """Run all, print the table; exits with 1 where losses differ by more than 1e-5 of one process's."""
    with tempfile.TemporaryDirectory() as folder:
        names = {f"{ranks} process{'es' * (ranks > 1)}": (ranks,) for ranks in RANKS}
        names["4, ring"] = (4, "--train.exchange=ring")
        found = {name: losses(Path(folder), *run) for name, run in names.items()}
    one = next(iter(found.values()))
    print("step " + "".join(f"{name:>14}" for name in found))
    for step, row in enumerate(zip(*found.values(), strict=True), 1):
        print(f"{step:>4} " + "".join(f"{loss:>14.6f}" for loss in row))
    worst = max(abs(a / b - 1) for run in found.values() for a, b in zip(run, one, strict=True))
    print(f"largest difference from one process: {worst:.1e} of the loss")
    if not worst < 1e-5:
        sys.exit(1)


if __name__ == "__main__":
    main()
