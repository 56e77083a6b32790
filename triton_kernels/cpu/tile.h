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
    // Bytes of codes for one of `signs`.
    int less() const { return format == RANKED_4 ? 1 : 2; }
    // Numbers of a channel vector of one page-and-head: quarters without bits have no steps.
    int64_t numbers(const Factor& factor) const {
        return int64_t(part()) * (format == RANKED_2 && factor.dtype == STEP ? 3 : fields());
    }
    int blocks() const { return (int(dim) + FLOAT_BLOCK - 1) / FLOAT_BLOCK; }
    int row_bytes() const { return format == VECTORS ? int(dim) * item_size(dtype) : part(); }
};

// Rows of one page: `count` <= BLOCK tokens from `rows` on become `tile` [count, columns].  `work` is memory of
// `work_bytes`.
typedef void Unpack(const Side& side, const char* rows, int64_t row_bytes, const float* residual, int count,
                    uint8_t* work, float* tile);

// Two bytes for each one of codes, and what stores and loads of whole vectors touch beyond them.
inline size_t work_bytes(int columns) { return size_t(BLOCK) * columns / 2 + 8 * WORDS; }

// How a level follows from its code, beside the table of levels.
enum Kind { PLAIN, SLOPED, SIGNED, CENTRED, FLOATING, BLOCKED };

