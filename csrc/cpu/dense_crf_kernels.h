// Mean-field steps of the dense CRF (Kraehenbuehl, Koltun 2011, algorithm 1), compiled per instruction set. Everything
// is pixel-major: a row of S floats has the classes of a pixel, or of a lattice vertex, padded to whole vectors.
// Energies are negative and in powers of two: the weights have log2(e) in them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dense_crf.h"

namespace ppap::PPAP_ISA {

namespace {

#include "simd.inc"

using crf::Entry;

constexpr int64_t PIXELS = 64;          // transposed at a time
constexpr int64_t VERTICES_AHEAD = 6;   // pixels
constexpr int MAX_STAGES = 4;
constexpr float NEVER = -1e30f;         // energy of the padding
constexpr float LOG2_E = 1.44269504f;
constexpr float LOWEST = -16.6096405f;  // log2 of the smallest probability, 1e-5

struct Release {
    void operator()(float* memory) const { std::free(memory); }
};
using Rows = std::unique_ptr<float, Release>;

Rows allocate(int64_t floats) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, std::max<int64_t>(floats, 1) * sizeof(float))) throw std::bad_alloc();
    return Rows(static_cast<float*>(memory));
}

// An associative operation over all lanes.
template <class Op>
inline float across(vf v, Op&& op) {
    typedef float quarter __attribute__((vector_size(16)));
    quarter parts[LANES / 4];
    std::memcpy(parts, &v, sizeof(v));
    for (int width = LANES / 8; width; width /= 2)
        for (int i = 0; i < width; ++i)
            for (int k = 0; k < 4; ++k) parts[i][k] = op(parts[i][k], parts[i + width][k]);
    return op(op(parts[0][0], parts[0][1]), op(parts[0][2], parts[0][3]));
}

inline void prefetch_row(const float* row, int64_t floats) {
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(row + i);
}

// V vectors at a time, `blocks` times per row.
template <int V>
class MeanField {
  public:
    MeanField(const PpapDenseCrf& problem, const crf::Kernels& kernels, int64_t classes)
        : kernels_(kernels), width_(problem.W), height_(problem.H), pixels_(problem.W * problem.H), classes_(classes),
          blocks_((classes + V * LANES - 1) / (V * LANES)), row_(blocks_ * V * LANES), unary_(allocate(pixels_ * row_)),
          q_(allocate(pixels_ * row_)) {
        for (const crf::Lattice& lattice : kernels.lattices) vertices_.push_back(allocate(lattice.vertices * row_));
        for (const crf::Banded& banded : kernels.banded)
            // The row after the last vertex stands for all neighbours that are not there.
            for (int stage = 0; stage <= banded.corners; ++stage) {
                rings_.push_back(allocate((banded.ring + 1) * row_));
                std::fill_n(rings_.back().get() + banded.ring * row_, row_, 0.0f);
            }
    }

    void run(const float* scores, int64_t iterations, float* out) {
        read(scores);
        for (int64_t p = 0; p < pixels_; ++p) softmax(unary_.get() + p * row_, q_.get() + p * row_);
        for (int64_t i = 0; i < iterations; ++i) {
            for (size_t k = 0; k < vertices_.size(); ++k) {
                const crf::Lattice& lattice = kernels_.lattices[k];
                for (int64_t v = 0; v < lattice.vertices; ++v) gather(lattice, v, vertices_[k].get() + v * row_);
                for (const auto& chain : lattice.chains) blur(chain, vertices_[k].get());
            }
            int64_t done[MAX_STAGES] = {};
            for (int64_t y = 0; y < height_; ++y) {
                for (const crf::Banded& banded : kernels_.banded) advance(banded, banded.known[y], done);
                // In place: what is still to be gathered lies below.
                for (int64_t x = 0; x < width_; ++x) update(y * width_ + x, x + VERTICES_AHEAD < width_);
            }
        }
        write(out);
    }

  private:
    // Energies from scores (classes, pixels).
    void read(const float* scores) {
        alignas(64) float shifted[PIXELS], total[PIXELS], top[PIXELS];
        for (int64_t first = 0; first < pixels_; first += PIXELS) {
            const int64_t count = std::min(PIXELS, pixels_ - first);
            std::fill_n(top, PIXELS, 0.0f), std::fill_n(total, PIXELS, 0.0f), std::fill_n(shifted, PIXELS, 0.0f);
            const float* at = scores + first;
            std::copy_n(at, count, top);
            for (int64_t c = 1; c < classes_; ++c)
                for (int64_t i = 0; i < count; ++i) top[i] = std::max(top[i], at[c * pixels_ + i]);
            float* to = unary_.get() + first * row_;
            for (int64_t c = 0; c < classes_; ++c) {
                for (int64_t i = 0; i < count; ++i) shifted[i] = (at[c * pixels_ + i] - top[i]) * LOG2_E;
                for (int64_t i = 0; i < count; ++i) to[i * row_ + c] = shifted[i];
                for (int64_t i = 0; i < PIXELS; i += LANES) store(total + i, load(total + i) + exp2(load(shifted + i)));
            }
            for (int64_t i = 0; i < count; ++i) {
                float* row = to + i * row_;
                const float log_total = std::log2(total[i]);
                for (int64_t c = 0; c < classes_; ++c) row[c] = std::max(row[c] - log_total, LOWEST);
                std::fill(row + classes_, row + row_, NEVER);
            }
        }
    }

    void write(float* out) const {
        for (int64_t first = 0; first < pixels_; first += PIXELS) {
            const int64_t count = std::min(PIXELS, pixels_ - first);
            for (int64_t c = 0; c < classes_; ++c)
                for (int64_t i = 0; i < count; ++i) out[c * pixels_ + first + i] = q_.get()[(first + i) * row_ + c];
        }
    }

    void softmax(const float* energy, float* q) const {
        vf top = load(energy);
        for (int64_t i = LANES; i < row_; i += LANES) top = max(top, load(energy + i));
        const vf shift = splat(across(top, [](float a, float b) { return std::max(a, b); }));
        vf total{};
        for (int64_t i = 0; i < row_; i += LANES) {
            const vf value = exp2(load(energy + i) - shift);
            store(q + i, value);
            total += value;
        }
        const vf inverse = splat(1.0f / across(total, [](float a, float b) { return a + b; }));
        for (int64_t i = 0; i < row_; i += LANES) store(q + i, load(q + i) * inverse);
    }

    // What the pixels of a vertex splat on it.
    void gather(const crf::Lattice& lattice, int64_t v, float* to) const {
        for (int64_t block = 0; block < row_; block += V * LANES) {
            vf sum[V] = {};
            for (int64_t e = lattice.first[v]; e < lattice.first[v + 1]; ++e) {
                const Entry entry = lattice.splat[e];
                prefetch_row(q_.get() + lattice.splat[e + crf::AHEAD].index * row_ + block, V * LANES);
                accumulate(sum, entry.weight, q_.get() + entry.index * row_ + block);
            }
            put(to + block, sum);
        }
    }

    // Along lines of vertices, in place: every vertex is read once and written once.
    void blur(const std::vector<int32_t>& chain, float* values) const {
        const int64_t count = chain.size();
        for (int64_t block = 0; block < row_; block += V * LANES) {
            vf before[V] = {}, here[V] = {};
            bool fresh = true;
            for (int64_t i = 0; i < count; ++i) {
                const bool last = chain[i] < 0;
                float* at = values + vertex(chain[i]) * row_ + block;
                if (i + crf::AHEAD < count)
                    prefetch_row(values + vertex(chain[i + crf::AHEAD]) * row_ + block, V * LANES);
                if (fresh) get(here, at);
                vf after[V] = {};
                if (!last) get(after, values + vertex(chain[i + 1]) * row_ + block);
                for (int k = 0; k < V; ++k) {
                    store(at + k * LANES, here[k] + 0.5f * (before[k] + after[k]));
                    before[k] = last ? vf{} : here[k];
                    here[k] = after[k];
                }
                fresh = last;
            }
        }
    }

