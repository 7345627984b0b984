// Sums of the keys that bits select (Eq. 2).
#include "bits.cuh"
#include "ppap_cuda.h"

namespace {

// Sums of the selected keys of 32 anchors (x) and 256 channels over part y of the patches; patches in their order.
struct MaskSum {
    const uint8_t* positive;
    const float* keys;
    float* sums;
    int64_t stride, C, N, D, parts;

    struct Shared {
        float sums[32][THREADS];
        uint32_t words[THREADS];
    };

    PPAP_DEVICE void operator()(const Block& block, Shared& shared) const {
        const int64_t blocks = (C + 31) / 32, channel = block.x / blocks * THREADS, anchor = block.x % blocks * 32;
        const int64_t per_part = (N + parts - 1) / parts, first = block.y * per_part;
        const int64_t last = first + per_part < N ? first + per_part : N;
        block.each([&](int thread) {
            for (int a = 0; a < 32; ++a) shared.sums[a][thread] = 0.0f;
        });
        for (int64_t from = first; from < last; from += THREADS) {
            block.each([&](int thread) {
                const int64_t patch = from + thread;
                shared.words[thread] = patch < last ? bits_of(positive, patch, stride, anchor) : 0u;
            });
            block.each([&](int thread) {
                if (channel + thread >= D) return;
                for (int i = 0; i < THREADS; ++i) {
                    uint32_t word = shared.words[i];
                    if (!word) continue;
                    const float value = keys[(from + i) * D + channel + thread];
                    for (; word; word &= word - 1) shared.sums[lowest(word)][thread] += value;
                }
            });
        }
        block.each([&](int thread) {
            for (int a = 0; a < 32 && anchor + a < C; ++a)
                if (channel + thread < D)
                    sums[(block.y * C + anchor + a) * D + channel + thread] = shared.sums[a][thread];
        });
    }

    PPAP_DEVICE static int lowest(uint32_t word) { return count_ones((word & (0u - word)) - 1u); }
};

}  // namespace

extern "C" {

int ppap_cuda_proxy_average(void* stream, const uint8_t* positive, int64_t stride, int64_t C, const float* keys,
                            int64_t N, int64_t D, int64_t parts, float* sums) {
    const MaskSum kernel{positive, keys, sums, stride, C, N, D, parts};
    return launch(static_cast<Stream>(stream), blocks(C, 32) * blocks(D, THREADS), parts, kernel);
}
}
