// Vectors of floats as wide as the processor has them, and the few operations that compilers do not find alone.
// Everything has a portable version; the widths are 16 (AVX-512), 8 (AVX2) and 4.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(KV_PORTABLE)
#define KV_WIDTH 4
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define KV_WIDTH 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define KV_WIDTH 8
#else
#define KV_WIDTH 4
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define KV_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KV_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

namespace kv {

constexpr int W = KV_WIDTH;
typedef float Floats __attribute__((vector_size(4 * KV_WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * KV_WIDTH)));
typedef uint16_t Words __attribute__((vector_size(4 * KV_WIDTH)));
typedef uint8_t Bytes __attribute__((vector_size(2 * KV_WIDTH)));

constexpr int WORDS = 2 * W;  // in one vector of them

// STEP: bits 14 to 7 of a FLOAT16, whose others are 0.
enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, BOOL = 3, STEP = 4 };

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

inline int item_size(int64_t dtype) { return dtype == FLOAT32 ? 4 : dtype == BOOL || dtype == STEP ? 1 : 2; }

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline Floats splat(float x) { return Floats{} + x; }

inline Floats select(Ints condition, Floats yes, Floats no) {
    return (Floats)((condition & (Ints)yes) | (~condition & (Ints)no));
}

inline Floats maximum(Floats a, Floats b) { return select(a > b, a, b); }

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16;
    if ((h & 0x7c00) == 0x7c00) return bits_to_float(sign | 0x7f800000 | uint32_t(h & 0x3ff) << 13);
    // Read with the exponent of float32, then made larger by the difference of the biases: right for subnormals too.
    const float magnitude = bits_to_float(uint32_t(h & 0x7fff) << 13) * 0x1p112f;
    return bits_to_float(float_to_bits(magnitude) | sign);
}

// Rounds to nearest, ties to even; too large becomes infinity.
inline uint16_t float_to_half(float x) {
#if KV_WIDTH > 4
    return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // adding 1/2 leaves the subnormal's digits at the end of the sum, rounded
        const float sum = bits_to_float(magnitude) + 0.5f;
        return uint16_t(sign | (float_to_bits(sum) - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return uint16_t(sign | ((rounded - 0x38000000) >> 13));
#endif
}

inline float bfloat_to_float(uint16_t b) { return bits_to_float(uint32_t(b) << 16); }

inline uint16_t float_to_bfloat(float x) {
    const uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Ints load_bytes(const uint8_t* p) {
#if KV_WIDTH == 16
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif KV_WIDTH == 8
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    return Ints{p[0], p[1], p[2], p[3]};
#endif
}

// W numbers of 4 bits, two in a byte, the lower first.
inline Ints load_nibbles(const uint8_t* p) {
#if KV_WIDTH > 4
    int64_t bytes = 0;
    std::memcpy(&bytes, p, W / 2);
    const __m128i both = _mm_cvtsi64_si128(bytes), mask = _mm_set1_epi8(15);
    const __m128i apart = _mm_unpacklo_epi8(_mm_and_si128(both, mask), _mm_and_si128(_mm_srli_epi16(both, 4), mask));
#endif
#if KV_WIDTH == 16
    return (Ints)_mm512_cvtepu8_epi32(apart);
#elif KV_WIDTH == 8
    return (Ints)_mm256_cvtepu8_epi32(apart);
#else
    return Ints{p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4};
#endif
}

inline Words load_words(const uint8_t* p) {
    Words v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// WORDS bytes, each in a word.
inline Words widen_bytes(const uint8_t* p) {
#if KV_WIDTH == 16
    return (Words)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
#else
    Bytes v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Words);
#endif
}

inline void store_words(uint8_t* p, Words v) { std::memcpy(p, &v, sizeof v); }

inline Words choose(uint16_t mask, Words yes, Words no) { return (yes & mask) | (no & uint16_t(~mask)); }

inline Floats load_halves(const uint16_t* p) {
#if KV_WIDTH == 16
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif KV_WIDTH == 8
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    return Floats{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
#endif
}

// W numbers of dtype STEP.
inline Floats load_steps(const uint8_t* p) {
#if KV_WIDTH == 16
    return (Floats)_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 7));
#elif KV_WIDTH == 8
    return (Floats)_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7));
#else
    Floats steps;
    for (int i = 0; i < W; i++) steps[i] = half_to_float(uint16_t(p[i] << 7));
    return steps;
#endif
}

