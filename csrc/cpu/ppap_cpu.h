// C entry points of the native CPU library: raw pointers, sizes, no torch. Everything is float32, row-major.
//
// Shapes: N patches, C anchors of a chunk, D guidance channels, E embedding channels. Masks are bits, patch-major:
// bit a % 8 of byte a / 8 of a patch's row is anchor a; rows are `stride` bytes, a multiple of 4 (padding bits are
// 0). `isa` is an index into ppap_isa_name. What is summed, and in which order, does not depend on `threads`, however
// anchors and channels are dealt to them: every thread count gives the same bits. No state survives a call, so that a
// forked process may call too. Where a function returns int, 0 is done and 1 is out of memory.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

int ppap_abi_version();

// Name of an instruction set, best first, or null past the last; whether this processor has it.
const char* ppap_isa_name(int isa);
int ppap_isa_available(int isa);

// Rows of patches (of `width` floats) that a kernel works on at a time and keeps partial results of: per anchor two of
// 4 bytes for each such tile.
int64_t ppap_tile_rows(int isa, int64_t width);

// E and groups of anchors are multiples of it.
int64_t ppap_panel();

// Rows of patches enter as they are: key_scale (N,) multiplies each, null = 1. So normalised features need no copy.
// Where bf16 is not 0, all operands are rounded to bf16 beforehand, but for rows that are given as pairs too (then these
// alone are read), and products are of that type where the instruction set has them; results are float32.

// Whether an instruction set multiplies pairs of bf16. Then rows of patches are packed once for all calls.
int ppap_uses_pairs(int isa);

struct PpapPackPairs {
    const float* rows;   // (N, D)
    const float* scale;  // (N,) or null
    uint32_t* pairs;     // (N, ceil(D / 2)), written: scaled rows, two bf16 each
    float* norms;        // (N,), written: bounds of the scaled rows' L2 norms; or null
    int64_t N, D;
};

int ppap_pack_pairs(int isa, int threads, const PpapPackPairs* arguments);

struct PpapRelationMasks {
    const float* queries;       // (C, D)
    const float* keys;          // (N, D)
    const float* key_scale;     // (N,) or null
    const uint32_t* key_pairs;  // of ppap_pack_pairs, or null: products in float32 alone
    const float* key_norms;     // likewise, read where bf16 is 0
    const float* phi;           // (C,) or null: positive is read instead of formed
    const float* psi;           // (C,); read with kept
    const int64_t* self;        // (C,) patch of each anchor, which its sets leave out; or null
    uint8_t* positive;          // (N, stride) bits: query . key > phi
    uint8_t* kept;              // (N, stride) bits: positive or query . key < psi; or null: not wanted
    int64_t* num_positive;      // (C,), of what was formed
    int64_t* num_kept;          // (C,)
    int64_t C, N, D, stride, bf16;
};

int ppap_relation_masks(int isa, int threads, const PpapRelationMasks* arguments);

struct PpapProxyAverage {
    const uint8_t* positive;    // (N, stride) bits
    const float* keys;          // (N, D)
    const float* key_scale;     // (N,) or null
    const uint32_t* key_pairs;  // of ppap_pack_pairs: what is summed, or null: keys times their scale are
    float* sums;                // (C, D), written: the selected keys, in the order of the patches
    int64_t C, N, D, stride;
};

int ppap_proxy_average(int isa, int threads, const PpapProxyAverage* arguments);

struct PpapMaskedLogSoftmax {
    const float* z_anchors;         // (C, E)
    const float* z;                 // (N, E), E a multiple of 32
    const uint32_t* z_pairs;        // (N, E / 2) of ppap_pack_pairs: weights are rounded to bf16 too; or null
    const uint8_t* positive;        // (N, stride) bits
    const uint8_t* kept;            // (N, stride) bits
    const int64_t* num_positive;    // (C,)
    const float* shift;             // (C,) subtracted from the logits [powers of two], or null: the largest kept
    const float* row_weight;        // (C,) factor of each anchor's gradient, or null: no gradient
    float* loss;                    // (C,) [nats]
    float* lse;                     // (C,) [nats]
    float* dz_anchors;              // (C, E), written
    float* dz;                      // (N, E), added to, or written where fresh is not 0
    float* workspace;               // (N, group): exponentials of a group of anchors
    const float* known_lse;         // (C,) [nats] that weights divide by, or null: that of these patches
    int64_t C, N, E, stride, group; // group: a multiple of 32
    int64_t fresh;
    float temperature;
};

// Loss and log-sum-exp of every anchor and, with row_weight, the gradients of sum(row_weight * loss).
int ppap_masked_log_softmax(int isa, int threads, const PpapMaskedLogSoftmax* arguments);

struct PpapPixelCrossEntropy {
    const float* logits;       // (B, C, h, w) scores of patches
    const int64_t* target;     // (B, H, W) classes below C; negative: left out
    const int64_t* first_row;  // (H,), ascending: a row of pixels lies between this row of patches and the next
    const float* row_weights;  // (H, 2) of the two; 0 for a next one that is not there
    const float* columns;      // (W, w) weights of the patches of a row for its pixels
    double* loss;              // (B,), written: sums over labelled pixels [nats]
    float* grad;               // (B, C, h, w), written: gradient of the sum of all; or null
    int64_t B, C, h, w, H, W;  // none but B is 0
};

int ppap_pixel_cross_entropy(int isa, int threads, const PpapPixelCrossEntropy* arguments);

// Bits between the patch-major form and public words: int32 (C, ceil(N / 32)), bit k of word w = column 32 w + k.
int ppap_to_public(int threads, const uint8_t* bits, int64_t stride, int64_t C, int64_t N, int32_t* words);
int ppap_from_public(int threads, const int32_t* words, int64_t C, int64_t N, uint8_t* bits, int64_t stride,
                     int64_t* counts);

struct PpapDenseCrf {
    const uint8_t* image;          // (H, W, 3) RGB
    const float* const* scores;    // per map (C, H, W): finite logits
    float* const* q;               // per map (C, H, W): probabilities, written
    const int64_t* classes;        // C of every map
    int64_t H, W, maps, iterations;
    float gaussian_sxy, gaussian_weight;  // [pixels], [nats]; without the kernel where the weight is 0
    float bilateral_sxy, bilateral_srgb, bilateral_weight;  // [pixels], [grey levels], [nats]
};

// Mean-field inference on one image for several maps, one after the other in the calling thread. No vertex of the
// lattice may lie beyond what its key holds: kernels/dense_crf/native_impl.py checks it. At most 2^28 pixels.
int ppap_dense_crf(int isa, const PpapDenseCrf* arguments);
}
#pragma GCC visibility pop
