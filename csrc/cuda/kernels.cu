// The kernels of the CUDA fallback and their C entry points. Compiled by nvcc, or with -DPPAP_EMULATED -x c++ by a C++
// compiler to be tested without a GPU.
#include "ppap_cuda.h"
#include "tile.cuh"

namespace {

PPAP_DEVICE inline uint32_t bits_of(const uint8_t* bits, int64_t patch, int64_t stride, int64_t anchor) {
    return *reinterpret_cast<const uint32_t*>(bits + patch * stride + anchor / 32 * 4);
}

PPAP_DEVICE inline int count_ones(uint32_t word) {
#ifdef PPAP_EMULATED
    return __builtin_popcount(word);
#else
    return __popc(word);
#endif
}

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
                if (channel + thread < D) sums[(block.y * C + anchor + a) * D + channel + thread] = shared.sums[a][thread];
        });
    }

    PPAP_DEVICE static int lowest(uint32_t word) { return count_ones((word & (0u - word)) - 1u); }
};

// Partial log-sum-exp of a tile of patches (x) and anchors (y): a thread owns an anchor.
template <int P>
struct LogSumExp {
    const float *own, *z, *scale;
    const uint8_t *positive, *kept;
    float *top, *total, *hit;
    int64_t C, N, E, stride;

    struct Shared {
        typename Tile<P>::Shared tile;
    };

    PPAP_DEVICE void operator()(const Block& block, Shared& shared) const {
        constexpr int SIDE = Tile<P>::SIDE;
        const int64_t patch = block.x * SIDE, anchor = block.y * SIDE;
        Tile<P>::product(block, shared.tile, z, N, patch, own, C, anchor, E);
        block.each([&](int thread) {
            if (thread >= SIDE || anchor + thread >= C) return;
            const int bit = thread % 32, rows = static_cast<int>(N - patch < SIDE ? N - patch : SIDE);
            float largest = -infinity(), sum = 0.0f, positives = 0.0f;
            for (int row = 0; row < rows; ++row)
                if (bits_of(kept, patch + row, stride, anchor + thread) >> bit & 1u) {
                    const float x = entry(shared, row, thread);
                    largest = x > largest ? x : largest;
                }
            const float base = largest == -infinity() ? 0.0f : largest;
            for (int row = 0; row < rows; ++row) {
                const float x = entry(shared, row, thread);
                if (bits_of(kept, patch + row, stride, anchor + thread) >> bit & 1u) sum += power_of_two(x - base);
                if (bits_of(positive, patch + row, stride, anchor + thread) >> bit & 1u) positives += x;
            }
            const int64_t at = block.x * C + anchor + thread;
            top[at] = largest, total[at] = sum, hit[at] = positives;
        });
    }

    PPAP_DEVICE float entry(const Shared& shared, int row, int column) const {
        return shared.tile.out[row * Tile<P>::OUT_PITCH + column] * *scale;
    }
};

// Gradient weights of a tile of patches (x) and anchors (y), in the type of the product that follows.
template <int P, class Out>
struct Weights {
    const float *own, *z, *scale, *lse, *share;
    const uint8_t *positive, *kept;
    Out* weights;
    int64_t C, N, E, stride;

    struct Shared {
        typename Tile<P>::Shared tile;
    };

