// What every instruction set offers; filled by kernels.h, chosen from by library.cpp.
#pragma once
#include <cstdint>

#include "ppap_cpu.h"

namespace ppap {

struct KernelTable {
    void (*similarity)(int, const float*, int64_t, const float*, int64_t, int64_t, const float*, const float*, uint8_t*,
                       uint8_t*, int64_t, int64_t*, int64_t*);
    void (*mask_sum)(int, const uint8_t*, int64_t, int64_t, const float*, int64_t, int64_t, float*);
    void (*contrast)(int, const PpapContrast&);
};

#if defined(__x86_64__)
namespace avx512 { extern const KernelTable table; }
namespace avx2 { extern const KernelTable table; }
#endif
namespace portable { extern const KernelTable table; }

}  // namespace ppap
