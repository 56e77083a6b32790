// Weights in the blocks of GGUF files (../blocks.py has their layouts): unpacked, or multiplied without being stored.
#pragma once

#include "threads.h"
#include "vector.h"

namespace kv {

// Numbers of the types in a file.
enum BlockType : int64_t { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

// `out`: [rows, columns], contiguous, of `dtype`.  `row_bytes`: from one row of blocks to the next.
struct UnpackBlocks {
    const uint8_t* blocks;
    int64_t type, rows, columns, row_bytes;
    void* out;
    int64_t dtype, threads;
    void* fork;
};

// `x`: [n, columns] and `out`: [n, rows], float32, contiguous.
struct MultiplyBlocks {
    const uint8_t* blocks;
    int64_t type, rows, columns, row_bytes;
    const float* x;
    int64_t n;
    float* out;
    int64_t threads;
    void* fork;
};

constexpr int ROWS_PER_ITEM = 16;

inline float half_at(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, sizeof h);
    return half_to_float(h);
}

template <int64_t TYPE>
void unpack_short(const uint8_t* block, float* out) {
    constexpr bool offset = TYPE == Q4_1 || TYPE == Q5_1, fifth = TYPE == Q5_0 || TYPE == Q5_1;
    const float d = half_at(block);
    if (TYPE == Q8_0) {
        const int8_t* q = (const int8_t*)block + 2;
        for (int i = 0; i < 32; i++) out[i] = d * float(q[i]);
        return;
    }
    const float m = offset ? half_at(block + 2) : 0.0f;
    const uint8_t* q = block + (offset ? 4 : 2);
    constexpr int middle = offset ? 0 : fifth ? 16 : 8;
    uint32_t bits = 0;
    if (fifth) {
        std::memcpy(&bits, q, sizeof bits);
        q += 4;
    }
    for (int i = 0; i < 16; i++) {
        int low = q[i] & 15, high = q[i] >> 4;
        if (fifth) {
            low |= int(bits >> i & 1) << 4;
            high |= int(bits >> (i + 16) & 1) << 4;
        }
        out[i] = offset ? d * float(low) + m : d * float(low - middle);
        out[i + 16] = offset ? d * float(high) + m : d * float(high - middle);
    }
}

template <int64_t TYPE>
void unpack_long(const uint8_t* block, float* out) {
    const float d = half_at(block), dm = half_at(block + 2);
    const uint8_t *s = block + 4, *fifth = block + 16, *q = block + (TYPE == Q5_K ? 48 : 16);
    for (int j = 0; j < 8; j++) {
        int scale, minimum;
        if (j < 4) {
            scale = s[j] & 63;
            minimum = s[j + 4] & 63;
        } else {
            scale = (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
            minimum = s[j + 4] >> 4 | s[j] >> 6 << 4;
        }
        const float step = d * float(scale), low = dm * float(minimum);
        const uint8_t* codes = q + j / 2 * 32;
        const int shift = j % 2 * 4;
        for (int i = 0; i < 32; i++) {
            int code = codes[i] >> shift & 15;
            if (TYPE == Q5_K) code |= (fifth[i] >> j & 1) << 4;
            out[j * 32 + i] = step * float(code) - low;
        }
    }
}

inline void unpack_q6(const uint8_t* block, float* out) {
    const float d = half_at(block + 208);
    const int8_t* scales = (const int8_t*)block + 192;
    for (int half = 0; half < 2; half++, block += 64, out += 128, scales += 8) {
        const uint8_t* high = block + 128 - half * 32;  // 32 bytes on, while the low bits are 64 on
        for (int j = 0; j < 4; j++) {
            const uint8_t* low = block + j % 2 * 32;
            const int shift = j / 2 * 4;
            for (int part = 0; part < 2; part++) {
                const float step = d * float(scales[j * 2 + part]);
                for (int i = part * 16; i < part * 16 + 16; i++) {
                    const int code = (low[i] >> shift & 15) | (high[i] >> j * 2 & 3) << 4;
                    out[j * 32 + i] = step * float(code - 32);
                }
            }
        }
    }
}

template <int ELEMENTS, int SIZE, class Block>
void unpack_blocks(const uint8_t* blocks, int64_t columns, float* out, const Block& block) {
    for (int64_t i = 0; i < columns; i += ELEMENTS, blocks += SIZE) block(blocks, out + i);
}

inline void unpack_row(int64_t type, const uint8_t* blocks, int64_t columns, float* out) {
    switch (type) {
        case Q4_0: return unpack_blocks<32, 18>(blocks, columns, out, unpack_short<Q4_0>);
        case Q4_1: return unpack_blocks<32, 20>(blocks, columns, out, unpack_short<Q4_1>);
        case Q5_0: return unpack_blocks<32, 22>(blocks, columns, out, unpack_short<Q5_0>);
        case Q5_1: return unpack_blocks<32, 24>(blocks, columns, out, unpack_short<Q5_1>);
        case Q8_0: return unpack_blocks<32, 34>(blocks, columns, out, unpack_short<Q8_0>);
        case Q4_K: return unpack_blocks<256, 144>(blocks, columns, out, unpack_long<Q4_K>);
        case Q5_K: return unpack_blocks<256, 176>(blocks, columns, out, unpack_long<Q5_K>);
        case Q6_K: return unpack_blocks<256, 210>(blocks, columns, out, unpack_q6);
    }
}

inline void unpack(const UnpackBlocks& call) {
    for_each_item((call.rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, int(call.threads), call.fork, [&](int64_t item) {
        std::vector<float> row(call.columns);
        const int64_t end = std::min(call.rows, (item + 1) * ROWS_PER_ITEM);
        for (int64_t r = item * ROWS_PER_ITEM; r < end; r++) {
            unpack_row(call.type, call.blocks + r * call.row_bytes, call.columns, row.data());
            if (call.dtype == FLOAT32) {
                std::memcpy((float*)call.out + r * call.columns, row.data(), 4 * call.columns);
                continue;
            }
            uint16_t* out = (uint16_t*)call.out + r * call.columns;
            if (call.dtype == BFLOAT16)
                for (int64_t i = 0; i < call.columns; i++) out[i] = float_to_bfloat(row[i]);
            else
                for (int64_t i = 0; i < call.columns; i++) out[i] = float_to_half(row[i]);
        }
    });
}

// Products of one row of weights with N rows of `x`; `columns` is a multiple of 32, and so of W.
template <int N>
void dot_rows(const float* row, const float* x, int64_t columns, float* out, int64_t stride) {
    Floats sums[N] = {};
    for (int64_t i = 0; i < columns; i += W) {
        const Floats w = load(row + i);
        for (int n = 0; n < N; n++) sums[n] += w * load(x + n * columns + i);
    }
    for (int n = 0; n < N; n++) {
        float sum = 0.0f;
        for (int i = 0; i < W; i++) sum += sums[n][i];
        out[n * stride] = sum;
    }
}

inline void multiply(const MultiplyBlocks& call) {
    for_each_item((call.rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, int(call.threads), call.fork, [&](int64_t item) {
        std::vector<float> row(call.columns);
        const int64_t end = std::min(call.rows, (item + 1) * ROWS_PER_ITEM);
        for (int64_t r = item * ROWS_PER_ITEM; r < end; r++) {
            unpack_row(call.type, call.blocks + r * call.row_bytes, call.columns, row.data());
            int64_t n = 0;
            for (; n + 4 <= call.n; n += 4)
                dot_rows<4>(row.data(), call.x + n * call.columns, call.columns, call.out + n * call.rows + r, call.rows);
            for (; n < call.n; n++)
                dot_rows<1>(row.data(), call.x + n * call.columns, call.columns, call.out + n * call.rows + r, call.rows);
        }
    });
}

}  // namespace kv
