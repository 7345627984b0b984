// Eq. 8 of a chunk of anchors, a group at a time. With x the logits in powers of two, s a shift, r = sum of 2^(x - s)
// over the kept set, P the positives and n their number:
//   loss = (log2 r + s - mean of x over P) ln 2,   d loss / d logit = (2^(x - s) [kept] - r/n [P]) / r.
// The exponentials of a group stay in the workspace, which becomes the weights; 1 / r goes into the anchors' rows.
// Included by kernels.h, inside its namespace.

// Largest kept logit of every anchor of a group, -inf where nothing is kept.
static std::vector<float> largest(int threads, const PpapContrast& c, const float* packed, int64_t first_anchor,
                                  int64_t count) {
    const int64_t rows = tile_rows(c.E), tiles = (c.N + rows - 1) / rows, panels = panels_of(count);
    const int64_t width = panels * PANEL, offset = first_anchor / 8;
    std::vector<float> parts(tiles * width), top(width, -INFINITY);
    parallel(busy_threads(threads, double(c.N) * c.E * count), tiles, [&](int64_t tile) {
        const int64_t first = tile * rows;
        for (int64_t panel = 0; panel < panels; ++panel) {
            vf m0 = splat(-INFINITY), m1 = m0;
            const vf none = m0;
            row_tiles(std::min(rows, c.N - first), c.z + first * c.E, c.E, 1, packed + panel * c.E * PANEL, PANEL, c.E,
                      [&](int64_t row, vf x0, vf x1) {
                          const uint32_t kept = read_bits(c.kept + (first + row) * c.stride + offset, panel);
                          m0 = max(where(kept & LOW, x0) + where(~kept & LOW, none), m0);
                          m1 = max(where(kept >> LANES, x1) + where(~(kept >> LANES) & LOW, none), m1);
                      });
            store(&parts[tile * width + panel * PANEL], m0);
            store(&parts[tile * width + panel * PANEL + LANES], m1);
        }
    });
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t a = 0; a < width; ++a) top[a] = std::max(top[a], parts[tile * width + a]);
    for (float& value : top)
        if (value == -INFINITY) value = 0.0f;
    return top;
}

