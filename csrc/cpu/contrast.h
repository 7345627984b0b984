// Eq. 8 of a chunk of anchors, a group at a time. With x the logits in powers of two, s a shift, r = sum of 2^(x - s)
// over the kept set, P the positives and n their number:
//   loss = (log2 r + s - mean of x over P) ln 2,   d loss / d logit = (2^(x - s) [kept] - r/n [P]) / r.
// The exponentials of a group stay in the workspace, which becomes the weights; 1 / r goes into the anchors' rows.
// With bf16 products the logits' factor follows the product, and weights and weighted anchors are rounded to bf16.
// Included by kernels.h, inside its namespace.

static inline bool in_pairs(const PpapContrast& c) { return PAIRS && c.bf16; }

// Anchors of a group as panels of the logits' product, in powers of two.
struct PackedAnchors {
    int64_t first, count;
    float factor;
    std::vector<float> rows;
    std::vector<uint32_t> pairs;

    PackedAnchors(const PpapContrast& c, int64_t first, int64_t count)
        : first(first), count(count), factor(1.4426950408889634f / c.temperature) {
        const float* from = c.z_anchors + first * c.E;
        if (in_pairs(c))
            pairs = pack_pair_rows(from, count, c.E, 1.0f);
        else
            rows = pack_rows(from, count, c.E, factor);
    }
};

// Tiles of patches that the logits of a group are formed in.
struct LogitTiles {
    int64_t rows, tiles, panels, width;

    LogitTiles(const PpapContrast& c, int64_t count)
        : rows(tile_rows(c.E)), tiles((c.N + rows - 1) / rows), panels(panels_of(count)), width(panels * PANEL) {}
};

// run(panel, finish) forms the logits of a tile of patches and a panel of anchors: finish(patch, two vectors).
template <class Run>
static void over_tiles(int threads, const PpapContrast& c, const PackedAnchors& anchors, const LogitTiles& t, Run&& run) {
    parallel(busy_threads(threads, double(c.N) * c.E * anchors.count), t.tiles, [&](int64_t tile) {
        const int64_t first = tile * t.rows, count = std::min(t.rows, c.N - first), depth = c.E / 2;
        std::vector<uint32_t> pairs(in_pairs(c) ? count * depth : 0);
        if (in_pairs(c)) pack_pairs(c.z + first * c.E, count * c.E, 1.0f, pairs.data());
        for (int64_t panel = 0; panel < t.panels; ++panel) {
            auto logits = [&](auto&& finish) {
                if (in_pairs(c)) {
                    const vf factor = splat(anchors.factor);
                    row_tiles(count, pairs.data(), depth, 1, &anchors.pairs[panel * depth * PANEL], PANEL, depth,
                              [&](int64_t row, vf x0, vf x1) { finish(first + row, x0 * factor, x1 * factor); });
                } else {
                    row_tiles(count, c.z + first * c.E, c.E, 1, &anchors.rows[panel * c.E * PANEL], PANEL, c.E,
                              [&](int64_t row, vf x0, vf x1) { finish(first + row, x0, x1); });
                }
            };
            run(tile * t.width + panel * PANEL, panel, logits);
        }
    });
}


// Largest kept logit of every anchor of a group, 0 where nothing is kept.
static std::vector<float> largest(int threads, const PpapContrast& c, const PackedAnchors& anchors) {
    const LogitTiles t(c, anchors.count);
    const int64_t offset = anchors.first / 8;
    std::vector<float> parts(t.tiles * t.width), top(t.width, -INFINITY);
    over_tiles(threads, c, anchors, t, [&](int64_t at, int64_t panel, auto&& logits) {
        vf m0 = splat(-INFINITY), m1 = m0;
        const vf none = m0;
        logits([&](int64_t patch, vf x0, vf x1) {
            const uint32_t kept = read_bits(c.kept + patch * c.stride + offset, panel);
            m0 = max(where(kept & LOW, x0) + where(~kept & LOW, none), m0);
            m1 = max(where(kept >> LANES, x1) + where(~(kept >> LANES) & LOW, none), m1);
        });
        store(&parts[at], m0), store(&parts[at + LANES], m1);
    });
    for (size_t at = 0; at < parts.size(); ++at) top[at % t.width] = std::max(top[at % t.width], parts[at]);
    for (float& value : top)
        if (value == -INFINITY) value = 0.0f;
    return top;
}

