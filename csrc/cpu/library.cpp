// The C entry points, the choice of instruction set, and the masks' two layouts.
#include <algorithm>
#include <cstring>
#include <exception>

#include "dense_crf.h"
#include "kernels_table.h"
#include "ppap_cpu.h"
#include "threads.h"

namespace {

struct Isa {
    const char* name;
    const ppap::KernelTable* table;
    ppap::crf::MeanField* mean_field;
    bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

const Isa isas[] = {
#if defined(__x86_64__)
#ifndef PPAP_WITHOUT_AVX512BF16
    {"avx512bf16", &ppap::avx512bf16::table, ppap::avx512::mean_field, has_avx512bf16},
#endif
#ifndef PPAP_WITHOUT_AVX512
    {"avx512", &ppap::avx512::table, ppap::avx512::mean_field, has_avx512},
#endif
#ifndef PPAP_WITHOUT_AVX2
    {"avx2", &ppap::avx2::table, ppap::avx2::mean_field, has_avx2},
#endif
#endif
    {"portable", &ppap::portable::table, ppap::portable::mean_field, [] { return true; }},
};
constexpr int count = sizeof(isas) / sizeof(isas[0]);

// 32 x 32 bits: bit j of word i becomes bit i of word j.
void transpose(uint32_t* words) {
    uint32_t mask = 0x0000ffff;
    for (int j = 16; j; j >>= 1, mask ^= mask << j)
        for (int k = 0; k < 32; k = (k + j + 1) & ~j) {
            const uint32_t swap = ((words[k] >> j) ^ words[k + j]) & mask;
            words[k] ^= swap << j;
            words[k + j] ^= swap;
        }
}

// 0, or 1 where memory ran out: no exception may cross into C.
template <class Job>
int guarded(Job&& job) {
    try {
        job();
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

}  // namespace

extern "C" {

int ppap_abi_version() { return 10; }

const char* ppap_isa_name(int isa) { return isa >= 0 && isa < count ? isas[isa].name : nullptr; }

int ppap_isa_available(int isa) { return isa >= 0 && isa < count && isas[isa].runs_here(); }

int64_t ppap_tile_rows(int isa, int64_t width) { return isas[isa].table->tile_rows(width); }

int64_t ppap_panel() { return ppap::PADDING; }

int ppap_uses_pairs(int isa) { return isas[isa].table->uses_pairs; }

int ppap_pack_pairs(int isa, int threads, const PpapPackPairs* arguments) {
    return guarded([&] { isas[isa].table->pack_pairs(threads, *arguments); });
}

int ppap_relation_masks(int isa, int threads, const PpapRelationMasks* arguments) {
    return guarded([&] { isas[isa].table->relation_masks(threads, *arguments); });
}

int ppap_proxy_average(int isa, int threads, const PpapProxyAverage* arguments) {
    return guarded([&] { isas[isa].table->proxy_average(threads, *arguments); });
}

int ppap_masked_log_softmax(int isa, int threads, const PpapMaskedLogSoftmax* arguments) {
    return guarded([&] { isas[isa].table->masked_log_softmax(threads, *arguments); });
}

int ppap_pixel_cross_entropy(int isa, int threads, const PpapPixelCrossEntropy* arguments) {
    return guarded([&] { isas[isa].table->pixel_cross_entropy(threads, *arguments); });
}

int ppap_to_public(int threads, const uint8_t* bits, int64_t stride, int64_t C, int64_t N, int32_t* words) {
    const int64_t width = (N + 31) / 32;
    auto part = [&](int64_t w) {
        for (int64_t a = 0; a < C; a += 32) {
            uint32_t block[32] = {};
            for (int64_t i = 0; i < 32 && 32 * w + i < N; ++i)
                std::memcpy(&block[i], bits + (32 * w + i) * stride + a / 8, 4);
            transpose(block);
            for (int64_t i = 0; i < 32 && a + i < C; ++i) words[(a + i) * width + w] = static_cast<int32_t>(block[i]);
        }
    };
    return guarded([&] { ppap::parallel(threads, width, part); });
}

int ppap_from_public(int threads, const int32_t* words, int64_t C, int64_t N, uint8_t* bits, int64_t stride,
                     int64_t* counts) {
    const int64_t width = (N + 31) / 32;
    auto part = [&](int64_t w) {
        for (int64_t a = 0; a < 8 * stride; a += 32) {
            uint32_t block[32] = {};
            for (int64_t i = 0; i < 32 && a + i < C; ++i) block[i] = static_cast<uint32_t>(words[(a + i) * width + w]);
            transpose(block);
            for (int64_t i = 0; i < 32 && 32 * w + i < N; ++i)
                std::memcpy(bits + (32 * w + i) * stride + a / 8, &block[i], 4);
        }
    };
    auto count = [&](int64_t a) {
        counts[a] = 0;
        for (int64_t w = 0; w < width; ++w) {
            // Bits past the last column are dropped, as above.
            const uint32_t valid = 32 * w + 32 <= N ? ~0u : (1u << (N - 32 * w)) - 1;
            counts[a] += __builtin_popcount(static_cast<uint32_t>(words[a * width + w]) & valid);
        }
    };
    return guarded([&] {
        ppap::parallel(threads, width, part);
        ppap::parallel(threads, C, count);
    });
}

int ppap_dense_crf(int isa, const PpapDenseCrf* arguments) {
    return guarded([&] {
        const ppap::crf::Kernels kernels = ppap::crf::build_kernels(*arguments);
        for (int64_t map = 0; map < arguments->maps; ++map)
            isas[isa].mean_field(*arguments, kernels, arguments->scores[map], arguments->classes[map],
                                 arguments->q[map]);
    });
}
}
