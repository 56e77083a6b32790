// fp16 numbers rounded to the safe side.
#pragma once

#include <algorithm>

#include "vector.h"

namespace kv {

constexpr float HALF_MAX = 65504.0f;

inline uint16_t half_saturating(float x) { return float_to_half(std::min(std::max(x, -HALF_MAX), HALF_MAX)); }

// The fp16 number below (or above) a finite one.
inline uint16_t half_neighbour(uint16_t h, bool upwards) {
    if ((h & 0x7fff) == 0) return upwards ? 0x0001 : 0x8001;
    const bool away_from_zero = upwards == !(h & 0x8000);
    return uint16_t(away_from_zero ? h + 1 : h - 1);
}

// Largest fp16 number not above `x`, and smallest not below it; at the ends of its range they saturate.
inline uint16_t half_at_most(float x) {
    const uint16_t h = half_saturating(x);
    const float rounded = half_to_float(h);
    return rounded > x && rounded > -HALF_MAX ? half_neighbour(h, false) : h;
}

inline uint16_t half_at_least(float x) {
    const uint16_t h = half_saturating(x);
    const float rounded = half_to_float(h);
    return rounded < x && rounded < HALF_MAX ? half_neighbour(h, true) : h;
}

}  // namespace kv
