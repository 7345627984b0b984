"""``python -m tests.stress``: experiments under faults, one line each and a table of Markdown."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

# Before torch: with one thread a forked process misses none, and the same bits come out everywhere.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # its threads would be lost, too

import torch  # noqa: E402

from bench.machine import device_name  # noqa: E402
from tests.stress import table  # noqa: E402
from tests.stress.material import Lab, warm_up  # noqa: E402
from tests.stress.registry import EXPERIMENTS  # noqa: E402


def main() -> int:
    """All experiments, or those that ``--only`` names; 1 = something went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of cases (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=EXPERIMENTS,
        default=[*EXPERIMENTS],
        metavar="NAME",
        help=f"experiments: {', '.join(EXPERIMENTS)} (default: all)",
    )
    parser.add_argument("--out", type=Path, help="file for the table (default: none)")
    arguments = parser.parse_args()
    if not hasattr(os, "fork"):
        parser.error("needs a system that forks processes")
    torch.set_num_threads(1)
    folder, rows = Path(tempfile.mkdtemp(prefix="ppap-stress-")), []
    os.environ["PPAP_CACHE_DIR"] = str(folder / "caches")
    try:
        warm_up(folder / "warm")
        for name in arguments.only:
            experiment, since = EXPERIMENTS[name], time.perf_counter()
            for report in experiment(Lab(folder, arguments.share, arguments.seed)):
                now = time.perf_counter()
                rows.append((report, now - since))
                print(table.line(*rows[-1]), flush=True)
                since = now
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    command = " ".join(["python -m tests.stress", *sys.argv[1:]])
    facts = [f"`{command}`", f"{time.strftime('%Y-%m-%d')}, {device_name()}, torch {torch.__version__}"]
    if arguments.out is not None:
        arguments.out.write_text(table.markdown(rows, facts), encoding="utf-8")
    return int(any(report.faults for report, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
