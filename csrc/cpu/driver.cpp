// Calls every entry point on ragged sizes, without Python or torch, and compares the instruction sets with each other:
// for valgrind (make valgrind), and for processors and emulators on which nothing else is installed.
//
// Masks: in float32 every instruction set must find the same bits. Products of bf16 are exact in float32, but the
// instruction that adds them (vdpbf16ps) rounds a pair in its own way, so there a bit may differ where the cosine lies
// within the error of any such sum of its threshold, and only few may. Sums, losses and gradients are compared from the
// portable form's masks, so that a bit that may differ does not hide what may not.
//
// `driver --spoil WHAT` spoils the masks that it compares, to show that the comparison sees it: "exact" flips a bit of
// float32, "far" one of bf16 farther from its threshold than the error, "many" one of every anchor on its threshold,
// which are too many, and "tie" a single one on its threshold, which is allowed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ppap_cpu.h"

static std::string spoil;  // what --spoil asks for

static void fail(const std::string& what) {
    std::printf("FAILED: %s\n", what.c_str());
    std::exit(1);
}

static std::vector<float> unit_rows(int64_t rows, int64_t width) {
    std::vector<float> values(rows * width);
    for (float& value : values) value = static_cast<float>(std::rand()) / RAND_MAX - 0.5f;
    for (int64_t r = 0; r < rows; ++r) {
        double norm = 0;
        for (int64_t d = 0; d < width; ++d) norm += values[r * width + d] * values[r * width + d];
        for (int64_t d = 0; d < width; ++d) values[r * width + d] /= static_cast<float>(std::sqrt(norm));
    }
    return values;
}

// As the callers do before they ask for bf16: the nearest bf16, ties to even.
static void round_to_bf16(std::vector<float>& values) {
    for (float& value : values) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
        std::memcpy(&value, &bits, 4);
    }
}

// Inputs of one loss: N patches, C anchors, D guidance and E embedding channels.
struct Problem {
    int64_t N, C, D, E, bf16, stride;
    std::vector<float> keys, queries, z, own, phi, psi, scale;
    std::vector<int64_t> self;

    Problem(int64_t N, int64_t C, int64_t D, int64_t E, int64_t bf16)
        : N(N), C(C), D(D), E(E), bf16(bf16), stride(4 * ((C + 31) / 32)), phi(C, 0.1f), psi(C, 0.0f), scale(N, 0.5f),
          self(C) {
        for (int64_t a = 0; a < C; ++a) self[a] = 7 * a % N;
        std::srand(static_cast<unsigned>(1000 * N + C));
        keys = unit_rows(N, D), queries = unit_rows(C, D), z = unit_rows(N, E), own = unit_rows(C, E);
        if (bf16)
            for (auto* values : {&keys, &queries, &z, &own}) round_to_bf16(*values);
    }

    // Cosine of an anchor's query and a patch, and a bound of the error of any float32 sum of its products, of which
    // each takes part in at most D + 2 roundings by 2^-24.
    void cosine(int64_t anchor, int64_t patch, double& value, double& error) const {
        double size = 0;
        value = 0;
        for (int64_t d = 0; d < D; ++d) {
            const double product = static_cast<double>(queries[anchor * D + d]) * keys[patch * D + d] * scale[patch];
            value += product, size += std::fabs(product);
        }
        error = 1.01 * (D + 2) * size / 16777216 + 1e-37;
    }
};

struct Masks {
    std::vector<uint8_t> positive, kept;
    std::vector<int64_t> num_positive, num_kept;
};

// Rows (N, D) as pairs where the instruction set multiplies them, else nothing.
struct PackedRows {
    std::vector<uint32_t> pairs;
    std::vector<float> norms;

    PackedRows(int isa, const std::vector<float>& rows, const float* scale, int64_t N, int64_t D) {
        if (!ppap_uses_pairs(isa)) return;
        pairs.resize(N * ((D + 1) / 2)), norms.resize(N);
        const PpapPackPairs packing = {rows.data(), scale, pairs.data(), norms.data(), N, D};
        ppap_pack_pairs(isa, 2, &packing);
    }

    const uint32_t* at() const { return pairs.empty() ? nullptr : pairs.data(); }
};