// Exponentials of a group into the workspace (with a gradient), and per tile their sums and those of x over P.
static void exponentials(int threads, const PpapContrast& c, const float* packed, int64_t first_anchor, int64_t count,
                         const float* shift, std::vector<float>& totals, std::vector<float>& hits) {
    const int64_t rows = tile_rows(c.E), tiles = (c.N + rows - 1) / rows, panels = panels_of(count);
    const int64_t width = panels * PANEL, offset = first_anchor / 8;
    totals.assign(tiles * width, 0.0f), hits.assign(tiles * width, 0.0f);
    parallel(busy_threads(threads, double(c.N) * c.E * count), tiles, [&](int64_t tile) {
        const int64_t first = tile * rows;
        for (int64_t panel = 0; panel < panels; ++panel) {
            const vf s0 = load(shift + panel * PANEL), s1 = load(shift + panel * PANEL + LANES);
            vf total0{}, total1{}, hit0{}, hit1{};
            row_tiles(std::min(rows, c.N - first), c.z + first * c.E, c.E, 1, packed + panel * c.E * PANEL, PANEL, c.E,
                      [&](int64_t row, vf x0, vf x1) {
                          const int64_t patch = first + row;
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
            const int64_t at = tile * width + panel * PANEL;
            store(&totals[at], total0), store(&totals[at + LANES], total1);
            store(&hits[at], hit0), store(&hits[at + LANES], hit1);
        }
    });
}

// Weights of a group in place of its exponentials, and dz += weights^T (scale * z_anchors), by tiles of patches.
static void add_to_patches(int threads, const PpapContrast& c, int64_t first_anchor, int64_t count,
                           const std::vector<float>& share, const std::vector<float>& scale) {
    const int64_t panels = panels_of(count), channels = panels_of(c.E), offset = first_anchor / 8;
    std::vector<float> right(channels * count * PANEL, 0.0f);
    for (int64_t a = 0; a < count; ++a)
        for (int64_t e = 0; e < c.E; ++e)
            right[(e / PANEL * count + a) * PANEL + e % PANEL] = c.z_anchors[(first_anchor + a) * c.E + e] * scale[a];
    const int64_t rows = tile_rows(c.group), tiles = (c.N + rows - 1) / rows;
    parallel(busy_threads(threads, double(c.N) * c.E * count), tiles, [&](int64_t tile) {
        const int64_t first = tile * rows, here = std::min(rows, c.N - first);
        for (int64_t patch = first; patch < first + here; ++patch)
            for (int64_t panel = 0; panel < panels; ++panel) {
                const uint32_t positive = read_bits(c.positive + patch * c.stride + offset, panel);
                if (!positive) continue;
                float* w = c.workspace + patch * c.group + panel * PANEL;
                store(w, load(w) - where(positive & LOW, load(&share[panel * PANEL])));
                store(w + LANES, load(w + LANES) - where(positive >> LANES, load(&share[panel * PANEL + LANES])));
            }
        for (int64_t channel = 0; channel < channels; ++channel)
            row_tiles(here, c.workspace + first * c.group, c.group, 1, &right[channel * count * PANEL], PANEL, count,
                      [&](int64_t row, vf g0, vf g1) {
                          float* to = c.dz + (first + row) * c.E + channel * PANEL;
                          store(to, load(to) + g0);
                          store(to + LANES, load(to + LANES) + g1);
                      });
    });
}

// dz_anchors = scale * weights z, patches added in their order.
static void add_to_anchors(int threads, const PpapContrast& c, int64_t first_anchor, int64_t count,
                           const std::vector<float>& scale) {
    float* out = c.dz_anchors + first_anchor * c.E;
    std::memset(out, 0, sizeof(float) * count * c.E);
    // How anchors are dealt to threads changes no sum.
    const int64_t block = std::max<int64_t>(ROWS, (count / std::max(threads, 1) + ROWS - 1) / ROWS * ROWS);
    parallel(busy_threads(threads, double(c.N) * c.E * count), (count + block - 1) / block, [&](int64_t part) {
        const int64_t begin = part * block, anchors = std::min(block, count - begin);
        for (int64_t first = 0; first < c.N; first += DEPTH)
            for (int64_t e = 0; e < c.E; e += PANEL)
                row_tiles(anchors, c.workspace + first * c.group + begin, 1, c.group, c.z + first * c.E + e, c.E,
                          std::min(DEPTH, c.N - first), [&](int64_t row, vf g0, vf g1) {
                              float* to = out + (begin + row) * c.E + e;
                              store(to, load(to) + g0);
                              store(to + LANES, load(to + LANES) + g1);
                          });
        for (int64_t a = begin; a < begin + anchors; ++a)
            for (int64_t e = 0; e < c.E; ++e) out[a * c.E + e] *= scale[a];
    });
}

static void contrast(int threads, const PpapContrast& c) {
    const float ln2 = 0.6931471805599453f, log2e = 1.4426950408889634f;
    std::vector<float> totals, hits;
    for (int64_t begin = 0; begin < c.C; begin += c.group) {
        const int64_t count = std::min(c.group, c.C - begin), width = panels_of(count) * PANEL;
        const std::vector<float> packed =
            pack_rows(c.z_anchors + begin * c.E, count, c.E, log2e / c.temperature);
        const std::vector<float> shift = c.shift ? padded(c.shift + begin, count, 0.0f)
                                                 : largest(threads, c, packed.data(), begin, count);
        exponentials(threads, c, packed.data(), begin, count, shift.data(), totals, hits);
        std::vector<float> share(width, 0.0f), scale(width, 0.0f);
        for (int64_t a = 0; a < count; ++a) {
            double total = 0, hit = 0;
            for (size_t at = a; at < totals.size(); at += width) total += totals[at], hit += hits[at];
            const double n = static_cast<double>(c.num_positive[begin + a]), log_total = std::log2(total);
            c.loss[begin + a] = n > 0 ? static_cast<float>((log_total - hit / n) * ln2) : 0.0f;
            c.lse[begin + a] = static_cast<float>((log_total + shift[a]) * ln2);
            // Positives outside an empty kept set: there is no gradient to speak of.
            if (!c.row_weight || !(n > 0) || total == 0) continue;
            share[a] = static_cast<float>(total / n);
            scale[a] = static_cast<float>(c.row_weight[begin + a] / total);
        }
        if (!c.row_weight) continue;
        add_to_patches(threads, c, begin, count, share, scale);
        add_to_anchors(threads, c, begin, count, scale);
    }
}
