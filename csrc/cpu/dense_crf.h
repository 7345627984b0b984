// Dense CRF: what the parts of an inference share. dense_crf_lattice.cpp builds the kernels of an image,
// dense_crf_kernels.h runs mean-field steps on them, once per instruction set.
#pragma once
#include <cstdint>
#include <vector>

#include "ppap_cpu.h"

namespace ppap::crf {

// One term of a weighted sum: a pixel or a vertex, and its weight.
struct Entry {
    int32_t index;
    float weight;
};

// Entries that may be prefetched past the last one.
constexpr int64_t AHEAD = 32;

// A filter by splat, blur and slice on a permutohedral lattice. Normalisation and the kernel's weight are in the
// entries, one half of the weight in each direction.
struct Lattice {
    int64_t vertices = 0;
    int corners = 0;                           // of a simplex: d + 1, also the number of axes
    std::vector<Entry> slice;                  // (pixels, corners): vertices of a pixel
    std::vector<int64_t> first;                // (vertices + 1,): where the pixels of a vertex begin
    std::vector<Entry> splat;                  // pixels of every vertex, ascending; AHEAD more
    std::vector<std::vector<int32_t>> chains;  // per axis, vertices in line; the last of a line as ~vertex
};

// A filter as weighted sums over neighbours. Rows of an image that have the same sums share a row of the table.
struct Stencil {
    int64_t reach = 0;            // farthest neighbour [rows]
    std::vector<int32_t> row;     // (height,): row of the table
    std::vector<int64_t> first;   // (table rows * width + 1,): where the neighbours of a pixel begin
    std::vector<Entry> taps;      // index: neighbour minus pixel [pixels]
};

struct Kernels {
    std::vector<Lattice> lattices;
    std::vector<Stencil> stencils;  // at most one
};

// The kernels whose weight is not 0.
Kernels build_kernels(const PpapDenseCrf& problem);

// Probabilities (C, H, W) of one map from its scores (C, H, W).
using MeanField = void(const PpapDenseCrf& problem, const Kernels& kernels, const float* scores, int64_t classes, float* q);

}  // namespace ppap::crf

namespace ppap {
#if defined(__x86_64__)
namespace avx512 { crf::MeanField mean_field; }
namespace avx2 { crf::MeanField mean_field; }
#endif
namespace portable { crf::MeanField mean_field; }
}  // namespace ppap
