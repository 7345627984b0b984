// A tile of inner products of rows of two float matrices, left in shared memory: 128 patches by 128 anchors by tensor
// cores, 64 by 64 in plain fp32.
#pragma once
#include <cstddef>

#include "phases.h"

#ifndef PPAP_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
#endif

enum Precision { FP32 = 0, FP16 = 1, BF16 = 2, PLAIN = 3 };

#ifdef PPAP_EMULATED
using half_t = float;
using bfloat_t = float;
PPAP_DEVICE static inline void narrow(float value, float& to) { to = value; }
PPAP_DEVICE static inline float infinity() { return INFINITY; }
#else
using half_t = __half;
using bfloat_t = __nv_bfloat16;
PPAP_DEVICE static inline void narrow(float value, __half& to) { to = __float2half_rn(value); }
PPAP_DEVICE static inline void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }
PPAP_DEVICE static inline void narrow(float value, float& to) { to = value; }
PPAP_DEVICE static inline float infinity() { return __int_as_float(0x7f800000); }
#endif

template <int P> struct Operand {
    using type = half_t;
};
template <> struct Operand<BF16> {
    using type = bfloat_t;
};
template <> struct Operand<PLAIN> {
    using type = float;
};

// Values of two planes are scaled so that the low one stays in fp16's normal range.
constexpr float SPLIT_SCALE = 32768.0f;

template <int P>
struct Tile {
    static constexpr int SIDE = P == PLAIN ? 64 : 128;
    static constexpr int DEPTH = P == PLAIN ? 16 : 32;
    static constexpr int PITCH = DEPTH + 8;  // of operands: rows start in different banks
    static constexpr int PLANES = P == FP32 ? 2 : 1;
    static constexpr int OUT_PITCH = SIDE + 4;
    using Value = typename Operand<P>::type;

    struct Shared {
        union {
            struct {
                alignas(SHARED_ALIGN) Value left[PLANES][SIDE * PITCH];
                alignas(SHARED_ALIGN) Value right[PLANES][SIDE * PITCH];
            } in;
            alignas(SHARED_ALIGN) float out[SIDE * OUT_PITCH];
        };
    };

    // Fragments of 16 by 16 start at any multiple of 16 rows and columns of a plane, all at aligned addresses.
    static constexpr bool aligned(size_t entries, size_t size) { return entries * size % SHARED_ALIGN == 0; }
    static_assert(aligned(16, sizeof(Value)) && aligned(16 * PITCH, sizeof(Value)), "fragments of operands");
    static_assert(aligned(SIDE* PITCH, sizeof(Value)), "planes of operands");
    static_assert(aligned(16, sizeof(float)) && aligned(16 * OUT_PITCH, sizeof(float)), "fragments of the product");
    static_assert(PITCH * sizeof(Value) % 16 == 0 && OUT_PITCH * sizeof(float) % 16 == 0, "rows of fragments");
    static_assert(DEPTH % 16 == 0, "whole fragments");

    // out[row * OUT_PITCH + column] = left row . right row; rows past the end count as 0.
    PPAP_DEVICE static void product(const Block& block, Shared& shared, const float* left, int64_t left_rows,
                                    int64_t left_first, const float* right, int64_t right_rows, int64_t right_first,
                                    int64_t depth);

  private:
    PPAP_DEVICE static void put(float value, Value (*to)[SIDE * PITCH], int at) {
        if (P == FP32) {
            value *= SPLIT_SCALE;
            Value high;
            narrow(value, high);
            to[0][at] = high;
            narrow(value - static_cast<float>(high), to[PLANES - 1][at]);
        } else {
            narrow(value, to[0][at]);
        }
    }

    PPAP_DEVICE static void fetch(int thread, const float* from, int64_t rows, int64_t first, int64_t depth, int64_t k,
                                  Value (*to)[SIDE * PITCH]) {
        for (int at = thread; at < SIDE * DEPTH; at += THREADS) {
            const int row = at / DEPTH, column = at % DEPTH;
            const bool inside = first + row < rows && k + column < depth;
            put(inside ? from[(first + row) * depth + k + column] : 0.0f, to, row * PITCH + column);
        }
    }
};

