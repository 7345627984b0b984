// Sums of the keys that bits select, from a list of patches per anchor (Eq. 2): few of them are set.
// Included by kernels.h, inside its namespace.

// to[0..D) += the listed rows times their scale, in order.
static void add_rows(float* to, const float* rows, const float* scale, int64_t D, const std::vector<int32_t>& list) {
    constexpr int WIDE = 8;
    int64_t d = 0;
    for (; d + WIDE * LANES <= D; d += WIDE * LANES) {
        vf sum[WIDE];
#pragma GCC unroll 8
        for (int i = 0; i < WIDE; ++i) sum[i] = load(to + d + i * LANES);
        for (int32_t row : list) {
            const float* from = rows + row * D + d;
            const vf factor = splat(scale ? scale[row] : 1.0f);
#pragma GCC unroll 8
            for (int i = 0; i < WIDE; ++i) sum[i] += load(from + i * LANES) * factor;
        }
#pragma GCC unroll 8
        for (int i = 0; i < WIDE; ++i) store(to + d + i * LANES, sum[i]);
    }
    for (; d < D; ++d) {
        float sum = to[d];
        for (int32_t row : list) sum += rows[row * D + d] * (scale ? scale[row] : 1.0f);
        to[d] = sum;
    }
}

static void mask_sum(int threads, const PpapMaskSum& c) {
    std::memset(c.sums, 0, sizeof(float) * c.C * c.D);
    const int64_t rows = tile_rows(c.D);
    parallel(busy_threads(threads, double(c.N) * c.C / 8), (c.C + 31) / 32, [&](int64_t block) {
        std::vector<int32_t> lists[32];
        const int64_t anchors = std::min<int64_t>(32, c.C - block * 32);
        for (int64_t first = 0; first < c.N; first += rows) {
            const int64_t count = std::min(rows, c.N - first);
            for (auto& list : lists) list.clear();
            for (int64_t row = 0; row < count; ++row) {
                uint32_t word;
                std::memcpy(&word, c.positive + (first + row) * c.stride + block * 4, 4);
                for (; word; word &= word - 1) lists[__builtin_ctz(word)].push_back(static_cast<int32_t>(row));
            }
            for (int64_t a = 0; a < anchors; ++a)
                if (!lists[a].empty())
                    add_rows(c.sums + (block * 32 + a) * c.D, c.keys + first * c.D,
                             c.key_scale ? c.key_scale + first : nullptr, c.D, lists[a]);
        }
    });
}
