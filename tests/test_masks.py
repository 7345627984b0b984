"""Packing of masks: the public bit layout."""

import pytest
import torch

from ppap.kernels import pack_masks, unpack_masks


def test_bit_k_of_word_w_is_column_32w_plus_k():
    mask = torch.zeros(1, 70, dtype=torch.bool)
    mask[0, [0, 31, 32, 69]] = True
    words = pack_masks(mask)
    assert words.dtype == torch.int32
    assert words.tolist() == [[1 - 2**31, 1, 1 << 5]]


@pytest.mark.parametrize(
    "shape", [(3, 1), (5, 31), (5, 32), (2, 33), (4, 203), (0, 40), (2, 0), (70,), (2, 3, 65)]
)
def test_unpack_inverts_pack(shape, generator):
    mask = torch.rand(shape, generator=generator) < 0.3
    words = pack_masks(mask)
    assert words.shape == (*shape[:-1], -(-shape[-1] // 32))
    assert torch.equal(unpack_masks(words, shape[-1]), mask)


def test_pack_reads_a_non_contiguous_mask(generator):
    mask = (torch.rand(50, 7, generator=generator) < 0.5).T
    assert torch.equal(unpack_masks(pack_masks(mask), 50), mask)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="boolean"):
        pack_masks(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"int32 \(\.\.\., 2\)"):
        unpack_masks(torch.zeros(3, 1, dtype=torch.int32), 33)
