"""Files as other programs write them, byte by byte where Pillow cannot."""

import struct
import zlib
from pathlib import Path

import numpy as np


def write_tiff(path: Path, pixels: np.ndarray, extra: tuple[int, ...] = ()) -> Path:
    """(H, W, bands) uint8, uint16 or float32 as an uncompressed, interleaved TIFF.

    Args:
        extra: the tag ExtraSamples: 0 = unspecified, 1 = associated alpha, 2 = alpha; empty = no tag.
    """
    pixels = np.ascontiguousarray(pixels)
    height, width, bands = pixels.shape
    kind = 3 if pixels.dtype.kind == "f" else 1
    tags = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [8 * pixels.dtype.itemsize] * bands),
        259: (3, [1]),
        262: (3, [2 if bands >= 3 else 1]),
        273: (4, [0]),
        277: (3, [bands]),
        278: (4, [height]),
        279: (4, [pixels.nbytes]),
        284: (3, [1]),
        **({338: (3, list(extra))} if extra else {}),
        339: (3, [kind] * bands),
    }
    start = 8 + 2 + 12 * len(tags) + 4
    outside = sum(len(v) * {3: 2, 4: 4}[t] for t, v in tags.values() if len(v) * {3: 2, 4: 4}[t] > 4)
    tags[273] = (4, [start + outside])
    entries, more = b"", b""
    for tag, (code, values) in sorted(tags.items()):
        body = struct.pack(f"<{len(values)}{'H' if code == 3 else 'I'}", *values)
        if len(body) > 4:
            more, body = more + body, struct.pack("<I", start + len(more))
        entries += struct.pack("<HHI", tag, code, len(values)) + body.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + more
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + pixels.astype(pixels.dtype.newbyteorder("<")).tobytes())
    return path


def write_png16(path: Path, pixels: np.ndarray) -> Path:
    """(H, W, 3) uint16 as a PNG with 16 bits per channel, which Pillow reads but does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path
