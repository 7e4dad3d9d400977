// Attention over token trees: forward and backward, tile by tile, without a mask and without keeping weights.
//
// A query row attends its own segment up to itself and all of the segments above it, as far back as window and chunk let
// it see. Row blocks and key blocks never cross a segment, so a block is seen whole, or cut by a diagonal, or hidden. The
// weights of a block live in a thread's own memory only (FlashAttention-2, arXiv 2307.08691): the forward pass keeps out
// and, per row, the log of the softmax's total; the backward pass forms the weights again, piece by piece of a segment,
// and adds up the gradients of a piece's keys apart from those of other pieces (`Pieces`).
//
// Exponentials are powers of two, of scores that are scaled accordingly. Products take numbers as the arrays hold them,
// float32 or bfloat16; scores, softmax and sums are float32, the softmax's total float64, and weights are rounded only to be
// multiplied. A row's output has the same bits however its path is cut into segments and blocks: keys are added up from
// the root down, and what a running maximum rescales by is a power of two.
//
// Arrays: query, out and their gradients (T, H, D), key, value and theirs (T, K, D), strides given in numbers, D contiguous.
// Values, and with them outputs, may have another D than queries and keys.

#include "layout.h"

#include <memory>

namespace {

constexpr int ROWS = 96, KEYS = 128;  // of a block: its weights fit the second-level cache
constexpr float UNSEEN = -INFINITY;  // a score whose weight is 0 whatever the others are

int64_t whole(int64_t floats) { return (floats + VL - 1) / VL * VL; }

// One block of scores: rows [row, row + rows) of segment `own`, keys [key, key + keys) of segment `above`.
struct Block {
    const Shape* shape;
    int64_t row, rows, own, above, key, keys;
    int64_t position, key_position;  // path positions of the first row and the first key
    int hidden(int64_t i) const {  // how many keys at the beginning are too far away for row i; no less for later rows
        return std::clamp<int64_t>(first_seen(*shape, position + i) - key_position, 0, keys);
    }
    int seen(int64_t i) const {  // up to where row i sees keys
        return own == above ? std::clamp<int64_t>(row + i - key + 1, 0, keys) : keys;
    }
    int reach(int64_t i) const {  // how many the micro kernel's group of row i sees
        return seen(std::min(i / MR * MR + MR, rows) - 1);
    }
    int first(int64_t j) const {  // the first row that sees key j
        return own == above ? std::clamp<int64_t>(key + j - row, 0, rows) : 0;
    }
};

// Calls visit(block) for all key blocks that the rows see, from the root down.
template <class Visit>
void blocks_of(const Forest& f, const Shape& shape, int64_t own, int64_t row, int64_t rows, Visit visit) {
    thread_local static std::vector<int64_t> path;
    path.clear();
    for (int64_t s = own; s >= 0; s = f.parent[s]) path.push_back(s);
    const int64_t position = f.position[own] + row - f.start[own], first = first_seen(shape, position);
    for (auto s = path.rbegin(); s != path.rend(); ++s) {
        const int64_t start = f.start[*s], end = *s == own ? row + rows : f.end[*s];
        const int64_t far = std::max<int64_t>(0, first - f.position[*s]) / NR * NR;  // blocks begin where panels do
        for (int64_t key = start + far; key < end; key += KEYS)
            visit(Block{&shape, row, rows, own, *s, key, std::min<int64_t>(KEYS, end - key), position,
                        f.position[*s] + key - start});
    }
}

template <class Number>
int words(int64_t numbers) { return (numbers + Words<Number>::together - 1) / Words<Number>::together; }

// Rows times packed keys or values of a block, as far as each group of rows reaches.
template <class Number>
void rows_by_keys(const Block& b, const Forest& f, const Number* rows, int64_t step, Panels<Number>& panels, int64_t kh,
                  float* out) {
    const int depth = panels.words;
    product<Number>(
        b.rows, [&](int i) { return b.seen(i); }, [&](int) { return Reach{0, depth}; },
        reinterpret_cast<const word*>(rows), step / Words<Number>::together, 1,
        panels.at(kh, b.above, b.key - f.start[b.above]), NR, depth * NR, out, KEYS, false);
}

// Weights (or their gradients) of a block, a row of Numbers for each query, times rows that stand for its keys.
template <class Number>
void weights_by_keys(const Block& b, int size, const float* weight, Stack rows, float* to, bool add) {
    product<Number>(
        b.rows, [&](int) { return size; },
        [&](int i) { return Reach{b.hidden(i) / Words<Number>::together, words<Number>(b.reach(i))}; }, weight, KEYS, 1,
        rows.data, rows.step, NR, to, size, add);
}

// The transpose, of weights that are stacked as the rows are: added to one row for each key.
template <class Number>
void weights_by_rows(const Block& b, int size, const float* weight, Stack rows, float* to, int64_t to_step) {
    product<Number>(
        b.keys, [&](int) { return size; },
        [&](int j) { return Reach{int(b.first(j)) / Words<Number>::together, words<Number>(b.rows)}; }, weight, 1, KEYS,
        rows.data, rows.step, NR, to, to_step, true);
}

// Scores of a block before they are scaled, with softcap and ALiBi; keys that a row does not see, as far as its group
// reaches, are UNSEEN.
template <class Number>
void scores(const Forest& f, const Block& b, const Number* query, Panels<Number>& keys, int64_t h, float* out) {
    const Shape& shape = *b.shape;
    const Number* q = query + b.row * shape.query_token + h * shape.query_head;
    rows_by_keys(b, f, q, shape.query_token, keys, h / (shape.heads / shape.key_heads), out);
    for (int64_t i = 0; i < b.rows; ++i) {
        float* line = out + i * KEYS;
        const int64_t reach = whole(b.reach(i));
        if (shape.softcap)
            for (int64_t j = 0; j < reach; j += VL)
                store(line + j, hyperbolic_tangent(load(line + j) * (shape.scale / shape.softcap)) * (shape.softcap / shape.scale));
        if (shape.slopes) {
            // Softmax ignores what is constant along a row; counting from the row's own position keeps numbers small.
            const int64_t away = b.key_position - b.position - i;
            for (int64_t j = 0; j < reach; ++j) line[j] += shape.slopes[h] / shape.scale * float(away + j);
        }
        std::fill_n(line, b.hidden(i), UNSEEN);
        for (int64_t j = b.seen(i); j < reach; ++j) line[j] = UNSEEN;
    }
}

struct Rows {
    int64_t segment, row, rows;
};

std::vector<Rows> row_blocks(const Forest& f) {
    std::vector<Rows> blocks;
    for (int64_t s = 0; s < f.segments; ++s)
        for (int64_t row = f.start[s]; f.known <= row && row < f.end[s]; row += ROWS)
            blocks.push_back({s, row, std::min<int64_t>(ROWS, f.end[s] - row)});
    return blocks;
}

// A thread's own memory for the sums of one block of rows.
float* sums_of(int64_t size) {
    thread_local static std::vector<float> room;
    room.resize(std::max<size_t>(room.size(), ROWS * size));
    return room.data();
}

template <class Number>
void forward_rows(const Forest& f, const Shape& shape, const Rows& at, int64_t h, const Number* query,
                  Panels<Number>& keys, const Stacks<Number>& values, Number* out, float* total) {
    const int64_t size = shape.value_size, kh = h / (shape.heads / shape.key_heads);
    const float scale = shape.scale * LOG2E;
    alignas(64) thread_local static float weight[ROWS * KEYS];
    float top[ROWS], *to = sums_of(size);
    double sum[ROWS];
    std::fill_n(top, at.rows, UNSEEN);
    std::fill_n(sum, at.rows, 0.);
    bool begun = false;
    blocks_of(f, shape, at.segment, at.row, at.rows, [&](const Block& b) {
        scores(f, b, query, keys, h, weight);
        for (int64_t i = 0; i < b.rows; ++i) {
            float* line = weight + i * KEYS;
            const int64_t reach = whole(b.reach(i));
            vec highest = all(UNSEEN);
            for (int64_t j = 0; j < reach; j += VL) highest = larger(highest, load(line + j));
            const float now = std::max(top[i], std::ceil(scale * max_of(highest)));
            dvec sums = {};
            for (int64_t j = 0; j < reach; j += VL) {
                const vec e = power_of_two<Number>(load(line + j) * scale, now);
                // Never ahead of what is still to be read.
                sums += __builtin_convertvector(store_turned(reinterpret_cast<Number*>(line) + j, e), dvec);
            }
            const float shrink = top[i] == now ? 1.f : std::exp2(top[i] - now);
            sum[i] = sum[i] * shrink + sum_of(sums);
            top[i] = now;
            if (begun && shrink != 1.f)
                for (int64_t d = 0; d < size; d += VL) store(to + i * size + d, load(to + i * size + d) * shrink);
        }
        weights_by_keys<Number>(b, size, weight, values.at(f, kh, b.above, b.key - f.start[b.above]), to, begun);
        begun = true;
    });
    for (int64_t i = 0; i < at.rows; ++i) {
        const float share = float(1. / sum[i]);
        Number* line = out + ((at.row + i) * shape.heads + h) * size;
        for (int64_t d = 0; d < size; d += VL) store(line + d, load(to + i * size + d) * share);
        total[h * f.tokens + at.row + i] = float(top[i] + std::log2(sum[i]));
    }
}

// From scores and the weights' gradients of a block: `weight` and `stacked_slope` become the weights and the scores'
// gradients as rows to sum over queries, `slope` the latter as rows of Numbers to sum over keys.
template <class Number>
void slopes_of(const Block& b, const float* shift, const float* along, float* weight, float* slope, float* stacked_slope) {
    const float scale = b.shape->scale, cap = b.shape->softcap;
    constexpr int together = Words<Number>::together;
    for (int64_t i = 0; i < b.rows; i += together) {
        const int64_t reach = whole(b.reach(i)), stacked = i / together * KEYS;
        const int64_t rows = std::min<int64_t>(together, b.rows - i);
        for (int64_t j = 0; j < reach; j += VL) {
            vec w[together] = {}, s[together] = {};
            for (int64_t t = 0; t < rows; ++t) {
                const int64_t at = (i + t) * KEYS;
                const vec score = load(weight + at + j);
                w[t] = power_of_two<Number>(score * (scale * LOG2E) - shift[i + t], 0.f);
                s[t] = w[t] * (load(slope + at + j) - along[i + t]) * scale;
                if (cap) s[t] = w[t] > 0.f ? s[t] * (1.f - score * score * (scale / cap * (scale / cap))) : (vec){};
                store_turned(reinterpret_cast<Number*>(slope + at) + j, s[t]);
            }
            if constexpr (together == 1) {
                store(weight + stacked + j, w[0]);
            } else {
                store(weight + stacked + j, paired(w[0], w[1]));
                store(stacked_slope + stacked + j, paired(s[0], s[1]));
            }
        }
        // A key's group of rows may begin in a group of rows that does not reach its last key.
        for (float* rest : {weight, stacked_slope}) std::fill(rest + stacked + reach, rest + stacked + KEYS, 0.f);
    }
}

// What a segment's rows give to the gradients of keys and values is added up in pieces of a few blocks of rows, each in
// memory of its own, so that pieces can be worked on side by side however few trees and heads there are; `collect` adds
// the pieces up, always in one order.
struct Pieces {
    static constexpr int64_t BLOCKS = 4;
    struct Piece {
        int64_t segment, begin, end;  // rows
        int64_t keys;                 // of the path down to the piece's last row
        int64_t offset;               // of its sums: in keys of all pieces before it
    };
    std::vector<int64_t> depth;  // keys above each segment
    std::vector<Piece> pieces;
    std::vector<int64_t> order;  // costliest first
    int64_t keys = 0;

