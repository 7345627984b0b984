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

#include "simd.h"

constexpr int ROWS = PPAP_ROWS;
constexpr int PANEL = 2 * LANES;
constexpr int64_t TILE_BYTES = 160 << 10;  // of a tile of patches: it stays in the second cache over all panels
constexpr int64_t DEPTH = 128;             // patches per step of the products over patches

// Register tile: sum over k of left[i * row_step + k * depth_step] * right[k * right_step + lane].
template <int R, class Finish>
static inline void register_tile(const float* left, int64_t row_step, int64_t depth_step, const float* right,
                                 int64_t right_step, int64_t depth, Finish&& finish) {
    vf sum[R][2];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = vf{};
    for (int64_t k = 0; k < depth; ++k) {
        vf b0 = load(right), b1 = load(right + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            vf a = splat(left[i * row_step]);
            sum[i][0] += a * b0;
            sum[i][1] += a * b1;
        }
        left += depth_step;
        right += right_step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) finish(i, sum[i][0], sum[i][1]);
}

// The same for fewer rows than a full tile.
template <int R, class Finish>
static void last_rows(int64_t rows, const float* left, int64_t row_step, int64_t depth_step, const float* right,
                      int64_t right_step, int64_t depth, Finish&& finish) {
    if constexpr (R > 0) {
        if (rows == R)
            register_tile<R>(left, row_step, depth_step, right, right_step, depth, finish);
        else
            last_rows<R - 1>(rows, left, row_step, depth_step, right, right_step, depth, finish);
    }
}

// finish(row, two vectors) for every row of a column of register tiles.
template <class Finish>
static inline void row_tiles(int64_t rows, const float* left, int64_t row_step, int64_t depth_step,
                             const float* right, int64_t right_step, int64_t depth, Finish&& finish) {
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

constexpr uint32_t LOW = (LANES == 32) ? ~0u : (1u << LANES) - 1;

static void add_counts(const std::vector<int32_t>& parts, int64_t tiles, int64_t width, int64_t C, int64_t* counts) {
    for (int64_t a = 0; a < C; ++a) counts[a] = 0;
    for (int64_t t = 0; t < tiles; ++t)
        for (int64_t a = 0; a < C; ++a) counts[a] += parts[t * width + a];
}

static void similarity(int threads, const float* queries, int64_t C, const float* keys, int64_t N, int64_t D,
                       const float* phi, const float* psi, uint8_t* positive, uint8_t* kept, int64_t stride,
                       int64_t* num_positive, int64_t* num_kept) {
    const std::vector<float> packed = pack_rows(queries, C, D, 1.0f);
    // Lanes past the last anchor: nothing is above inf or below -inf.
    const std::vector<float> above = padded(phi, C, INFINITY), below = padded(psi, C, -INFINITY);
    const int64_t rows = tile_rows(D), tiles = (N + rows - 1) / rows, panels = panels_of(C), width = panels * PANEL;
    std::vector<int32_t> positive_parts(phi ? tiles * width : 0), kept_parts(kept ? tiles * width : 0);
    parallel(busy_threads(threads, double(N) * D * C), tiles, [&](int64_t tile) {
        const int64_t first = tile * rows, count = std::min(rows, N - first);
        for (int64_t row = first; row < first + count; ++row) {
            if (phi) std::memset(positive + row * stride, 0, stride);
            if (kept) std::memset(kept + row * stride, 0, stride);
        }
        for (int64_t panel = 0; panel < panels; ++panel) {
            const vf up0 = load(&above[panel * PANEL]), up1 = load(&above[panel * PANEL + LANES]);
            const vf low0 = load(&below[panel * PANEL]), low1 = load(&below[panel * PANEL + LANES]);
            vi p0{}, p1{}, k0{}, k1{};
            row_tiles(count, keys + first * D, D, 1, &packed[panel * D * PANEL], PANEL, D,
                      [&](int64_t row, vf s0, vf s1) {
                          uint8_t* out = positive + (first + row) * stride;
                          uint32_t bits;
                          if (phi) {
                              bits = greater(s0, up0) | greater(s1, up1) << LANES;
                              write_bits(out, panel, bits);
                              p0 -= s0 > up0;
                              p1 -= s1 > up1;
                          } else {
                              bits = read_bits(out, panel);
                          }
                          if (kept) {
                              bits |= greater(low0, s0) | greater(low1, s1) << LANES;
                              write_bits(kept + (first + row) * stride, panel, bits);
                              const vf one = reinterpret_cast<vf>(vi{} + 1);
                              k0 += reinterpret_cast<vi>(where(bits & LOW, one));
                              k1 += reinterpret_cast<vi>(where(bits >> LANES, one));
                          }
                      });
            for (int i = 0; i < LANES; ++i) {
                const int64_t at = tile * width + panel * PANEL + i;
                if (phi) positive_parts[at] = p0[i], positive_parts[at + LANES] = p1[i];
                if (kept) kept_parts[at] = k0[i], kept_parts[at + LANES] = k1[i];
            }
        }
    });
    if (phi) add_counts(positive_parts, tiles, width, C, num_positive);
    if (kept) add_counts(kept_parts, tiles, width, C, num_kept);
}

// to[0..D) += the listed rows, in order.
static void add_rows(float* to, const float* rows, int64_t D, const std::vector<int32_t>& list) {
    constexpr int WIDE = 8;
    int64_t d = 0;
    for (; d + WIDE * LANES <= D; d += WIDE * LANES) {
        vf sum[WIDE];
#pragma GCC unroll 8
        for (int i = 0; i < WIDE; ++i) sum[i] = load(to + d + i * LANES);
        for (int32_t row : list) {
            const float* from = rows + row * D + d;
#pragma GCC unroll 8
            for (int i = 0; i < WIDE; ++i) sum[i] += load(from + i * LANES);
        }
#pragma GCC unroll 8
        for (int i = 0; i < WIDE; ++i) store(to + d + i * LANES, sum[i]);
    }
    for (; d < D; ++d) {
        float sum = to[d];
        for (int32_t row : list) sum += rows[row * D + d];
        to[d] = sum;
    }
}

static void mask_sum(int threads, const uint8_t* positive, int64_t stride, int64_t C, const float* keys, int64_t N,
                     int64_t D, float* sums) {
    std::memset(sums, 0, sizeof(float) * C * D);
    const int64_t rows = tile_rows(D);
    parallel(busy_threads(threads, double(N) * C / 8), (C + 31) / 32, [&](int64_t block) {
        std::vector<int32_t> lists[32];
        const int64_t anchors = std::min<int64_t>(32, C - block * 32);
        for (int64_t first = 0; first < N; first += rows) {
            const int64_t count = std::min(rows, N - first);
            for (auto& list : lists) list.clear();
            for (int64_t row = 0; row < count; ++row) {
                uint32_t word;
                std::memcpy(&word, positive + (first + row) * stride + block * 4, 4);
                for (; word; word &= word - 1) lists[__builtin_ctz(word)].push_back(static_cast<int32_t>(row));
            }
            for (int64_t a = 0; a < anchors; ++a)
                if (!lists[a].empty()) add_rows(sums + (block * 32 + a) * D, keys + first * D, D, lists[a]);
        }
    });
}

#include "contrast.h"

const KernelTable table = {similarity, mask_sum, contrast};

}  // namespace ppap::PPAP_ISA