template <int BITS, Kind KIND>
void unpack_codes(const Side& side, const char* rows, int64_t row_bytes, const float* residual, int count, uint8_t*,
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

// W bytes, WORDS words, or WORDS bytes each in a word, from `p` on, where `bytes` are left.
inline Ints load_bytes(const uint8_t* p, int bytes) {
    if (bytes >= W) return load_bytes(p);
    uint8_t some[W] = {};
    std::memcpy(some, p, size_t(bytes));
    return load_bytes(some);
}

inline Words load_words(const uint8_t* p, int bytes) {
    if (bytes >= 2 * WORDS) return load_words(p);
    uint8_t some[2 * WORDS] = {};
    std::memcpy(some, p, size_t(bytes));
    return load_words(some);
}

inline Words widen_bytes(const uint8_t* p, int bytes) {
    if (bytes >= WORDS) return widen_bytes(p);
    uint8_t some[WORDS] = {};
    std::memcpy(some, p, size_t(bytes));
    return widen_bytes(some);
}

// Codes of ranked.py: each byte has one channel of every quarter.  PART is their number where it is known to the
// compiler, else 0.
template <int FORMAT, int PART>
void unpack_ranked(const Side& side, const char* rows, int64_t, const float*, int count, uint8_t* work, float* tile) {
    const int part = PART ? PART : side.part(), width = PART ? PART : side.width();
    const uint8_t *codes = (const uint8_t*)rows, *second = work;
    if constexpr (FORMAT == RANKED_4) second = (const uint8_t*)side.signs + (rows - side.codes);
    if constexpr (FORMAT == RANKED_3) {  // a byte for two channels becomes a byte with two nibbles for each
        const uint8_t* pairs = (const uint8_t*)side.signs + (rows - side.codes) / 2;
        for (int i = 0; i < count * part; i += 2 * WORDS) {
            Words fields = widen_bytes(pairs + i / 2, (count * part - i) / 2);
            fields = (fields | fields << 4) & 0x0f0f;
            store_words(work + i, (fields | fields << 2) & 0x3333);
        }
    }
    for (int t = 0; t < count; t++) {
        float* out = tile + int64_t(t) * 4 * width;
        for (int j = 0; j < part; j += W) {
            const int at = t * part + j;
            const Ints a = load_bytes(codes + at, part - j);
            const auto put = [&](int quarter, Floats code) { store(out + quarter * width + j, code); };
            if constexpr (FORMAT == RANKED_4) {
                const Ints b = load_bytes(second + at, part - j);
                put(0, numbers((a << 2 & 60) | (b & 3))), put(1, lowest<4>(a >> 4));
                put(2, lowest<3>(b >> 2)), put(3, numbers(b >> 5));
            } else if constexpr (FORMAT == RANKED_3) {
                const Ints b = load_bytes(second + at);
                put(0, lowest<4>(a)), put(1, numbers(a >> 4)), put(2, lowest<4>(b)), put(3, numbers(b >> 4));
            } else {
                put(0, lowest<4>(a)), put(1, lowest<2>(a >> 4)), put(2, numbers(a >> 6)), put(3, Floats{});
            }
        }
    }
}

// Codes of octet.py, whose signs follow from the codes of a block.
template <bool THREE, int PART>
void unpack_octets(const Side& side, const char* rows, int64_t, const float*, int count, uint8_t* work, float* tile) {
    const Table levels(side.levels);
    const int part = PART ? PART : side.part(), width = PART ? PART : side.width();
    const uint8_t* codes = (const uint8_t*)rows;
    const uint8_t* high = THREE ? (const uint8_t*)side.signs + (rows - side.codes) / 2 : codes;
    uint8_t *even = work, *odd = work + BLOCK * part + 2 * WORDS;
    for (int i = 0; i < count * part; i += 2 * WORDS) {
        const int left = count * part - i;
        const Words third = THREE ? widen_bytes(high + i / 2, left / 2) : Words{};
        Words fields[2];
        octet_indices<THREE>(load_words(codes + i, left), third, fields[0], fields[1]);
        store_words(even + i, fields[0]);
        store_words(odd + i, fields[1]);
    }
    for (int t = 0; t < count; t++) {
        float* out = tile + int64_t(t) * 4 * width;
        for (int j = 0; j < part; j += W) {
            const Ints a = load_bytes(even + t * part + j), b = load_bytes(odd + t * part + j);
            store(out + j, levels.at(a));
            store(out + width + j, levels.at(b));
            store(out + 2 * width + j, levels.at(a >> 4));
            store(out + 3 * width + j, levels.at(b >> 4));
        }
    }
}

template <int64_t DTYPE>
void unpack_vectors(const Side& side, const char* rows, int64_t row_bytes, const float*, int count, uint8_t*,
                    float* tile) {
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

// Unpackers of octets and of ranked channels with their PART.
template <int PART>
inline Unpack* quartered(const Side& side) {
    if (side.format == RANKED_4) return unpack_ranked<RANKED_4, PART>;
    if (side.format == RANKED_3) return unpack_ranked<RANKED_3, PART>;
    if (side.format == RANKED_2) return unpack_ranked<RANKED_2, PART>;
    return side.signs ? unpack_octets<true, PART> : unpack_octets<false, PART>;
}

inline Unpack* unpacker(const Side& side) {
    if (side.ranked() || (side.format == CODES_2 && side.octets)) {
        if (side.part() == 16) return quartered<16>(side);
        if (side.part() == 32) return quartered<32>(side);
        return quartered<0>(side);
    }
    switch (side.format) {
        case VECTORS: return vectors_of(side.dtype);
        case CODES_8: return side.middle ? unpack_codes<8, CENTRED> : unpack_codes<8, PLAIN>;
        case E4M3: return unpack_codes<8, FLOATING>;
        case CODES_4:
            if (side.block_scale) return unpack_codes<4, BLOCKED>;
            return side.slopes ? unpack_codes<4, SLOPED> : unpack_codes<4, PLAIN>;
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
    if (side.ranked()) return (void)std::memcpy(to, from, size_t(side.dim) * 4);
    const int part = side.part(), width = side.width();
    for (int field = 0; field < side.fields(); field++)
        std::memcpy(to + field * part, from + field * width, size_t(part) * 4);
}

// A channel vector of page-and-head `index` in the columns' order; zero for channels that have none.
inline void channel_factor(const Side& side, const Factor& factor, int64_t index, float* to) {
    const int part = side.part(), width = side.width(), size = item_size(factor.dtype);
    const int64_t numbers = side.numbers(factor);
    const int fields = int(numbers / part);
    const char* from = factor.at(index, numbers);
    for (int c = fields * width; c < side.columns(); c++) to[c] = 0;
    if (part == width) return to_floats(from, factor.dtype, int(numbers), to);
    for (int field = 0; field < fields; field++) {
        to_floats(from + int64_t(field) * part * size, factor.dtype, part, to + field * width);
        for (int j = part; j < width; j++) to[field * width + j] = 0;
    }
}

// Blocks of channels, of 256 at most, that are ranked by themselves: those of one block are as far apart.
inline int channel_blocks(int dim) { return dim <= 256 ? 1 : dim <= 512 ? 2 : dim <= 1024 ? 4 : 8; }

// The channel of each column of page-and-head `index`; of columns that are padding, channel 0.
inline void ranked_channels(const Side& side, int64_t index, int32_t* to) {
    const int part = side.part(), width = side.width();
    const uint8_t* from = (const uint8_t*)side.order + index * side.dim;
    const int blocks = channel_blocks(int(side.dim));
    for (int field = 0; field < 4; field++)
        for (int j = 0; j < width; j++)
            to[field * width + j] = j < part ? from[field * part + j] * blocks + (field * part + j) % blocks : 0;
}

// Those of the numbers `from` [dim, padded to whole vectors] that `channels` say.  DIM is their number where it is known
// to the compiler, else 0.
template <int DIM>
inline Floats gather(const float* from, int width, Ints channels) {
#if KV_WIDTH == 16
    const int dim = DIM ? DIM : width;
    const __m512i channel = (__m512i)channels, block = _mm512_srli_epi32(channel, 5);
    __m512 some = _mm512_setzero_ps();
    for (int first = 0; first < dim; first += 32) {
        const __m512 low = _mm512_loadu_ps(from + first);
        const __m512 high = first + 16 < dim ? _mm512_loadu_ps(from + first + 16) : low;
        const __mmask16 here = _mm512_cmpeq_epi32_mask(block, _mm512_set1_epi32(first / 32));
        some = _mm512_mask_mov_ps(some, here, _mm512_permutex2var_ps(low, channel, high));
    }
    return (Floats)some;
#else
    Floats some;
    for (int i = 0; i < W; i++) some[i] = from[channels[i]];
    return some;
#endif
}

// Rows of `query` [rows, columns], channels in their own order, become `scaled`: those of a page in its order, times its
// steps.  `constant` [rows]: their products with its offsets.  `totals` [rows, W] is work memory.
template <int DIM>
void rank_query(const float* query, int rows, int dim, const int32_t* channels, const float* steps,
                const float* offsets, int width, float* totals, float* scaled, float* constant) {
    const int columns = DIM ? DIM : width;
    std::memset(totals, 0, size_t(rows) * W * 4);
    for (int c = 0; c < columns; c += W) {
        const Ints some = (Ints)load((const float*)channels + c);
        const Floats step = load(steps + c), offset = load(offsets + c);
        for (int r = 0; r < rows; r++) {
            const Floats x = gather<DIM>(query + int64_t(r) * columns, dim, some);
            store(totals + r * W, load(totals + r * W) + x * offset);
            store(scaled + int64_t(r) * columns + c, x * step);
        }
    }
    for (int r = 0; r < rows; r++) constant[r] = sum(load(totals + r * W));
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
