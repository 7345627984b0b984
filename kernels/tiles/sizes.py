"""What operands and masks are padded to."""

# Widths are padded to this many channels, patches to this many columns (the widest tile).
WIDTH_BLOCK = 64
COLUMN_BLOCK = 256
# Columns of a group of mask words, see ``device.py``.
GROUP = 128


def padded(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple."""
    return -(-count // multiple) * multiple