    PPAP_DEVICE void operator()(const Block& block, Shared& shared) const {
        constexpr int SIDE = Tile<P>::SIDE;
        const int64_t patch = block.x * SIDE, anchor = block.y * SIDE;
        Tile<P>::product(block, shared.tile, z, N, patch, own, C, anchor, E);
        block.each([&](int thread) {
            const int column = thread % SIDE;
            if (anchor + column >= C) return;
            const float log_total = lse[anchor + column], part = share[anchor + column];
            for (int row = thread / SIDE; row < SIDE && patch + row < N; row += THREADS / SIDE) {
                const int bit = column % 32;
                float x = shared.tile.out[row * Tile<P>::OUT_PITCH + column] * *scale - log_total;
                x = x > 0.0f ? 0.0f : x;  // a kept logit exceeds the log-sum-exp by rounding alone
                float weight = bits_of(kept, patch + row, stride, anchor + column) >> bit & 1u ? power_of_two(x) : 0.0f;
                if (bits_of(positive, patch + row, stride, anchor + column) >> bit & 1u) weight -= part;
                narrow(weight * 16384.0f, weights[(patch + row) * C + anchor + column]);
            }
        });
    }
};

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
                word |= (static_cast<uint32_t>(words[(block.y * 32 + i) * width + patch / 32]) >> (patch % 32) & 1u) << i;
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

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// The precision that runs here: tensor cores of the fp32 form need sm_80.
int supported(int precision) {
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
int dispatch(int precision, Make&& make) {
    switch (supported(precision)) {
        case FP32: return make(Tile<FP32>{});
        case FP16: return make(Tile<FP16>{});
        case BF16: return make(Tile<BF16>{});
        default: return make(Tile<PLAIN>{});
    }
}

template <class T> struct PrecisionOf;
template <int P> struct PrecisionOf<Tile<P>> { static constexpr int value = P; };

template <int P, class Out>
int run_weights(Stream stream, int64_t grid_x, int64_t grid_y, const float* own, int64_t C, const float* z, int64_t N,
                int64_t E, const float* scale, const uint8_t* positive, const uint8_t* kept, int64_t stride,
                const float* lse, const float* share, void* weights) {
    const Weights<P, Out> kernel{own, z, scale, lse, share, positive, kept, static_cast<Out*>(weights), C, N, E, stride};
    return launch(stream, grid_x, grid_y, kernel);
}

}  // namespace

extern "C" {

int ppap_cuda_abi_version() { return 2; }

const char* ppap_cuda_error(int code) {
#ifdef PPAP_EMULATED
    return code ? "emulated" : "no error";
#else
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}

int64_t ppap_cuda_tile() { return supported(FP16) == PLAIN ? Tile<PLAIN>::SIDE : Tile<FP16>::SIDE; }

int ppap_cuda_similarity(void* stream, int precision, const float* queries, int64_t C, const float* keys, int64_t N,
                         int64_t D, const float* scale, const float* phi, const float* psi, uint8_t* positive,
                         uint8_t* kept, int64_t stride, int64_t* num_positive, int64_t* num_kept) {
    return dispatch(precision, [&](auto tile) {
        using T = decltype(tile);
        const Similarity<PrecisionOf<T>::value> kernel{queries,      keys,     scale, phi, psi, positive, kept,
                                                       num_positive, num_kept, C,     N,   D,   stride};
        return launch(static_cast<Stream>(stream), blocks(N, T::SIDE), blocks(C, T::SIDE), kernel);
    });
}

int ppap_cuda_mask_sum(void* stream, const uint8_t* positive, int64_t stride, int64_t C, const float* keys, int64_t N,
                       int64_t D, int64_t parts, float* sums) {
    const MaskSum kernel{positive, keys, sums, stride, C, N, D, parts};
    return launch(static_cast<Stream>(stream), blocks(C, 32) * blocks(D, THREADS), parts, kernel);
}

int ppap_cuda_log_sum_exp(void* stream, int precision, const float* z_anchors, int64_t C, const float* z, int64_t N,
                          int64_t E, const float* scale, const uint8_t* positive, const uint8_t* kept, int64_t stride,
                          float* top, float* total, float* hit) {
    return dispatch(precision, [&](auto tile) {
        using T = decltype(tile);
        const LogSumExp<PrecisionOf<T>::value> kernel{z_anchors, z,   scale, positive, kept, top,
                                                      total,     hit, C,     N,        E,    stride};
        return launch(static_cast<Stream>(stream), blocks(N, T::SIDE), blocks(C, T::SIDE), kernel);
    });
}

int ppap_cuda_weights(void* stream, int precision, const float* z_anchors, int64_t C, const float* z, int64_t N,
                      int64_t E, const float* scale, const uint8_t* positive, const uint8_t* kept, int64_t stride,
                      const float* lse, const float* share, void* weights) {
    return dispatch(precision, [&](auto tile) {
        using T = decltype(tile);
        constexpr int P = PrecisionOf<T>::value;
        auto run = [&](auto out) {
            return run_weights<P, decltype(out)>(static_cast<Stream>(stream), blocks(N, T::SIDE), blocks(C, T::SIDE),
                                                 z_anchors, C, z, N, E, scale, positive, kept, stride, lse, share, weights);
        };
        if (precision == FP16) return run(half_t{});
        if (precision == BF16) return run(bfloat_t{});
        return run(float{});
    });
}

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
