// The CPU kernels, written once and compiled per instruction set: define PPAP_ISA, PPAP_LANES and PPAP_ROWS, then
// include. A register tile is PPAP_ROWS patches by two vectors of anchors (or channels); anchors lie in lanes, so
// that thresholds, masks, exponentials and row sums need nothing across lanes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels_table.h"
#include "ppap_cpu.h"
#include "threads.h"

namespace ppap::PPAP_ISA {

#include "simd.inc"

#include "pairs.inc"

#ifdef PPAP_PAIRS
constexpr bool PAIRS = true;  // products of bf16 pairs are faster than those of float32
#else
constexpr bool PAIRS = false;
#endif

constexpr int ROWS = PPAP_ROWS;
constexpr int PANEL = 2 * LANES;
static_assert(PADDING % PANEL == 0, "padded rows are whole panels");
constexpr int64_t TILE_BYTES = 160 << 10;  // of a tile of patches: it stays in the second cache over all panels
constexpr int64_t DEPTH = 128;             // patches per step of the products over patches

// Register tile: sum over k of left[i * row_step + k * depth_step] * right[k * right_step + lane].
// T is float, or uint32_t for pairs of bf16.
template <int R, class T, class Finish>
static inline void register_tile(const T* left, int64_t row_step, int64_t depth_step, const T* right,
                                 int64_t right_step, int64_t depth, Finish&& finish) {
    vf sum[R][2];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = vf{};
    for (int64_t k = 0; k < depth; ++k) {
        const auto b0 = load(right), b1 = load(right + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const auto a = splat(left[i * row_step]);
            add_product(sum[i][0], a, b0);
            add_product(sum[i][1], a, b1);
        }
        left += depth_step;
        right += right_step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) finish(i, sum[i][0], sum[i][1]);
}

// The same for fewer rows than a full tile.
template <int R, class T, class Finish>
static void last_rows(int64_t rows, const T* left, int64_t row_step, int64_t depth_step, const T* right,
                      int64_t right_step, int64_t depth, Finish&& finish) {
    if constexpr (R > 0) {
        if (rows == R)
            register_tile<R>(left, row_step, depth_step, right, right_step, depth, finish);
        else
            last_rows<R - 1>(rows, left, row_step, depth_step, right, right_step, depth, finish);
    }
}

// finish(row, two vectors) for every row of a column of register tiles.
template <class T, class Finish>
static inline void row_tiles(int64_t rows, const T* left, int64_t row_step, int64_t depth_step, const T* right,
                             int64_t right_step, int64_t depth, Finish&& finish) {
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) {
        auto at = [&](int i, vf a, vf b) { finish(row + i, a, b); };
        register_tile<ROWS>(left + row * row_step, row_step, depth_step, right, right_step, depth, at);
    }
    auto at = [&](int i, vf a, vf b) { finish(row + i, a, b); };
    last_rows<ROWS - 1>(rows - row, left + row * row_step, row_step, depth_step, right, right_step, depth, at);
}

static int64_t panels_of(int64_t count) { return (count + PANEL - 1) / PANEL; }

// Rows (count, depth) times factor as panels [panel][depth][PANEL]; missing rows are 0.
static std::vector<float> pack_rows(const float* rows, int64_t count, int64_t depth, float factor) {
    std::vector<float> packed(panels_of(count) * depth * PANEL, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
        float* to = packed.data() + i / PANEL * depth * PANEL + i % PANEL;
        for (int64_t k = 0; k < depth; ++k) to[k * PANEL] = rows[i * depth + k] * factor;
    }
    return packed;
}

// The same as pairs: [panel][pairs of depth][PANEL].
static std::vector<uint32_t> pack_pair_rows(const float* rows, int64_t count, int64_t depth, float factor) {
    const int64_t length = pairs_of(depth);
    std::vector<uint32_t> packed(panels_of(count) * length * PANEL, 0u), row(length);
    for (int64_t i = 0; i < count; ++i) {
        pack_pairs(rows + i * depth, depth, factor, row.data());
        uint32_t* to = packed.data() + i / PANEL * length * PANEL + i % PANEL;
        for (int64_t k = 0; k < length; ++k) to[k * PANEL] = row[k];
    }
    return packed;
}

// A bound of the L2 norm of values times factor, but for its rounding: squares too small to be seen count as 1e-36.
static float norm(const float* values, int64_t count, float factor) {
    float sum = 1e-36f;
    for (int64_t k = 0; k < count; ++k) sum += (values[k] * factor) * (values[k] * factor);
    return std::sqrt(sum);
}

// Values (count,), padded to whole panels.
static std::vector<float> padded(const float* values, int64_t count, float filling) {
    std::vector<float> out(panels_of(count) * PANEL, filling);
    if (values) std::copy(values, values + count, out.begin());
    return out;
}

static int64_t tile_rows(int64_t width) {
    return std::max<int64_t>(ROWS, TILE_BYTES / (4 * std::max<int64_t>(width, 1)) / ROWS * ROWS);
}

static inline uint32_t read_bits(const uint8_t* bits, int64_t panel) {
    uint32_t word = 0;
    std::memcpy(&word, bits + panel * (PANEL / 8), PANEL / 8);
    return word;
}

static inline void write_bits(uint8_t* bits, int64_t panel, uint32_t word) {
    std::memcpy(bits + panel * (PANEL / 8), &word, PANEL / 8);
}

#include "relation_masks.inc"

#include "proxy_average.inc"

#include "masked_log_softmax.inc"

#include "pixel_cross_entropy.inc"

const KernelTable table = {relation_masks, proxy_average, masked_log_softmax, pixel_cross_entropy, tile_rows};

}  // namespace ppap::PPAP_ISA