inline Floats load_bfloats(const uint16_t* p) {
#if KV_WIDTH == 16
    return (Floats)((Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif KV_WIDTH == 8
    return (Floats)((Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
    return (Floats)(Ints{p[0], p[1], p[2], p[3]} << 16);
#endif
}

template <int64_t DTYPE>
inline Floats load_as(const void* p) {
    if constexpr (DTYPE == FLOAT32) return load((const float*)p);
    if constexpr (DTYPE == BFLOAT16) return load_bfloats((const uint16_t*)p);
    if constexpr (DTYPE == STEP) return load_steps((const uint8_t*)p);
    return load_halves((const uint16_t*)p);
}

template <int64_t DTYPE>
inline void to_floats(const void* from, int count, float* to) {
    constexpr int size = DTYPE == FLOAT32 ? 4 : DTYPE == STEP ? 1 : 2;
    const char* p = (const char*)from;
    int i = 0;
    for (; i + W <= count; i += W) store(to + i, load_as<DTYPE>(p + i * size));
    if (i < count) {
        char rest[4 * W] = {};
        float floats[W];
        std::memcpy(rest, p + i * size, size_t(count - i) * size);
        store(floats, load_as<DTYPE>(rest));
        std::memcpy(to + i, floats, size_t(count - i) * 4);
    }
}

// `count` numbers of any dtype.
inline void to_floats(const void* from, int64_t dtype, int count, float* to) {
    if (dtype == FLOAT32) return to_floats<FLOAT32>(from, count, to);
    if (dtype == BFLOAT16) return to_floats<BFLOAT16>(from, count, to);
    if (dtype == STEP) return to_floats<STEP>(from, count, to);
    to_floats<FLOAT16>(from, count, to);
}

inline void from_floats(const float* from, int64_t dtype, int count, void* to) {
    if (dtype == FLOAT32) {
        std::memcpy(to, from, size_t(count) * 4);
    } else if (dtype == BFLOAT16) {
        for (int i = 0; i < count; i++) ((uint16_t*)to)[i] = float_to_bfloat(from[i]);
    } else {
        for (int i = 0; i < count; i++) ((uint16_t*)to)[i] = float_to_half(from[i]);
    }
}

inline Floats numbers(Ints x) { return __builtin_convertvector(x, Floats); }

// Numbers of the lowest BITS of each lane, looked up where the processor does so beside shifts and conversions.
template <int BITS>
inline Floats lowest(Ints x) {
#if KV_WIDTH == 16
    const Ints all = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (Floats)_mm512_permutexvar_ps((__m512i)x, (__m512)numbers(all & ((1 << BITS) - 1)));
#else
    return numbers(x & ((1 << BITS) - 1));
#endif
}

// Sixteen levels, and which one each lane wants; bits of an index above the fourth are ignored.
struct Table {
    Floats part[16 / W];
    explicit Table(const float* levels) {
        for (int i = 0; i < 16 / W; i++) part[i] = load(levels + i * W);
    }
    Floats at(Ints index) const {
#if KV_WIDTH == 16
        return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)part[0]);
#elif KV_WIDTH == 8
        const __m256 low = _mm256_permutevar8x32_ps((__m256)part[0], (__m256i)index);
        const __m256 high = _mm256_permutevar8x32_ps((__m256)part[1], (__m256i)index);
        return (Floats)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
        const float* levels = (const float*)part;
        return Floats{levels[index[0] & 15], levels[index[1] & 15], levels[index[2] & 15], levels[index[3] & 15]};
#endif
    }
};

// The sum over the lanes of each of W vectors, as one vector: a transposition whose steps add.
inline Floats sum_lanes(const Floats* v) {
#if KV_WIDTH == 16
    Floats a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = KV_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
               KV_SHUFFLE(v[2 * i], v[2 * i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    for (int i = 0; i < 4; i++)
        b[i] = KV_SHUFFLE(a[2 * i], a[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               KV_SHUFFLE(a[2 * i], a[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    for (int i = 0; i < 2; i++)
        c[i] = KV_SHUFFLE(b[2 * i], b[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               KV_SHUFFLE(b[2 * i], b[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    return KV_SHUFFLE(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           KV_SHUFFLE(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif KV_WIDTH == 8
    Floats a[4], b[2];
    for (int i = 0; i < 4; i++)
        a[i] = KV_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
               KV_SHUFFLE(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    for (int i = 0; i < 2; i++)
        b[i] = KV_SHUFFLE(a[2 * i], a[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               KV_SHUFFLE(a[2 * i], a[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return KV_SHUFFLE(b[0], b[1], 0, 1, 2, 3, 8, 9, 10, 11) + KV_SHUFFLE(b[0], b[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
    const Floats a = KV_SHUFFLE(v[0], v[1], 0, 4, 1, 5) + KV_SHUFFLE(v[0], v[1], 2, 6, 3, 7);
    const Floats b = KV_SHUFFLE(v[2], v[3], 0, 4, 1, 5) + KV_SHUFFLE(v[2], v[3], 2, 6, 3, 7);
    return KV_SHUFFLE(a, b, 0, 1, 4, 5) + KV_SHUFFLE(a, b, 2, 3, 6, 7);
#endif
}

inline float sum(Floats v) {
    float total = 0;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
}

inline float highest(Floats v) {
    float top = v[0];
    for (int i = 1; i < W; i++) top = v[i] > top ? v[i] : top;
    return top;
}

// e^x for x <= 0 (and not much above): 2^n e^r, e^r by its Taylor series to r^7, which leaves 5e-9 of it.
// Below -87 it is 0; NaN stays NaN.
inline Floats exponential(Floats x) {
    const Ints tiny = x < splat(-87.0f);
    x = select(tiny, splat(-87.0f), x);
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats n = (x * 1.44269504f + magic) - magic;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact times n
    Floats p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Floats power = (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
    return select(tiny, Floats{}, p * power);
}

// Rotates `x` [dim] in place by the orthonormal Walsh-Hadamard matrix, in blocks of the largest power of two in dim.
inline void hadamard(float* x, int dim) {
    const int order = dim & -dim;
    for (int half = 1; half < order; half *= 2)
        for (int i = 0; i < dim; i += 2 * half)
            for (int j = i; j < i + half; j++) {
                const float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
    const float factor = 1.0f / std::sqrt(float(order));
    for (int i = 0; i < dim; i++) x[i] *= factor;
}

}  // namespace kv
