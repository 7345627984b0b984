// Eq. 8 over a chunk of anchors: partial log-sum-exps by tiles, then the gradient's weights.
#include "bits.cuh"
#include "ppap_cuda.h"
#include "precision.cuh"

namespace {

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

template <int P, class Out>
int run_weights(Stream stream, int64_t grid_x, int64_t grid_y, const float* own, int64_t C, const float* z, int64_t N,
                int64_t E, const float* scale, const uint8_t* positive, const uint8_t* kept, int64_t stride,
                const float* lse, const float* share, void* weights) {
    const Weights<P, Out> kernel{own, z, scale, lse,   share, positive, kept, static_cast<Out*>(weights),
                                 C,   N, E,     stride};
    return launch(stream, grid_x, grid_y, kernel);
}

}  // namespace

extern "C" {

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
                                                 z_anchors, C, z, N, E, scale, positive, kept, stride, lse, share,
                                                 weights);
        };
        if (precision == FP16) return run(half_t{});
        if (precision == BF16) return run(bfloat_t{});
        return run(float{});
    });
}
}
