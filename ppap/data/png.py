"""The chunks of a PNG file: which of them are damaged, and which of those matter to its pixels."""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NEEDED = (b"IHDR", b"PLTE", b"IDAT", b"IEND")  # all chunks that the format calls critical


def without_damage(data: bytes) -> bytes:
    """A PNG without the damaged ones among the chunks that say nothing of ids and colours (texts, times).

    Decoders pass over checksums of pixels, and refuse a file for those of a text.

    Args:
        data: the file, with its signature.

    Raises:
        ValueError: a chunk that matters has a wrong checksum, or the file is cut off.
    """
    kept, place, kind = [data[: len(SIGNATURE)]], len(SIGNATURE), b""
    while kind != b"IEND":
        head = data[place : place + 8]
        length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (len(data), b"")
        end = place + 12 + length
        if end > len(data):
            raise ValueError("the file is cut off, or the length of a chunk is wrong")
        if zlib.crc32(data[place + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big"):
            kept.append(data[place:end])
        elif not _is_spare(kind):
            raise ValueError(f"the checksum of its chunk {kind!r} is wrong, so that ids may be others")
        place = end
    return b"".join(kept)


def _is_spare(kind: bytes) -> bool:
    """Whether a chunk is one that pixels do not need.

    The first letter says it, in one bit: where that bit is the damage, the name is that of a needed one.
    """
    return kind.isalpha() and kind[:1].islower() and kind.upper() not in _NEEDED
