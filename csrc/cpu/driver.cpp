// Calls every entry point on ragged sizes, without Python or torch, and compares the instruction sets with each other:
// for valgrind (make valgrind), and for processors and emulators on which nothing else is installed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ppap_cpu.h"

struct Results {
    std::vector<float> numbers;
    std::vector<uint8_t> masks;
};

static void add(Results& results, const std::vector<float>& values) {
    results.numbers.insert(results.numbers.end(), values.begin(), values.end());
}

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

static Results loss_parts(int isa, int64_t N, int64_t C, int64_t D, int64_t E, int64_t bf16) {
    std::srand(static_cast<unsigned>(1000 * N + C));
    const int64_t stride = 4 * ((C + 31) / 32), group = 32;
    const auto keys = unit_rows(N, D), queries = unit_rows(C, D), z = unit_rows(N, E), own = unit_rows(C, E);
    std::vector<float> phi(C, 0.1f), psi(C, 0.0f), sums(C * D), weight(C, 1.0f), loss(C), lse(C), scale(N, 0.5f);
    std::vector<float> dz(N * E), dz_own(C * E), workspace(N * group);
    std::vector<uint8_t> positive(N * stride), kept(N * stride), again(N * stride);
    std::vector<int64_t> num_positive(C), num_kept(C), counts(C);
    const PpapSimilarity cosines = {queries.data(), keys.data(), scale.data(), phi.data(), psi.data(), positive.data(),
                                    kept.data(), num_positive.data(), num_kept.data(), C, N, D, stride, bf16};
    ppap_similarity(isa, 2, &cosines);
    const PpapMaskSum selected = {positive.data(), keys.data(), scale.data(), sums.data(), C, N, D, stride};
    ppap_mask_sum(isa, 2, &selected);
    const PpapContrast contrast = {own.data(), z.data(), positive.data(), kept.data(), num_positive.data(), nullptr,
                                   weight.data(), loss.data(), lse.data(), dz_own.data(), dz.data(), workspace.data(),
                                   C, N, E, stride, group, bf16, 0.1f};
    ppap_contrast(isa, 2, &contrast);
    std::vector<int32_t> words(C * ((N + 31) / 32));
    ppap_to_public(2, positive.data(), stride, C, N, words.data());
    ppap_from_public(2, words.data(), C, N, again.data(), stride, counts.data());
    if (again != positive || counts != num_positive) fail("masks do not survive a change of layout");
    for (float value : loss)
        if (!std::isfinite(value)) fail("a loss that is not finite");
    Results results;
    for (const auto* values : {&sums, &loss, &lse, &dz, &dz_own}) add(results, *values);
    for (const auto* masks : {&positive, &kept}) results.masks.insert(results.masks.end(), masks->begin(), masks->end());
    return results;
}

static Results crf(int isa, int64_t H, int64_t W, int64_t C, float gaussian_sxy) {
    std::srand(static_cast<unsigned>(1000 * H + C));
    std::vector<uint8_t> image(H * W * 3);
    for (uint8_t& value : image) value = static_cast<uint8_t>(std::rand());
    const std::vector<float> scores = unit_rows(C, H * W);
    std::vector<float> q(scores.size()), one(H * W);
    const float* const maps[] = {scores.data(), scores.data()};
    float* const results[] = {q.data(), one.data()};
    const int64_t classes[] = {C, 1};
    const PpapDenseCrf arguments = {image.data(), maps, results, classes, H, W, 2, 3, gaussian_sxy, 3.0f, 67.0f, 3.0f, 4.0f};
    if (ppap_dense_crf(isa, &arguments)) fail("dense_crf refuses");
    for (float value : q)
        if (!(value >= 0 && value <= 1.0001f)) fail("a probability outside 0..1");
    return {q, {}};
}

// The same masks (sums of so few channels round alike, of operands rounded to bf16 too), and numbers within `tolerance`
// of 1 and of their size.
static void compare(const Results& got, const Results& wanted, float tolerance, const std::string& what) {
    if (got.numbers.size() != wanted.numbers.size() || got.masks != wanted.masks) fail(what + ": other masks");
    for (size_t i = 0; i < got.numbers.size(); ++i) {
        const float value = got.numbers[i], other = wanted.numbers[i];
        if (value == other) continue;  // infinities too: a row without kept patches has -inf
        if (!(std::fabs(value - other) <= tolerance * (1 + std::fabs(other))))
            fail(what + ": " + std::to_string(value) + " where portable has " + std::to_string(other));
    }
}

int main() {
    int portable = 0;  // the last of them, which runs everywhere
    while (ppap_isa_name(portable + 1)) ++portable;
    for (int isa = 0; ppap_isa_name(isa); ++isa) {
        const std::string name = ppap_isa_name(isa);
        if (!ppap_isa_available(isa)) {
            std::printf("%s: not on this processor\n", name.c_str());
            continue;
        }
        for (int64_t N : {1, 31, 129, 300})
            for (int64_t C : {1, 33, 70})
                for (int64_t bf16 : {0, 1}) {
                    const std::string what = name + " loss " + std::to_string(N) + " " + std::to_string(C);
                    const float tolerance = bf16 ? 1e-2f : 1e-5f;
                    compare(loss_parts(isa, N, C, 19, 32, bf16), loss_parts(portable, N, C, 19, 32, bf16), tolerance, what);
                }
        for (int64_t C : {1, 9, 27, 40})
            for (float sxy : {1.0f, 2.5f})
                for (int64_t H : {1, 13}) compare(crf(isa, H, 21, C, sxy), crf(portable, H, 21, C, sxy), 1e-5f, name + " crf");
        std::printf("%s: as portable\n", name.c_str());
    }
    return 0;
}
