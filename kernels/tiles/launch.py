"""Launch configurations of the Triton kernels per architecture, and the choice among them.

Those of sm_90 were timed, the others are chosen from the compiler's figures, see ``bench/results/aot.md`` for
every kernel and line: none spills. ``PPAP_AUTOTUNE=1`` times the alternatives on the device at hand instead,
see :mod:`.autotune`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import budget
from ..environment import autotune_wanted
from . import autotune
from .sizes import COLUMN_BLOCK

if TYPE_CHECKING:
    from .planes import Planes


@dataclass(frozen=True)
class Launch:
    """One configuration of a tile kernel.

    Attributes:
        block_m: rows (anchors) of a tile.
        block_n: columns (patches) of a tile, a multiple of 128; for ``mask_sum`` channels.
        block_k: channels, for ``mask_sum`` columns, per step of the inner loop.
        warps: warps per program.
        stages: steps whose loads are in flight.
        tma: load tiles through tensor descriptors (sm_90 and later).
        accumulators: for ``mask_sum``: blocks of channels that share an operand made of bits; 1 to 3.
        persistent: of the kernels of products: as many programs as run at a time, each going through several
            tiles.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    warps: int = 4
    stages: int = 3
    tma: bool = False
    accumulators: int = 1
    persistent: bool = False

    def options(self, operand: "Planes") -> dict[str, object]:
        """What every tile kernel takes by name, for planes that are streamed through it."""
        return {
            "WIDTH": operand.high.shape[1],
            "BLOCK_M": self.block_m,
            "SPLIT": operand.split,
            "TMA": self.tma,
            "UPCAST": interpreted() and operand.high.dtype == torch.bfloat16,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }


# Kernels with a configuration of their own. "split" = operands of two planes, the fp32 precision.
KERNELS = ("similarity", "relations", "mask_sum", "log_sum_exp", "weights")


def _table(
    one: Launch, two: Launch, mask_sum: Launch, mask_sum_split: Launch, **own: Launch
) -> dict[str, Launch]:
    """Kernel -> configuration: `one` and `two` planes, unless a kernel has its `own`."""
    products = ("similarity", "relations", "log_sum_exp", "weights")
    table = {name: one for name in products} | {f"{name}/split": two for name in products}
    own = {name.replace("_split", "/split"): config for name, config in own.items()}
    return table | {"mask_sum": mask_sum, "mask_sum/split": mask_sum_split} | own


# Beside each: registers per thread and shared memory [KiB] per program, as compiled.
_AMPERE = _table(
    Launch(block_k=32, warps=8),  # 128-186, 32: one program per SM with both masks, else two
    Launch(block_k=32, warps=8, stages=2),  # 181-249, 32
    Launch(block_k=32, warps=8),  # 127, 18; steps of 64 columns spill 8 bytes with Triton 3.9
    Launch(warps=8, stages=2),  # 178-186, 64
)
# Accumulators that share an operand halve the time of mask_sum on an H200. From Triton 3.9 on their products
# are made to wait for one another.
_SHARING = 3 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else 1
# The fastest of 252 configurations on an H200 (bench/results/nvidia-h200-tiles.json), but for mask_sum: of
# its forms with several accumulators only these were timed.
_HOPPER = _table(
    Launch(warps=8, tma=True),
    Launch(block_k=32, stages=3, tma=True),
    Launch(warps=8, tma=True, accumulators=_SHARING),
    Launch(block_k=32, warps=8, stages=2, tma=True, accumulators=_SHARING),
    similarity=Launch(stages=2, tma=True),
    similarity_split=Launch(block_k=32, stages=2, tma=True),
    log_sum_exp=Launch(stages=2, tma=True),
    log_sum_exp_split=Launch(block_k=32, stages=2, tma=True),
    weights_split=Launch(block_k=32, warps=8, tma=True),
)
_BLACKWELL = _table(
    Launch(tma=True),
    Launch(warps=8, stages=2, tma=True),
    Launch(warps=8, tma=True),
    # At odd multiples of 64 channels others spill with one or another Triton; with four warps at powers of
    # two.
    Launch(block_k=128, warps=8, stages=3, tma=True),
)
# Architecture -> kernel -> configuration. "interpret" keeps Triton's interpreter quick on small tests.
TABLE: dict[str, dict[str, Launch]] = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE,
    "sm_89": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_120": _AMPERE,
    "gfx942": _table(
        Launch(warps=8, stages=2),  # 82-142, 32
        Launch(block_k=32, warps=8, stages=2),  # 98-128, 32
        Launch(warps=8, stages=2),  # 94-124, 32
        Launch(warps=8, stages=2),  # 98-144, 48
    ),
    "interpret": _table(
        *[Launch(block_m=64, block_n=256)] * 2, *[Launch(block_m=64, block_k=128, accumulators=3)] * 2
    ),
}
# Multiprocessors that are taken for granted where kernels are compiled or interpreted without a GPU.
_MULTIPROCESSORS = {"sm_90": 132, "sm_100": 148, "gfx942": 304, "interpret": 4}
# Row tiles of a band, see device.tile_index.
BAND = 32
# Options of the row kernels. Fusing a product and a sum only rounds less.
ROW_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, so that kernels run on CPU tensors."""
    return not isinstance(triton.language.sum, triton.runtime.JITFunction)


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name for `device`: the nearest older architecture that has a row."""
    if interpreted():
        return "interpret"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    capability = 10 * properties.major + properties.minor
    known = sorted(int(name[3:]) for name in TABLE if name.startswith("sm_"))
    return f"sm_{max(number for number in known if number <= capability)}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _MULTIPROCESSORS.get(architecture(device), 108)


