// Vectors of PPAP_LANES floats by the compiler's vector extensions; the few operations that they lack, by instruction
// set. Included once per instruction set, inside that set's namespace.

constexpr int LANES = PPAP_LANES;
constexpr uint32_t LOW = (1u << LANES) - 1;  // the bits of one vector
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vf load(const float* from) { return *reinterpret_cast<const vf_unaligned*>(from); }
static inline void store(float* to, vf v) { *reinterpret_cast<vf_unaligned*>(to) = v; }
static inline vf splat(float x) { return x - vf{}; }
// The larger one; a NaN of a stays one.
static inline vf max(vf a, vf b) { return a < b ? b : a; }

static inline vf magnitude(vf a) { return reinterpret_cast<vf>(reinterpret_cast<vi>(a) & 0x7fffffff); }

// Bits of a > b, lane 0 in bit 0.
static inline uint32_t greater(vf a, vf b) {
#if PPAP_LANES == 16 && defined(__AVX512F__)
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
#elif PPAP_LANES == 8 && defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(a > b)));
#else
    vi m = a > b;
    uint32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= (static_cast<uint32_t>(m[i]) & 1u) << i;
    return bits;
#endif
}

// v where the lane's bit is set, else 0.
static inline vf where(uint32_t bits, vf v) {
#if PPAP_LANES == 16 && defined(__AVX512F__)
    return reinterpret_cast<vf>(_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(v)));
#else
    vi lane, all = static_cast<int32_t>(bits) - vi{};
    for (int i = 0; i < LANES; ++i) lane[i] = 1 << i;
    return reinterpret_cast<vf>(reinterpret_cast<vi>(v) & ((all & lane) != 0));
#endif
}

// 2^x for x <= 1; below 2^-126 it is 0, and a NaN stays one. Relative error 2e-7: degree 6 on [-0.5, 0.5].
static inline vf exp2(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    vf clamped = max(x, splat(-126.0f));
    vf whole = (clamped + magic) - magic;
    vf f = clamped - whole;
    vf p = splat(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    vi exponent = (__builtin_convertvector(whole, vi) + 127) << 23;
    vf result = p * reinterpret_cast<vf>(exponent);
    return reinterpret_cast<vf>(reinterpret_cast<vi>(result) & ~(x < splat(-126.0f)));
}
