// What the CUDA library says about itself. Compiled by nvcc, or like all units with -DPPAP_EMULATED -x c++ by a C++
// compiler, to be tested without a GPU.
#include "ppap_cuda.h"
#include "precision.cuh"

extern "C" {

int ppap_cuda_abi_version() { return 3; }

const char* ppap_cuda_error(int code) {
#ifdef PPAP_EMULATED
    return code ? "emulated" : "no error";
#else
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}

int64_t ppap_cuda_tile() { return supported(FP16) == PLAIN ? Tile<PLAIN>::SIDE : Tile<FP16>::SIDE; }
}
