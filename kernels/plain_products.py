"""What surrounds every op: the device that launches go to, and products that follow no global setting."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


class _PlainProducts:
    """Torch's settings of products, as the ops want them while any thread is inside one.

    They belong to the process: of ops that overlap, the first saves them and the last puts them back. Were
    each to put back what it found, one would leave the other's settings behind for good.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.RLock(), 0
        self._saved: tuple[list[str], bool] = ([], False)

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = self._read()
            self._inside += 1
            try:
                self._set(["ieee"] * 2, False)  # each time: someone may have changed them since the first
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._set(*self._saved)

    @staticmethod
    def _knobs() -> tuple[Any, Any]:
        backends: Any = torch.backends  # not all of its modules say what they have
        return backends.cuda.matmul, backends.mkldnn.matmul

    def _read(self) -> tuple[list[str], bool]:
        # A knob that was never set reads as the general setting: it goes back to following that.
        backends: Any = torch.backends
        general, found = backends.fp32_precision, [knob.fp32_precision for knob in self._knobs()]
        precisions = ["none" if precision == general else precision for precision in found]
        return precisions, torch.backends.cuda.matmul.allow_fp16_accumulation

    def _set(self, precisions: list[str], fp16_accumulation: bool) -> None:
        torch.backends.cuda.matmul.allow_fp16_accumulation = fp16_accumulation
        for knob, precision in zip(self._knobs(), precisions, strict=True):
            knob.fp32_precision = precision


_plain_products = _PlainProducts()


@contextlib.contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """What surrounds every op: launches go to `device`, and products are as asked for.

    Triton and native launches take the current GPU, which need not be that of the tensors. Products follow no
    global setting: no autocast, no TF32, no bf16 in place of fp32, no fp16 accumulation. Torch keeps these
    settings for the process: another thread's products see them too while an op runs, and a change that it
    makes meanwhile is undone.
    """
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_plain_products)
        yield
