"""Compile every Triton kernel in every shipped configuration, without a GPU: ``python -m bench.aot``.

The ops run with a recorder in the place of Triton's launcher, so that what is compiled is what is launched:
the same kernels, types, sizes known to the compiler and options. Prints registers, spills and shared memory
of each as markdown; ``--out`` also puts them into a file, as the column of the Triton at hand beside those of
other versions (``make aot`` makes all columns anew). The figures are the compiler's, no time is measured.
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.aot_table import Figures, Line, Table
from bench.shapes import clustered
from ppap.kernels import PropagationConfig
from ppap.kernels.masked_log_softmax import triton_impl as contrast
from ppap.kernels.masked_log_softmax.chunks import Settings as SoftmaxSettings
from ppap.kernels.masked_log_softmax.chunks import losses
from ppap.kernels.ppap_loss import triton_impl as loss
from ppap.kernels.ppap_loss.settings import Settings
from ppap.kernels.relation_masks import Queries, count_sets
from ppap.kernels.relation_masks import triton_impl as relations
from ppap.kernels.tiles import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory of one program [bytes].
SHARED_LIMIT = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# bf16 differs from fp16 in types alone: compiled for one architecture.
BF16 = {"sm_90": ("bf16",)}
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


# Kernel -> pointers that may be None, and what a form that has one is called.
_OPTIONAL = {
    "rows": {
        "p_index": "gathered",
        "p_unit": "divided",
        "p_factor": "weighted",
        "p_out": "values",
        "p_high": "planes",
        "p_again": "twice",
        "p_norm": "norms",
        "p_norm_scale": "scaled",
    },
    "similarity": {"p_unit": "unit"},
    "finish": {"p_phi": "thresholds"},
    "group": {"p_row": "weights", "p_mean": "means"},
    "add_rows": {"p_second": "summed", "p_factor": "weighted"},
}


@dataclass(frozen=True)
class Call:
    """One launch, as the compiler sees it."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """The kernel and what distinguishes this form of it."""
        values = dict(self.constants)
        forms = [flag.lower() for flag in ("POSITIVE", "KEPT", "NORMALISE") if values.get(flag) is True]
        kernel = self.kernel.__name__.removesuffix("_kernel")
        given = {name for name, kind in self.signature if kind != "constexpr"}
        forms += [word for pointer, word in _OPTIONAL.get(kernel, {}).items() if pointer in given]
        kinds = {kind for _, kind in self.signature}
        types = "split" if values.get("SPLIT") else "bf16" if any("bf16" in kind for kind in kinds) else ""
        return " ".join([kernel, *forms, types]).strip()

    @property
    def configuration(self) -> str:
        """Tile sizes, warps, stages, kind of loads."""
        values = dict(self.constants)
        sizes = [
            values[key]
            for key in ("BLOCK_M", "ROWS", "BLOCK_N", "BLOCK_D", "BLOCK", "BLOCK_K")
            if key in values
        ]
        loads = " tma" if values.get("TMA") else ""
        width = f" D={values['WIDTH']}" if "WIDTH" in values else ""
        return f"{'x'.join(map(str, sizes))} w{self.warps} s{self.stages}{loads}{width}"


def _recorded(kernel: JITFunction, args: tuple, options: dict[str, object]) -> Call:
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
    signature, constants, divisible = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or value is True or value is False:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature.append((parameter.name, f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"))
        elif isinstance(value, torch.Tensor):
            signature.append((parameter.name, f"*{_TYPES[value.dtype]}"))
            divisible.append(index)
        elif isinstance(value, float):
            signature.append((parameter.name, "fp32"))
        else:
            signature.append((parameter.name, "i32"))
            if value % 16 == 0:
                divisible.append(index)
    warps, stages = options.get("num_warps", 4), options.get("num_stages", 3)
    return Call(kernel, tuple(signature), tuple(constants), tuple(divisible), warps, stages)


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Call]]:
    """Calls launched inside, by hosts that believe to be on `architecture`; nothing runs."""
    calls: list[Call] = []
    saved = JITFunction.__getitem__, launch.architecture

    def getitem(kernel: JITFunction, grid):
        return lambda *args, **options: calls.append(_recorded(kernel, args, options))

    JITFunction.__getitem__, launch.architecture = getitem, lambda device: architecture
    try:
        yield calls
    finally:
        JITFunction.__getitem__, launch.architecture = saved


def calls_of(
    architecture: str, width: int, precisions: tuple[str, ...] = ("fp16", "bf16", "fp32")
) -> list[Call]:
    """Every distinct launch of the ops on `architecture` at D = E = `width`."""
    unit, anchors = clustered(512, width, seed=0), torch.arange(128)
    cfg = PropagationConfig(trustworthy_positives=False)
    words = torch.zeros((128, 16), dtype=torch.int32)
    column = torch.zeros(128)
    with recording(architecture) as calls:
        for precision in precisions:
            settings = Settings(cfg, 0.1, 0.07, 128, True, precision, 2**29)
            loss.guarded_loss(unit, unit, anchors, settings)
            keys, queries = relations.prepare(unit, precision), Queries(unit[:128], column, None, column)
            count_sets(relations, keys, precision, queries, anchors, 2**29, (words, words))
            of_softmax = SoftmaxSettings(0.1, precision, 2**29)
            sets = contrast.from_words(words, words, 512)
            losses(contrast, unit[:128], unit, of_softmax, 128, lambda _part, sets=sets: sets)
    return list(dict.fromkeys(calls))


def guarded_calls(architecture: str, width: int = 384) -> list[Call]:
    """What is launched at D = E = `width`, and the kernel that has narrower tiles at odd multiples of 64."""
    calls = calls_of(architecture, width, (*BF16.get(architecture, ()), "fp16", "fp32"))
    narrow = calls_of(architecture, width // 2, ("fp16", "fp32")) if width // 2 % 128 == 64 else []
    return calls + [call for call in narrow if call.name.startswith("mask_sum")]


def resources(call: Call, architecture: str) -> Figures:
    """Compile one call for `architecture` and read what it takes."""
    source = ASTSource(
        fn=call.kernel,
        signature=dict(call.signature),
        constexprs=dict(call.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in call.divisible},
    )
    options = {"num_warps": call.warps, "num_stages": call.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[architecture], options=options)
    if architecture.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # noqa: E731
        spills = number("vgpr_spill_count") + number("sgpr_spill_count")
        return Figures(number("vgpr_count"), spills, compiled.metadata.shared, "v_mfma" in text, False)
    ptx = compiled.asm["ptx"]
    log = _ptxas(ptx, architecture)
    spills = sum(int(found) for found in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    matrix = "wgmma" in ptx if architecture == "sm_90" else "tcgen05.mma" in ptx or "mma.sync" in ptx
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    return Figures(registers, spills, compiled.metadata.shared, matrix, "C75" in log)


def _ptxas(ptx: str, architecture: str) -> str:
    """What Triton's own ptxas says about a kernel."""
    target = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    program = get_ptxas(int(architecture[3:])).path
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.ptx"
        file.write_text(ptx)
        command = [program, "-v", f"--gpu-name={target}", file, "-o", Path(scratch) / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas refuses a kernel for {target}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def figures(architecture: str, widths: tuple[int, ...]) -> dict[Line, Figures]:
    """Every line of one architecture."""
    calls = [call for width in widths for call in guarded_calls(architecture, width)]
    return dict(worst(calls, architecture))


def line_of(call: Call, architecture: str) -> Line:
    """The line of the table that a call stands in."""
    return Line(architecture, call.name, call.configuration)


def worst(calls: list[Call], architecture: str) -> Iterator[tuple[Line, Figures]]:
    """Lines and figures of calls; of several in one line, as of other sizes, the one that spills most."""
    lines: dict[Line, list[Call]] = {}
    for call in dict.fromkeys(calls):
        lines.setdefault(line_of(call, architecture), []).append(call)
    for line, own in lines.items():
        found = [resources(call, architecture) for call in own]
        yield line, max(found, key=lambda one: (one.spills, one.serialised, one.shared, one.registers))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument(
        "--arch", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all of them"
    )
    parser.add_argument(
        "--widths", nargs="+", type=int, default=[384, 768], help="channels D = E (default 384 768)"
    )
    parser.add_argument(
        "--out", type=Path, help="file whose table gets a column of this version of Triton (default: none)"
    )
    options = parser.parse_args()
    found: dict[Line, Figures] = {}
    # A process per architecture: Triton compiles on one core. Not forked, since torch has threads.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=fresh) as pool:
        for part in pool.map(figures, options.arch, [tuple(options.widths)] * len(options.arch)):
            found |= part
    print(Table().with_column(triton.__version__, found).text())
    if options.out:
        before = Table.read(options.out) if options.out.exists() else Table()
        options.out.write_text(before.with_column(triton.__version__, found).text())


if __name__ == "__main__":
    main()
