"""Arrays of MATLAB files of version 5 to 7, read by their published format and by nothing that can crash.

A file is a header of 128 bytes and a row of elements, each a tag (type and length in bytes) and its data; a
compressed element holds one other. A matrix is an element of elements: flags, dimensions, name and values.
Every length is compared with what is there before it is believed.
"""

import os
import struct
import zlib
from typing import NamedTuple

import numpy as np

from ppap.data.limits import check_file, check_size
from ppap.errors import DataError

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_BANDS = 64  # most values of a pixel
_HEAD = 1 << 12  # bytes that hold all of a matrix but its values
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x0800


class _Element(NamedTuple):
    kind: int
    start: int
    """Where its data begin."""
    length: int
    """Bytes of its data."""
    end: int
    """Where the next element begins."""


def read_matrix(path: str | os.PathLike, name: str) -> np.ndarray:
    """A variable of numbers in a MATLAB file.

    Args:
        path: version 5 to 7.
        name: of the variable.

    Returns:
        The array, of the type that it has in MATLAB.

    Raises:
        DataError: no such file or variable, another format or kind of variable, damage, or more pixels than
            ``--data.max-pixels``.
    """
    try:
        check_file(path)
        with open(path, "rb") as file:
            data = file.read()
        return _find(data, name, path)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as a MATLAB file ({error}); copy it again") from None


def _find(data: bytes, name: str, path: str | os.PathLike) -> np.ndarray:
    if len(data) <= _HEADER or data[126:128] not in (b"IM", b"MI"):
        raise ValueError("it has no header of version 5 to 7")
    order, place, there = "<" if data[126:128] == b"IM" else ">", _HEADER, []
    while place < len(data):
        element = _element(data, place, order)
        inside = memoryview(data)[element.start : element.start + element.length]
        kind, packed = element.kind, element.kind == _COMPRESSED
        if packed:
            head = _unpacked(inside, _HEAD)
            kind, length = struct.unpack_from(f"{order}II", head)
            head = head[8:]
        else:
            length, head = element.length, bytes(inside[:_HEAD])
        if kind == _MATRIX:
            matrix = _Matrix(head, order, length)
            there.append(matrix.name)
            if matrix.name == name:
                matrix.check(path)
                body = _unpacked(inside, 8 + length)[8:] if packed else bytes(inside)
                return matrix.values(body)
        place = element.end if not packed else element.start + element.length
    raise DataError(f"{path}: no variable {name!r} (it holds {', '.join(there[:9]) or 'nothing'})")


def _unpacked(data: memoryview, most: int) -> bytes:
    """At most so many bytes of compressed ones, however many they claim to be."""
    return zlib.decompressobj().decompress(data, most)


def _element(data: bytes, place: int, order: str, within: int | None = None) -> _Element:
    """The element at a place; `within` = bytes that there should be, where `data` is only their beginning."""
    kind, length = struct.unpack_from(f"{order}II", data, place)
    if kind >> 16:  # short: length and type in four bytes, data in the next four
        kind, length, start, end = kind & 0xFFFF, kind >> 16, place + 4, place + 8
        if length > 4:
            raise ValueError("a length is wrong")
    else:
        start = place + 8
        end = start + length + -length % 8
    if start + length > (len(data) if within is None else within):
        raise ValueError("the file is cut off, or a length is wrong")
    return _Element(kind, start, length, end)


class _Matrix:
    """What stands before the values of a matrix."""

    def __init__(self, head: bytes, order: str, length: int) -> None:
        """Args: the first bytes of its data, of `length` in all."""
        self._order = order
        flags = _element(head, 0, order, length)
        shape = _element(head, flags.end, order, length)
        title = _element(head, shape.end, order, length)
        if flags.length != 8 or title.start + title.length > len(head) or shape.length % 4:
            raise ValueError("the head of a variable is wrong")
        self._flags = struct.unpack_from(f"{order}I", head, flags.start)[0]
        self.shape = struct.unpack_from(f"{order}{shape.length // 4}i", head, shape.start)
        self.name = head[title.start : title.start + title.length].decode("latin-1")
        self._values_at = title.end

    def check(self, path: str | os.PathLike) -> None:
        """Refuse what is no array of pixels before its values are unpacked."""
        if self._flags & 0xFF not in _CLASSES or self._flags & _COMPLEX:
            raise DataError(f"{path}: the variable {self.name!r} is no array of real numbers")
        if len(self.shape) not in (2, 3) or min(self.shape) < 1 or (*self.shape, 1)[2] > _BANDS:
            raise DataError(f"{path}: {self.name} has the shape {self.shape}; wanted (H, W) or (H, W, bands)")
        check_size(self.shape, path)

    def values(self, body: bytes) -> np.ndarray:
        """The array, of all bytes of the matrix."""
        element = _element(body, self._values_at, self._order)
        if element.kind not in _STORED:
            raise ValueError(f"values of type {element.kind}")
        stored = np.dtype(self._order + _STORED[element.kind])
        if element.length != int(np.prod(self.shape, dtype=np.int64)) * stored.itemsize:
            raise ValueError("there are not as many values as its size says")
        values = np.frombuffer(body, stored, offset=element.start, count=element.length // stored.itemsize)
        return values.astype(_CLASSES[self._flags & 0xFF]).reshape(self.shape, order="F")