static Masks masks_of(int isa, const Problem& p) {
    Masks m{std::vector<uint8_t>(p.N * p.stride), std::vector<uint8_t>(p.N * p.stride), std::vector<int64_t>(p.C),
            std::vector<int64_t>(p.C)};
    const PackedRows packed(isa, p.keys, p.scale.data(), p.N, p.D);
    const PpapRelationMasks cosines = {p.queries.data(),
                                       p.keys.data(),
                                       p.scale.data(),
                                       packed.at(),
                                       packed.norms.data(),
                                       p.phi.data(),
                                       p.psi.data(),
                                       p.self.data(),
                                       m.positive.data(),
                                       m.kept.data(),
                                       m.num_positive.data(),
                                       m.num_kept.data(),
                                       p.C,
                                       p.N,
                                       p.D,
                                       p.stride,
                                       p.bf16};
    ppap_relation_masks(isa, 2, &cosines);
    return m;
}

static bool bit(const std::vector<uint8_t>& mask, const Problem& p, int64_t anchor, int64_t patch) {
    return mask[patch * p.stride + anchor / 8] >> (anchor % 8) & 1;
}

static void check_counts(const std::vector<uint8_t>& mask, const std::vector<int64_t>& counts, const Problem& p,
                         const std::string& what) {
    int64_t bits = 0, in_rows = 0;
    for (uint8_t byte : mask)
        for (int i = 0; i < 8; ++i) bits += byte >> i & 1;
    for (int64_t a = 0; a < p.C; ++a) {
        int64_t found = 0;
        for (int64_t n = 0; n < p.N; ++n) found += bit(mask, p, a, n);
        if (found != counts[a]) fail(what + ": counts are not those of the masks");
        in_rows += found;
    }
    if (bits != in_rows) fail(what + ": bits past the last anchor");
}

// At most one bit in so many may differ, or a single one. Pairs of bf16 (emulated) against AVX-512: none of 784 x 3,136
// bits at D = 19, 64, 384 and 768, where at D = 384 a share of 3e-4 of the cosines lies within the bound above, 1e-5.
static const int64_t BITS_PER_FLIP = 10000;

static void compare_masks(const Masks& got, const Masks& wanted, const Problem& p, const std::string& what) {
    check_counts(got.positive, got.num_positive, p, what);
    check_counts(got.kept, got.num_kept, p, what);
    if (!p.bf16) {
        if (got.positive != wanted.positive || got.kept != wanted.kept) fail(what + ": other masks");
        return;
    }
    int64_t flips = 0;
    for (int64_t a = 0; a < p.C; ++a)
        for (int64_t n = 0; n < p.N; ++n) {
            const bool positive = bit(got.positive, p, a, n) != bit(wanted.positive, p, a, n);
            const bool kept = bit(got.kept, p, a, n) != bit(wanted.kept, p, a, n);
            if (!positive && !kept) continue;
            double value, error;
            p.cosine(a, n, value, error);
            const bool near_phi = std::fabs(value - p.phi[a]) <= error, near_psi = std::fabs(value - p.psi[a]) <= error;
            if (!near_phi && (positive || !near_psi)) fail(what + ": another mask far from its threshold");
            ++flips;
        }
    if (flips > 1 && flips * BITS_PER_FLIP > p.N * p.C) fail(what + ": too many other masks");
}

// Flip a positive bit, and its count with it; an ambiguous patch thereby enters the kept ones or leaves them.
static void flip(Masks& m, const Problem& p, int64_t anchor, int64_t patch) {
    const int64_t at = patch * p.stride + anchor / 8;
    const uint8_t one = static_cast<uint8_t>(1 << anchor % 8);
    const int64_t step = m.positive[at] & one ? -1 : 1;
    m.positive[at] ^= one, m.kept[at] ^= one;
    m.num_positive[anchor] += step, m.num_kept[anchor] += m.kept[at] & one ? 1 : -1;
}

// Put the threshold of anchors on the cosine with a patch of their own, where a bit may fall either way.
static void tie(Problem& p, int64_t anchors) {
    double value, error;
    for (int64_t a = 0; a < anchors; ++a) p.cosine(a, a % p.N, value, error), p.phi[a] = static_cast<float>(value);
}

static void spoil_masks(Masks& m, const Problem& p) {
    if (spoil == (p.bf16 ? "tie" : "exact")) flip(m, p, 0, 0);
    if (spoil == "many" && p.bf16)
        for (int64_t a = 0; a < p.C; ++a) flip(m, p, a, a % p.N);
    if (spoil != "far" || !p.bf16) return;
    double value = 0, error = 1;
    for (int64_t n = 0; n < p.N; ++n) {
        p.cosine(0, n, value, error);
        if (std::fabs(value - p.phi[0]) > error && std::fabs(value - p.psi[0]) > error) return flip(m, p, 0, n);
    }
}

// Sums, losses and gradients from given masks.
static std::vector<float> numbers_of(int isa, const Problem& p, const Masks& m) {
    const int64_t group = 32;
    std::vector<float> sums(p.C * p.D), weight(p.C, 1.0f), loss(p.C), lse(p.C), dz_own(p.C * p.E);
    // Written where there are several groups, added to where there is one.
    std::vector<float> dz(p.N * p.E, p.C > group ? NAN : 0.5f);
    std::vector<float> workspace(p.N * group);
    const PackedRows keys(isa, p.keys, p.scale.data(), p.N, p.D), z(isa, p.z, nullptr, p.N, p.E);
    const PpapProxyAverage selected = {
        m.positive.data(), p.keys.data(), p.scale.data(), p.bf16 ? keys.at() : nullptr, sums.data(), p.C, p.N, p.D,
        p.stride};
    ppap_proxy_average(isa, 2, &selected);
    const PpapMaskedLogSoftmax contrast = {p.own.data(),
                                           p.z.data(),
                                           p.bf16 ? z.at() : nullptr,
                                           m.positive.data(),
                                           m.kept.data(),
                                           m.num_positive.data(),
                                           nullptr,
                                           weight.data(),
                                           loss.data(),
                                           lse.data(),
                                           dz_own.data(),
                                           dz.data(),
                                           workspace.data(),
                                           nullptr,
                                           p.C,
                                           p.N,
                                           p.E,
                                           p.stride,
                                           group,
                                           p.C > group,
                                           0.1f};
    ppap_masked_log_softmax(isa, 2, &contrast);
    for (float value : loss)
        if (!std::isfinite(value)) fail("a loss that is not finite");
    std::vector<float> numbers;
    for (const auto* values : {&sums, &loss, &lse, &dz, &dz_own})
        numbers.insert(numbers.end(), values->begin(), values->end());
    return numbers;
}

static void check_layout(const Problem& p, const Masks& m) {
    std::vector<int32_t> words(p.C * ((p.N + 31) / 32));
    std::vector<uint8_t> again(p.N * p.stride);
    std::vector<int64_t> counts(p.C);
    ppap_to_public(2, m.positive.data(), p.stride, p.C, p.N, words.data());
    ppap_from_public(2, words.data(), p.C, p.N, again.data(), p.stride, counts.data());
    if (again != m.positive || counts != m.num_positive) fail("masks do not survive a change of layout");
}

static std::vector<float> crf(int isa, int64_t H, int64_t W, int64_t C, float gaussian_sxy) {
    std::srand(static_cast<unsigned>(1000 * H + C));
    std::vector<uint8_t> image(H * W * 3);
    for (uint8_t& value : image) value = static_cast<uint8_t>(std::rand());
    const std::vector<float> scores = unit_rows(C, H * W);
    std::vector<float> q(scores.size()), one(H * W);
    const float* const maps[] = {scores.data(), scores.data()};
    float* const results[] = {q.data(), one.data()};
    const int64_t classes[] = {C, 1};
    const PpapDenseCrf arguments = {image.data(), maps, results, classes, H,   W, 2, 3,
                                    gaussian_sxy, 3.0f, 67.0f,   3.0f,    4.0f};
    if (ppap_dense_crf(isa, &arguments)) fail("dense_crf refuses");
    for (float value : q)
        if (!(value >= 0 && value <= 1.0001f)) fail("a probability outside 0..1");
    return q;
}

