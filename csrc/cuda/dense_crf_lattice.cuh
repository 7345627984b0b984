// Permutohedral lattices (Adams, Baek, Davis 2010) on the device. Keys go into a hash table in any order; vertices are
// then numbered by the first entry that touches them, so that nothing depends on the order in which threads ran. Which
// simplex a pixel falls into hangs on the last bit of its position: the operations on it are those of
// csrc/cpu/dense_crf_lattice.cpp, in their order and never contracted into fused products.
#pragma once
#include "phases.h"
#include "ppap_cuda.h"

namespace {

using Entry = PpapCudaEntry;

constexpr uint64_t EMPTY = ~uint64_t{0};

#ifdef PPAP_EMULATED
// Compiled with -ffp-contract=off.
inline float times(float a, float b) { return a * b; }
inline float plus(float a, float b) { return a + b; }
inline float over(float a, float b) { return a / b; }
inline uint64_t put_if_empty(uint64_t* slot, uint64_t key) {
    const uint64_t found = *slot;
    if (found == EMPTY) *slot = key;
    return found;
}
inline void lower(int32_t* to, int32_t value) { *to = value < *to ? value : *to; }
#else
__device__ inline float times(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float over(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline uint64_t put_if_empty(uint64_t* slot, uint64_t key) {
    return atomicCAS(reinterpret_cast<unsigned long long*>(slot), EMPTY, static_cast<unsigned long long>(key));
}
__device__ inline void lower(int32_t* to, int32_t value) { atomicMin(to, value); }
#endif

// A vertex has d coordinates (d + 1) q + r with one r for all of them; the last one follows. Its key holds r in the
// lowest 3 bits and every q, shifted to be positive, in BITS of its own.
template <int D>
struct Key {
    static constexpr int BITS = 60 / D;

    PPAP_DEVICE static uint64_t unit(int i) { return i < D ? uint64_t{1} << (3 + i * BITS) : 0; }
    PPAP_DEVICE static uint64_t units() {
        uint64_t sum = 0;
        for (int i = 0; i < D; ++i) sum += unit(i);
        return sum;
    }
    // q = 0 everywhere, r = 0.
    PPAP_DEVICE static uint64_t origin() { return units() << (BITS - 1); }

    // The next vertex along an axis: every coordinate less 1, that of the axis plus d.
    PPAP_DEVICE static uint64_t next(uint64_t key, int axis) {
        return (key & 7 ? key - 1 : key + D - units()) + unit(axis);
    }
};

// Where the search for a key begins, in a table of 2^bits slots.
PPAP_DEVICE inline uint32_t place(uint64_t key, int bits) {
    return static_cast<uint32_t>((key * 0x9e3779b97f4a7c15u) >> (64 - bits));
}

PPAP_DEVICE inline int32_t find_or_add(uint64_t* table, int bits, uint64_t key) {
    const uint32_t mask = (1u << bits) - 1;
    for (uint32_t at = place(key, bits);; at = (at + 1) & mask) {
        // A slot is written once: a stale look is at worst that of an empty one, which the exchange corrects.
        uint64_t found = *const_cast<const volatile uint64_t*>(table + at);
        if (found == EMPTY) found = put_if_empty(table + at, key);
        if (found == EMPTY || found == key) return static_cast<int32_t>(at);
    }
}

// The slot of a key, or -1.
PPAP_DEVICE inline int32_t find(const uint64_t* table, int bits, uint64_t key) {
    const uint32_t mask = (1u << bits) - 1;
    for (uint32_t at = place(key, bits);; at = (at + 1) & mask) {
        if (table[at] == key) return static_cast<int32_t>(at);
        if (table[at] == EMPTY) return -1;
    }
}

// The simplex of every pixel: keys into the table, weights into the slice entries.
template <int D>
struct Embed {
    PpapCudaLattice lattice;
    int bits;
    float scale[D];
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t pixel = block.x * THREADS + thread;
            if (pixel < lattice.height * lattice.width) locate(static_cast<int32_t>(pixel));
        });
    }

    // Positions [pixels] and colours in the order blue, green, red, over their sigmas.
    PPAP_DEVICE float feature(int32_t pixel, int dimension) const {
        const int32_t width = static_cast<int32_t>(lattice.width);
        if (dimension == 0) return over(static_cast<float>(pixel % width), lattice.sxy);
        if (dimension == 1) return over(static_cast<float>(pixel / width), lattice.sxy);
        return over(static_cast<float>(lattice.image[int64_t{3} * pixel + 4 - dimension]), lattice.srgb);
    }

