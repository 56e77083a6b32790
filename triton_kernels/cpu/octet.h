// The codes of codecs/octet.py: what a word says of its signs, and the nearest codes of eight coordinates.
#pragma once

#include <algorithm>

#include "threads.h"
#include "vector.h"

namespace kv {

// Indices of the levels of words of codes in a table of levels and their negatives: fields 0 and 2 of a byte are the two
// nibbles of `even`, 1 and 3 those of `odd`.  Of 2 bits the highest bit of a nibble means nothing.  `high` has a byte of
// third bits in the lower half of each word.
template <bool THREE>
inline void octet_indices(Words codes, Words high, Words& even, Words& odd) {
    const Words differ = codes ^ (codes << 8 | codes >> 8);  // in both bytes
    const Words again = differ ^ differ >> 2;                // the sign of field f at bit 2 f + 2
    if constexpr (THREE) {
        const Words some = (again << 1 & 0x88) | (again >> 2 & 0x44), signs = some | some << 8;
        const Words third = high | high << 7;
        even = choose(0x3333, codes, choose(0x4444, third << 2, signs));
        odd = choose(0x3333, codes >> 2, choose(0x4444, third, signs << 1));
    } else {
        const Words some = (again & 0x44) | (again >> 1 & 0x88), signs = some | some << 8;
        even = choose(0x3333, codes, signs);
        odd = choose(0x3333, codes >> 2, signs >> 1);
    }
}

// Signed codes of the nearest levels of rows [rows, dim]: `octet.search`, which see.  In the order of `SEARCH` in
// native.py.
struct Search {
    const float* numbers;
    int64_t rows, dim;
    const float* levels;
    int64_t level_count;  // 4 or 8
    uint8_t* codes;
    int64_t threads;
    void* fork;
};

// W blocks, one in each lane: coordinates `x` [8] become codes [8].
template <int COUNT>
void search_blocks(const Floats* x, const float* levels, Ints* codes) {
    const auto square = [&](Floats y, int code) {
        const Floats distance = y - splat(levels[code]);
        return distance * distance;
    };
    const auto minimum = [](Floats a, Floats b) { return select(b < a, b, a); };
    const auto error = [&](Floats y, int parity) {
        Floats best = square(y, parity);
        for (int code = parity + 2; code < COUNT; code += 2) best = minimum(best, square(y, code));
        return best;
    };
    Floats least[4][2][2];  // of coordinates i and i + 4, by sign and v
    Ints second[4][2][2];   // whether that is with u_i = 1
    for (int i = 0; i < 4; i++)
        for (int sign = 0; sign < 2; sign++) {
            const Floats a = sign ? -x[i] : x[i], b = sign ? -x[i + 4] : x[i + 4];
            const Floats a0 = error(a, 0), a1 = error(a, 1), b0 = error(b, 0), b1 = error(b, 1);
            for (int v = 0; v < 2; v++) {
                const Floats zero = a0 + (v ? b1 : b0), one = a1 + (v ? b0 : b1);
                second[i][sign][v] = one < zero;
                least[i][sign][v] = minimum(zero, one);
            }
        }
    const auto sign_of = [](int pattern, int i) { return (pattern >> (i + 1) % 4 ^ pattern >> (i + 2) % 4) & 1; };
    Floats best = {};
    Ints which = {};
    for (int pattern = 0; pattern < 16; pattern++) {
        Floats term[4];
        for (int i = 0; i < 4; i++) term[i] = least[i][sign_of(pattern, i)][pattern >> i & 1];
        const Floats cost = (term[0] + term[1]) + (term[2] + term[3]);
        const Ints better = cost < best;
        which = pattern ? (better & pattern) | (~better & which) : which;
        best = pattern ? minimum(best, cost) : cost;
    }
    const auto pick = [](Ints condition, Ints yes, Ints no) { return (condition & yes) | (~condition & no); };
    for (int i = 0; i < 4; i++) {
        const Ints v = -(which >> i & 1), sign = -((which >> (i + 1) % 4 ^ which >> (i + 2) % 4) & 1);
        const Ints u = pick(sign, pick(v, second[i][1][1], second[i][1][0]), pick(v, second[i][0][1], second[i][0][0]));
        for (int half = 0; half < 2; half++) {
            const int c = i + 4 * half;
            const Floats y = (Floats)((Ints)x[c] ^ (sign & INT32_MIN));
            const Ints odd = half ? u ^ v : u;
            Ints code = odd & 1;
            Floats nearest = select(odd, square(y, 1), square(y, 0));
            for (int next = 2; next < COUNT; next += 2) {
                const Floats other = select(odd, square(y, next + 1), square(y, next));
                code += (other < nearest) & 2;
                nearest = minimum(nearest, other);
            }
            codes[c] = code + (sign & COUNT);
        }
    }
}

inline void search(const Search& call) {
    constexpr int64_t SOME = 32 * W;  // blocks
    const int64_t dim = call.dim, words = dim / 8, part = dim / 4, blocks = call.rows * words;
    for_each_item((blocks + SOME - 1) / SOME, int(call.threads), call.fork, [&](int64_t item) {
        const int64_t last = std::min(blocks, (item + 1) * SOME);
        for (int64_t first = item * SOME; first < last; first += W) {
            const int count = int(std::min<int64_t>(W, last - first));
            float numbers[8][W] = {};
            Floats x[8];
            Ints codes[8];
            int64_t at[W];  // of the first coordinate
            for (int lane = 0; lane < count; lane++) {
                const int64_t block = first + lane;
                at[lane] = block / words * dim + block % words * 2;
                for (int c = 0; c < 8; c++) numbers[c][lane] = call.numbers[at[lane] + c % 4 * part + c / 4];
            }
            std::memcpy(x, numbers, sizeof x);
            if (call.level_count == 4)
                search_blocks<4>(x, call.levels, codes);
            else
                search_blocks<8>(x, call.levels, codes);
            for (int lane = 0; lane < count; lane++)
                for (int c = 0; c < 8; c++) call.codes[at[lane] + c % 4 * part + c / 4] = uint8_t(codes[c][lane]);
        }
    });
}

}  // namespace kv
