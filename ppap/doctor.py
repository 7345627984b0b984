"""Show versions, devices and which kernel backends this installation can use, with reasons."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ppap.cli import parse, run
from ppap.reports.installation import build_cuda, report


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Options of ``ppap doctor``."""

    json: bool = False
    """Print JSON, for a bug report."""

    build_cuda: bool = False
    """Build the CUDA library (backend cuda) with nvcc into the cache folder first; takes about a minute."""


def main(argv: Sequence[str]) -> None:
    """Command ``doctor``."""
    arguments = parse(DoctorArguments, argv, command="doctor", description=__doc__)
    if arguments.build_cuda:
        build_cuda()
    found = report()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"ppap {found['ppap']}, Python {found['python']}, {found['platform']}")
    sections = {
        "packages": found["packages"],
        "devices": found["devices"],
        "environment variables": {k: "not set" if v is None else v for k, v in found["variables"].items()},
        "kernel backends": found["backends"],
        "backend that auto takes on CPU tensors": found["auto"]["cpu"],
        "backend that auto takes on CUDA tensors": found["auto"]["cuda"],
        "backend that the variables above choose": found["taken"],
        "instruction sets of the cpp backend": found["instruction sets"],
        "dense CRF (--eval.crf)": found["dense_crf"],
        "compilers": found["compilers"],
    }
    for title, rows in sections.items():
        print(f"\n{title}")
        width = max(map(len, rows))
        for name, value in rows.items():
            print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(run(main))
