// Sides of the pages (keys or values) as Python describes them, and how rows of a page become floats.
// Members are 64 bits wide, in the order of `_SIDE` in native.py.
#pragma once

#include "vector.h"

namespace kv {

constexpr int BLOCK = 16;  // tokens that are unpacked at a time: their floats stay in the first-level cache

constexpr int MIDDLE = 128;  // of 8-bit codes that stand for -128 to 127

enum Format : int64_t { VECTORS = 0, CODES_8 = 1, CODES_4 = 2, CODES_2 = 3, CODES_1 = 4 };

// One of the vectors that stand outside of the levels; `data` is null where the codec has none.
struct Factor {
    const char* data;
    int64_t dtype;
    int64_t heads;  // of a vector that all pages share, else 0

    // Its `count` numbers for page-and-head `index`.
    const char* at(int64_t index, int64_t count) const {
        return data + (heads ? index % heads : index) * count * item_size(dtype);
    }
};

struct Side {
    int64_t format, dim, rotated;
    const char* codes;
    int64_t dtype;        // of VECTORS
    const float* levels;  // 16 floats; null for CODES_8, whose levels are the codes less `middle`
    const float* slopes;  // 16 floats: level = levels[code] + residual[token] * slopes[code]; or null
    const char* signs;    // of CODES_2, half as many bytes, packed as in three_bit.py: a set bit negates a level; or null
    int64_t middle;       // MIDDLE or 0
    Factor token_scale, token_offset, residual, channel_scale, channel_offset;
    int64_t zero_point;  // whether token_offset is a zero point: the offset is then -zero * scale
    const char* tail;    // the open page
    int64_t tail_dtype, tail_batch, tail_head, tail_token;  // strides in elements
    const char* first;  // tokens that are read as they came, [batch, heads, n, dim] in tail_dtype; or null