// Loss and gradient of two images of C classes on 3 x 2 patches of 5 pixels, the last of which are cut off.
static std::vector<float> cross_entropy(int isa, int64_t C, int64_t W) {
    constexpr int64_t B = 2, h = 3, w = 2, p = 5, H = h * p - 2;
    std::srand(static_cast<unsigned>(100 * W + C));
    const std::vector<float> logits = unit_rows(B * C * h, w);
    std::vector<int64_t> target(B * H * W), first(H);
    for (int64_t& value : target) value = std::rand() % (C + 1) - 1;
    std::vector<float> rows(2 * H), columns(W * w, 0.0f), grad(logits.size());
    auto place = [](int64_t pixel) { return std::max(0.0f, (static_cast<float>(pixel) + 0.5f) / p - 0.5f); };
    for (int64_t y = 0; y < H; ++y) {
        first[y] = static_cast<int64_t>(place(y));
        rows[2 * y + 1] = first[y] + 1 < h ? place(y) - static_cast<float>(first[y]) : 0.0f;
        rows[2 * y] = 1.0f - rows[2 * y + 1];
    }
    for (int64_t x = 0; x < W; ++x) {
        const int64_t before = static_cast<int64_t>(place(x)), after = std::min(before + 1, w - 1);
        columns[x * w + before] += 1.0f - (place(x) - static_cast<float>(before));
        columns[x * w + after] += place(x) - static_cast<float>(before);
    }
    double loss[B];
    const PpapPixelCrossEntropy arguments = {
        logits.data(), target.data(), first.data(), rows.data(), columns.data(), loss, grad.data(), B, C, h, w, H, W};
    if (ppap_pixel_cross_entropy(isa, 2, &arguments)) fail("pixel_cross_entropy refuses");
    grad.insert(grad.end(), loss, loss + B);
    for (float value : grad)
        if (!std::isfinite(value)) fail("a cross-entropy or its gradient that is not finite");
    return grad;
}

// Numbers within `tolerance` of 1 and of their size.
static void compare(const std::vector<float>& got, const std::vector<float>& wanted, float tolerance,
                    const std::string& what) {
    if (got.size() != wanted.size()) fail(what + ": another number of results");
    for (size_t i = 0; i < got.size(); ++i) {
        const float value = got[i], other = wanted[i];
        if (value == other) continue;  // infinities too: a row without kept patches has -inf
        if (!(std::fabs(value - other) <= tolerance * (1 + std::fabs(other))))
            fail(what + ": " + std::to_string(value) + " where portable has " + std::to_string(other));
    }
}

static void compare_loss(int isa, int portable, int64_t N, int64_t C, int64_t D, int64_t bf16) {
    std::string what = std::string(ppap_isa_name(isa)) + (bf16 ? " bf16" : "") + " loss";
    for (int64_t size : {N, C, D}) what += " " + std::to_string(size);
    Problem problem(N, C, D, 32, bf16);
    if (spoil == "tie" && bf16) tie(problem, 1);
    if (spoil == "many" && bf16) tie(problem, C);
    const Masks wanted = masks_of(portable, problem);
    Masks got = masks_of(isa, problem);
    check_layout(problem, got);
    spoil_masks(got, problem);
    compare_masks(got, wanted, problem, what);
    compare(numbers_of(isa, problem, wanted), numbers_of(portable, problem, wanted), bf16 ? 1e-2f : 1e-5f, what);
}

int main(int count, char** words) {
    if (count == 3 && std::string(words[1]) == "--spoil") spoil = words[2];
    int portable = 0;  // the last of them, which runs everywhere
    while (ppap_isa_name(portable + 1)) ++portable;
    for (int isa = 0; ppap_isa_name(isa); ++isa) {
        const std::string name = ppap_isa_name(isa);
        if (!ppap_isa_available(isa)) {
            std::printf("%s: not on this processor\n", name.c_str());
            continue;
        }
        for (int64_t bf16 : {0, 1}) {
            for (int64_t N : {1, 31, 129, 300})
                for (int64_t C : {1, 33, 70}) compare_loss(isa, portable, N, C, 19, bf16);
            compare_loss(isa, portable, 300, 70, 384, bf16);
        }
        for (int64_t C : {1, 9, 27, 40})
            for (float sxy : {1.0f, 2.5f})
                for (int64_t H : {1, 13})
                    compare(crf(isa, H, 21, C, sxy), crf(portable, H, 21, C, sxy), 1e-5f, name + " crf");
        for (int64_t C : {1, 3, 40})
            for (int64_t W : {1, 9, 10})
                compare(cross_entropy(isa, C, W), cross_entropy(portable, C, W), 1e-5f, name + " cross-entropy");
        std::printf("%s: as portable\n", name.c_str());
    }
    return 0;
}
