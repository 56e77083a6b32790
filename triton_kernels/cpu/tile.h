// Sides of the pages (keys or values) as Python describes them, and how rows of a page become floats.
// Members are 64 bits wide, in the order of `_SIDE` in native.py.
#pragma once

#include "octet.h"
#include "small_float.h"
#include "vector.h"

namespace kv {

constexpr int BLOCK = 16;  // tokens that are unpacked at a time: their floats stay in the first-level cache

constexpr int MIDDLE = 128;  // of 8-bit codes that stand for -128 to 127

enum Format : int64_t {
    VECTORS = 0, CODES_8 = 1, CODES_4 = 2, CODES_2 = 3, CODES_1 = 4,
    RANKED_4 = 5, RANKED_3 = 6, RANKED_2 = 7,  // of ranked.py: four quarters of channels in the order of a page
    E4M3 = 8                                   // of small_float.py
};

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
    const char* signs;    // of CODES_2, half as many bytes, packed as in three_bit.py: a set bit negates a level; or null;
                          // of RANKED_4 and RANKED_3, the second plane
    int64_t middle;       // MIDDLE or 0
    int64_t octets;       // whether codes are those of octet.py; `signs` are then their third bits, or null
    const char* block_scale;  // of CODES_4, as in small_float.py: an e4m3 scale for FLOAT_BLOCK channels; or null
    Factor token_scale, token_offset, residual, channel_scale, channel_offset;
    const char* order;   // of ranked channels, uint8: the channel of each rank in each page; or null
    int64_t zero_point;  // whether token_offset is a zero point: the offset is then -zero * scale
    const char* tail;    // the open page
    int64_t tail_dtype, tail_batch, tail_head, tail_token;  // strides in elements
    const char* first;  // tokens that are read as they came, [batch, heads, n, dim] in tail_dtype; or null

    bool ranked() const { return format >= RANKED_4 && format <= RANKED_2; }
    int fields() const { return format == VECTORS || format == E4M3 ? 1 : ranked() ? 4 : 1 << (format - 1); }
    int part() const { return int(dim) / fields(); }
    // Channels are in the order of fields, each padded to whole vectors.
    int width() const { return round_up(part(), W); }
    int columns() const { return fields() * width(); }
    int blocks() const { return (int(dim) + FLOAT_BLOCK - 1) / FLOAT_BLOCK; }
    int row_bytes() const { return format == VECTORS ? int(dim) * item_size(dtype) : part(); }
};

// Rows of one page: `count` <= BLOCK tokens from `rows` on become `tile` [count, columns].
typedef void Unpack(const Side& side, const char* rows, int64_t row_bytes, const float* residual, int count,
                    float* tile);

// How a level follows from its code, beside the table of levels.
enum Kind { PLAIN, SLOPED, SIGNED, CENTRED, FLOATING, BLOCKED };

