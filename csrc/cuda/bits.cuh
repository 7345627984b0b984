// Bits of a patch's anchors, as csrc/cpu/ppap_cpu.h lays them out.
#pragma once
#include "phases.h"

PPAP_DEVICE static inline uint32_t bits_of(const uint8_t* bits, int64_t patch, int64_t stride, int64_t anchor) {
    return *reinterpret_cast<const uint32_t*>(bits + patch * stride + anchor / 32 * 4);
}

PPAP_DEVICE static inline int count_ones(uint32_t word) {
#ifdef PPAP_EMULATED
    return __builtin_popcount(word);
#else
    return __popc(word);
#endif
}

static inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }
