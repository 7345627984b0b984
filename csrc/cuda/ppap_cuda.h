// C entry points of the CUDA library, the fallback for GPUs without Triton. Device pointers, sizes and a stream; every
// call returns a cudaError_t and waits for nothing. Shapes, bits and meanings are those of csrc/cpu/ppap_cpu.h.
//
// precision: 0 = fp32 (two fp16 planes per operand on tensor cores, plain fp32 before sm_80), 1 = fp16, 2 = bf16.
// Operands of fp16 and fp32 must be at most 1 in magnitude; `scale` (a device scalar) multiplies the products.
#pragma once
#include <cstdint>

// One term of a weighted sum: a pixel or a vertex, and its weight.
struct alignas(8) PpapCudaEntry {
    int32_t index;
    float weight;
};

// The permutohedral lattice of one kernel of the dense CRF on one image, d = 5 with an image and 2 without. An entry is
// a pixel and one of the d + 1 vertices of its simplex, pixel by pixel; everything is the caller's, on the device.
struct PpapCudaLattice {
    const uint8_t* image;  // (H, W, 3) RGB, or null: positions alone
    int64_t height, width;
    int64_t slots;         // of the hash table: a power of two above the number of entries
    uint64_t* table;       // (slots,), ~0 before: keys
    int32_t* first;        // (slots,), INT32_MAX before: the first entry of a key
    int32_t* slot;         // (entries,)
    int32_t* number;       // (entries,) 1 for the first entry of a vertex, else 0; then its inclusive prefix sums
    int64_t vertices;      // in the order of their first entries
    uint64_t* keys;        // (vertices,)
    int32_t* before;       // (d + 1, vertices), -1 before: neighbours along every axis, or -1
    int32_t* next;
    PpapCudaEntry* slice;  // (entries,) vertices of the pixels
    PpapCudaEntry* splat;  // (entries,) pixels of the vertices, ascending
    const int64_t* order;  // (entries,) the entry that every splat entry is
    const int32_t* owner;  // (entries,) the vertex of every splat entry
    const int32_t* begin;  // (vertices + 1,) where the splat entries of a vertex begin
    float* factor;         // (H, W)
    float* values[2];      // (vertices, C) each
    float* partial;        // (2 ppap_cuda_crf_parts(entries), C)
    float sxy, srgb, weight;
};

#pragma GCC visibility push(default)
extern "C" {

int ppap_cuda_abi_version();
const char* ppap_cuda_error(int code);

// As ppap_relation_masks of the CPU library. counts (C,) int64 must be 0 before; they are added to.
int ppap_cuda_relation_masks(void* stream, int precision, const float* queries, int64_t C, const float* keys, int64_t N,
                             int64_t D, const float* scale, const float* phi, const float* psi, uint8_t* positive,
                             uint8_t* kept, int64_t stride, int64_t* num_positive, int64_t* num_kept);

// sums (parts, C, D): part s of the patches; the caller adds the parts in their order.
int ppap_cuda_proxy_average(void* stream, const uint8_t* positive, int64_t stride, int64_t C, const float* keys,
                            int64_t N, int64_t D, int64_t parts, float* sums);

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

// The dense CRF of one image, in this order for every kernel: embed fills table, first, slot, number and slice without
// its indices; with the prefix sums of number, link fills slice, keys, before and next; with order, owner and begin,
// weigh puts weights and normalisation into slice and splat. Nothing depends on the order in which threads run.
int ppap_cuda_crf_embed(void* stream, const PpapCudaLattice* lattice);
int ppap_cuda_crf_link(void* stream, const PpapCudaLattice* lattice);
int ppap_cuda_crf_weigh(void* stream, const PpapCudaLattice* lattice);

int64_t ppap_cuda_crf_parts(int64_t entries);
int64_t ppap_cuda_crf_classes_max();

// Mean-field steps: probabilities out (C, pixels) from scores (C, pixels) of C <= ppap_cuda_crf_classes_max() classes.
// Either lattice may be null; unary and q (pixels, C) are working memory.
int ppap_cuda_crf_infer(void* stream, const PpapCudaLattice* edges, const PpapCudaLattice* smooth, const float* scores,
                        int64_t C, int64_t pixels, int64_t iterations, float* unary, float* q, float* out);
}
#pragma GCC visibility pop
