// What every instruction set offers; filled by kernels.h, chosen from by library.cpp.
#pragma once
#include <cstdint>

#include "ppap_cpu.h"

namespace ppap {

// What E and groups of anchors are padded to: whole panels of every instruction set.
constexpr int64_t PADDING = 32;

struct KernelTable {
    bool uses_pairs;
    void (*pack_pairs)(int, const PpapPackPairs&);
    void (*relation_masks)(int, const PpapRelationMasks&);
    void (*proxy_average)(int, const PpapProxyAverage&);
    void (*masked_log_softmax)(int, const PpapMaskedLogSoftmax&);
    void (*pixel_cross_entropy)(int, const PpapPixelCrossEntropy&);
    int64_t (*tile_rows)(int64_t width);
};

#if defined(__x86_64__)
namespace avx512bf16 { extern const KernelTable table; }
namespace avx512 { extern const KernelTable table; }
namespace avx2 { extern const KernelTable table; }
#endif
namespace portable { extern const KernelTable table; }

}  // namespace ppap
