// Attention over pages, split-KV: each item of work is a range of pages of one sequence and key/value head (or its open
// page) for up to ROWS rows of queries; who finishes the last item of some rows merges them.
//
// Within an item each page is unpacked BLOCK tokens at a time, once for all rows: a block of keys gives the scores of
// its tokens, the online softmax takes those of the whole page, and blocks of values are added under its weights.
//
// Latents (MLA) are keys and values at once, of one head for all query heads: a page of them is unpacked once, for both.
// A query has the elements of a rotary key behind those of a latent, and the scores of both are added.
#pragma once

#include <algorithm>
#include <memory>

#include "threads.h"
#include "tile.h"

namespace kv {

constexpr int ROWS = 64;  // rows per item: their queries and results stay in the second-level cache
constexpr float MINUS_INFINITY = -INFINITY;

// Members are 64 bits wide, in the order of `ATTENTION` in native.py; strides are in elements.
struct Attention {
    const char* query;
    int64_t query_dtype, query_batch, query_head, query_token;
    char* out;  // [batch, heads * group, queries, dim of what is summed], contiguous, in the query's dtype
    int64_t batch, heads, group, queries, page_size;
    const int32_t* table;
    int64_t table_batch;
    const int32_t* lengths;  // [batch, 2]
    double scale, softcap;   // softcap 0: none
    int64_t causal, window;
    const char* mask;
    int64_t mask_dtype, mask_batch, mask_head, mask_query, mask_token;
    const float* sinks;
    const int32_t* first_at;  // [batch]: where the `first_count` tokens begin that are read as they came; or null
    int64_t first_count;
    int64_t latent;  // whether the keys are latents, and the values the rotary keys beside them
    int64_t threads, splits;
    void* fork;
    Side keys, values;

