"""What operands and masks are padded to."""

# Widths are padded to this many channels, patches to this many columns (the widest tile).
WIDTH_BLOCK = 64
COLUMN_BLOCK = 256


def padded(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def padded_channels(width: int) -> int:
    """Channels of the operands of rows of `width`, one block at least."""
    return padded(max(width, 1), WIDTH_BLOCK)