template <int BITS, Kind KIND>
void unpack_codes(const Side& side, const char* rows, int64_t row_bytes, const float* residual, int count,
                  float* tile) {
    constexpr int FIELDS = 8 / BITS;
    static const float none[16] = {};
    const Table levels(BITS == 8 ? none : side.levels), slopes(KIND == SLOPED ? side.slopes : none);
    const int part = side.part(), width = side.width();
    const bool whole = part % FLOAT_BLOCK == 0;  // no block lies in two fields, nor two in a vector
    const float* numbers = nullptr;
    const uint8_t* scales = nullptr;  // of the blocks of a token
    if (KIND == BLOCKED) {
        numbers = e4m3_numbers();
        scales = (const uint8_t*)side.block_scale + (rows - side.codes) / row_bytes * side.blocks();
    }
    // `signs` of a lane: bit f is that of its channel in field f.
    const auto expand = [&](Ints bytes, int j, float* out, Floats rest, Ints signs) {
        for (int field = 0; field < FIELDS; field++) {
            Floats level;
            if constexpr (KIND == FLOATING) {
                level = from_e4m3(bytes);
            } else if constexpr (BITS == 8) {
                level = __builtin_convertvector(KIND == CENTRED ? bytes - MIDDLE : bytes, Floats);
            } else {
                level = levels.at(bytes >> (field * BITS));
                if constexpr (KIND == SLOPED) level += rest * slopes.at(bytes >> (field * BITS));
                if constexpr (KIND == SIGNED) level = (Floats)((Ints)level ^ (signs << (31 - field) & INT32_MIN));
                if constexpr (KIND == BLOCKED)
                    if (whole) level *= numbers[scales[(field * part + j) / FLOAT_BLOCK]];
            }
            store(out + field * width + j, level);
        }
    };
    for (int t = 0; t < count; t++) {
        const uint8_t* bytes = (const uint8_t*)rows + t * row_bytes;
        const uint8_t* signs = KIND == SIGNED ? (const uint8_t*)side.signs + ((const char*)bytes - side.codes) / 2 : bytes;
        float* out = tile + int64_t(t) * FIELDS * width;
        const Floats rest = KIND == SLOPED ? splat(residual[t]) : Floats{};
        int j = 0;
        for (; j + W <= part; j += W)
            expand(load_bytes(bytes + j), j, out, rest, KIND == SIGNED ? load_nibbles(signs + j / 2) : Ints{});
        if (j < part) {
            uint8_t last[W] = {}, some[W] = {};
            std::memcpy(last, bytes + j, size_t(part - j));
            if (KIND == SIGNED) std::memcpy(some, signs + j / 2, size_t(part - j) / 2);
            expand(load_bytes(last), j, out, rest, KIND == SIGNED ? load_nibbles(some) : Ints{});
        }
        if (KIND == BLOCKED) {
            if (!whole) scale_blocks(scales, numbers, part, width, out);
            scales += side.blocks();
        }
    }
}

// Codes of ranked.py: each byte has one channel of every quarter.
template <int FORMAT>
void unpack_ranked(const Side& side, const char* rows, int64_t row_bytes, const float*, int count, float* tile) {
    const int part = side.part(), width = side.width();
    constexpr int LESS = FORMAT == RANKED_3 ? 2 : 1;  // bytes of codes for one of the second plane
    const char* second = side.signs + (rows - side.codes) / LESS;
    const auto expand = [&](Ints a, Ints b, float* out) {
        const auto put = [&](int quarter, Ints code) {
            store(out + quarter * width, __builtin_convertvector(code, Floats));
        };
        if constexpr (FORMAT == RANKED_4) {
            put(0, (a & 15) << 2 | (b & 3)), put(1, a >> 4), put(2, b >> 2 & 7), put(3, b >> 5);
        } else if constexpr (FORMAT == RANKED_3) {
            put(0, a & 15), put(1, a >> 4), put(2, b & 3), put(3, b >> 2);
        } else {
            put(0, a & 15), put(1, a >> 4 & 3), put(2, a >> 6), put(3, Ints{});
        }
    };
    const auto load_second = [](const uint8_t* p) {
        if constexpr (FORMAT == RANKED_4) return load_bytes(p);
        if constexpr (FORMAT == RANKED_3) return load_nibbles(p);
        return Ints{};
    };
    for (int t = 0; t < count; t++) {
        const uint8_t *a = (const uint8_t*)rows + t * row_bytes, *b = (const uint8_t*)second + t * row_bytes / LESS;
        float* out = tile + int64_t(t) * 4 * width;
        int j = 0;
        for (; j + W <= part; j += W) expand(load_bytes(a + j), load_second(b + j / LESS), out + j);
        if (j < part) {
            uint8_t last[W] = {}, rest[W] = {};
            std::memcpy(last, a + j, size_t(part - j));
            if (FORMAT != RANKED_2) std::memcpy(rest, b + j / LESS, size_t(part - j) / LESS);
            expand(load_bytes(last), load_second(rest), out + j);
        }
    }
}

