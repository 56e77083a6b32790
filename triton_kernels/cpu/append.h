// Storing: tokens into open pages, and full pages encoded by the codecs whose arithmetic is exact to the bit.
#pragma once

#include <algorithm>
#include <memory>

#include "threads.h"
#include "ranked.h"
#include "tile.h"

namespace kv {

// Tokens [batch, heads, tokens, dim] and where they go in the open page; strides in elements, of both alike.
// In the order of `_COPY` in native.py.
struct Copy {
    const char* from;
    int64_t from_batch, from_head, from_token;
    char* to;
    int64_t to_batch, to_head, to_token;
    int64_t heads, row_bytes, item_size;
};

struct Append {
    int64_t batch, tokens;
    const int32_t* lengths;  // [batch, 2]
    int32_t* new_lengths;
    Copy keys, values;
};

// Only for tokens that all fit into the open pages.
inline void append(const Append& call) {
    for (int64_t b = 0; b < call.batch; b++) {
        const int32_t* lengths = call.lengths + 2 * b;
        for (const Copy* copy : {&call.keys, &call.values})
            for (int64_t h = 0; h < copy->heads; h++) {
                const char* from = copy->from + (b * copy->from_batch + h * copy->from_head) * copy->item_size;
                char* to = copy->to + (b * copy->to_batch + h * copy->to_head) * copy->item_size;
                for (int64_t t = 0; t < call.tokens; t++)
                    std::memcpy(to + (lengths[1] + t) * copy->to_token * copy->item_size,
                                from + t * copy->from_token * copy->item_size, size_t(copy->row_bytes));
            }
        call.new_lengths[2 * b] = lengths[0];
        call.new_lengths[2 * b + 1] = lengths[1] + int32_t(call.tokens);
    }
}

// Full pages [batch, pages, heads, page_size, dim], strides in elements, to be stored as pages `ids` [batch, pages].
// In the order of `ENCODE` in native.py.
struct Encode {
    const char* from;
    int64_t dtype, from_batch, from_page, from_head, from_token;
    int64_t batch, pages, heads, page_size;
    const int64_t* ids;
    int64_t given;  // whether the channels' scales and offsets are there already
    const float* covered;  // of ranked channels: how much of a range the grids of each quarter cover
    const float* metric;   // [batch, heads, dim, dim], second moments of the queries; or null
    int64_t threads;
    void* fork;
    Side side;
};

// Rotates `tokens` rows of `x` [tokens, dim] in place, in float64, where these sums are all but always exact, so that
// the order of additions does not show in the codes.
inline void hadamard_exact(float* x, int tokens, int dim) {
    constexpr int SOME = 8;  // tokens side by side, one vector
    typedef double Doubles __attribute__((vector_size(8 * SOME)));
    const int order = dim & -dim;
    const double factor = std::pow(double(order), -0.5);
    static thread_local std::vector<Doubles> columns;
    if (int(columns.size()) < dim) columns.resize(size_t(dim));
    for (int first = 0; first < tokens; first += SOME) {
        const int count = std::min(SOME, tokens - first);
        float* rows = x + int64_t(first) * dim;
        for (int c = 0; c < dim; c++)
            for (int t = 0; t < SOME; t++) columns[c][t] = t < count ? double(rows[t * dim + c]) : 0.0;
        for (int half = 1; half < order; half *= 2)
            for (int i = 0; i < dim; i += 2 * half)
                for (int j = i; j < i + half; j++) {
                    const Doubles a = columns[j], b = columns[j + half];
                    columns[j] = a + b;
                    columns[j + half] = a - b;
                }
        for (int c = 0; c < dim; c++) {
            const Doubles y = columns[c] * factor;
            for (int t = 0; t < count; t++) rows[t * dim + c] = float(y[t]);
        }
    }
}

// Rotates pages, strided as those of Encode, to float32 `to` [batch, pages, heads, page_size, dim].
// In the order of `ROTATE` in native.py.
struct Rotate {
    const char* from;
    int64_t dtype, from_batch, from_page, from_head, from_token;
    int64_t batch, pages, heads, page_size, dim;
    float* to;
    int64_t threads;
    void* fork;
};

inline void rotate(const Rotate& call) {
    for_each_item(call.batch * call.pages * call.heads, int(call.threads), call.fork, [&](int64_t item) {
        const int64_t head = item % call.heads, page = item / call.heads % call.pages,
                      batch = item / call.heads / call.pages;
        const char* from = call.from + (batch * call.from_batch + page * call.from_page + head * call.from_head) *
                                           item_size(call.dtype);
        float* to = call.to + item * call.page_size * call.dim;
        for (int64_t t = 0; t < call.page_size; t++)
            to_floats(from + t * call.from_token * item_size(call.dtype), call.dtype, int(call.dim), to + t * call.dim);
        hadamard_exact(to, int(call.page_size), int(call.dim));
    });
}

// Number of `boundaries` strictly below each of `count` numbers.  In the order of `BUCKET` in native.py.
struct Bucket {
    const float* numbers;
    int64_t count;
    const float* boundaries;
    int64_t boundary_count;
    uint8_t* codes;
    int64_t threads;
    void* fork;
};

inline void bucket(const Bucket& call) {
    constexpr int64_t SOME = 4096;
    for_each_item((call.count + SOME - 1) / SOME, int(call.threads), call.fork, [&](int64_t item) {
        const int64_t last = std::min(call.count, (item + 1) * SOME);
        int64_t i = item * SOME;
        for (; i + W <= last; i += W) {
            const Floats x = load(call.numbers + i);
            Ints codes = {};
            for (int64_t b = 0; b < call.boundary_count; b++) codes -= x > splat(call.boundaries[b]);
            for (int lane = 0; lane < W; lane++) call.codes[i + lane] = uint8_t(codes[lane]);
        }
        for (; i < last; i++) {
            call.codes[i] = 0;
            for (int64_t b = 0; b < call.boundary_count; b++) call.codes[i] += call.numbers[i] > call.boundaries[b];
        }
    });
}

// Codes of one token, `fields` per byte, the lowest standing for FIRST; STEP is 1 where each channel has an offset and a
// divisor, 0 where all share.
template <int BITS, int STEP, int FIRST = 0>
void affine_codes(const float* x, const float* offset, const float* divisor, int part, uint8_t* codes) {
    constexpr float LOW = FIRST, LAST = FIRST + (1 << BITS) - 1;
    constexpr float INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
    const auto code = [&](int c) {
        const float scaled = (x[c] - offset[c * STEP]) / divisor[c * STEP];
        const float inside = scaled > LOW ? (scaled < LAST ? scaled : LAST) : LOW;
        return int((inside + INTEGER) - INTEGER) - FIRST;
    };
    for (int j = 0; j < part; j++) {
        int byte = 0;
        for (int field = 0; field < 8 / BITS; field++) byte |= code(field * part + j) << (field * BITS);
        codes[j] = uint8_t(byte);
    }
}

template <int BITS>
void encode_affine(const Encode& call, const float* x, int64_t index, float* low, float* high) {
    const Side& side = call.side;
    const int dim = int(side.dim), part = side.part(), page_size = int(call.page_size);
    uint8_t* codes = (uint8_t*)side.codes + index * page_size * part;
    const bool channels = side.channel_scale.data;
    const Factor &scale = channels ? side.channel_scale : side.token_scale;
    const Factor &shift = channels ? side.channel_offset : side.token_offset;
    const int count = channels ? dim : page_size;
    uint16_t* steps = (uint16_t*)scale.data + index * count;
    uint16_t* offsets = (uint16_t*)shift.data + index * count;
    if (channels) {
        std::memcpy(low, x, size_t(dim) * 4);
        std::memcpy(high, x, size_t(dim) * 4);
        for (int t = 1; t < page_size; t++)
            for (int c = 0; c < dim; c++) {
                const float value = x[int64_t(t) * dim + c];
                low[c] = value < low[c] ? value : low[c];
                high[c] = value > high[c] ? value : high[c];
            }
    } else {
        for (int t = 0; t < page_size; t++) {
            const float* row = x + int64_t(t) * dim;
            low[t] = high[t] = row[0];
            for (int c = 0; c < dim; c++) {
                low[t] = row[c] < low[t] ? row[c] : low[t];
                high[t] = row[c] > high[t] ? row[c] : high[t];
            }
        }
    }
    for (int i = 0; i < count; i++) {
        offsets[i] = half_at_most(low[i]);
        const float offset = half_to_float(offsets[i]), width = high[i] - offset;
        steps[i] = half_at_least((width > 0 ? width : 0) / float((1 << BITS) - 1));
        const float step = half_to_float(steps[i]);
        low[i] = offset;
        high[i] = step > 0 ? step : 1.0f;  // a step of zero: every element equals the offset, code 0
    }
    for (int t = 0; t < page_size; t++) {
        const float* row = x + int64_t(t) * dim;
        if (channels)
            affine_codes<BITS, 1>(row, low, high, part, codes + int64_t(t) * part);
        else
            affine_codes<BITS, 0>(row, low + t, high + t, part, codes + int64_t(t) * part);
    }
}

// Codes in a range that was measured beforehand; `offset` and `divisor` are work memory, [dim].
inline void encode_given(const Encode& call, const float* x, int64_t index, float* offset, float* divisor) {
    const Side& side = call.side;
    const int dim = int(side.dim), page_size = int(call.page_size);
    uint8_t* codes = (uint8_t*)side.codes + index * page_size * dim;
    to_floats(side.channel_offset.at(index, dim), side.channel_offset.dtype, dim, offset);
    to_floats(side.channel_scale.at(index, dim), side.channel_scale.dtype, dim, divisor);
    for (int c = 0; c < dim; c++) divisor[c] = divisor[c] > 0 ? divisor[c] : 1.0f;
    for (int t = 0; t < page_size; t++)
        affine_codes<8, 1, -MIDDLE>(x + int64_t(t) * dim, offset, divisor, dim, codes + int64_t(t) * dim);
}

inline void encode(const Encode& call) {
    const int dim = int(call.side.dim), page_size = int(call.page_size), widest = std::max(dim, page_size);
    for_each_item(call.batch * call.pages * call.heads, int(call.threads), call.fork, [&](int64_t item) {
        static thread_local std::vector<float> scratch;
        scratch.resize(std::max(scratch.size(), size_t(page_size) * dim + 2 * size_t(widest)));
        float *x = scratch.data(), *low = x + int64_t(page_size) * dim, *high = low + widest;
        const int64_t head = item % call.heads, page = item / call.heads % call.pages,
                      batch = item / call.heads / call.pages;
        const char* from = call.from + (batch * call.from_batch + page * call.from_page + head * call.from_head) *
                                           item_size(call.dtype);
        for (int t = 0; t < page_size; t++)
            to_floats(from + t * call.from_token * item_size(call.dtype), call.dtype, dim, x + int64_t(t) * dim);
        if (call.side.rotated) hadamard_exact(x, page_size, dim);
        const int64_t index = call.ids[batch * call.pages + page] * call.heads + head;
        if (call.side.ranked())
            encode_ranked(call.side, x, page_size, index, call.covered,
                          call.metric ? call.metric + (batch * call.heads + head) * dim * dim : nullptr);
        else if (call.given)
            encode_given(call, x, index, low, high);
        else if (call.side.format == E4M3)
            encode_e4m3(x, int64_t(page_size) * dim, (uint8_t*)call.side.codes + index * page_size * dim);
        else if (call.side.block_scale)
            encode_blocks(x, page_size, dim, (uint8_t*)call.side.codes + index * page_size * call.side.part(),
                          (uint8_t*)call.side.block_scale + index * page_size * call.side.blocks());
        else if (call.side.format == CODES_8)
            encode_affine<8>(call, x, index, low, high);
        else
            encode_affine<4>(call, x, index, low, high);
    });
}

}  // namespace kv
