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

// A lattice of positions: what a row of pixels needs of it lies close together, so that splat, blur and slice follow
// each other in a band that moves down the image. Every stage has a ring of vertices: the splat, then each axis.
struct Banded : Lattice {
    std::vector<std::vector<int32_t>> before, next;  // per axis (vertices,): neighbours, or -1
    std::vector<int64_t> known;                      // (height,): vertices that this row and those above touch
    int64_t reach = 0;                               // farthest neighbour [vertices]
    int64_t ring = 1;                                // vertices kept per stage, a power of two
};

struct Kernels {
    std::vector<Lattice> lattices;
    std::vector<Banded> banded;
};

// The kernels whose weight is not 0.
Kernels build_kernels(const PpapDenseCrf& problem);

// Probabilities (C, H, W) of one map from its scores (C, H, W).
using MeanField = void(const PpapDenseCrf& problem, const Kernels& kernels, const float* scores, int64_t classes,
                       float* q);

}  // namespace ppap::crf

namespace ppap {
#if defined(__x86_64__)
namespace avx512 { crf::MeanField mean_field; }
namespace avx2 { crf::MeanField mean_field; }
#endif
namespace portable { crf::MeanField mean_field; }
}  // namespace ppap
