// C entry points of the CUDA library, the fallback for GPUs without Triton. Device pointers, sizes and a stream; every
// call returns a cudaError_t and waits for nothing. Shapes, bits and meanings are those of csrc/cpu/ppap_cpu.h.
//
// precision: 0 = fp32 (two fp16 planes per operand on tensor cores, plain fp32 before sm_80), 1 = fp16, 2 = bf16.
// Operands of fp16 and fp32 must be at most 1 in magnitude; `scale` (a device scalar) multiplies the products.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

int ppap_cuda_abi_version();
const char* ppap_cuda_error(int code);

// As ppap_similarity_fwd. counts (C,) int64 must be 0 before; they are added to.
int ppap_cuda_similarity(void* stream, int precision, const float* queries, int64_t C, const float* keys, int64_t N,
                         int64_t D, const float* scale, const float* phi, const float* psi, uint8_t* positive,
                         uint8_t* kept, int64_t stride, int64_t* num_positive, int64_t* num_kept);

// sums (parts, C, D): part s of the patches; the caller adds the parts in their order.
int ppap_cuda_mask_sum(void* stream, const uint8_t* positive, int64_t stride, int64_t C, const float* keys, int64_t N,
                       int64_t D, int64_t parts, float* sums);

// Per tile of ppap_cuda_tile() patches and anchor, (tiles, C): largest kept x, sum of 2^(x - largest) over the kept,
// sum of x over the positives; -inf, 0, 0 where there is none. x = scale * z_i . z_j.
int ppap_cuda_log_sum_exp(void* stream, int precision, const float* z_anchors, int64_t C, const float* z, int64_t N,
                          int64_t E, const float* scale, const uint8_t* positive, const uint8_t* kept, int64_t stride,
                          float* top, float* total, float* hit);

// weights (N, C) = (2^min(x - lse, 0) [kept] - share [positive]) 2^14 as fp16, bf16 or (precision 0) float.
int ppap_cuda_weights(void* stream, int precision, const float* z_anchors, int64_t C, const float* z, int64_t N,
                      int64_t E, const float* scale, const uint8_t* positive, const uint8_t* kept, int64_t stride,
                      const float* lse, const float* share, void* weights);

int64_t ppap_cuda_tile();

int ppap_cuda_to_public(void* stream, const uint8_t* bits, int64_t stride, int64_t C, int64_t N, int32_t* words);
int ppap_cuda_from_public(void* stream, const int32_t* words, int64_t C, int64_t N, uint8_t* bits, int64_t stride,
                          int64_t* counts);
}
#pragma GCC visibility pop
