// Cosines of anchors' queries with all patches, compared with thresholds as they leave the registers: bits and counts.
// Where the instruction set multiplies bf16, cosines are screened: formed of operands rounded to bf16 first, and again
// in float32 where the thresholds lie within the error that the rounding can make. So the bits are those of float32.
// Included by kernels.h, inside its namespace.

// q . k of operands rounded to bf16, and the same in float32, differ by at most this times |q| |k|: a bf16 has 8 binary
// digits, so that each operand is off by up to 2^-8 of itself and a product by 2^-7 + 2^-16; sums of D products by
// D 2^-24 in either; with some room for the rounding of the norms themselves.
static float screening_error(int64_t D) {
    return 1.01f * (1.0f / 128 + 1.0f / 65536 + (3.0f * static_cast<float>(D) + 16.0f) / 16777216.0f);
}

// Thresholds, bits and counts of a panel of anchors.
struct PanelBits {
    const PpapSimilarity& c;
    const int64_t panel;
    const vf up0, up1, low0, low1;
    vi p0{}, p1{}, k0{}, k1{};

    PanelBits(const PpapSimilarity& c, int64_t panel, const std::vector<float>& above, const std::vector<float>& below)
        : c(c), panel(panel), up0(load(&above[panel * PANEL])), up1(load(&above[panel * PANEL + LANES])),
          low0(load(&below[panel * PANEL])), low1(load(&below[panel * PANEL + LANES])) {}

    // Write and count the bits of one patch with cosines s0, s1.
    inline void judge(int64_t patch, vf s0, vf s1) {
        uint8_t* out = c.positive + patch * c.stride;
        uint32_t bits;
        if (c.phi) {
            bits = greater(s0, up0) | greater(s1, up1) << LANES;
            write_bits(out, panel, bits);
            p0 -= s0 > up0;
            p1 -= s1 > up1;
        } else {
            bits = read_bits(out, panel);
        }
        if (c.kept) {
            bits |= greater(low0, s0) | greater(low1, s1) << LANES;
            write_bits(c.kept + patch * c.stride, panel, bits);
            const vf one = reinterpret_cast<vf>(vi{} + 1);
            k0 += reinterpret_cast<vi>(where(bits & LOW, one));
            k1 += reinterpret_cast<vi>(where(bits >> LANES, one));
        }
    }

    // Whether every threshold in use is farther from s0, s1 than the error of screening. A NaN is not.
    inline bool decided(vf s0, vf s1, vf error0, vf error1) const {
        uint32_t sure = ~0u;
        if (c.phi) sure &= greater(magnitude(s0 - up0), error0) | greater(magnitude(s1 - up1), error1) << LANES;
        if (c.kept) sure &= greater(magnitude(s0 - low0), error0) | greater(magnitude(s1 - low1), error1) << LANES;
        return (sure & LOW) == LOW && (sure >> LANES & LOW) == LOW;
    }

    void store_counts(int32_t* positive, int32_t* kept) const {
        for (int i = 0; i < LANES; ++i) {
            if (c.phi) positive[i] = p0[i], positive[i + LANES] = p1[i];
            if (c.kept) kept[i] = k0[i], kept[i + LANES] = k1[i];
        }
    }
};

// Queries as panels, in float32 and, with bf16 products, as pairs with a bound of the error per unit of a key's norm.
struct PackedQueries {
    std::vector<float> rows, error;
    std::vector<uint32_t> pairs;

    explicit PackedQueries(const PpapSimilarity& c) : rows(pack_rows(c.queries, c.C, c.D, 1.0f)) {
        if (!PAIRS) return;
        pairs = pack_pair_rows(c.queries, c.C, c.D, 1.0f);
        error.assign(panels_of(c.C) * PANEL, 0.0f);
        if (c.bf16) return;
        for (int64_t a = 0; a < c.C; ++a) error[a] = screening_error(c.D) * norm(c.queries + a * c.D, c.D, 1.0f);
    }
};

// A tile of patches as pairs, and what a thread keeps of those that have to be formed again.
struct PackedTile {
    std::vector<uint32_t> pairs;
    std::vector<float> norms, rows;
    std::vector<int64_t> unsure;

