// Bits between the patch-major form and public words.
#include "bits.cuh"
#include "ppap_cuda.h"

namespace {

// 32 patches (x) by 32 anchors (y) of bits from one layout to the other; a thread makes one word.
struct ToPublic {
    const uint8_t* bits;
    int32_t* words;
    int64_t stride, C, N;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        const int64_t width = (N + 31) / 32;
        block.each([&](int thread) {
            const int64_t anchor = block.y * THREADS + thread;
            if (anchor >= C) return;
            uint32_t word = 0;
            for (int i = 0; i < 32 && block.x * 32 + i < N; ++i)
                word |= (bits_of(bits, block.x * 32 + i, stride, anchor) >> (anchor % 32) & 1u) << i;
            words[anchor * width + block.x] = static_cast<int32_t>(word);
        });
    }
};

struct FromPublic {
    const int32_t* words;
    uint8_t* bits;
    int64_t stride, C, N;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        const int64_t width = (N + 31) / 32, per_row = stride / 4;
        block.each([&](int thread) {
            const int64_t patch = block.x * THREADS + thread;
            if (patch >= N) return;
            uint32_t word = 0;
            for (int64_t i = 0; i < 32 && block.y * 32 + i < C; ++i)
                word |= (static_cast<uint32_t>(words[(block.y * 32 + i) * width + patch / 32]) >> (patch % 32) & 1u)
                        << i;
            reinterpret_cast<uint32_t*>(bits)[patch * per_row + block.y] = word;
        });
    }
};

struct CountWords {
    const int32_t* words;
    int64_t* counts;
    int64_t C, N;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        const int64_t width = (N + 31) / 32;
        block.each([&](int thread) {
            const int64_t anchor = block.x * THREADS + thread;
            if (anchor >= C) return;
            int64_t count = 0;
            for (int64_t w = 0; w < width; ++w) {
                // Bits past the last column are dropped, as above.
                const uint32_t valid = 32 * w + 32 <= N ? ~0u : (1u << (N - 32 * w)) - 1u;
                count += count_ones(static_cast<uint32_t>(words[anchor * width + w]) & valid);
            }
            counts[anchor] = count;
        });
    }
};

}  // namespace

extern "C" {

int ppap_cuda_to_public(void* stream, const uint8_t* bits, int64_t stride, int64_t C, int64_t N, int32_t* words) {
    return launch(static_cast<Stream>(stream), blocks(N, 32), blocks(C, THREADS), ToPublic{bits, words, stride, C, N});
}

int ppap_cuda_from_public(void* stream, const int32_t* words, int64_t C, int64_t N, uint8_t* bits, int64_t stride,
                          int64_t* counts) {
    const int error =
        launch(static_cast<Stream>(stream), blocks(N, THREADS), stride / 4, FromPublic{words, bits, stride, C, N});
    if (error) return error;
    return launch(static_cast<Stream>(stream), blocks(C, THREADS), 1, CountWords{words, counts, C, N});
}
}
