// What every instruction set offers; filled by kernels.h, chosen from by library.cpp.
#pragma once
#include <cstdint>

#include "ppap_cpu.h"

namespace ppap {

struct KernelTable {
    void (*similarity)(int, const PpapSimilarity&);
    void (*mask_sum)(int, const PpapMaskSum&);
    void (*contrast)(int, const PpapContrast&);
};

#if defined(__x86_64__)
namespace avx512bf16 { extern const KernelTable table; }
namespace avx512 { extern const KernelTable table; }
namespace avx2 { extern const KernelTable table; }
#endif
namespace portable { extern const KernelTable table; }

}  // namespace ppap
