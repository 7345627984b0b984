"""Argument checks of the public functions: shapes, dtypes and ranges that need no look at the values."""

import math

import torch


def require(ok: bool, message: str) -> None:
    """Raise ValueError with `message` unless `ok`."""
    if not ok:
        raise ValueError(message)


def check_rows(
    op: str, name: str, tensor: torch.Tensor, columns: int | None = None, rows: int | None = None
) -> None:
    """A floating (rows, columns) tensor; None leaves a size free."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; give a torch tensor")
    shape = f"({'any' if rows is None else rows}, {'any' if columns is None else columns})"
    fits = tensor.dim() == 2 and rows in (None, tensor.shape[0]) and columns in (None, tensor.shape[1])
    require(fits, f"{op}: {name} has shape {tuple(tensor.shape)}; give {shape}")
    require(tensor.is_floating_point(), f"{op}: {name} is {tensor.dtype}; give a floating type")
    require(
        tensor.element_size() >= 2,
        f"{op}: {name} is {tensor.dtype}; give float16, bfloat16, float32 or float64",
    )


def check_vector(op: str, name: str, tensor: torch.Tensor, length: int, integer: bool = False) -> None:
    """A vector of `length` values: int64 where `integer`, else floating."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; give a torch tensor")
    require(
        tuple(tensor.shape) == (length,), f"{op}: {name} has shape {tuple(tensor.shape)}; give ({length},)"
    )
    right = tensor.dtype == torch.int64 if integer else tensor.is_floating_point()
    require(right, f"{op}: {name} is {tensor.dtype}; give {'int64' if integer else 'a floating type'}")


def check_anchors(op: str, anchors: torch.Tensor, patches: int | None = None) -> None:
    """A vector of int64 row numbers; their range is checked where it costs no wait for the device.

    Where there are no `patches` there is no such row.
    """
    if not isinstance(anchors, torch.Tensor):
        raise TypeError(f"{op}: anchors is a {type(anchors).__name__}; give an int64 torch tensor or None")
    require(anchors.dim() == 1, f"{op}: anchors has shape {tuple(anchors.shape)}; give (A,)")
    require(anchors.dtype == torch.int64, f"{op}: anchors is {anchors.dtype}; give int64")
    none = patches == 0 and anchors.shape[0] > 0
    require(not none, f"{op}: {anchors.shape[0]} anchors of no patches; give features (N, D) with N >= 1")


def check_positive(op: str, name: str, value: float) -> float:
    """A finite number above 0, as a float."""
    number = float(value)
    require(math.isfinite(number) and number > 0, f"{op}: {name} is {value!r}; give a finite number above 0")
    return number


def check_budget(op: str, memory_budget: int) -> int:
    """A whole number of bytes above 0."""
    ok = isinstance(memory_budget, int) and not isinstance(memory_budget, bool) and memory_budget > 0
    require(ok, f"{op}: memory_budget is {memory_budget!r}; give a number of bytes above 0")
    return memory_budget
