// Calls every entry point on ragged sizes, without Python or torch: for valgrind (make valgrind).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ppap_cpu.h"

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

static void run(int isa, int64_t N, int64_t C, int64_t D, int64_t E, int64_t bf16) {
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
    if (again != positive || counts != num_positive) {
        std::printf("masks do not survive a change of layout\n");
        std::exit(1);
    }
    for (float value : loss)
        if (!std::isfinite(value)) std::exit(2);
}

static void run_crf(int isa, int64_t H, int64_t W, int64_t C, float gaussian_sxy) {
    std::vector<uint8_t> image(H * W * 3);
    for (uint8_t& value : image) value = static_cast<uint8_t>(std::rand());
    const std::vector<float> scores = unit_rows(C, H * W);
    std::vector<float> q(scores.size());
    const float* const maps[] = {scores.data(), scores.data()};
    float* const results[] = {q.data(), q.data()};
    const int64_t classes[] = {C, 1};
    const PpapDenseCrf arguments = {image.data(), maps, results, classes, H, W, 2, 3, gaussian_sxy, 3.0f, 67.0f, 3.0f, 4.0f};
    if (ppap_dense_crf(isa, &arguments)) std::exit(3);
    for (float value : q)
        if (!(value >= 0 && value <= 1.0001f)) std::exit(4);
}

int main() {
    for (int isa = 0; ppap_isa_name(isa); ++isa) {
        if (!ppap_isa_available(isa)) continue;
        for (int64_t N : {1, 31, 129, 300})
            for (int64_t C : {1, 33, 70}) run(isa, N, C, 19, 32, N % 2);
        for (int64_t C : {1, 9, 27, 40})
            for (float sxy : {1.0f, 2.5f}) run_crf(isa, 13, 21, C, sxy), run_crf(isa, 1, 7, C, sxy);
        std::printf("%s: done\n", ppap_isa_name(isa));
    }
    return 0;
}
