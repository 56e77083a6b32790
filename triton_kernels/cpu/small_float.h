// The codes of codecs/small_float.py: e4m3 numbers, and e2m1 numbers in blocks with a scale in e4m3.
#pragma once

#include <algorithm>

#include "vector.h"

namespace kv {

constexpr int FLOAT_BLOCK = 16;  // channels that share a scale
constexpr float LARGEST_E4M3 = 448.0f, LEAST_NORMAL_E4M3 = 0x1p-6f;

// Numbers that codes of e4m3, one in each lane, stand for.
inline Floats from_e4m3(Ints codes) {
    const Ints magnitude = codes & 0x7f, subnormal = magnitude < 8;
    // Exponents are counted from 127 and not from 7.  Subnormal numbers get the exponent of 2^-6 and with it a leading
    // one that is taken off again: no step meets a float that is subnormal, which processors are slow with.
    Floats value = (Floats)((magnitude << 20) + (120 << 23) + (subnormal & 1 << 23));
    value -= (Floats)(subnormal & (Ints)splat(LEAST_NORMAL_E4M3));
    return (Floats)((Ints)value | (codes & 0x80) << 24);
}

inline float from_e4m3(uint8_t code) {
    const int magnitude = code & 0x7f;
    const float value = magnitude < 8 ? float(magnitude) * 0x1p-9f : bits_to_float(uint32_t(magnitude << 20) + (120u << 23));
    return code & 0x80 ? -value : value;
}

// The code of the number next to a finite `x`, ties to even, saturating.
inline uint8_t to_e4m3(float x) {
    const uint32_t all = float_to_bits(x), bits = std::min(all & 0x7fffffffu, float_to_bits(LARGEST_E4M3));
    const uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    // Below 2^-6 numbers are multiples of 2^-9, the unit in the last place of 2^14.
    const uint32_t small = float_to_bits(bits_to_float(bits) + 0x1p14f) - float_to_bits(0x1p14f);
    return uint8_t((bits < float_to_bits(LEAST_NORMAL_E4M3) ? small : normal) | (all >> 24 & 0x80));
}

// The same for e2m1.
inline int to_e2m1(float x) {
    const float m = bits_to_float(float_to_bits(x) & 0x7fffffff);
    const int code = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) + (m >= 3.5f) + (m > 5.0f);
    return code | int(float_to_bits(x) >> 28 & 8);
}

// Codes of `count` tokens of `x` [count, dim].
inline void encode_e4m3(const float* x, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; i++) codes[i] = to_e4m3(x[i]);
}

inline void encode_blocks(const float* x, int count, int dim, uint8_t* codes, uint8_t* scales) {
    const int part = dim / 2;
    for (int t = 0; t < count; t++, x += dim, codes += part) {
        std::memset(codes, 0, size_t(part));
        for (int first = 0; first < dim; first += FLOAT_BLOCK) {
            const int last = std::min(dim, first + FLOAT_BLOCK);
            float largest = 0;
            for (int c = first; c < last; c++) largest = std::max(largest, std::fabs(x[c]));
            *scales = to_e4m3(largest * (1.0f / 6));
            const float scale = from_e4m3(*scales++), inverse = scale > 0 ? 1 / scale : 0;
            for (int c = first; c < last; c++)
                codes[c < part ? c : c - part] |= uint8_t(to_e2m1(x[c] * inverse) << (c < part ? 0 : 4));
        }
    }
}

// What each code stands for, 256 numbers.
inline const float* e4m3_numbers() {
    static const struct Numbers {
        float of[256];
        Numbers() {
            for (int code = 0; code < 256; code++) of[code] = from_e4m3(uint8_t(code));
        }
    } numbers;
    return numbers.of;
}

// Multiplies a token's levels, in two fields of `part` channels that are `width` apart, by the scales of their blocks,
// one of which may lie in both.
inline void scale_blocks(const uint8_t* scales, const float* numbers, int part, int width, float* levels) {
    for (int field = 0; field < 2; field++)
        for (int j = 0; j < part;) {
            const int channel = field * part + j, end = std::min(part, j + FLOAT_BLOCK - channel % FLOAT_BLOCK);
            const float scale = numbers[scales[channel / FLOAT_BLOCK]];
            for (; j < end; j++) levels[field * width + j] *= scale;
        }
}

}  // namespace kv
