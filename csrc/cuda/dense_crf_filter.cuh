// Filtering on a permutohedral lattice: splat, blur, slice. Values are rows: the classes of a pixel or of a vertex. Every
// value is summed by one thread in a fixed order.
#pragma once
#include "dense_crf_lattice.cuh"

namespace {

constexpr int SEGMENT = 64;  // splat entries that one thread adds up
constexpr int ITEMS = 4 * THREADS;  // values that one block makes

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Rows of `width` values, some of them per block.
struct Rows {
    int64_t count;
    int width, per_block;

    // body(row, column) for the values of a block.
    template <class Body>
    PPAP_DEVICE void each(const Block& block, Body&& body) const {
        const int64_t first = block.x * per_block, left = count - first;
        const int values = static_cast<int>(left < per_block ? left : per_block) * width;
        block.each([&](int thread) {
            for (int at = thread; at < values; at += THREADS) body(first + at / width, at % width);
        });
    }
};

// `height` rows to a block, or as many as make it ITEMS values.
Rows rows_of(int64_t count, int64_t width, int64_t height = 0) {
    const int64_t fitting = height ? height : width < ITEMS ? ITEMS / width : 1;
    return {count, static_cast<int>(width), static_cast<int>(fitting)};
}

template <class Kernel>
int launch_on(const Rows& rows, Stream stream, const Kernel& kernel) {
    return launch(stream, blocks_of(rows.count, rows.per_block), 1, kernel);
}

// What some splat entries bring.
struct Bringing {
    const Entry* splat;
    const int32_t* begin;
    const float* q;

    PPAP_DEVICE float operator()(int32_t from, int32_t to, int width, int column) const {
        float sum = 0.0f;
        for (int32_t i = from; i < to; ++i) {
            const Entry entry = splat[i];
            sum += entry.weight * q[static_cast<int64_t>(entry.index) * width + column];
        }
        return sum;
    }
    // Whether several threads add up a vertex.
    PPAP_DEVICE bool is_long(int32_t vertex) const { return begin[vertex + 1] - begin[vertex] > SEGMENT; }
};

// Sums over a segment of the splat entries, a row each: those of a long vertex at its beginning, and at its end.
struct Partial {
    Bringing bringing;
    const int32_t* owner;
    float* partial;
    int64_t entries;
    Rows rows;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        rows.each(block, [&](int64_t segment, int column) {
            const int32_t from = static_cast<int32_t>(segment * SEGMENT);
            const int32_t to = static_cast<int32_t>(from + SEGMENT < entries ? from + SEGMENT : entries);
            const int32_t head = owner[from], tail = owner[to - 1];
            float* out = partial + 2 * segment * rows.width + column;
            if (bringing.is_long(head)) {
                const int32_t until = bringing.begin[head + 1];
                out[0] = bringing(from, until < to ? until : to, rows.width, column);
            }
            if (tail != head && bringing.is_long(tail))
                out[rows.width] = bringing(bringing.begin[tail], to, rows.width, column);
        });
    }
};

// What the pixels of a vertex splat on it.
struct Splat {
    Bringing bringing;
    const float* partial;
    float* values;
    Rows rows;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        rows.each(block, [&](int64_t row, int column) {
            const int32_t vertex = static_cast<int32_t>(row);
            const int32_t from = bringing.begin[vertex], to = bringing.begin[vertex + 1];
            float sum = 0.0f;
            if (!bringing.is_long(vertex)) {
                sum = bringing(from, to, rows.width, column);
            } else {
                for (int64_t segment = from / SEGMENT; segment <= (to - 1) / SEGMENT; ++segment) {
                    const int at_end = segment * SEGMENT < from ? 1 : 0;
                    sum += partial[(2 * segment + at_end) * rows.width + column];
                }
            }
            values[row * rows.width + column] = sum;
        });
    }
};

// Along one axis: half of both neighbours more.
struct Blur {
    const int32_t *before, *next;
    const float* from;
    float* to;
    Rows rows;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        rows.each(block, [&](int64_t row, int column) {
            const float sides = value(before[row], column) + value(next[row], column);
            to[row * rows.width + column] = from[row * rows.width + column] + 0.5f * sides;
        });
    }

    PPAP_DEVICE float value(int32_t vertex, int column) const {
        return vertex < 0 ? 0.0f : from[static_cast<int64_t>(vertex) * rows.width + column];
    }
};

// Blurred values, seen from the pixels.
struct Slice {
    const Entry* entries;  // null: there is no such kernel
    const float* values;

    template <int CORNERS>
    PPAP_DEVICE float at(int64_t pixel, int width, int column) const {
        float sum = 0.0f;
        for (int r = 0; r < CORNERS; ++r) {
            const Entry entry = entries[pixel * CORNERS + r];
            sum += entry.weight * values[static_cast<int64_t>(entry.index) * width + column];
        }
        return sum;
    }
};

// Weights of the splat entries as they are, and ones to filter.
struct Arrange {
    PpapCudaLattice lattice;
    int64_t entries;
    int corners;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t at = block.x * THREADS + thread;
            if (at >= entries) return;
            const int64_t entry = lattice.order[at];
            lattice.splat[at] = {static_cast<int32_t>(entry / corners), lattice.slice[entry].weight};
            if (entry % corners == 0) lattice.factor[entry / corners] = 1.0f;
        });
    }
};

// Into the slice entries: the normalisation, 1 / sqrt of the filtered ones, and one half of the kernel's weight.
template <int CORNERS>
struct Normalise {
    PpapCudaLattice lattice;
    Slice slice;
    float alpha, half;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t pixel = block.x * THREADS + thread;
            if (pixel >= lattice.height * lattice.width) return;
            const float factor = half / sqrtf(alpha * slice.at<CORNERS>(pixel, 1, 0) + 1e-20f);
            for (int r = 0; r < CORNERS; ++r) lattice.slice[pixel * CORNERS + r].weight *= factor;
            lattice.factor[pixel] = factor;
        });
    }
};

// Into the splat entries: the same.
struct Weigh {
    PpapCudaLattice lattice;
    int64_t entries;
    struct Shared {};

    PPAP_DEVICE void operator()(const Block& block, Shared&) const {
        block.each([&](int thread) {
            const int64_t at = block.x * THREADS + thread;
            if (at < entries) lattice.splat[at].weight *= lattice.factor[lattice.splat[at].index];
        });
    }
};

}  // namespace
