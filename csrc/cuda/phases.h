// Kernels as phases: a body is a sequence of block.each([&](int thread) {...}), with a barrier after each, and keeps
// nothing but shared memory from one to the next. On a GPU every thread runs its own share; compiled by a C++ compiler
// (-DPPAP_EMULATED) the same body runs thread after thread on the CPU, which is how it is tested without a GPU.
#pragma once
#include <cstdint>

#ifdef PPAP_EMULATED
#include <cmath>
#include <cstring>
#include <vector>
#define PPAP_DEVICE
using Stream = void*;
// Whether threads and blocks run last to first: no result may depend on it.
inline bool backwards = false;
extern "C" __attribute__((used, visibility("default"))) inline void ppap_cuda_backwards(int on) { backwards = on != 0; }
static inline void add_count(int64_t* to, int64_t value) { *to += value; }
static inline void add_count(int* to, int value) { *to += value; }
static inline float power_of_two(float x) { return std::exp2(x); }
#else
#include <cuda_runtime.h>
#define PPAP_DEVICE __device__
using Stream = cudaStream_t;
// Sums of whole numbers do not depend on their order.
__device__ static inline void add_count(int64_t* to, int64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
__device__ static inline void add_count(int* to, int value) { atomicAdd(to, value); }
__device__ static inline float power_of_two(float x) { return exp2f(x); }
#endif

constexpr int THREADS = 256;
// Of shared memory [bytes]: tensor cores load and store fragments at multiples of 256 bits.
constexpr int SHARED_ALIGN = 32;

struct Block {
    int64_t x, y;
    template <class Body>
    PPAP_DEVICE void each(Body&& body) const {
#ifdef PPAP_EMULATED
        for (int i = 0; i < THREADS; ++i) body(backwards ? THREADS - 1 - i : i);
#else
        body(static_cast<int>(threadIdx.x));
        __syncthreads();
#endif
    }
};

#ifndef PPAP_EMULATED
template <class Kernel>
__global__ void __launch_bounds__(THREADS) run_kernel(Kernel kernel) {
    static_assert(alignof(typename Kernel::Shared) <= SHARED_ALIGN, "shared memory is aligned to SHARED_ALIGN bytes");
    extern __shared__ __align__(SHARED_ALIGN) unsigned char memory[];
    kernel(Block{blockIdx.x, blockIdx.y}, *reinterpret_cast<typename Kernel::Shared*>(memory));
}
#endif

// Run a kernel on a grid of blocks; 0, or the error of the launch.
template <class Kernel>
int launch(Stream stream, int64_t grid_x, int64_t grid_y, const Kernel& kernel) {
    if (grid_x == 0 || grid_y == 0) return 0;
#ifdef PPAP_EMULATED
    static_assert(alignof(typename Kernel::Shared) <= SHARED_ALIGN, "shared memory is aligned to SHARED_ALIGN bytes");
    struct alignas(SHARED_ALIGN) Line {
        unsigned char bytes[SHARED_ALIGN];
    };
    std::vector<Line> memory((sizeof(typename Kernel::Shared) + SHARED_ALIGN - 1) / SHARED_ALIGN);
    for (int64_t y = 0; y < grid_y; ++y)
        for (int64_t x = 0; x < grid_x; ++x) {
            // NaN where a kernel reads what it has not written.
            std::memset(memory.data(), 0xff, memory.size() * SHARED_ALIGN);
            const Block block = backwards ? Block{grid_x - 1 - x, grid_y - 1 - y} : Block{x, y};
            kernel(block, *reinterpret_cast<typename Kernel::Shared*>(memory.data()));
        }
    (void)stream;
    return 0;
#else
    constexpr int bytes = sizeof(typename Kernel::Shared);
    if (bytes > 48 * 1024) {
        auto error = cudaFuncSetAttribute(run_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return error;
    }
    const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
    run_kernel<Kernel><<<grid, THREADS, bytes, stream>>>(kernel);
    return cudaGetLastError();
#endif
}
