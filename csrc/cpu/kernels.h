// The CPU kernels, written once and compiled per instruction set: define PPAP_ISA, PPAP_LANES and PPAP_ROWS, then
// include. A register tile is PPAP_ROWS patches by two vectors of anchors (or channels); anchors lie in lanes, so
// that thresholds, masks, exponentials and row sums need nothing across lanes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels_table.h"
#include "ppap_cpu.h"
#include "threads.h"

namespace ppap::PPAP_ISA {

#include "simd.inc"

#include "lines.inc"

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
// Rows of a panel that are asked for before they are needed: 4 to 16 made a product of 384 channels 6 % faster on an
// Intel Xeon whose first cache a panel overfills, and differ by less than a hundredth.
constexpr int64_t AHEAD = 8;

// Left operands of a product, of float or of uint32_t for pairs of bf16: rows as they lie, or as pack_columns leaves
// them.
template <class T>
struct RowMajor {
    const T* at;
    int64_t width;

    RowMajor from(int64_t row) const { return {at + row * width, width}; }
    inline T operator[](int i) const { return at[i * width]; }
    inline void next() { ++at; }
};

template <class T>
struct Tiled {
    const T* at;
    int64_t depth;

    Tiled from(int64_t row) const { return {at + row * depth, depth}; }  // of whole tiles
    inline T operator[](int i) const { return at[i]; }
    inline void next() { at += ROWS; }
};

// Register tile: the sum over k of left[i] at k times right[k][lane], as rows of a panel. It is a function of its own,
// so that what is done with the sums takes no register from them. A panel is often larger than the first cache, and
// what of it comes next is asked for in time.
template <int R, class Left, class T>
[[gnu::noinline]] static void register_tile(Left left, const T* right, int64_t depth, float* out) {
    vf sum[R][2];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = vf{};
    for (int64_t k = 0; k < depth; ++k) {
        const auto b0 = load(right), b1 = load(right + LANES);
#pragma GCC unroll 2
        for (int line = 0; line < PANEL; line += 16) __builtin_prefetch(right + AHEAD * PANEL + line);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const auto a = splat(left[i]);
            add_product(sum[i][0], a, b0);
            add_product(sum[i][1], a, b1);
        }
        left.next();
        right += PANEL;
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) store(out + i * PANEL, sum[i][0]), store(out + i * PANEL + LANES, sum[i][1]);
}

// The same for fewer rows than a full tile.
template <int R, class Left, class T>
static void last_rows(int64_t rows, Left left, const T* right, int64_t depth, float* out) {
    if constexpr (R > 0) {
        if (rows == R)
            register_tile<R>(left, right, depth, out);
        else
            last_rows<R - 1>(rows, left, right, depth, out);
    }
}

// finish(row, two vectors) for every row of a column of register tiles.
template <class Left, class T, class Finish>
static inline void row_tiles(int64_t rows, Left left, const T* right, int64_t depth, Finish&& finish) {
    alignas(64) float sums[ROWS * PANEL];
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int64_t here = std::min<int64_t>(ROWS, rows - row);
        if (here == ROWS)
            register_tile<ROWS>(left.from(row), right, depth, sums);
        else
            last_rows<ROWS - 1>(here, left.from(row), right, depth, sums);
        for (int64_t i = 0; i < here; ++i) finish(row + i, load(sums + i * PANEL), load(sums + i * PANEL + LANES));
    }
}

static int64_t panels_of(int64_t count) { return (count + PANEL - 1) / PANEL; }

// Rows (count, depth) times factor as panels [panel][depth][PANEL]; missing rows are 0.
static Lines<float> pack_rows(const float* rows, int64_t count, int64_t depth, float factor) {
    Lines<float> packed(panels_of(count) * depth * PANEL, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
        float* to = packed.data() + i / PANEL * depth * PANEL + i % PANEL;
        for (int64_t k = 0; k < depth; ++k) to[k * PANEL] = rows[i * depth + k] * factor;
    }
    return packed;
}

// The same as pairs: [panel][pairs of depth][PANEL].
static Lines<uint32_t> pack_pair_rows(const float* rows, int64_t count, int64_t depth, float factor) {
    const int64_t length = pairs_of(depth);
    Lines<uint32_t> packed(panels_of(count) * length * PANEL, 0u), row(length);
    for (int64_t i = 0; i < count; ++i) {
        pack_pairs(rows + i * depth, depth, factor, row.data());
        uint32_t* to = packed.data() + i / PANEL * length * PANEL + i % PANEL;
        for (int64_t k = 0; k < length; ++k) to[k * PANEL] = row[k];
    }
    return packed;
}

// A bound of the L2 norm of values times factor, but for its rounding: squares too small to be seen count as 1e-36.
static float norm(const float* values, int64_t count, float factor) {
    vf lanes = splat(0.0f);
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) {
        const vf scaled = load(values + k) * factor;
        lanes += scaled * scaled;
    }
    float sum = 1e-36f;
    for (int i = 0; i < LANES; ++i) sum += lanes[i];
    for (; k < count; ++k) sum += (values[k] * factor) * (values[k] * factor);
    return std::sqrt(sum);
}

// Values (count,), padded to whole panels.
static Lines<float> padded(const float* values, int64_t count, float filling) {
    Lines<float> out(panels_of(count) * PANEL, filling);
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

static void pack_rows_of_pairs(int threads, const PpapPackPairs& c) {
    const int64_t rows = tile_rows(c.D);
    parallel(busy_threads(threads, double(c.N) * c.D), (c.N + rows - 1) / rows, [&](int64_t part) {
        for (int64_t row = part * rows; row < std::min((part + 1) * rows, c.N); ++row) {
            const float* from = c.rows + row * c.D;
            const float scale = c.scale ? c.scale[row] : 1.0f;
            pack_pairs(from, c.D, scale, c.pairs + row * pairs_of(c.D));
            if (c.norms) c.norms[row] = norm(from, c.D, scale);
        }
    });
}

#include "relation_masks.inc"

#include "proxy_average.inc"

#include "masked_log_softmax.inc"

#include "pixel_cross_entropy.inc"

const KernelTable table = {
    PAIRS, pack_rows_of_pairs, relation_masks, proxy_average, masked_log_softmax, pixel_cross_entropy, tile_rows};

}  // namespace ppap::PPAP_ISA