    PPAP_DEVICE void locate(int32_t pixel) const {
        constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23 rounds to whole numbers
        constexpr float INVERSE = 1.0f / (D + 1);
        float elevated[D + 1], sum = 0.0f;
        for (int j = D; j > 0; --j) {
            const float scaled = times(feature(pixel, j - 1), scale[j - 1]);
            elevated[j] = plus(sum, -times(static_cast<float>(j), scaled));
            sum = plus(sum, scaled);
        }
        elevated[0] = sum;
        float rest[D + 1];
        int q[D + 1], rank[D + 1], total = 0;
        for (int i = 0; i <= D; ++i) {
            const float nearest = plus(plus(times(INVERSE, elevated[i]), MAGIC), -MAGIC);
            q[i] = static_cast<int>(nearest);
            rest[i] = plus(elevated[i], -times(nearest, static_cast<float>(D + 1)));
            rank[i] = 0;
            total += q[i];
        }
        for (int i = 0; i < D; ++i)
            for (int j = i + 1; j <= D; ++j) {
                const bool less = rest[i] < rest[j];
                rank[i] += less ? 1 : 0;
                rank[j] += less ? 0 : 1;
            }
        uint64_t key = Key<D>::origin();
        for (int i = 0; i <= D; ++i) {
            // Off the plane of the lattice: back to the nearest vertex on it.
            rank[i] += total;
            const int shift = rank[i] < 0 ? 1 : rank[i] > D ? -1 : 0;
            rank[i] += (D + 1) * shift;
            q[i] += shift;
            rest[i] = times(plus(elevated[i], -static_cast<float>(q[i] * (D + 1))), INVERSE);
            key += static_cast<uint64_t>(static_cast<int64_t>(q[i])) * Key<D>::unit(i);
        }
        corners(pixel, key, rank, rest);
    }

    // Entries of a pixel by r, from the key with r = 0 and, per coordinate, rank and distance to that vertex.
    PPAP_DEVICE void corners(int32_t pixel, uint64_t key, const int (&rank)[D + 1], const float (&rest)[D + 1]) const {
        // By rank, descending; selected, not indexed, so that all of it stays in registers.
        float distance[D + 1];
        for (int r = 0; r <= D; ++r) {
            distance[r] = 0.0f;
            for (int i = 0; i <= D; ++i) distance[r] = rank[i] == r ? rest[i] : distance[r];
        }
        Entry* slice = lattice.slice + int64_t{pixel} * (D + 1);
        slice[0].weight = plus(distance[D], plus(1.0f, -distance[0]));
        for (int r = 1; r <= D; ++r) slice[r].weight = plus(distance[D - r], -distance[D - r + 1]);
        for (int r = 0; r <= D; ++r) {
            const int32_t entry = pixel * (D + 1) + r, slot = find_or_add(lattice.table, bits, key);
            lattice.slot[entry] = slot;
            if (*const_cast<const volatile int32_t*>(lattice.first + slot) > entry) lower(lattice.first + slot, entry);
            key += 1;
            for (int i = 0; i <= D; ++i) key -= rank[i] == D - r ? Key<D>::unit(i) : 0;
        }
    }
};

// 1 for the first entry of a vertex, else 0.
struct Mark {
    PpapCudaLattice lattice;
    int64_t entries;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t entry = block.x * THREADS + thread;
            if (entry < entries) lattice.number[entry] = lattice.first[lattice.slot[entry]] == entry ? 1 : 0;
        });
    }
};

// The vertex of every entry, the key of every vertex.
struct Number {
    PpapCudaLattice lattice;
    int64_t entries;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t entry = block.x * THREADS + thread;
            if (entry >= entries) return;
            const int32_t slot = lattice.slot[entry], first = lattice.first[slot], vertex = lattice.number[first] - 1;
            lattice.slice[entry].index = vertex;
            if (first == entry) lattice.keys[vertex] = lattice.table[slot];
        });
    }
};

// Neighbours along axis y: one is looked up, the other is its inverse.
template <int D>
struct Neighbours {
    PpapCudaLattice lattice;
    int bits;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t vertex = block.x * THREADS + thread, axis = block.y * lattice.vertices;
            if (vertex >= lattice.vertices) return;
            const uint64_t key = Key<D>::next(lattice.keys[vertex], static_cast<int>(block.y));
            const int32_t slot = find(lattice.table, bits, key);
            const int32_t found = slot < 0 ? -1 : lattice.number[lattice.first[slot]] - 1;
            lattice.next[axis + vertex] = found;
            if (found >= 0) lattice.before[axis + found] = static_cast<int32_t>(vertex);
        });
    }
};

}  // namespace