// Codes of octet.py, whose signs follow from the codes of a block.
template <bool THREE>
void unpack_octets(const Side& side, const char* rows, int64_t row_bytes, const float*, int count, float* tile) {
    const Table levels(side.levels);
    const int part = side.part(), width = side.width();
    const auto expand = [&](Ints codes, Ints high, float* out) {
        const OctetIndices index(codes, high, THREE);
        store(out, levels.at(index.even));
        store(out + width, levels.at(index.odd));
        store(out + 2 * width, levels.at(index.even >> 4));
        store(out + 3 * width, levels.at(index.odd >> 4));
    };
    for (int t = 0; t < count; t++) {
        const uint8_t* codes = (const uint8_t*)rows + t * row_bytes;
        const uint8_t* high = THREE ? (const uint8_t*)side.signs + ((const char*)codes - side.codes) / 2 : codes;
        float* out = tile + int64_t(t) * 4 * width;
        int j = 0;
        for (; j + W <= part; j += W)
            expand(load_bytes(codes + j), THREE ? load_pairs(high + j / 2) : Ints{}, out + j);
        if (j < part) {
            uint8_t last[W] = {}, some[W] = {};
            std::memcpy(last, codes + j, size_t(part - j));
            if (THREE) std::memcpy(some, high + j / 2, size_t(part - j) / 2);
            expand(load_bytes(last), THREE ? load_pairs(some) : Ints{}, out + j);
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
        case E4M3: return unpack_codes<8, FLOATING>;
        case CODES_4:
            if (side.block_scale) return unpack_codes<4, BLOCKED>;
            return side.slopes ? unpack_codes<4, SLOPED> : unpack_codes<4, PLAIN>;
        case CODES_2:
            if (side.octets) return side.signs ? unpack_octets<true> : unpack_octets<false>;
            if (side.signs) return unpack_codes<2, SIGNED>;
            return side.slopes ? unpack_codes<2, SLOPED> : unpack_codes<2, PLAIN>;
        case RANKED_4: return unpack_ranked<RANKED_4>;
        case RANKED_3: return unpack_ranked<RANKED_3>;
        case RANKED_2: return unpack_ranked<RANKED_2>;
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
    if (side.ranked()) return (void)std::memcpy(to, from, size_t(side.dim) * 4);
    const int part = side.part(), width = side.width();
    for (int field = 0; field < side.fields(); field++)
        std::memcpy(to + field * part, from + field * width, size_t(part) * 4);
}

// A channel vector of page-and-head `index` in the columns' order; zero for channels that have none.
inline void channel_factor(const Side& side, const Factor& factor, int64_t index, float* to) {
    const int part = side.part(), width = side.width(), size = item_size(factor.dtype);
    const int fields = side.format == RANKED_2 && factor.dtype == STEP ? 3 : side.fields();
    const char* from = factor.at(index, int64_t(part) * fields);
    for (int c = fields * width; c < side.columns(); c++) to[c] = 0;
    for (int field = 0; field < fields; field++) {
        to_floats(from + int64_t(field) * part * size, factor.dtype, part, to + field * width);
        for (int j = part; j < width; j++) to[field * width + j] = 0;
    }
}

// The channel of each column of page-and-head `index`; of columns that are padding, channel 0.
inline void ranked_channels(const Side& side, int64_t index, int32_t* to) {
    const int part = side.part(), width = side.width();
    const uint8_t* from = (const uint8_t*)side.order + index * side.dim;
    for (int field = 0; field < 4; field++)
        for (int j = 0; j < width; j++) to[field * width + j] = j < part ? from[field * part + j] : 0;
}

// `from` [dim, padded to whole vectors] in the order of `channels` [columns].
inline void permute(const float* from, int dim, const int32_t* channels, int columns, float* to) {
#if KV_WIDTH == 16
    for (int c = 0; c < columns; c += W) {
        const __m512i channel = _mm512_loadu_si512(channels + c), block = _mm512_srli_epi32(channel, 5);
        __m512 some = _mm512_setzero_ps();
        for (int first = 0; first < dim; first += 32) {
            const __m512 low = _mm512_loadu_ps(from + first);
            const __m512 high = first + 16 < dim ? _mm512_loadu_ps(from + first + 16) : low;
            const __mmask16 here = _mm512_cmpeq_epi32_mask(block, _mm512_set1_epi32(first / 32));
            some = _mm512_mask_mov_ps(some, here, _mm512_permutex2var_ps(low, channel, high));
        }
        _mm512_storeu_ps(to + c, some);
    }
#else
    for (int c = 0; c < columns; c++) to[c] = from[channels[c]];
#endif
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