// Exponentials of a group into the workspace (with a gradient), and per tile their sums and those of x over P.
static void exponentials(int threads, const PpapContrast& c, const PackedAnchors& anchors, const float* shift,
                         std::vector<float>& totals, std::vector<float>& hits) {
    const LogitTiles t(c, anchors.count);
    const int64_t offset = anchors.first / 8;
    totals.assign(t.tiles * t.width, 0.0f), hits.assign(t.tiles * t.width, 0.0f);
    over_tiles(threads, c, anchors, t, [&](int64_t at, int64_t panel, auto&& logits) {
        const vf s0 = load(shift + panel * PANEL), s1 = load(shift + panel * PANEL + LANES);
        vf total0{}, total1{}, hit0{}, hit1{};
        logits([&](int64_t patch, vf x0, vf x1) {
            const uint32_t kept = read_bits(c.kept + patch * c.stride + offset, panel);
            const uint32_t positive = read_bits(c.positive + patch * c.stride + offset, panel);
            x0 -= s0, x1 -= s1;
            const vf e0 = where(kept & LOW, exp2(x0)), e1 = where(kept >> LANES, exp2(x1));
            total0 += e0, total1 += e1;
            if (positive) {
                hit0 += where(positive & LOW, x0);
                hit1 += where(positive >> LANES, x1);
            }
            if (c.row_weight) {
                store(c.workspace + patch * c.group + panel * PANEL, e0);
                store(c.workspace + patch * c.group + panel * PANEL + LANES, e1);
            }
        });
        store(&totals[at], total0), store(&totals[at + LANES], total1);
        store(&hits[at], hit0), store(&hits[at + LANES], hit1);
    });
}

// Factors of a group's weights: r / n of the positives, and row_weight / r.
struct GroupWeights {
    std::vector<float> share, scale;
};

// The scaled anchors of a group with anchors along the depth: [panel of channels][anchor][PANEL].
static std::vector<float> deep_anchors(const PpapContrast& c, const PackedAnchors& anchors, const GroupWeights& w) {
    std::vector<float> right(panels_of(c.E) * anchors.count * PANEL, 0.0f);
    for (int64_t a = 0; a < anchors.count; ++a)
        for (int64_t e = 0; e < c.E; ++e)
            right[(e / PANEL * anchors.count + a) * PANEL + e % PANEL] =
                c.z_anchors[(anchors.first + a) * c.E + e] * w.scale[a];
    return right;
}

// The same in pairs of anchors.
static std::vector<uint32_t> deep_anchor_pairs(const std::vector<float>& deep, int64_t count, int64_t channels) {
    const int64_t depth = pairs_of(count);
    std::vector<uint32_t> right(channels * depth * PANEL);
    for (int64_t channel = 0; channel < channels; ++channel)
        for (int64_t a = 0; a < count; a += 2)
            for (int64_t e = 0; e < PANEL; ++e) {
                const float* even = &deep[(channel * count + a) * PANEL + e];
                right[(channel * depth + a / 2) * PANEL + e] = to_pair(even[0], a + 1 < count ? even[PANEL] : 0.0f);
            }
    return right;
}

// Weights of a group in place of its exponentials, and dz += weights^T (scale * z_anchors), by tiles of patches.
static void add_to_patches(int threads, const PpapContrast& c, const PackedAnchors& anchors, const GroupWeights& w) {
    const int64_t count = anchors.count, panels = panels_of(count), channels = panels_of(c.E);
    const std::vector<float> right = deep_anchors(c, anchors, w);
    const std::vector<uint32_t> right_pairs =
        in_pairs(c) ? deep_anchor_pairs(right, count, channels) : std::vector<uint32_t>();
    const int64_t rows = tile_rows(c.group), tiles = (c.N + rows - 1) / rows, depth = pairs_of(count);
    parallel(busy_threads(threads, double(c.N) * c.E * count), tiles, [&](int64_t tile) {
        const int64_t first = tile * rows, here = std::min(rows, c.N - first);
        for (int64_t patch = first; patch < first + here; ++patch)
            for (int64_t panel = 0; panel < panels; ++panel) {
                const uint32_t positive = read_bits(c.positive + patch * c.stride + anchors.first / 8, panel);
                if (!positive) continue;
                float* to = c.workspace + patch * c.group + panel * PANEL;
                store(to, load(to) - where(positive & LOW, load(&w.share[panel * PANEL])));
                store(to + LANES, load(to + LANES) - where(positive >> LANES, load(&w.share[panel * PANEL + LANES])));
            }
        std::vector<uint32_t> pairs(in_pairs(c) ? here * depth : 0);
        if (in_pairs(c))
            for (int64_t row = 0; row < here; ++row)
                pack_pairs(c.workspace + (first + row) * c.group, count, 1.0f, &pairs[row * depth]);
        for (int64_t channel = 0; channel < channels; ++channel) {
            auto add = [&](int64_t row, vf g0, vf g1) {
                float* to = c.dz + (first + row) * c.E + channel * PANEL;
                store(to, load(to) + g0);
                store(to + LANES, load(to + LANES) + g1);
            };
            if (in_pairs(c))
                row_tiles(here, pairs.data(), depth, 1, &right_pairs[channel * depth * PANEL], PANEL, depth, add);
            else
                row_tiles(here, c.workspace + first * c.group, c.group, 1, &right[channel * count * PANEL], PANEL,
                          count, add);
        }
    });
}

