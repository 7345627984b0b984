// The dense CRF on the device: mean-field steps (Kraehenbuehl, Koltun 2011, algorithm 1) with the filters of
// dense_crf_filter.cuh on the lattices of dense_crf_lattice.cuh, and the C entry points of all three. Energies are
// negative and in powers of two: the weights have log2(e) in them.
#include "dense_crf_filter.cuh"

namespace {

constexpr int TILE = 8192;  // floats of shared memory
constexpr float LOG2_E = 1.44269504f;
constexpr float LOWEST = -16.6096405f;  // log2 of the smallest probability, 1e-5

PPAP_DEVICE inline float log_two(float x) {
#ifdef PPAP_EMULATED
    return std::log2(x);
#else
    return log2f(x);
#endif
}

// Rows of a block's pixels in shared memory; an odd pitch, so that threads on rows meet different banks.
struct Pixels {
    Rows rows;
    int pitch;
    struct Shared {
        float tile[TILE];
    };

    PPAP_DEVICE int count(const Block& block) const {
        const int64_t left = rows.count - block.x * rows.per_block;
        return static_cast<int>(left < rows.per_block ? left : rows.per_block);
    }

    // Energies -> probabilities, a thread per pixel.
    PPAP_DEVICE void softmax(const Block& block, Shared& shared) const {
        block.each([&](int thread) {
            if (thread >= count(block)) return;
            float* row = shared.tile + thread * pitch;
            float top = row[0], total = 0.0f;
            for (int c = 1; c < rows.width; ++c) top = row[c] > top ? row[c] : top;
            for (int c = 0; c < rows.width; ++c) total += row[c] = power_of_two(row[c] - top);
            const float inverse = 1.0f / total;
            for (int c = 0; c < rows.width; ++c) row[c] *= inverse;
        });
    }

    // To pixel-major memory.
    PPAP_DEVICE void store(const Block& block, const Shared& shared, float* to) const {
        rows.each(block, [&](int64_t row, int column) {
            to[row * rows.width + column] = shared.tile[(row - block.x * rows.per_block) * pitch + column];
        });
    }
};

Pixels pixels_of(int64_t pixels, int64_t classes) {
    const int64_t pitch = classes | 1, fitting = TILE / pitch;
    return {rows_of(pixels, classes, fitting < THREADS ? fitting : THREADS), static_cast<int>(pitch)};
}

// Energies and first probabilities from scores (classes, pixels).
struct Start {
    Pixels pixels;
    const float* scores;
    float *unary, *q;
    using Shared = Pixels::Shared;

    PPAP_DEVICE void operator()(const Block& block, Shared& shared) const {
        const int count = pixels.count(block), classes = pixels.rows.width;
        const int64_t first = block.x * pixels.rows.per_block;
        block.each([&](int thread) {
            for (int at = thread; at < count * classes; at += THREADS)
                shared.tile[at % count * pixels.pitch + at / count] =
                    scores[at / count * pixels.rows.count + first + at % count];
        });
        block.each([&](int thread) {
            if (thread >= count) return;
            float* row = shared.tile + thread * pixels.pitch;
            float top = row[0], total = 0.0f;
            for (int c = 1; c < classes; ++c) top = row[c] > top ? row[c] : top;
            for (int c = 0; c < classes; ++c) total += power_of_two(row[c] = (row[c] - top) * LOG2_E);
            const float log_total = log_two(total);
            for (int c = 0; c < classes; ++c) row[c] = row[c] - log_total > LOWEST ? row[c] - log_total : LOWEST;
        });
        pixels.store(block, shared, unary);
        pixels.softmax(block, shared);
        pixels.store(block, shared, q);
    }
};

// New probabilities from the filtered old ones.
struct Update {
    Pixels pixels;
    Slice edges, smooth;
    const float* unary;
    float* q;
    using Shared = Pixels::Shared;

    PPAP_DEVICE void operator()(const Block& block, Shared& shared) const {
        const int64_t first = block.x * pixels.rows.per_block;
        pixels.rows.each(block, [&](int64_t pixel, int column) {
            const int width = pixels.rows.width;
            float energy = unary[pixel * width + column];
            if (edges.entries) energy += edges.at<6>(pixel, width, column);
            if (smooth.entries) energy += smooth.at<3>(pixel, width, column);
            shared.tile[(pixel - first) * pixels.pitch + column] = energy;
        });
        pixels.softmax(block, shared);
        pixels.store(block, shared, q);
    }
};

// Probabilities (classes, pixels).
struct Finish {
    Pixels pixels;
    const float* q;
    float* out;
    using Shared = Pixels::Shared;