    // Stages of the vertices up to `known`; each stage stays ahead of the next by the reach of its blur.
    void advance(const crf::Banded& banded, int64_t known, int64_t* done) {
        const int64_t mask = banded.ring - 1;
        for (int stage = 0; stage <= banded.corners; ++stage) {
            const int64_t until = std::min(banded.vertices, known + (banded.corners - stage) * banded.reach);
            float* to = rings_[stage].get();
            for (int64_t v = done[stage]; v < until; ++v) {
                float* at = to + (v & mask) * row_;
                if (stage == 0) {
                    gather(banded, v, at);
                    continue;
                }
                const int32_t before = banded.before[stage - 1][v], next = banded.next[stage - 1][v];
                const float* from = rings_[stage - 1].get();
                const float* here = from + (v & mask) * row_;
                const float* left = from + (before < 0 ? banded.ring : before & mask) * row_;
                const float* right = from + (next < 0 ? banded.ring : next & mask) * row_;
                for (int64_t i = 0; i < row_; i += LANES)
                    store(at + i, load(here + i) + 0.5f * (load(left + i) + load(right + i)));
            }
            done[stage] = std::max(done[stage], until);
        }
    }

    // A pixel's new probabilities from the filtered old ones.
    void update(int64_t p, bool prefetch) {
        float* to = q_.get() + p * row_;
        for (int64_t block = 0; block < row_; block += V * LANES) {
            vf sum[V], rest[V] = {};
            get(sum, unary_.get() + p * row_ + block);
            for (size_t k = 0; k < vertices_.size(); ++k) {
                const crf::Lattice& lattice = kernels_.lattices[k];
                const Entry* entries = &lattice.slice[p * lattice.corners];
                const float* values = vertices_[k].get() + block;
                if (prefetch)
                    for (int r = 0; r < lattice.corners; ++r)
                        prefetch_row(values + entries[VERTICES_AHEAD * lattice.corners + r].index * row_, V * LANES);
                // Into two sums by turns: a sum waits for its last product.
                for (int r = 0; r < lattice.corners; r += 2) {
                    accumulate(sum, entries[r].weight, values + entries[r].index * row_);
                    accumulate(rest, entries[r + 1].weight, values + entries[r + 1].index * row_);
                }
            }
            for (const crf::Banded& banded : kernels_.banded) {
                const Entry* entries = &banded.slice[p * banded.corners];
                const float* values = rings_[banded.corners].get() + block;
                auto row = [&](int r) { return values + (entries[r].index & (banded.ring - 1)) * row_; };
                accumulate(sum, entries[0].weight, row(0));
                accumulate(rest, entries[1].weight, row(1));
                accumulate(sum, entries[2].weight, row(2));
            }
            for (int k = 0; k < V; ++k) store(to + block + k * LANES, sum[k] + rest[k]);
        }
        softmax(to, to);
    }

    static int64_t vertex(int32_t link) { return link < 0 ? ~link : link; }

    static inline void accumulate(vf* sum, float weight, const float* row) {
        const vf w = splat(weight);
        for (int k = 0; k < V; ++k) sum[k] += w * load(row + k * LANES);
    }
    static inline void get(vf* values, const float* row) {
        for (int k = 0; k < V; ++k) values[k] = load(row + k * LANES);
    }
    static inline void put(float* row, const vf* values) {
        for (int k = 0; k < V; ++k) store(row + k * LANES, values[k]);
    }

    const crf::Kernels& kernels_;
    int64_t width_, height_, pixels_, classes_, blocks_, row_;
    Rows unary_, q_;
    std::vector<Rows> vertices_;  // of every lattice
    std::vector<Rows> rings_;     // of every stage
};

}  // namespace

void mean_field(const PpapDenseCrf& problem, const crf::Kernels& kernels, const float* scores, int64_t classes,
                float* q) {
    const int64_t vectors = (classes + LANES - 1) / LANES;
    if (vectors == 1)
        MeanField<1>(problem, kernels, classes).run(scores, problem.iterations, q);
    else if (vectors == 2)
        MeanField<2>(problem, kernels, classes).run(scores, problem.iterations, q);
    else if (vectors == 3)
        MeanField<3>(problem, kernels, classes).run(scores, problem.iterations, q);
    else
        MeanField<4>(problem, kernels, classes).run(scores, problem.iterations, q);
}

}  // namespace ppap::PPAP_ISA