    explicit Pieces(const Forest& f) : depth(f.segments) {
        for (int64_t s = 0; s < f.segments; ++s) {
            const int64_t parent = f.parent[s];
            depth[s] = parent < 0 ? 0 : depth[parent] + f.end[parent] - f.start[parent];
            for (int64_t row = f.start[s]; row < f.end[s]; row += BLOCKS * ROWS) {
                const int64_t end = std::min(row + BLOCKS * ROWS, f.end[s]);
                order.push_back(pieces.size());
                pieces.push_back({s, row, end, depth[s] + end - f.start[s], keys});
                keys += pieces.back().keys;
            }
        }
        const auto cost = [&](int64_t p) { return (pieces[p].end - pieces[p].begin) * pieces[p].keys; };
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
    }
    // Numbers of the pieces that segment s's keys are seen from: its own and those below it, one after the other.
    std::pair<int64_t, int64_t> below(const Forest& f, int64_t s) const {
        int64_t last = s + 1;  // segments lie depth first
        while (last < f.segments && f.parent[last] >= s) ++last;
        const auto first_of = [&](int64_t segment) {
            return std::partition_point(pieces.begin(), pieces.end(), [&](const Piece& p) { return p.segment < segment; }) - pieces.begin();
        };
        return {first_of(s), first_of(last)};
    }
};

template <class Number>
void backward_rows(const Forest& f, const Shape& shape, const Rows& at, int64_t h, const Pieces& pieces,
                   const Number* query, const Stacks<Number>& key_rows, Panels<Number>& keys, Panels<Number>& values,
                   const Number* out, const float* total, const Number* grad, Number* query_grad, float* key_sums,
                   float* value_sums) {
    const int64_t size = shape.size, value_size = shape.value_size, kh = h / (shape.heads / shape.key_heads);
    const int64_t step = shape.heads * value_size, query_step = shape.heads * size;
    alignas(64) thread_local static float weight[ROWS * KEYS], slope[ROWS * KEYS], turned[ROWS * KEYS];
    thread_local static std::vector<float> grad_room, query_room;
    float* stacked_slope = Words<Number>::together == 1 ? slope : turned;
    float along[ROWS], *sums = sums_of(size);
    const int64_t here = (at.row * shape.heads + h) * value_size;
    for (int64_t i = 0; i < at.rows; ++i) {
        vec dot = {};
        for (int64_t d = 0; d < value_size; d += VL) dot += load(out + here + i * step + d) * load(grad + here + i * step + d);
        along[i] = sum_of(dot);
    }
    const Number* q = query + at.row * shape.query_token + h * shape.query_head;
    const Stack grad_rows = stacked(grad + here, step, at.rows, value_size, grad_room);
    const Stack query_rows = stacked(q, shape.query_token, at.rows, size, query_room);
    bool begun = false;
    blocks_of(f, shape, at.segment, at.row, at.rows, [&](const Block& b) {
        scores(f, b, query, keys, h, weight);
        rows_by_keys(b, f, grad + here, step, values, kh, slope);
        slopes_of<Number>(b, total + h * f.tokens + at.row, along, weight, slope, stacked_slope);
        const int64_t there = pieces.depth[b.above] + b.key - f.start[b.above];
        weights_by_rows<Number>(b, value_size, weight, grad_rows, value_sums + there * value_size, value_size);
        weights_by_rows<Number>(b, size, stacked_slope, query_rows, key_sums + there * size, size);
        weights_by_keys<Number>(b, size, slope, key_rows.at(f, kh, b.above, b.key - f.start[b.above]), sums, begun);
        begun = true;
    });
    Number* to = query_grad + (at.row * shape.heads + h) * size;
    for (int64_t i = 0; i < at.rows; ++i)
        for (int64_t d = 0; d < size; d += VL) store(to + i * query_step + d, load(sums + i * size + d));
}

template <class Number>
void forward(const Forest& f, const Shape& shape, const Number* query, const Number* key, const Number* value,
             Number* out, float* total) {
    Panels<Number> keys(f, shape, key, shape.key_token, shape.key_head, shape.size);
    const Stacks<Number> values(f, shape, value, shape.value_token, shape.value_head, shape.value_size);
    const std::vector<Rows> blocks = row_blocks(f);
    const int64_t tasks = int64_t(blocks.size()) * shape.heads;
#pragma omp parallel for schedule(dynamic) num_threads(shape.threads)
    for (int64_t task = 0; task < tasks; ++task)
        forward_rows(f, shape, blocks[task % blocks.size()], task / blocks.size(), query, keys, values, out, total);
}

// The gradient of one segment's keys (or values) of a head: the sums of all pieces that see them.
template <class Number>
void collect(const Forest& f, const Shape& shape, int64_t size, const Pieces& pieces, int64_t segment, const float* sums,
             Number* to) {
    const int64_t step = shape.key_heads * size;
    const auto [first, last] = pieces.below(f, segment);
    for (int64_t key = f.start[segment]; key < f.end[segment]; ++key)
        for (int64_t d = 0; d < size; d += VL) {
            vec sum = {};
            for (int64_t p = first; p < last; ++p) {
                const auto& piece = pieces.pieces[p];
                if (piece.segment == segment && piece.end <= key) continue;
                sum += load(sums + (piece.offset + pieces.depth[segment] + key - f.start[segment]) * size + d);
            }
            store(to + key * step + d, sum);
        }
}

template <class Number>
void backward(const Forest& f, const Shape& shape, const Number* query, const Number* key, const Number* value,
              const Number* out, const float* total, const Number* grad, Number* query_grad, Number* key_grad, Number* value_grad) {
    const int64_t size = shape.size, value_size = shape.value_size;
    Panels<Number> keys(f, shape, key, shape.key_token, shape.key_head, size);
    Panels<Number> values(f, shape, value, shape.value_token, shape.value_head, value_size);
    const Stacks<Number> key_rows(f, shape, key, shape.key_token, shape.key_head, size);
    const Pieces pieces(f);
    const int64_t group = shape.heads / shape.key_heads;
    const std::unique_ptr<float[]> sums(new float[shape.key_heads * pieces.keys * (size + value_size)]);
    const auto key_sums_of = [&](int64_t kh) { return sums.get() + kh * pieces.keys * size; };
    const auto value_sums_of = [&](int64_t kh) { return key_sums_of(shape.key_heads) + kh * pieces.keys * value_size; };
#pragma omp parallel for schedule(dynamic) num_threads(shape.threads)
    for (int64_t task = 0; task < int64_t(pieces.order.size()) * shape.key_heads; ++task) {
        const auto& piece = pieces.pieces[pieces.order[task / shape.key_heads]];
        const int64_t kh = task % shape.key_heads;
        float* key_sums = key_sums_of(kh) + piece.offset * size;
        float* value_sums = value_sums_of(kh) + piece.offset * value_size;
        std::fill_n(key_sums, piece.keys * size, 0.f);
        std::fill_n(value_sums, piece.keys * value_size, 0.f);
        for (int64_t h = kh * group; h < (kh + 1) * group; ++h)
            for (int64_t row = piece.begin; row < piece.end; row += ROWS)
                backward_rows(f, shape, {piece.segment, row, std::min<int64_t>(ROWS, piece.end - row)}, h, pieces, query,
                              key_rows, keys, values, out, total, grad, query_grad, key_sums, value_sums);
    }
#pragma omp parallel for schedule(dynamic) num_threads(shape.threads)
    for (int64_t task = 0; task < f.segments * shape.key_heads; ++task) {
        const int64_t s = task / shape.key_heads, kh = task % shape.key_heads;
        collect(f, shape, size, pieces, s, key_sums_of(kh), key_grad + kh * size);
        collect(f, shape, value_size, pieces, s, value_sums_of(kh), value_grad + kh * value_size);
    }
}

}  // namespace

extern "C" {

// out (T, H, D) and total (H, T), the base-2 log of each row's softmax denominator. Arrays of Numbers are void here.
void preftree_forward(int64_t is_bfloat, const Forest* f, const Shape* shape, const void* query, const void* key,
                      const void* value, void* out, float* total) {
    with_numbers(is_bfloat, [&](auto* n) {
        forward(*f, *shape, as(n, query), as(n, key), as(n, value), as(n, out), total);
    });
}

// Gradients (T, H, D) and (T, K, D).
void preftree_backward(int64_t is_bfloat, const Forest* f, const Shape* shape, const void* query, const void* key,
                       const void* value, const void* out, const float* total, const void* grad, void* query_grad,
                       void* key_grad, void* value_grad) {
    with_numbers(is_bfloat, [&](auto* n) {
        backward(*f, *shape, as(n, query), as(n, key), as(n, value), as(n, out), total, as(n, grad), as(n, query_grad),
                 as(n, key_grad), as(n, value_grad));
    });
}

}  // extern "C"
