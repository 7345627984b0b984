// Cosines of patches and anchors, compared with thresholds as they leave the product: bits and counts (Eq. 1, 6, 7).
#include "bits.cuh"
#include "ppap_cuda.h"
#include "precision.cuh"

namespace {

// Similarities of a tile of patches (x) and anchors (y), compared and packed: a thread makes whole words.
template <int P>
struct Similarity {
    const float *queries, *keys, *scale, *phi, *psi;
    uint8_t *positive, *kept;
    int64_t *num_positive, *num_kept;
    int64_t C, N, D, stride;

    struct Shared {
        typename Tile<P>::Shared tile;
        int counts[2][Tile<P>::SIDE];
    };

    PPAP_DEVICE void operator()(const Block& block, Shared& shared) const {
        constexpr int SIDE = Tile<P>::SIDE, WORDS = SIDE / 32;
        const int64_t patch = block.x * SIDE, anchor = block.y * SIDE;
        Tile<P>::product(block, shared.tile, keys, N, patch, queries, C, anchor, D);
        block.each([&](int thread) {
            for (int at = thread; at < 2 * SIDE; at += THREADS) shared.counts[at / SIDE][at % SIDE] = 0;
        });
        block.each([&](int thread) {
            for (int at = thread; at < SIDE * WORDS; at += THREADS) {
                const int row = at % SIDE, word = at / SIDE;
                if (patch + row < N && anchor + 32 * word < C) pack(shared, patch + row, anchor, row, word);
            }
        });
        block.each([&](int thread) {
            if (thread >= SIDE || anchor + thread >= C) return;
            if (phi) add_count(num_positive + anchor + thread, shared.counts[0][thread]);
            if (kept) add_count(num_kept + anchor + thread, shared.counts[1][thread]);
        });
    }

    PPAP_DEVICE void pack(Shared& shared, int64_t patch, int64_t anchor, int row, int word) const {
        uint32_t above = 0, either = 0;
        const int64_t at = patch * stride + (anchor / 32 + word) * 4;
        if (!phi) above = *reinterpret_cast<const uint32_t*>(positive + at);
        for (int i = 0; i < 32 && anchor + 32 * word + i < C; ++i) {
            const int column = 32 * word + i;
            const float sim = shared.tile.out[row * Tile<P>::OUT_PITCH + column] * *scale;
            if (phi && sim > phi[anchor + column]) {
                above |= 1u << i;
                add_count(&shared.counts[0][column], 1);
            }
            if (kept && ((above >> i & 1u) || sim < psi[anchor + column])) {
                either |= 1u << i;
                add_count(&shared.counts[1][column], 1);
            }
        }
        if (phi) *reinterpret_cast<uint32_t*>(positive + at) = above;
        if (kept) *reinterpret_cast<uint32_t*>(kept + at) = either;
    }
};

}  // namespace

extern "C" {

int ppap_cuda_relation_masks(void* stream, int precision, const float* queries, int64_t C, const float* keys, int64_t N,
                             int64_t D, const float* scale, const float* phi, const float* psi, uint8_t* positive,
                             uint8_t* kept, int64_t stride, int64_t* num_positive, int64_t* num_kept) {
    return dispatch(precision, [&](auto tile) {
        using T = decltype(tile);
        const Similarity<PrecisionOf<T>::value> kernel{queries,      keys,     scale, phi, psi, positive, kept,
                                                       num_positive, num_kept, C,     N,   D,   stride};
        return launch(static_cast<Stream>(stream), blocks(N, T::SIDE), blocks(C, T::SIDE), kernel);
    });
}
}