// Rows 2 k and 2 k + 1 of a matrix as row k of pairs; the partner of a last odd row is 0.
static void pair_rows(const float* from, int64_t rows, int64_t row_step, int64_t width, uint32_t* to) {
    for (int64_t k = 0; k < rows; k += 2)
        for (int64_t e = 0; e < width; ++e)
            *to++ = to_pair(from[k * row_step + e], k + 1 < rows ? from[(k + 1) * row_step + e] : 0.0f);
}

// dz_anchors = scale * weights z, patches added in their order.
static void add_to_anchors(int threads, const PpapContrast& c, const PackedAnchors& group, const GroupWeights& w) {
    const int64_t count = group.count;
    float* out = c.dz_anchors + group.first * c.E;
    std::memset(out, 0, sizeof(float) * count * c.E);
    // How anchors are dealt to threads changes no sum.
    const int64_t block = std::max<int64_t>(ROWS, (count / std::max(threads, 1) + ROWS - 1) / ROWS * ROWS);
    parallel(busy_threads(threads, double(c.N) * c.E * count), (count + block - 1) / block, [&](int64_t part) {
        const int64_t begin = part * block, anchors = std::min(block, count - begin);
        std::vector<uint32_t> left(in_pairs(c) ? DEPTH / 2 * anchors : 0), right(in_pairs(c) ? DEPTH / 2 * c.E : 0);
        for (int64_t first = 0; first < c.N; first += DEPTH) {
            const int64_t depth = std::min(DEPTH, c.N - first);
            const float *weights = c.workspace + first * c.group + begin, *z = c.z + first * c.E;
            if (in_pairs(c)) {
                pair_rows(weights, depth, c.group, anchors, left.data());
                pair_rows(z, depth, c.E, c.E, right.data());
            }
            for (int64_t e = 0; e < c.E; e += PANEL) {
                auto add = [&](int64_t row, vf g0, vf g1) {
                    float* to = out + (begin + row) * c.E + e;
                    store(to, load(to) + g0);
                    store(to + LANES, load(to + LANES) + g1);
                };
                if (in_pairs(c))
                    row_tiles(anchors, left.data(), 1, anchors, right.data() + e, c.E, pairs_of(depth), add);
                else
                    row_tiles(anchors, weights, 1, c.group, z + e, c.E, depth, add);
            }
        }
        for (int64_t a = begin; a < begin + anchors; ++a)
            for (int64_t e = 0; e < c.E; ++e) out[a * c.E + e] *= w.scale[a];
    });
}

static void contrast(int threads, const PpapContrast& c) {
    const float ln2 = 0.6931471805599453f;
    std::vector<float> totals, hits;
    for (int64_t begin = 0; begin < c.C; begin += c.group) {
        const PackedAnchors anchors(c, begin, std::min(c.group, c.C - begin));
        const int64_t count = anchors.count, width = panels_of(count) * PANEL;
        const std::vector<float> shift =
            c.shift ? padded(c.shift + begin, count, 0.0f) : largest(threads, c, anchors);
        exponentials(threads, c, anchors, shift.data(), totals, hits);
        GroupWeights w{std::vector<float>(width, 0.0f), std::vector<float>(width, 0.0f)};
        for (int64_t a = 0; a < count; ++a) {
            double total = 0, hit = 0;
            for (size_t at = a; at < totals.size(); at += width) total += totals[at], hit += hits[at];
            const double n = static_cast<double>(c.num_positive[begin + a]), log_total = std::log2(total);
            c.loss[begin + a] = n > 0 ? static_cast<float>((log_total - hit / n) * ln2) : 0.0f;
            c.lse[begin + a] = static_cast<float>((log_total + shift[a]) * ln2);
            // Positives outside an empty kept set: there is no gradient to speak of.
            if (!c.row_weight || !(n > 0) || total == 0) continue;
            w.share[a] = static_cast<float>(total / n);
            w.scale[a] = static_cast<float>(c.row_weight[begin + a] / total);
        }
        if (!c.row_weight) continue;
        add_to_patches(threads, c, anchors, w);
        add_to_anchors(threads, c, anchors, w);
    }
}
