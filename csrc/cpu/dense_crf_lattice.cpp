// Permutohedral lattices of an image (Adams, Baek, Davis 2010). Which simplex a pixel falls into hangs on the last bit
// of its position: the order of the operations on it is that of the published CRF code, and this file is compiled
// without contraction into fused products.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "dense_crf.h"

namespace ppap::crf {

namespace {

#define PPAP_LANES 4
#include "simd.inc"

constexpr uint64_t EMPTY = ~uint64_t{0};
constexpr int64_t BLOCK = 16;  // pixels whose table slots are fetched together
constexpr double LOG2_E = 1.4426950408889634;

// A vertex has d coordinates (d + 1) q + r with one r for all of them; the last one follows. Its key holds r in the
// lowest 3 bits and every q, shifted to be positive, in BITS of its own.
template <int D>
struct Key {
    static constexpr int BITS = 60 / D;
    static constexpr uint64_t unit(int i) { return i < D ? uint64_t{1} << (3 + i * BITS) : 0; }
    static constexpr uint64_t units() {
        uint64_t sum = 0;
        for (int i = 0; i < D; ++i) sum += unit(i);
        return sum;
    }
    // q = 0 everywhere, r = 0.
    static constexpr uint64_t ORIGIN = units() << (BITS - 1);

    // The next vertex along an axis: every coordinate less 1, that of the axis plus d.
    static uint64_t next(uint64_t key, int axis) { return (key & 7 ? key - 1 : key + D - units()) + unit(axis); }
};

// Keys of the vertices, numbered as they come.
class VertexTable {
  public:
    explicit VertexTable(int64_t expected) {
        while ((int64_t{1} << bits_) < 2 * expected) ++bits_;
        slots_.assign(size_t{1} << bits_, {EMPTY, 0});
    }

    void prefetch(uint64_t key) const { __builtin_prefetch(&slots_[place(key)]); }

    // Number of a vertex, or -1.
    int32_t find(uint64_t key) const {
        const Slot& slot = slots_[probe(key)];
        return slot.key == EMPTY ? -1 : slot.vertex;
    }

    int32_t find_or_add(uint64_t key) {
        Slot& slot = slots_[probe(key)];
        if (slot.key == key) return slot.vertex;
        const int32_t vertex = static_cast<int32_t>(keys_.size());
        slot = {key, vertex};
        keys_.push_back(key);
        if (2 * keys_.size() > slots_.size()) grow();
        return vertex;
    }

    const std::vector<uint64_t>& keys() const { return keys_; }

  private:
    struct Slot {
        uint64_t key;
        int32_t vertex;
    };

    size_t place(uint64_t key) const { return (key * 0x9e3779b97f4a7c15u) >> (64 - bits_); }

    size_t probe(uint64_t key) const {
        size_t at = place(key);
        while (slots_[at].key != key && slots_[at].key != EMPTY) at = (at + 1) & (slots_.size() - 1);
        return at;
    }

    void grow() {
        ++bits_;
        slots_.assign(size_t{1} << bits_, {EMPTY, 0});
        for (size_t i = 0; i < keys_.size(); ++i) slots_[probe(keys_[i])] = {keys_[i], static_cast<int32_t>(i)};
    }

    int bits_ = 10;
    std::vector<Slot> slots_;
    std::vector<uint64_t> keys_;
};

// Positions [pixels] and, with an image, colours in the order blue, green, red.
struct Features {
    int64_t width, height;
    float sigma;
    const uint8_t* image;
    float colour_sigma;

