// Which form of a product runs.
#pragma once
#include "tile.cuh"

// The precision that runs here: tensor cores of the fp32 form need sm_80.
static inline int supported(int precision) {
#ifdef PPAP_EMULATED
    return precision;
#else
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 8 ? precision : static_cast<int>(PLAIN);
#endif
}

// make(std::integral_constant<P>) for the precision that runs; tiles of patches by tiles of anchors.
template <class Make>
static int dispatch(int precision, Make&& make) {
    switch (supported(precision)) {
        case FP32: return make(Tile<FP32>{});
        case FP16: return make(Tile<FP16>{});
        case BF16: return make(Tile<BF16>{});
        default: return make(Tile<PLAIN>{});
    }
}

template <class T> struct PrecisionOf;
template <int P> struct PrecisionOf<Tile<P>> {
    static constexpr int value = P;
};
