// Encoding keys whose channels are ranked, as codecs/ranked.py and codecs/feedback.py say: the same operations in the same
// order, but for the sums of the feedback.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "half.h"
#include "tile.h"

namespace kv {

constexpr double DAMPING = 0.05;
constexpr int LARGEST_STEP = 247;

// A product that no addition is fused with.
inline float product(float a, float b) {
    volatile float rounded = a * b;
    return rounded;
}

// U of the damped `metric` [dim, dim] in `order`, column by column: factor[j * dim + i] = U_ij for i < j.
// All zero where the metric has no such factor.
inline void feedback_factor(const float* metric, const int* order, int dim, float* factor) {
    static thread_local std::vector<double> memory;
    memory.resize(size_t(dim) * dim);
    double* h = memory.data();
    for (int i = 0; i < dim; i++) {
        for (int j = 0; j < dim; j++) h[int64_t(i) * dim + j] = metric[int64_t(order[i]) * dim + order[j]];
        double& diagonal = h[int64_t(i) * dim + i];
        diagonal += diagonal > 0 ? DAMPING * diagonal : 1;
    }
    std::fill(factor, factor + int64_t(dim) * dim, 0.0f);
    for (int j = dim - 1; j > 0; j--) {
        const double* row = h + int64_t(j) * dim;  // of a symmetric matrix: its column
        if (!(row[j] > 0)) return std::fill(factor, factor + int64_t(dim) * dim, 0.0f);
        for (int i = 0; i < j; i++) factor[int64_t(j) * dim + i] = float(row[i] / row[j]);
        for (int i = 0; i < j; i++) {
            const double share = row[i] / row[j];
            double* other = h + int64_t(i) * dim;
            for (int k = 0; k <= i; k++) other[k] -= share * row[k];
        }
    }
}

// One page `x` [page_size, dim] to page-and-head `index`; `metric` [dim, dim] may be null.
inline void encode_ranked(const Side& side, const float* x, int page_size, int64_t index, const float* covered,
                          const float* metric) {
    const int dim = int(side.dim), part = side.part(), stride = round_up(page_size, W);
    static const int WIDTHS[3][4] = {{6, 4, 3, 3}, {4, 4, 2, 2}, {4, 2, 2, 0}};
    const int* widths = WIDTHS[side.format - RANKED_4];
    static thread_local std::vector<float> floats;
    static thread_local std::vector<int> order;
    static thread_local std::vector<uint8_t> codes;
    floats.resize(size_t(dim) * (dim + 2 * stride + 4));
    codes.resize(size_t(dim) * stride), order.resize(size_t(dim));
    float *low = floats.data(), *high = low + dim, *cost = high + dim, *factor = cost + dim;
    float *y = factor + int64_t(dim) * dim, *errors = y + int64_t(dim) * stride;
    std::memcpy(low, x, size_t(dim) * 4);
    std::memcpy(high, x, size_t(dim) * 4);
    for (int t = 1; t < page_size; t++)
        for (int c = 0; c < dim; c++) {
            const float value = x[int64_t(t) * dim + c];
            low[c] = value < low[c] ? value : low[c];
            high[c] = value > high[c] ? value : high[c];
        }
    for (int c = 0; c < dim; c++) {
        const float range = high[c] - low[c], size = range * range;
        cost[c] = metric ? metric[int64_t(c) * dim + c] * size : size;
        if (metric && !std::isfinite(cost[c])) cost[c] = 0;
    }
    const int blocks = channel_blocks(dim);
    static thread_local std::vector<int> block;
    block.resize(size_t(dim / blocks));
    for (int b = 0; b < blocks; b++) {
        for (int i = 0; i < dim / blocks; i++) block[size_t(i)] = i * blocks + b;
        std::stable_sort(block.begin(), block.end(), [&](int a, int c) { return cost[a] > cost[c]; });
        for (int i = 0; i < dim / blocks; i++) order[size_t(i * blocks + b)] = block[size_t(i)];
    }
    if (metric) feedback_factor(metric, order.data(), dim, factor);

    const int steps = widths[3] ? dim : 3 * part;
    uint8_t *stored_step = (uint8_t*)side.channel_scale.data + index * steps, *stored_order = (uint8_t*)side.order + index * dim;
    uint16_t* stored_offset = (uint16_t*)side.channel_offset.data + index * dim;
    constexpr float INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
    for (int j = 0; j < dim; j++) {
        const int c = order[j], width = widths[j / part];
        const float share = covered[j / part], last = float((1 << width) - 1);
        const float middle = product(low[c], 0.5f) + product(high[c], 0.5f);
        float from = low[c], to = high[c];
        if (share < 1) {
            from = middle + product(from - middle, share);
            to = middle + product(to - middle, share);
        }
        stored_order[j] = uint8_t(c / blocks);
        stored_offset[j] = half_at_most(width ? from : middle);
        const float offset = half_to_float(stored_offset[j]);
        float step = 0;
        if (width) {
            const uint16_t bits = half_at_least(std::max(to - offset, 0.0f) / last);
            stored_step[j] = uint8_t(std::min((bits + 127) >> 7, LARGEST_STEP));
            step = half_to_float(uint16_t(stored_step[j]) << 7);
        }
        const float divisor = step > 0 ? step : 1.0f;
        float *wanted = y + int64_t(j) * stride, *error = errors + int64_t(j) * stride;
        for (int t = 0; t < page_size; t++) wanted[t] = x[int64_t(t) * dim + c];
        std::memcpy(error, wanted, size_t(page_size) * 4);
        if (metric) {
            const float* shares = factor + int64_t(j) * dim;
            for (int t = 0; t < page_size; t += W) {
                Floats sum = {};
                for (int i = 0; i < j; i++) sum += splat(shares[i]) * load(errors + int64_t(i) * stride + t);
                store(wanted + t, load(wanted + t) + sum);
            }
        }
        uint8_t* code = codes.data() + int64_t(j) * stride;
        for (int t = 0; t < page_size; t++) {
            const float scaled = (wanted[t] - offset) / divisor, inside = scaled > 0 ? (scaled < last ? scaled : last) : 0;
            const float rounded = (inside + INTEGER) - INTEGER;
            code[t] = uint8_t(rounded);
            error[t] -= offset + step * rounded;
        }
    }

    uint8_t *first = (uint8_t*)side.codes + index * page_size * part, *second = (uint8_t*)side.signs;
    second += second ? index * page_size * part / (side.format == RANKED_3 ? 2 : 1) : 0;
    for (int t = 0; t < page_size; t++) {
        const auto at = [&](int quarter, int j) { return codes[size_t(quarter * part + j) * stride + t]; };
        for (int j = 0; j < part; j++) {
            const int a = at(0, j), b = at(1, j), c = at(2, j), d = at(3, j);
            uint8_t& byte = first[int64_t(t) * part + j];
            if (side.format == RANKED_4) {
                byte = uint8_t(a >> 2 | b << 4);
                second[int64_t(t) * part + j] = uint8_t((a & 3) | c << 2 | d << 5);
            } else if (side.format == RANKED_3) {
                byte = uint8_t(a | b << 4);
                uint8_t& both = second[(int64_t(t) * part + j) / 2];
                both = uint8_t(j % 2 ? both | (c | d << 2) << 4 : c | d << 2);
            } else {
                byte = uint8_t(a | b << 4 | c << 6);
            }
        }
    }
}

}  // namespace kv