    float at(int64_t pixel, int dimension) const {
        if (dimension == 0) return static_cast<float>(pixel % width) / sigma;
        if (dimension == 1) return static_cast<float>(pixel / width) / sigma;
        return static_cast<float>(image[3 * pixel + 4 - dimension]) / colour_sigma;
    }
};

// Simplices of LANES pixels: per coordinate of the d + 1, its q, its rank by the distance to the vertex with r = 0
// and that distance.
template <int D>
struct Simplices {
    int32_t q[D + 1][LANES], rank[D + 1][LANES];
    float distance[D + 1][LANES];
};

template <int D>
std::array<float, D> scales() {
    const float deviation = static_cast<float>(std::sqrt(2.0 / 3.0) * (D + 1));
    std::array<float, D> scale;
    for (int i = 0; i < D; ++i) scale[i] = static_cast<float>(1.0 / std::sqrt((i + 2.0) * (i + 1.0)) * deviation);
    return scale;
}

template <int D>
void locate(const vf* feature, const std::array<float, D>& scale, Simplices<D>& out) {
    const vf magic = splat(12582912.0f), inverse = splat(1.0f / (D + 1));  // 1.5 * 2^23 rounds to whole numbers
    vf elevated[D + 1], sum{};
    for (int j = D; j > 0; --j) {
        const vf scaled = feature[j - 1] * scale[j - 1];
        elevated[j] = sum - static_cast<float>(j) * scaled;
        sum += scaled;
    }
    elevated[0] = sum;
    vf difference[D + 1];
    vi q[D + 1], rank[D + 1], total{};
    for (int i = 0; i <= D; ++i) {
        const vf nearest = (inverse * elevated[i] + magic) - magic;
        q[i] = __builtin_convertvector(nearest, vi);
        difference[i] = elevated[i] - nearest * static_cast<float>(D + 1);
        rank[i] = vi{};
        total += q[i];
    }
    for (int i = 0; i < D; ++i)
        for (int j = i + 1; j <= D; ++j) {
            const vi less = difference[i] < difference[j];
            rank[i] -= less;
            rank[j] += 1 + less;
        }
    for (int i = 0; i <= D; ++i) {
        // Off the plane of the lattice: back to the nearest vertex on it.
        rank[i] += total;
        const vi below = rank[i] < 0;
        const vi above = rank[i] > D;
        rank[i] += (D + 1) * (above - below);
        q[i] += above - below;
        const vf distance = (elevated[i] - __builtin_convertvector(q[i] * (D + 1), vf)) * inverse;
        std::memcpy(out.q[i], &q[i], sizeof(vi));
        std::memcpy(out.rank[i], &rank[i], sizeof(vi));
        std::memcpy(out.distance[i], &distance, sizeof(vf));
    }
}

// Keys and weights of a pixel's vertices, by r.
template <int D>
void corners(const Simplices<D>& simplices, int lane, uint64_t* keys, Entry* entries) {
    int by_rank[D + 1];
    float distance[D + 1];
    uint64_t key = Key<D>::ORIGIN;
    for (int i = 0; i <= D; ++i) {
        const int rank = simplices.rank[i][lane];
        by_rank[rank] = i;
        distance[rank] = simplices.distance[i][lane];
        key += static_cast<uint64_t>(static_cast<int64_t>(simplices.q[i][lane])) * Key<D>::unit(i);
    }
    keys[0] = key;
    entries[0].weight = distance[D] + (1.0f - distance[0]);
    for (int r = 1; r <= D; ++r) {
        keys[r] = keys[r - 1] + 1 - Key<D>::unit(by_rank[D - r + 1]);
        entries[r].weight = distance[D - r] - distance[D - r + 1];
    }
}

// A lattice's vertices and simplices, before anything is folded in.
struct Mesh {
    int64_t vertices;
    std::vector<Entry> slice;
    std::vector<std::vector<int32_t>> next;  // per axis: the next vertex, or -1
};

template <int D>
std::vector<std::vector<int32_t>> neighbours(const VertexTable& table) {
    const std::vector<uint64_t>& keys = table.keys();
    const int64_t count = keys.size();
    std::vector<std::vector<int32_t>> next(D + 1, std::vector<int32_t>(count));
    for (int axis = 0; axis <= D; ++axis)
        for (int64_t first = 0; first < count; first += BLOCK) {
            const int64_t last = std::min(count, first + BLOCK);
            uint64_t wanted[BLOCK];
            for (int64_t v = first; v < last; ++v) {
                wanted[v - first] = Key<D>::next(keys[v], axis);
                table.prefetch(wanted[v - first]);
            }
            for (int64_t v = first; v < last; ++v) next[axis][v] = table.find(wanted[v - first]);
        }
    return next;
}

template <int D>
Mesh mesh(const Features& features) {
    constexpr int CORNERS = D + 1;
    const int64_t pixels = features.width * features.height;
    const std::array<float, D> scale = scales<D>();
    Mesh out;
    out.slice.resize(pixels * CORNERS);
    VertexTable table(pixels / 2);
    uint64_t keys[BLOCK + 1][CORNERS];
    int32_t last[CORNERS];
    std::fill_n(keys[0], CORNERS, EMPTY);
    for (int64_t first = 0; first < pixels; first += BLOCK) {
        const int64_t count = std::min(BLOCK, pixels - first);
        Entry* entries = &out.slice[first * CORNERS];
        for (int64_t group = 0; group < count; group += LANES) {
            const int lanes = static_cast<int>(std::min<int64_t>(LANES, count - group));
            vf feature[D] = {};
            for (int i = 0; i < D; ++i)
                for (int lane = 0; lane < lanes; ++lane) feature[i][lane] = features.at(first + group + lane, i);
            Simplices<D> simplices;
            locate<D>(feature, scale, simplices);
            for (int lane = 0; lane < lanes; ++lane)
                corners<D>(simplices, lane, keys[group + lane + 1], entries + (group + lane) * CORNERS);
        }
        for (int64_t i = 1; i <= count; ++i)
            for (int r = 0; r < CORNERS; ++r)
                if (keys[i][r] != keys[i - 1][r]) table.prefetch(keys[i][r]);
        for (int64_t i = 1; i <= count; ++i)
            for (int r = 0; r < CORNERS; ++r) {
                // Neighbours in the image mostly share vertices.
                if (keys[i][r] != keys[i - 1][r]) last[r] = table.find_or_add(keys[i][r]);
                entries[(i - 1) * CORNERS + r].index = last[r];
            }
        std::copy_n(keys[count], CORNERS, keys[0]);
    }
    out.vertices = table.keys().size();
    out.next = neighbours<D>(table);
    return out;
}

std::vector<std::vector<int32_t>> lines(const Mesh& mesh) {
    std::vector<std::vector<int32_t>> chains(mesh.next.size());
    std::vector<uint8_t> follows(mesh.vertices);
    for (size_t axis = 0; axis < chains.size(); ++axis) {
        const std::vector<int32_t>& next = mesh.next[axis];
        std::fill(follows.begin(), follows.end(), uint8_t{0});
        for (int32_t vertex : next)
            if (vertex >= 0) follows[vertex] = 1;
        for (int64_t v = 0; v < mesh.vertices; ++v) {
            if (follows[v] || next[v] < 0) continue;  // a vertex alone is not blurred
            for (int32_t at = static_cast<int32_t>(v); at >= 0; at = next[at]) chains[axis].push_back(at);
            chains[axis].back() = ~chains[axis].back();
        }
    }
    return chains;
}

// Splat entries from slice entries.
void transpose(Lattice& lattice) {
    lattice.first.assign(lattice.vertices + 1, 0);
    for (const Entry& entry : lattice.slice) ++lattice.first[entry.index + 1];
    for (int64_t v = 0; v < lattice.vertices; ++v) lattice.first[v + 1] += lattice.first[v];
    lattice.splat.assign(lattice.slice.size() + AHEAD, {0, 0.0f});
    std::vector<int64_t> at(lattice.first.begin(), lattice.first.end() - 1);
    int32_t pixel = 0;
    for (size_t i = 0; i < lattice.slice.size(); ++pixel)
        for (int r = 0; r < lattice.corners; ++r, ++i)
            lattice.splat[at[lattice.slice[i].index]++] = {pixel, lattice.slice[i].weight};
}

void blur_line(const std::vector<int32_t>& chain, std::vector<float>& values) {
    float before = 0.0f;
    for (size_t i = 0; i < chain.size(); ++i) {
        const bool last = chain[i] < 0;
        float& here = values[last ? ~chain[i] : chain[i]];
        const float after = last ? 0.0f : values[chain[i + 1] < 0 ? ~chain[i + 1] : chain[i + 1]];
        const float old = here;
        here += 0.5f * (before + after);
        before = last ? 0.0f : old;
    }
}

// What blurring adds up to along d + 1 axes, undone (Adams et al.).
float alpha(int corners) { return 1.0f / (1.0f + std::ldexp(1.0f, 1 - corners)); }

// 1 / sqrt of the filtered ones, per pixel.
std::vector<float> normalisation(const Lattice& lattice) {
    const int64_t pixels = lattice.slice.size() / lattice.corners;
    std::vector<float> values(lattice.vertices), norm(pixels);
    for (const Entry& entry : lattice.slice) values[entry.index] += entry.weight;
    for (const auto& chain : lattice.chains) blur_line(chain, values);
    const float factor = alpha(lattice.corners);
    for (int64_t p = 0; p < pixels; ++p) {
        float sum = 0.0f;
        for (int r = 0; r < lattice.corners; ++r) {
            const Entry& entry = lattice.slice[p * lattice.corners + r];
            sum += entry.weight * values[entry.index] * factor;
        }
        norm[p] = 1.0f / std::sqrt(sum + 1e-20f);
    }
    return norm;
}

// The filter of a mesh; `weight` in units of powers of two.
Lattice lattice_of(Mesh&& mesh, double weight) {
    Lattice lattice;
    lattice.vertices = mesh.vertices;
    lattice.corners = static_cast<int>(mesh.next.size());
    lattice.chains = lines(mesh);
    lattice.slice = std::move(mesh.slice);
    mesh.next.clear();
    const std::vector<float> norm = normalisation(lattice);
    const float half = static_cast<float>(std::sqrt(weight * alpha(lattice.corners)));
    for (size_t i = 0; i < lattice.slice.size(); ++i) lattice.slice[i].weight *= norm[i / lattice.corners] * half;
    transpose(lattice);
    return lattice;
}

// The filter of positions alone. Vertices are numbered by the first pixel that touches them, row by row.
Banded banded_of(const Features& features, double weight) {
    Mesh plane = mesh<2>(features);
    Banded out;
    out.next = plane.next;
    static_cast<Lattice&>(out) = lattice_of(std::move(plane), weight);
    for (const std::vector<int32_t>& next : out.next) {
        out.before.emplace_back(out.vertices, -1);
        for (int64_t v = 0; v < out.vertices; ++v) {
            if (next[v] < 0) continue;
            out.before.back()[next[v]] = static_cast<int32_t>(v);
            out.reach = std::max(out.reach, std::abs(next[v] - v));
        }
    }
    const int64_t row = features.width * out.corners;
    int64_t known = 0, span = 0;
    for (int64_t y = 0; y < features.height; ++y) {
        const int64_t before = known;
        int64_t lowest = out.vertices;
        for (int64_t i = y * row; i < (y + 1) * row; ++i) {
            known = std::max<int64_t>(known, out.slice[i].index + 1);
            lowest = std::min<int64_t>(lowest, out.slice[i].index);
        }
        out.known.push_back(known);
        // What a row reads, and what lies between two stages of the blur while a row is added.
        span = std::max({span, known - lowest, known - before + 3 * out.reach});
    }
    while (out.ring < span) out.ring *= 2;
    return out;
}

}  // namespace

Kernels build_kernels(const PpapDenseCrf& problem) {
    Kernels kernels;
    if (problem.bilateral_weight > 0) {
        const Features features = {problem.W, problem.H, problem.bilateral_sxy, problem.image, problem.bilateral_srgb};
        kernels.lattices.push_back(lattice_of(mesh<5>(features), problem.bilateral_weight * LOG2_E));
    }
    if (problem.gaussian_weight > 0) {
        const Features features = {problem.W, problem.H, problem.gaussian_sxy, nullptr, 1.0f};
        kernels.banded.push_back(banded_of(features, problem.gaussian_weight * LOG2_E));
    }
    return kernels;
}

}  // namespace ppap::crf