    void fill(const PpapSimilarity& c, int64_t first, int64_t count) {
        pairs.resize(count * pairs_of(c.D)), norms.resize(count), unsure.resize(count);
        for (int64_t row = 0; row < count; ++row) {
            const float* key = c.keys + (first + row) * c.D;
            const float scale = c.key_scale ? c.key_scale[first + row] : 1.0f;
            pack_pairs(key, c.D, scale, &pairs[row * pairs_of(c.D)]);
            norms[row] = c.bf16 ? 0.0f : norm(key, c.D, scale);  // bf16 decides alone: never unsure
        }
    }
};

static inline void judge_tile(const PpapSimilarity& c, const PackedQueries& queries, int64_t first, int64_t count,
                              PanelBits& bits) {
    row_tiles(count, c.keys + first * c.D, c.D, 1, &queries.rows[bits.panel * c.D * PANEL], PANEL, c.D,
              [&](int64_t row, vf s0, vf s1) {
                  const vf scale = splat(c.key_scale ? c.key_scale[first + row] : 1.0f);
                  bits.judge(first + row, s0 * scale, s1 * scale);
              });
}

static inline void judge_tile_screened(const PpapSimilarity& c, const PackedQueries& queries, int64_t first,
                                       int64_t count, PackedTile& tile, PanelBits& bits) {
    const int64_t depth = pairs_of(c.D), panel = bits.panel;
    const vf error0 = load(&queries.error[panel * PANEL]), error1 = load(&queries.error[panel * PANEL + LANES]);
    // No call between the rows of a register tile: it would push the sums out of their registers.
    int64_t* unsure = tile.unsure.data();
    int64_t left = 0;
    row_tiles(count, tile.pairs.data(), depth, 1, &queries.pairs[panel * depth * PANEL], PANEL, depth,
              [&](int64_t row, vf s0, vf s1) {
                  const vf length = splat(tile.norms[row]), tiny = splat(1e-30f);
                  if (c.bf16 || bits.decided(s0, s1, error0 * length + tiny, error1 * length + tiny))
                      bits.judge(first + row, s0, s1);
                  else
                      unsure[left++] = first + row;
              });
    if (!left) return;
    tile.rows.resize(count * c.D);
    for (int64_t i = 0; i < left; ++i) std::copy_n(c.keys + unsure[i] * c.D, c.D, &tile.rows[i * c.D]);
    row_tiles(left, tile.rows.data(), c.D, 1, &queries.rows[panel * c.D * PANEL], PANEL, c.D,
              [&](int64_t row, vf s0, vf s1) {
                  const vf scale = splat(c.key_scale ? c.key_scale[unsure[row]] : 1.0f);
                  bits.judge(unsure[row], s0 * scale, s1 * scale);
              });
}

static void add_counts(const std::vector<int32_t>& parts, int64_t tiles, int64_t width, int64_t C, int64_t* counts) {
    for (int64_t a = 0; a < C; ++a) counts[a] = 0;
    for (int64_t t = 0; t < tiles; ++t)
        for (int64_t a = 0; a < C; ++a) counts[a] += parts[t * width + a];
}

static void similarity(int threads, const PpapSimilarity& c) {
    const PackedQueries queries(c);
    // Lanes past the last anchor: nothing is above inf or below -inf.
    const std::vector<float> above = padded(c.phi, c.C, INFINITY), below = padded(c.psi, c.C, -INFINITY);
    const int64_t rows = tile_rows(c.D), tiles = (c.N + rows - 1) / rows, panels = panels_of(c.C);
    const int64_t width = panels * PANEL;
    std::vector<int32_t> positive_parts(tiles * width), kept_parts(tiles * width);
    parallel(busy_threads(threads, double(c.N) * c.D * c.C), tiles, [&](int64_t part) {
        const int64_t first = part * rows, count = std::min(rows, c.N - first);
        for (int64_t row = first; row < first + count; ++row) {
            if (c.phi) std::memset(c.positive + row * c.stride, 0, c.stride);
            if (c.kept) std::memset(c.kept + row * c.stride, 0, c.stride);
        }
        PackedTile tile;
        if (PAIRS) tile.fill(c, first, count);
        for (int64_t panel = 0; panel < panels; ++panel) {
            PanelBits bits(c, panel, above, below);
            if (PAIRS)
                judge_tile_screened(c, queries, first, count, tile, bits);
            else
                judge_tile(c, queries, first, count, bits);
            const int64_t at = part * width + panel * PANEL;
            bits.store_counts(&positive_parts[at], &kept_parts[at]);
        }
    });
    if (c.phi) add_counts(positive_parts, tiles, width, c.C, c.num_positive);
    if (c.kept) add_counts(kept_parts, tiles, width, c.C, c.num_kept);
}