def row_block(device: torch.device) -> int:
    """Rows that tensors of the tile kernels are padded to, and that one flag of occupied tiles covers."""
    return TABLE[architecture(device)]["similarity"].block_m


def rows_within(memory_budget: int, bytes_per_row: int, device: torch.device) -> int:
    """Rows within a budget: whole row tiles."""
    return budget.rows_within(memory_budget, bytes_per_row, row_block(device))


def rows_per_program() -> int:
    """Rows that a program of a row kernel owns; the interpreter takes its time per program, not per entry."""
    return 64 if interpreted() else 4


def configuration(kernel: str, device: torch.device, split: bool) -> Launch:
    """The shipped configuration of `kernel`."""
    return TABLE[architecture(device)][f"{kernel}/split" if split else kernel]


def choose(
    kernel: str, operand: "Planes", problem: tuple[object, ...], again: Callable[..., object]
) -> Launch:
    """The configuration that a tile kernel runs in: the shipped one, with PPAP_AUTOTUNE=1 the fastest.

    Args:
        kernel: one of :data:`KERNELS`.
        operand: planes that are streamed through the kernel.
        problem: sizes and form that a search distinguishes.
        again: launches the kernel in a given `config`; called many times by a search, so it must only
            overwrite.
    """
    device, width = operand.high.device, operand.high.shape[1]
    shipped = configuration(kernel, device, operand.split)
    if interpreted() or not autotune_wanted():
        return shipped
    key = (kernel, str(operand.high.dtype), operand.split, width, *problem)
    others = [each for each in alternatives(kernel, shipped) if fits(kernel, each, width)]
    return autotune.fastest(key, device, shipped, others, lambda config: again(config=config))


def alternatives(kernel: str, shipped: Launch) -> list[Launch]:
    """What a search tries besides the shipped configuration; row tiles keep their height."""
    found = [
        replace(shipped, warps=warps, stages=stages, block_k=block_k)
        for warps in (4, 8)
        for stages in (2, 3, 4)
        for block_k in (32, 64, 128)
    ]
    if kernel == "mask_sum":
        found += [replace(each, accumulators=4 - each.accumulators) for each in found if each.warps == 8]
    else:
        found += [replace(each, block_n=COLUMN_BLOCK) for each in found if each.warps == 8]
        # Where loads and products of the next tile hide the end of the last: the deepest pipelines.
        found += [replace(each, persistent=True) for each in found if (each.warps, each.stages) == (8, 3)]
    return [each for each in found if each != shipped]


def fits(kernel: str, config: Launch, width: int) -> bool:
    """Whether the steps of a configuration divide what they walk over: `width` channels, or a group."""
    return (128 if kernel == "mask_sum" else width) % config.block_k == 0


def source(plane: torch.Tensor | None, rows: int, columns: int, tma: bool) -> object:
    """What a kernel loads tiles (rows, columns) of `plane` from: a tensor descriptor, or the tensor."""
    if plane is None or not tma:
        return plane
    return TensorDescriptor.from_tensor(plane, [rows, columns])


def tiles(rows: int, columns: int, config: Launch, device: torch.device) -> tuple[int]:
    """Grid of a tile kernel."""
    count = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    # Two programs of 128 columns have room on a multiprocessor, one of 256.
    slots = multiprocessors(device) * (COLUMN_BLOCK // config.block_n)
    return (min(count, slots) if config.persistent else count,)