    int fields() const { return format == VECTORS ? 1 : 1 << (format - 1); }
    int part() const { return int(dim) / fields(); }
    // Channels are in the order of fields, each padded to whole vectors.
    int width() const { return round_up(part(), W); }
    int columns() const { return fields() * width(); }
    int row_bytes() const { return format == VECTORS ? int(dim) * item_size(dtype) : part(); }
};

// Rows of one page: `count` <= BLOCK tokens from `rows` on become `tile` [count, columns].
typedef void Unpack(const Side& side, const char* rows, int64_t row_bytes, const float* residual, int count,
                    float* tile);

// How a level follows from its code, beside the table of levels.
enum Kind { PLAIN, SLOPED, SIGNED, CENTRED };

template <int BITS, Kind KIND>
void unpack_codes(const Side& side, const char* rows, int64_t row_bytes, const float* residual, int count,
                  float* tile) {
    constexpr int FIELDS = 8 / BITS;
    static const float none[16] = {};
    const Table levels(BITS == 8 ? none : side.levels), slopes(KIND == SLOPED ? side.slopes : none);
    const int part = side.part(), width = side.width();
    // `signs` of a lane: bit f is that of its channel in field f.
    const auto expand = [&](Ints bytes, float* out, Floats rest, Ints signs) {
        for (int field = 0; field < FIELDS; field++) {
            Floats level;
            if constexpr (BITS == 8) {
                level = __builtin_convertvector(KIND == CENTRED ? bytes - MIDDLE : bytes, Floats);
            } else {
                level = levels.at(bytes >> (field * BITS));
                if constexpr (KIND == SLOPED) level += rest * slopes.at(bytes >> (field * BITS));
                if constexpr (KIND == SIGNED) level = (Floats)((Ints)level ^ (signs << (31 - field) & INT32_MIN));
            }
            store(out + field * width, level);
        }
    };
    for (int t = 0; t < count; t++) {
        const uint8_t* bytes = (const uint8_t*)rows + t * row_bytes;
        const uint8_t* signs = KIND == SIGNED ? (const uint8_t*)side.signs + ((const char*)bytes - side.codes) / 2 : bytes;
        float* out = tile + int64_t(t) * FIELDS * width;
        const Floats rest = KIND == SLOPED ? splat(residual[t]) : Floats{};
        int j = 0;
        for (; j + W <= part; j += W)
            expand(load_bytes(bytes + j), out + j, rest, KIND == SIGNED ? load_nibbles(signs + j / 2) : Ints{});
        if (j < part) {
            uint8_t last[W] = {}, some[W] = {};
            std::memcpy(last, bytes + j, size_t(part - j));
            if (KIND == SIGNED) std::memcpy(some, signs + j / 2, size_t(part - j) / 2);
            expand(load_bytes(last), out + j, rest, KIND == SIGNED ? load_nibbles(some) : Ints{});
        }
    }
}

template <int64_t DTYPE>
void unpack_vectors(const Side& side, const char* rows, int64_t row_bytes, const float*, int count, float* tile) {
    const int dim = int(side.dim), width = round_up(dim, W);
    for (int t = 0; t < count; t++) {
        float* out = tile + int64_t(t) * width;
        for (int i = dim; i < width; i++) out[i] = 0;
        to_floats<DTYPE>(rows + t * row_bytes, dim, out);
    }
}

inline Unpack* vectors_of(int64_t dtype) {
    return dtype == FLOAT32    ? unpack_vectors<FLOAT32>
           : dtype == BFLOAT16 ? unpack_vectors<BFLOAT16>
                               : unpack_vectors<FLOAT16>;
}

inline Unpack* unpacker(const Side& side) {
    switch (side.format) {
        case VECTORS: return vectors_of(side.dtype);
        case CODES_8: return side.middle ? unpack_codes<8, CENTRED> : unpack_codes<8, PLAIN>;
        case CODES_4: return side.slopes ? unpack_codes<4, SLOPED> : unpack_codes<4, PLAIN>;
        case CODES_2:
            if (side.signs) return unpack_codes<2, SIGNED>;
            return side.slopes ? unpack_codes<2, SLOPED> : unpack_codes<2, PLAIN>;
        default: return side.slopes ? unpack_codes<1, SLOPED> : unpack_codes<1, PLAIN>;
    }
}

// Channel vector `from` [dim] in the columns' order, zero in the padding; and back.
inline void to_columns(const Side& side, const float* from, float* to) {
    const int part = side.part(), width = side.width();
    for (int field = 0; field < side.fields(); field++)
        for (int j = 0; j < width; j++) to[field * width + j] = j < part ? from[field * part + j] : 0.0f;
}

inline void from_columns(const Side& side, const float* from, float* to) {
    const int part = side.part(), width = side.width();
    for (int field = 0; field < side.fields(); field++)
        std::memcpy(to + field * part, from + field * width, size_t(part) * 4);
}

// A channel vector of page-and-head `index` in the columns' order.
inline void channel_factor(const Side& side, const Factor& factor, int64_t index, float* to) {
    const int part = side.part(), width = side.width(), size = item_size(factor.dtype);
    const char* from = factor.at(index, side.dim);
    for (int field = 0; field < side.fields(); field++) {
        to_floats(from + int64_t(field) * part * size, factor.dtype, part, to + field * width);
        for (int j = part; j < width; j++) to[field * width + j] = 0;
    }
}

// Token vectors of page-and-head `index`, [page_size] each.
struct TokenFactors {
    float *scale, *offset, *residual;

    void read(const Side& side, int64_t index, int page_size) {
        const auto one = [&](const Factor& factor, float* to) {
            if (factor.data) to_floats(factor.at(index, page_size), factor.dtype, page_size, to);
        };
        one(side.token_scale, scale);
        one(side.token_offset, offset);
        one(side.residual, residual);
        if (side.zero_point)
            for (int t = 0; t < page_size; t++) offset[t] *= -scale[t];
    }
};

}  // namespace kv