    PPAP_DEVICE void operator()(const Block& block, Shared& shared) const {
        const int count = pixels.count(block);
        const int64_t first = block.x * pixels.rows.per_block;
        pixels.rows.each(block, [&](int64_t pixel, int column) {
            shared.tile[(pixel - first) * pixels.pitch + column] = q[pixel * pixels.rows.width + column];
        });
        block.each([&](int thread) {
            for (int at = thread; at < count * pixels.rows.width; at += THREADS)
                out[at / count * pixels.rows.count + first + at % count] =
                    shared.tile[at % count * pixels.pitch + at / count];
        });
    }
};

int corners_of(const PpapCudaLattice& lattice) { return lattice.image ? 6 : 3; }
int64_t entries_of(const PpapCudaLattice& lattice) { return lattice.height * lattice.width * corners_of(lattice); }

int bits_of_table(const PpapCudaLattice& lattice) {
    int bits = 1;
    while ((int64_t{1} << bits) < lattice.slots) ++bits;
    return bits;
}

template <int D>
int embed(Stream stream, const PpapCudaLattice& lattice) {
    Embed<D> kernel{lattice, bits_of_table(lattice), {}};
    const float deviation = static_cast<float>(std::sqrt(2.0 / 3.0) * (D + 1));
    for (int i = 0; i < D; ++i)
        kernel.scale[i] = static_cast<float>(1.0 / std::sqrt((i + 2.0) * (i + 1.0)) * deviation);
    return launch(stream, blocks_of(lattice.height * lattice.width, THREADS), 1, kernel);
}

template <int D>
int neighbours(Stream stream, const PpapCudaLattice& lattice) {
    const Neighbours<D> kernel{lattice, bits_of_table(lattice)};
    return launch(stream, blocks_of(lattice.vertices, THREADS), D + 1, kernel);
}

template <int CORNERS>
int normalise(Stream stream, const PpapCudaLattice& lattice, const Slice& slice) {
    // What blurring adds up to along the axes, undone (Adams et al.).
    const float alpha = 1.0f / (1.0f + std::ldexp(1.0f, 1 - CORNERS));
    const float half = static_cast<float>(std::sqrt(static_cast<double>(lattice.weight) * LOG2_E * alpha));
    const Normalise<CORNERS> kernel{lattice, slice, alpha, half};
    return launch(stream, blocks_of(lattice.height * lattice.width, THREADS), 1, kernel);
}

// Splat and blur q (pixels, width); where the result lies goes to `out`.
int filter(Stream stream, const PpapCudaLattice& lattice, const float* q, int64_t width, Slice& out) {
    const int64_t entries = entries_of(lattice), vertices = lattice.vertices;
    const Bringing bringing{lattice.splat, lattice.begin, q};
    const Rows segments = rows_of(blocks_of(entries, SEGMENT), width), rows = rows_of(vertices, width);
    int error = launch_on(segments, stream, Partial{bringing, lattice.owner, lattice.partial, entries, segments});
    if (!error) error = launch_on(rows, stream, Splat{bringing, lattice.partial, lattice.values[0], rows});
    for (int axis = 0; axis < corners_of(lattice) && !error; ++axis) {
        const int32_t *before = lattice.before + axis * vertices, *next = lattice.next + axis * vertices;
        float *from = lattice.values[axis % 2], *to = lattice.values[1 - axis % 2];
        error = launch_on(rows, stream, Blur{before, next, from, to, rows});
    }
    out = {lattice.slice, lattice.values[corners_of(lattice) % 2]};
    return error;
}

}  // namespace

extern "C" {

int ppap_cuda_crf_embed(void* stream, const PpapCudaLattice* lattice) {
    const auto on = static_cast<Stream>(stream);
    const int64_t entries = entries_of(*lattice);
    const int error = lattice->image ? embed<5>(on, *lattice) : embed<2>(on, *lattice);
    return error ? error : launch(on, blocks_of(entries, THREADS), 1, Mark{*lattice, entries});
}

int ppap_cuda_crf_link(void* stream, const PpapCudaLattice* lattice) {
    const auto on = static_cast<Stream>(stream);
    const int64_t entries = entries_of(*lattice);
    const int error = launch(on, blocks_of(entries, THREADS), 1, Number{*lattice, entries});
    if (error) return error;
    return lattice->image ? neighbours<5>(on, *lattice) : neighbours<2>(on, *lattice);
}

int ppap_cuda_crf_weigh(void* stream, const PpapCudaLattice* lattice) {
    const auto on = static_cast<Stream>(stream);
    const int64_t entries = entries_of(*lattice), grid = blocks_of(entries, THREADS);
    Slice slice{};
    int error = launch(on, grid, 1, Arrange{*lattice, entries, corners_of(*lattice)});
    if (!error) error = filter(on, *lattice, lattice->factor, 1, slice);
    if (!error) error = lattice->image ? normalise<6>(on, *lattice, slice) : normalise<3>(on, *lattice, slice);
    return error ? error : launch(on, grid, 1, Weigh{*lattice, entries});
}

int64_t ppap_cuda_crf_parts(int64_t entries) { return blocks_of(entries, SEGMENT); }

int64_t ppap_cuda_crf_classes_max() { return TILE - 1; }

int ppap_cuda_crf_infer(void* stream, const PpapCudaLattice* edges, const PpapCudaLattice* smooth, const float* scores,
                        int64_t C, int64_t pixels, int64_t iterations, float* unary, float* q, float* out) {
    const auto on = static_cast<Stream>(stream);
    const Pixels tiles = pixels_of(pixels, C);
    Slice by_edges{}, by_smooth{};
    int error = launch_on(tiles.rows, on, Start{tiles, scores, unary, q});
    for (int64_t i = 0; i < iterations && !error; ++i) {
        if (edges) error = filter(on, *edges, q, C, by_edges);
        if (smooth && !error) error = filter(on, *smooth, q, C, by_smooth);
        if (!error) error = launch_on(tiles.rows, on, Update{tiles, by_edges, by_smooth, unary, q});
    }
    return error ? error : launch_on(tiles.rows, on, Finish{tiles, q, out});
}
}
