// Products of bf16 operands, two channels at a time: a pair is two bf16 in 32 bits, the even channel below. A pair
// times a pair is added to a float32 lane, by one instruction where PPAP_PAIRS says that the instruction set has it.
// Included by kernels.h, inside its namespace.

typedef uint32_t vp __attribute__((vector_size(4 * LANES)));
typedef uint32_t vp_unaligned __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vp load(const uint32_t* from) { return *reinterpret_cast<const vp_unaligned*>(from); }
static inline vp splat(uint32_t x) { return x - vp{}; }

static inline void add_product(vf& sum, vf a, vf b) { sum += a * b; }

static inline void add_product(vf& sum, vp a, vp b) {
#if PPAP_LANES == 16 && defined(__AVX512BF16__)
    sum = reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                reinterpret_cast<__m512bh>(b)));
#else
    sum += reinterpret_cast<vf>(a & 0xffff0000u) * reinterpret_cast<vf>(b & 0xffff0000u);
    sum += reinterpret_cast<vf>(a << 16) * reinterpret_cast<vf>(b << 16);
#endif
}

// The nearest bf16, ties to even; a NaN stays one.
static inline uint32_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline uint32_t to_pair(float even, float odd) { return to_bf16(even) | to_bf16(odd) << 16; }

static int64_t pairs_of(int64_t depth) { return (depth + 1) / 2; }

// Values (depth,) times factor as pairs; the partner of a last odd one is 0.
static void pack_pairs(const float* values, int64_t depth, float factor, uint32_t* to) {
    for (int64_t k = 0; k < depth / 2; ++k) to[k] = to_pair(values[2 * k] * factor, values[2 * k + 1] * factor);
    if (depth % 2) to[depth / 2] = to_pair(values[depth - 1] * factor, 0.0f);
}