    const Side& summed() const { return latent ? keys : values; }
    int64_t rows() const { return group * queries; }
    int64_t row_blocks() const { return (rows() + ROWS - 1) / ROWS; }
};

// Dot products of each row of `q` [rows, columns] with the tokens of `tile` [BLOCK, columns], to `scores` [rows, stride].
// COLUMNS is their number where it is known to the compiler, which then needs no arithmetic for addresses; else 0.
template <int COLUMNS>
void score_tile(const float* q, int rows, const float* tile, int width, float* scores, int stride) {
    const int columns = COLUMNS ? COLUMNS : width;
    for (int first = 0; first < BLOCK; first += W)
        for (int r = 0; r < rows; r++) {
            Floats products[W] = {};
            for (int c = 0; c < columns; c += W) {
                const Floats x = load(q + int64_t(r) * columns + c);
#pragma GCC unroll 16
                for (int t = 0; t < W; t++) products[t] += x * load(tile + int64_t(first + t) * columns + c);
            }
            store(scores + int64_t(r) * stride + first, sum_lanes(products));
        }
}

inline void score_block(const float* q, int rows, const float* tile, int columns, float* scores, int stride) {
    if (columns == 64) return score_tile<64>(q, rows, tile, columns, scores, stride);
    if (columns == 128) return score_tile<128>(q, rows, tile, columns, scores, stride);
    score_tile<0>(q, rows, tile, columns, scores, stride);
}

// Adds `count` tokens of `tile` under `weights` [R, stride] to `sums` [R, columns], VECTORS vectors from column c on.
template <int R, int VECTORS>
inline void weigh_columns(const float* weights, int stride, const float* tile, int columns, int count, float* sums) {
    Floats total[R][VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) total[r][v] = load(sums + int64_t(r) * columns + v * W);
    for (int t = 0; t < count; t++) {
        Floats x[VECTORS];
        for (int v = 0; v < VECTORS; v++) x[v] = load(tile + int64_t(t) * columns + v * W);
        for (int r = 0; r < R; r++) {
            const Floats weight = splat(weights[int64_t(r) * stride + t]);
            for (int v = 0; v < VECTORS; v++) total[r][v] += weight * x[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECTORS; v++) store(sums + int64_t(r) * columns + v * W, total[r][v]);
}

template <int R>
inline void weigh_rows(const float* weights, int stride, const float* tile, int columns, int count, float* sums) {
    constexpr int VECTORS = W == 4 ? 2 : 4;  // R * VECTORS sums and VECTORS values stay in registers
    int c = 0;
    for (; c + VECTORS * W <= columns; c += VECTORS * W)
        weigh_columns<R, VECTORS>(weights, stride, tile + c, columns, count, sums + c);
    for (; c < columns; c += W) weigh_columns<R, 1>(weights, stride, tile + c, columns, count, sums + c);
}

inline void weigh_block(const float* weights, int rows, int stride, const float* tile, int columns, int count,
                        float* sums) {
    constexpr int MOST = W == 16 ? 4 : 2;
    int r = 0;
    for (; r + MOST <= rows; r += MOST)
        weigh_rows<MOST>(weights + int64_t(r) * stride, stride, tile, columns, count, sums + int64_t(r) * columns);
    weights += int64_t(r) * stride, sums += int64_t(r) * columns;
    if (rows - r == 3) return weigh_rows<3>(weights, stride, tile, columns, count, sums);
    if (rows - r == 2) return weigh_rows<2>(weights, stride, tile, columns, count, sums);
    if (rows - r == 1) weigh_rows<1>(weights, stride, tile, columns, count, sums);
}

// What an item hands to the merge, per row: maximum, sum of weights, sum of weighted token offsets, weighted values.
struct Partial {
    float* data;
    int stride;
    float* row(int r) const { return data + int64_t(r) * stride; }
};

// Memory of one thread; a request of the same shape reuses it.  Pieces begin at cache lines: loads that cross two take
// twice as long.
class Scratch {
    static constexpr size_t LINE = 16;  // floats
    std::unique_ptr<float[]> memory_;
    float* first_ = nullptr;
    size_t size_ = 0, used_ = 0;

   public:
    void reset(size_t floats) {
        if (floats > size_) {
            memory_.reset(new float[floats + LINE]());
            first_ = memory_.get() + (LINE - uintptr_t(memory_.get()) / sizeof(float) % LINE) % LINE;
            size_ = floats;
        }
        used_ = 0;
    }
    float* take(size_t floats) {
        float* p = first_ + used_;
        used_ += (floats + LINE - 1) / LINE * LINE;
        return p;
    }
};

// Queries that meet one side: rows [rows, columns], and the sum of each.
struct Queries {
    float *rows, *sums;
};

// The rows of one item and everything that is the same for all of its pages.
class Rows {
    const Attention& call_;
    const int batch_, head_, first_, rows_, stride_;
    const Side &keys_, &values_;  // what scores, and what is summed
    const Side* rotary_;          // what scores too, beside latents; or null
    Partial partial_;
    int64_t ahead_ = 0, next_ = 0;            // bytes from the current page to the next; its page-and-head
    int64_t total_ = 0, low_ = 0, high_ = 0;  // tokens of the sequence; range of those that some row sees
    int32_t* order_;  // channel of each column, where channels are ranked
    int64_t first_begin_ = 0, first_end_ = 0;  // range of those that are read as they came, and not in their page
    uint8_t* work_;  // of unpacking
    Queries query_, rotary_query_ = {};
    float *scaled_, *constant_, *scores_, *tile_, *channels_, *page_sum_;
    float *rotary_scores_ = nullptr, *kept_ = nullptr;  // with latents: scores beside theirs; a page of them
    TokenFactors factors_;

    int64_t position(int r) const { return total_ - call_.queries + (first_ + r) % call_.queries; }
    bool causal() const { return call_.causal && call_.queries > 1; }

   public:
    static size_t floats(const Attention& call) {
        const size_t rows = ROWS, page = size_t(round_up(int(call.page_size), BLOCK));
        const size_t widest = size_t(std::max(std::max(call.keys.columns(), call.values.columns()),
                                              round_up(int(std::max(call.keys.dim, call.values.dim)), W)));
        const size_t latents = call.latent ? rows * (widest + page + 1) + page * widest : 0;
        return rows * (3 * widest + page + 2) + BLOCK * widest + 3 * widest + 3 * page +
               work_bytes(int(widest)) / 4 + latents + 21 * 16;
    }

    Rows(const Attention& call, int batch, int head, int first, int rows, Partial partial, Scratch& scratch)
        : call_(call), batch_(batch), head_(head), first_(first), rows_(rows),
          stride_(round_up(int(call.page_size), BLOCK)), keys_(call.keys), values_(call.summed()),
          rotary_(call.latent ? &call.values : nullptr), partial_(partial) {
        const int widest = int(std::max(std::max(call.keys.columns(), call.values.columns()),
                                        round_up(int(std::max(call.keys.dim, call.values.dim)), W)));
        scratch.reset(floats(call));
        query_.rows = scratch.take(size_t(rows) * widest);
        scaled_ = scratch.take(size_t(rows) * widest);
        page_sum_ = scratch.take(size_t(rows) * widest);
        scores_ = scratch.take(size_t(rows) * stride_);
        query_.sums = scratch.take(rows);
        constant_ = scratch.take(rows);
        tile_ = scratch.take(size_t(BLOCK) * widest);
        channels_ = scratch.take(size_t(widest) * 2);
        work_ = (uint8_t*)scratch.take(work_bytes(widest) / 4);
        order_ = (int32_t*)scratch.take(size_t(widest));
        factors_ = {scratch.take(stride_), scratch.take(stride_), scratch.take(stride_)};
        if (rotary_) {
            rotary_query_ = {scratch.take(size_t(rows) * widest), scratch.take(rows)};
            rotary_scores_ = scratch.take(size_t(rows) * stride_);
            kept_ = scratch.take(size_t(stride_) * widest);
        }
        const int32_t* lengths = call.lengths + 2 * batch;
        total_ = int64_t(lengths[0]) * call.page_size + lengths[1];
        low_ = 0, high_ = total_;
        if (call.first_at && call.first_at[batch] >= 0) {
            first_begin_ = call.first_at[batch];
            first_end_ = std::min(first_begin_ + call.first_count, (first_begin_ / call.page_size + 1) * call.page_size);
        }
        int64_t least = INT64_MAX, most = INT64_MIN;
        for (int r = 0; r < rows; r++) least = std::min(least, position(r)), most = std::max(most, position(r));
        if (causal()) high_ = std::min(high_, most + 1);
        if (call.window) low_ = std::max<int64_t>(0, least - call.window + 1);
        for (int r = 0; r < rows; r++) {
            float* row = partial.row(r);
            std::memset(row, 0, size_t(partial.stride) * 4);
            row[0] = MINUS_INFINITY;
        }
    }

    // Scaled queries as floats, from their element `start` on; `packed`: in the domain and column order of packed keys,
    // else as they are.
    void read_query(const Side& side, bool packed, int64_t start, const Queries& to) {
        const int columns = side.columns(), dim = int(side.dim);
        float* row = channels_;
        for (int r = 0; r < rows_; r++) {
            const int64_t head = head_ * call_.group + (first_ + r) / call_.queries;
            const int64_t offset = batch_ * call_.query_batch + head * call_.query_head +
                                   (first_ + r) % call_.queries * call_.query_token + start;
            to_floats(call_.query + offset * item_size(call_.query_dtype), call_.query_dtype, dim, row);
            for (int i = 0; i < dim; i++) row[i] *= float(call_.scale);
            if (packed && side.rotated) hadamard(row, dim);
            if (packed && side.ranked())  // each page has an order of its own
                std::memcpy(to.rows + int64_t(r) * columns, row, size_t(dim) * 4);
            else
                to_columns(side, row, to.rows + int64_t(r) * columns);
            float total = 0;
            for (int i = 0; i < dim; i++) total += row[i];
            to.sums[r] = total;
        }
    }

    void read_queries(const Side& keys, const Side* rotary, bool packed) {
        read_query(keys, packed, 0, query_);
        if (rotary) read_query(*rotary, packed, keys.dim, rotary_query_);
    }

    // What rotary keys add to the scores of `count` tokens.
    void score_rotary(const Side& side, Unpack* unpack, const char* rows, int64_t row_bytes, int64_t index, int count,
                      bool packed) {
        score(side, unpack, rows, row_bytes, index, count, packed, rotary_query_, rotary_scores_, nullptr);
        for (int r = 0; r < rows_; r++)
            for (int t = 0; t < count; t++) scores_[int64_t(r) * stride_ + t] += rotary_scores_[int64_t(r) * stride_ + t];
    }

    // The sealed pages from `first` up to and without `last`.
    void pages(int64_t first, int64_t last) {
        first = std::max(first, low_ / call_.page_size);
        last = std::min(last, (high_ + call_.page_size - 1) / call_.page_size);
        if (first >= last) return;
        read_queries(keys_, rotary_, true);
        Unpack *unpack_keys = unpacker(keys_), *unpack_values = unpacker(values_);
        Unpack* unpack_rotary = rotary_ ? unpacker(*rotary_) : nullptr;
        const int32_t* table = call_.table + batch_ * call_.table_batch;
        const int page_size = int(call_.page_size);
        for (int64_t page = first; page < last; page++) {
            const int64_t index = table[page] * call_.heads + head_;
            const int64_t next = page + 1 < last ? table[page + 1] * call_.heads + head_ : index;
            next_ = next;
            const char* rows = keys_.codes + index * page_size * keys_.row_bytes();
            ahead_ = (next - index) * page_size * keys_.row_bytes();
            score(keys_, unpack_keys, rows, keys_.row_bytes(), index, page_size, true, query_, scores_, kept_);
            if (rotary_) {
                const int64_t bytes = rotary_->row_bytes();
                ahead_ = (next - index) * page_size * bytes;
                score_rotary(*rotary_, unpack_rotary, rotary_->codes + index * page_size * bytes, bytes, index, page_size,
                             true);
            }
            if (!weigh(page * page_size, page_size)) continue;
            rows = values_.codes + index * page_size * values_.row_bytes();
            ahead_ = rotary_ ? 0 : (next - index) * page_size * values_.row_bytes();
            add(values_, unpack_values, rows, values_.row_bytes(), index, page_size, true);
        }
    }

    // The open page, and the tokens that are read as they came.
    void tail() {
        const int32_t* lengths = call_.lengths + 2 * batch_;
        const int64_t first = lengths[0] * call_.page_size;
        const int count = lengths[1];
        const bool open = count && first < high_ && first + count > low_;
        const bool begin = first_end_ > first_begin_ && first_begin_ < high_ && first_end_ > low_;
        if (!open && !begin) return;
        const Side keys = open_side(keys_), values = open_side(values_);
        const Side rotary = rotary_ ? open_side(*rotary_) : Side();
        ahead_ = 0;
        read_queries(keys, rotary_ ? &rotary : nullptr, false);
        const auto rows = [&](const Side& side) {
            return side.tail + (batch_ * side.tail_batch + head_ * side.tail_head) * item_size(side.tail_dtype);
        };
        const auto row_bytes = [](const Side& side) { return side.tail_token * item_size(side.tail_dtype); };
        const auto first_rows = [&](const Side& side) {
            return side.first + (batch_ * call_.heads + head_) * call_.first_count * side.dim * item_size(side.tail_dtype);
        };
        const auto first_bytes = [](const Side& side) { return side.dim * item_size(side.tail_dtype); };
        if (open) {
            score(keys, unpacker(keys), rows(keys), row_bytes(keys), 0, count, false, query_, scores_, kept_);
            if (rotary_) score_rotary(rotary, unpacker(rotary), rows(rotary), row_bytes(rotary), 0, count, false);
            if (weigh(first, count)) add(values, unpacker(values), rows(values), row_bytes(values), 0, count, false);
        }
        if (begin) {
            const int some = int(first_end_ - first_begin_);
            score(keys, unpacker(keys), first_rows(keys), first_bytes(keys), 0, some, false, query_, scores_, kept_);
            if (rotary_)
                score_rotary(rotary, unpacker(rotary), first_rows(rotary), first_bytes(rotary), 0, some, false);
            if (weigh(first_begin_, some, false))
                add(values, unpacker(values), first_rows(values), first_bytes(values), 0, some, false);
        }
    }

   private:
    static Side open_side(Side side) {
        side.format = VECTORS, side.dtype = side.tail_dtype;
        return side;
    }

    // GCC drops calls of functions that do nothing else: for it they have no effect.  It lets the empty statement be one.
    static void prefetch_lines(const char* p, int64_t bytes) {
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
        __asm__ volatile("");
    }

    // The same rows of the next page, which lies anywhere: the processor does not foresee it.
    void prefetch(const Side& side, const char* rows, int64_t bytes) const {
        if (!ahead_) return;
        prefetch_lines(rows + ahead_, bytes);
        if (side.signs) prefetch_lines(side.signs + (rows + ahead_ - side.codes) / side.less(), bytes / side.less());
    }

    // What stands outside of the levels in the next page.
    void prefetch_factors(const Side& side, int count) const {
        if (!ahead_) return;
        const auto one = [&](const Factor& factor, int64_t numbers) {
            if (factor.data && !factor.heads) prefetch_lines(factor.at(next_, numbers), numbers * item_size(factor.dtype));
        };
        one(side.token_scale, count), one(side.token_offset, count), one(side.residual, count);
        one(side.channel_scale, side.numbers(side.channel_scale)), one(side.channel_offset, side.dim);
        if (side.order) prefetch_lines(side.order + next_ * side.dim, side.dim);
    }

    // Scores of `count` tokens, [rows, stride_], of the queries `asked`; their tiles go to `kept` if that is not null.
    void score(const Side& side, Unpack* unpack, const char* rows, int64_t row_bytes, int64_t index, int count,
               bool packed, const Queries& asked, float* scores, float* kept) {
        const int columns = side.columns();
        const float* query = asked.rows;
        prefetch_factors(side, count);
        if (packed) factors_.read(side, index, count);
        const bool scaled = packed && side.channel_scale.data, shifted = packed && side.channel_offset.data;
        const bool ranked = packed && side.ranked();  // which have steps and offsets
        if (ranked) {
            float* offsets = channels_ + columns;
            ranked_channels(side, index, order_);
            channel_factor(side, side.channel_scale, index, channels_);
            channel_factor(side, side.channel_offset, index, offsets);
            auto* rank = columns == 64 ? rank_query<64> : columns == 128 ? rank_query<128> : rank_query<0>;
            rank(query, rows_, int(side.dim), order_, channels_, offsets, columns, scores, scaled_, constant_);
            query = scaled_;
        } else if (shifted) {
            channel_factor(side, side.channel_offset, index, channels_);
            for (int r = 0; r < rows_; r++) {
                Floats total = {};
                for (int c = 0; c < columns; c += W) total += load(query + int64_t(r) * columns + c) * load(channels_ + c);
                constant_[r] = sum(total);
            }
        }
        if (scaled && !ranked) {
            channel_factor(side, side.channel_scale, index, channels_);
            for (int r = 0; r < rows_; r++)
                for (int c = 0; c < columns; c += W) {
                    const int64_t i = int64_t(r) * columns + c;
                    store(scaled_ + i, load(query + i) * load(channels_ + c));
                }
            query = scaled_;
        }
        for (int t = 0; t < count; t += BLOCK) {
            prefetch(side, rows + t * row_bytes, BLOCK * row_bytes);
            float* tile = kept ? kept + int64_t(t) * columns : tile_;
            unpack(side, rows + t * row_bytes, row_bytes, factors_.residual + t, std::min(BLOCK, count - t), work_,
                   tile);
            score_block(query, rows_, tile, columns, scores + t, stride_);
        }
        for (int r = 0; r < rows_; r++) {
            float* row = scores + int64_t(r) * stride_;
            if (packed && side.token_scale.data)
                for (int t = 0; t < count; t++) row[t] *= factors_.scale[t];
            if (packed && side.token_offset.data)
                for (int t = 0; t < count; t++) row[t] += asked.sums[r] * factors_.offset[t];
            if (shifted)
                for (int t = 0; t < count; t++) row[t] += constant_[r];
        }
    }

    // From scores of the tokens from `first` on to weights, in place; false where no row sees any of them.  `in_page`:
    // they are those of a page, which does not give the ones that are read as they came.
    bool weigh(int64_t first, int count, bool in_page = true) {
        bool seen = false;
        const int64_t hidden = in_page ? std::max<int64_t>(0, first_begin_ - first) : 0;
        const int64_t hidden_end = in_page ? std::min<int64_t>(count, first_end_ - first) : 0;
        for (int r = 0; r < rows_; r++) {
            float *row = scores_ + int64_t(r) * stride_, *state = partial_.row(r);
            if (call_.softcap != 0) cap(row, count);
            if (call_.mask) mask(row, r, first, count);
            const int64_t last = causal() ? std::min<int64_t>(count, position(r) + 1 - first) : count;
            for (int64_t t = std::max<int64_t>(0, last); t < stride_; t++) row[t] = MINUS_INFINITY;
            if (call_.window)
                for (int64_t t = 0; t < std::min<int64_t>(count, position(r) - call_.window + 1 - first); t++)
                    row[t] = MINUS_INFINITY;
            for (int64_t t = hidden; t < hidden_end; t++) row[t] = MINUS_INFINITY;
            Floats top = load(row);
            for (int t = W; t < stride_; t += W) top = maximum(load(row + t), top);
            // A row that sees nothing yet is measured from 0, so that no infinity minus infinity arises.
            const float most = std::max(state[0], highest(top)), origin = most == MINUS_INFINITY ? 0 : most;
            seen = seen || most != MINUS_INFINITY;
            Floats total = {};
            for (int t = 0; t < stride_; t += W) {
                const Floats weight = exponential(load(row + t) - origin);
                store(row + t, weight);
                total += weight;
            }
            if (state[0] != most) {
                const float decay = exponential(splat(state[0] - origin))[0];
                for (int i = 1; i < partial_.stride; i++) state[i] *= decay;
                state[0] = most;
            }
            state[1] += sum(total);
        }
        return seen;
    }

    void cap(float* row, int count) const {
        const float cap = float(call_.softcap);
        for (int t = 0; t < round_up(count, W); t += W) {
            // tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|)
            const Floats x = load(row + t) / cap, size = select(x < splat(0), -x, x);
            const Floats e = exponential(size * -2.0f), tanh = (1.0f - e) / (1.0f + e);
            store(row + t, select(x < splat(0), -tanh, tanh) * cap);
        }
    }

    void mask(float* row, int r, int64_t first, int count) const {
        const int64_t head = head_ * call_.group + (first_ + r) / call_.queries, step = call_.mask_token;
        const int64_t offset = batch_ * call_.mask_batch + head * call_.mask_head +
                               (first_ + r) % call_.queries * call_.mask_query + first * step;
        const char* p = call_.mask + offset * item_size(call_.mask_dtype);
        switch (call_.mask_dtype) {
            case BOOL:
                for (int t = 0; t < count; t++) row[t] = p[t * step] ? row[t] : MINUS_INFINITY;
                break;
            case FLOAT32:
                for (int t = 0; t < count; t++) row[t] += ((const float*)p)[t * step];
                break;
            case BFLOAT16:
                for (int t = 0; t < count; t++) row[t] += bfloat_to_float(((const uint16_t*)p)[t * step]);
                break;
            default:
                for (int t = 0; t < count; t++) row[t] += half_to_float(((const uint16_t*)p)[t * step]);
        }
    }

    // Adds the values of `count` tokens under the weights.
    void add(const Side& side, Unpack* unpack, const char* rows, int64_t row_bytes, int64_t index, int count,
             bool packed) {
        const int columns = side.columns();
        const bool scaled = packed && side.channel_scale.data, shifted = packed && side.channel_offset.data;
        const bool ranked = packed && side.ranked();  // what rows have summed is in the order of the channels
        prefetch_factors(side, count);
        if (packed) factors_.read(side, index, count);
        if (ranked) ranked_channels(side, index, order_);
        if (shifted) channel_factor(side, side.channel_offset, index, channels_);
        for (int r = 0; r < rows_; r++) {
            float *row = scores_ + int64_t(r) * stride_, *state = partial_.row(r);
            if (shifted) {
                Floats weight = {};
                for (int t = 0; t < stride_; t += W) weight += load(row + t);
                const float total = sum(weight);
                for (int c = 0; c < columns; c++) state[3 + (ranked ? order_[c] : c)] += total * channels_[c];
            }
            if (packed && side.token_offset.data) {
                float total = 0;
                for (int t = 0; t < count; t++) total += row[t] * factors_.offset[t];
                state[2] += total;
            }
            if (packed && side.token_scale.data)
                for (int t = 0; t < count; t++) row[t] *= factors_.scale[t];
            std::memcpy(page_sum_ + int64_t(r) * columns, state + 3, size_t(columns) * 4);
        }
        if (scaled) std::memset(page_sum_, 0, size_t(rows_) * columns * 4);
        for (int t = 0; t < count; t += BLOCK) {
            const int some = std::min(BLOCK, count - t);
            prefetch(side, rows + t * row_bytes, some * row_bytes);
            const float* tile = kept_ ? kept_ + int64_t(t) * columns : tile_;
            if (!kept_) unpack(side, rows + t * row_bytes, row_bytes, factors_.residual + t, some, work_, tile_);
            weigh_block(scores_ + t, rows_, stride_, tile, columns, some, page_sum_);
        }
        if (scaled) channel_factor(side, side.channel_scale, index, channels_);
        for (int r = 0; r < rows_; r++) {
            float *state = partial_.row(r) + 3, *sums = page_sum_ + int64_t(r) * columns;
            if (scaled)
                for (int c = 0; c < columns; c++) state[ranked ? order_[c] : c] += sums[c] * channels_[c];
            else
                std::memcpy(state, sums, size_t(columns) * 4);
        }
    }
};

// Merges the partial results of one row, its splits' and its open page's, into the output.
inline void merge(const Attention& call, int64_t head, const float* const* parts, int splits, float* packed,
                  float* exact, char* out) {
    const Side& values = call.summed();
    const int dim = int(values.dim), columns = values.columns();
    float most = call.sinks ? call.sinks[head] : MINUS_INFINITY, total = 0, offset = 0;
    for (int s = 0; s <= splits; s++) most = std::max(most, parts[s][0]);
    const float origin = most == MINUS_INFINITY ? 0 : most;
    if (call.sinks) total = exponential(splat(call.sinks[head] - origin))[0];
    std::memset(packed, 0, size_t(columns) * 4);
    for (int s = 0; s < splits; s++) {
        const float decay = exponential(splat(parts[s][0] - origin))[0];
        total += parts[s][1] * decay;
        offset += parts[s][2] * decay;
        for (int c = 0; c < columns; c++) packed[c] += parts[s][3 + c] * decay;
    }
    from_columns(values, packed, exact);
    for (int i = 0; i < dim; i++) exact[i] += offset;
    if (values.rotated) hadamard(exact, dim);
    const float decay = exponential(splat(parts[splits][0] - origin))[0];
    total += parts[splits][1] * decay;
    const float divisor = total == 0 ? 1.0f : total;  // a row that sees no token is zero
    for (int i = 0; i < dim; i++) exact[i] = (exact[i] + parts[splits][3 + i] * decay) / divisor;
    from_floats(exact, call.query_dtype, dim, out);
}

inline void attend(const Attention& call) {
    const int64_t blocks = call.row_blocks(), splits = call.splits, groups = call.batch * call.heads * blocks;
    const Side& summed = call.summed();
    const int stride = 3 + std::max(summed.columns(), round_up(int(summed.dim), W));
    const int64_t rows_per_block = std::min<int64_t>(call.rows(), ROWS);
    std::unique_ptr<float[]> partials(new float[size_t(groups * (splits + 1) * rows_per_block * stride)]);
    std::unique_ptr<std::atomic<int>[]> left(new std::atomic<int>[size_t(groups)]);
    for (int64_t g = 0; g < groups; g++) left[g] = int(splits) + 1;
    const auto partial = [&](int64_t group, int64_t split) {
        return Partial{partials.get() + (group * (splits + 1) + split) * rows_per_block * stride, stride};
    };
    for_each_item(groups * (splits + 1), int(call.threads), call.fork, [&](int64_t item) {
        static thread_local Scratch scratch;
        const int64_t split = item / groups, group = item % groups, first = group % blocks * ROWS;
        const int head = int(group / blocks % call.heads), batch = int(group / blocks / call.heads);
        const int count = int(std::min<int64_t>(ROWS, call.rows() - first));
        {
            Rows rows(call, batch, head, int(first), count, partial(group, split), scratch);
            const int64_t sealed = call.lengths[2 * batch];
            if (split < splits)
                rows.pages(sealed * split / splits, sealed * (split + 1) / splits);
            else
                rows.tail();
        }
        if (left[group].fetch_sub(1) != 1) return;
        scratch.reset(Rows::floats(call));
        float *packed = scratch.take(size_t(stride)), *exact = scratch.take(size_t(stride));
        std::vector<const float*> parts(size_t(splits) + 1);
        for (int r = 0; r < count; r++) {
            for (int64_t s = 0; s <= splits; s++) parts[size_t(s)] = partial(group, s).row(r);
            const int64_t query_head = head * call.group + (first + r) / call.queries;
            const int64_t row = (batch * call.heads * call.group + query_head) * call.queries + (first + r) % call.queries;
            char* out = call.out + row * summed.dim * item_size(call.query_dtype);
            merge(call, query_head, parts.data(), int(splits), packed, exact, out);
        }
    });
}

}  // namespace kv