#ifdef PPAP_EMULATED
// The order of the sums differs from that of tensor cores; everything around them is the same code.
template <int P>
void Tile<P>::product(const Block& block, Shared& shared, const float* left, int64_t left_rows, int64_t left_first,
                      const float* right, int64_t right_rows, int64_t right_first, int64_t depth) {
    static std::vector<float> sums;
    sums.assign(SIDE * SIDE, 0.0f);
    for (int64_t k = 0; k < depth; k += DEPTH) {
        block.each([&](int thread) {
            fetch(thread, left, left_rows, left_first, depth, k, shared.in.left);
            fetch(thread, right, right_rows, right_first, depth, k, shared.in.right);
        });
        for (int row = 0; row < SIDE; ++row)
            for (int column = 0; column < SIDE; ++column)
                for (int d = 0; d < DEPTH; ++d) {
                    float a = shared.in.left[0][row * PITCH + d], b = shared.in.right[0][column * PITCH + d];
                    if (P == FP32) {
                        a = (a + shared.in.left[PLANES - 1][row * PITCH + d]) / SPLIT_SCALE;
                        b = (b + shared.in.right[PLANES - 1][column * PITCH + d]) / SPLIT_SCALE;
                    }
                    sums[row * SIDE + column] += a * b;
                }
    }
    for (int row = 0; row < SIDE; ++row)
        for (int column = 0; column < SIDE; ++column) shared.out[row * OUT_PITCH + column] = sums[row * SIDE + column];
}
#else
// Tensor cores: 8 warps, each 32 rows by 64 columns in fragments of 16 by 16.
template <int P>
__device__ void Tile<P>::product(const Block& block, Shared& shared, const float* left, int64_t left_rows,
                                 int64_t left_first, const float* right, int64_t right_rows, int64_t right_first,
                                 int64_t depth) {
    if constexpr (P == PLAIN) {
        // 256 threads, each 4 by 4 entries.
        const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
        float sums[4][4] = {};
        for (int64_t k = 0; k < depth; k += DEPTH) {
            block.each([&](int thread) {
                fetch(thread, left, left_rows, left_first, depth, k, shared.in.left);
                fetch(thread, right, right_rows, right_first, depth, k, shared.in.right);
            });
            for (int d = 0; d < DEPTH; ++d)
                for (int i = 0; i < 4; ++i)
                    for (int j = 0; j < 4; ++j)
                        sums[i][j] +=
                            shared.in.left[0][(row + i) * PITCH + d] * shared.in.right[0][(column + j) * PITCH + d];
            __syncthreads();
        }
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) shared.out[(row + i) * OUT_PITCH + column + j] = sums[i][j];
        __syncthreads();
    } else {
#if __CUDA_ARCH__ >= 800  // before, only the plain form is launched
        namespace wmma = nvcuda::wmma;
        using Left = wmma::fragment<wmma::matrix_a, 16, 16, 16, Value, wmma::row_major>;
        using Right = wmma::fragment<wmma::matrix_b, 16, 16, 16, Value, wmma::col_major>;
        wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[2][4];
        const int warp = threadIdx.x / 32, row = warp % 4 * 32, column = warp / 4 * 64;
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 4; ++j) wmma::fill_fragment(sums[i][j], 0.0f);
        for (int64_t k = 0; k < depth; k += DEPTH) {
            block.each([&](int thread) {
                fetch(thread, left, left_rows, left_first, depth, k, shared.in.left);
                fetch(thread, right, right_rows, right_first, depth, k, shared.in.right);
            });
            for (int d = 0; d < DEPTH; d += 16) {
                Left a[PLANES][2];
                for (int plane = 0; plane < PLANES; ++plane)
                    for (int i = 0; i < 2; ++i)
                        wmma::load_matrix_sync(a[plane][i], &shared.in.left[plane][(row + 16 * i) * PITCH + d], PITCH);
                for (int j = 0; j < 4; ++j)
                    for (int plane = 0; plane < PLANES; ++plane) {
                        Right b;
                        wmma::load_matrix_sync(b, &shared.in.right[plane][(column + 16 * j) * PITCH + d], PITCH);
                        for (int i = 0; i < 2; ++i) {
                            wmma::mma_sync(sums[i][j], a[0][i], b, sums[i][j]);
                            // The product of the two low planes is below fp32's rounding.
                            if (PLANES == 2 && plane == 0) wmma::mma_sync(sums[i][j], a[PLANES - 1][i], b, sums[i][j]);
                        }
                    }
            }
            __syncthreads();
        }
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 4; ++j) {
                if (P == FP32)
                    for (int e = 0; e < sums[i][j].num_elements; ++e)
                        sums[i][j].x[e] *= 1.0f / (SPLIT_SCALE * SPLIT_SCALE);
                wmma::store_matrix_sync(&shared.out[(row + 16 * i) * OUT_PITCH + column + 16 * j], sums[i][j],
                                        OUT_PITCH, wmma::mem_row_major);
            }
        __syncthreads();
#endif
    }
}
#endif
