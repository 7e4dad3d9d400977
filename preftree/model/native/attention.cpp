// Attention over token trees: forward and backward, tile by tile, without a mask and without keeping weights.
//
// A query row attends its own segment up to itself and all of the segments above it. Row blocks and key blocks never
// cross a segment, so a block is either seen whole or triangular. The weights of a block live in a thread's own memory
// only (FlashAttention-2, arXiv 2307.08691): the forward pass keeps out and, per row, the log of the softmax's total;
// the backward pass forms the weights again. Products take numbers as the arrays hold them, float32 or bfloat16; scores,
// softmax, sums and the gradients of keys and values are float32, and weights are rounded only to be multiplied.
//
// Arrays: query, out and their gradients (T, H, D), key and value (T, K, D), strides given in numbers, D contiguous.

#include "layout.h"

namespace {

constexpr int ROWS = 96, KEYS = 128;  // of a block: its weights fit the second-level cache
constexpr float LOWEST = -1e30f;  // stands for -inf, but subtracting it from itself is no NaN

int64_t whole(int64_t floats) { return (floats + VL - 1) / VL * VL; }

// One block of scores: rows [row, row + rows) of segment `own`, keys [key, key + keys) of segment `above`.
struct Block {
    int64_t row, rows, own, above, key, keys;
    int seen(int64_t i) const {  // how many of the keys row i sees
        return own == above ? std::clamp<int64_t>(row + i - key + 1, 0, keys) : keys;
    }
    int reach(int64_t i) const {  // how many the micro kernel's group of row i sees
        return seen(std::min(i / MR * MR + MR, rows) - 1);
    }
    int first(int64_t j) const {  // the first row that sees key j
        return own == above ? std::clamp<int64_t>(key + j - row, 0, rows) : 0;
    }
};

// Calls visit(block) for all key blocks that the rows see, own segment last.
template <class Visit>
void blocks_of(const Forest& f, int64_t own, int64_t row, int64_t rows, Visit visit) {
    for (int64_t s = own; s >= 0; s = f.parent[s]) {
        const int64_t end = s == own ? row + rows : f.end[s];
        for (int64_t key = f.start[s]; key < end; key += KEYS)
            visit(Block{row, rows, own, s, key, std::min<int64_t>(KEYS, end - key)});
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
        b.rows, [&](int) { return size; }, [&](int i) { return Reach{0, words<Number>(b.reach(i))}; }, weight, KEYS, 1,
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

// Scores of a block before they are scaled, with ALiBi added; keys that a row does not see, as far as its group reaches, are LOWEST.
template <class Number>
void scores(const Forest& f, const Shape& shape, const Block& b, const Number* query, Panels<Number>& keys, int64_t h,
            float* out) {
    const Number* q = query + b.row * shape.query_token + h * shape.query_head;
    rows_by_keys(b, f, q, shape.query_token, keys, h / (shape.heads / shape.key_heads), out);
    for (int64_t i = 0; i < b.rows; ++i) {
        float* line = out + i * KEYS;
        const int64_t reach = whole(b.reach(i));
        if (shape.slopes) {
            // Softmax ignores what is constant along a row; counting from the row's own position keeps numbers small.
            const int64_t away = f.position[b.above] + b.key - f.start[b.above] - f.position[b.own] - b.row - i + f.start[b.own];
            for (int64_t j = 0; j < reach; ++j) line[j] += shape.slopes[h] / shape.scale * float(away + j);
        }
        for (int64_t j = b.seen(i); j < reach; ++j) line[j] = LOWEST;
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
    const int64_t size = shape.size, kh = h / (shape.heads / shape.key_heads);
    alignas(64) thread_local static float weight[ROWS * KEYS];
    float top[ROWS], sum[ROWS], *to = sums_of(size);
    std::fill_n(top, at.rows, LOWEST);
    std::fill_n(sum, at.rows, 0.f);
    bool begun = false;
    blocks_of(f, at.segment, at.row, at.rows, [&](const Block& b) {
        scores(f, shape, b, query, keys, h, weight);
        for (int64_t i = 0; i < b.rows; ++i) {
            float* line = weight + i * KEYS;
            const int64_t reach = whole(b.reach(i));
            vec highest = all(LOWEST);
            for (int64_t j = 0; j < reach; j += VL) highest = larger(highest, load(line + j));
            const float now = std::max(top[i], shape.scale * max_of(highest));
            vec sums = {};
            for (int64_t j = 0; j < reach; j += VL) {
                vec e = exponential(load(line + j) * shape.scale - now);
                sums += e;
                store(reinterpret_cast<Number*>(line) + j, e);  // never ahead of what is still to be read
            }
            const float shrink = top[i] == now ? 1.f : std::exp(top[i] - now);
            sum[i] = sum[i] * shrink + sum_of(sums);
            top[i] = now;
            if (begun && shrink != 1.f)
                for (int64_t d = 0; d < size; d += VL) store(to + i * size + d, load(to + i * size + d) * shrink);
        }
        weights_by_keys<Number>(b, size, weight, values.at(f, kh, b.above, b.key - f.start[b.above]), to, begun);
        begun = true;
    });
    for (int64_t i = 0; i < at.rows; ++i) {
        const float share = 1.f / sum[i];
        Number* line = out + ((at.row + i) * shape.heads + h) * size;
        for (int64_t d = 0; d < size; d += VL) store(line + d, load(to + i * size + d) * share);
        total[h * f.tokens + at.row + i] = top[i] + std::log(sum[i]);
    }
}

// From scores and the weights' gradients of a block: `weight` and `stacked_slope` become the weights and the scores'
// gradients as rows to sum over queries, `slope` the latter as rows of Numbers to sum over keys.
template <class Number>
void slopes_of(const Block& b, const float* shift, const float* along, float scale, float* weight, float* slope,
               float* stacked_slope) {
    constexpr int together = Words<Number>::together;
    for (int64_t i = 0; i < b.rows; i += together) {
        const int64_t reach = whole(b.reach(i)), stacked = i / together * KEYS;
        const int64_t rows = std::min<int64_t>(together, b.rows - i);
        for (int64_t j = 0; j < reach; j += VL) {
            vec w[together] = {}, s[together] = {};
            for (int64_t t = 0; t < rows; ++t) {
                const int64_t at = (i + t) * KEYS;
                w[t] = exponential(load(weight + at + j) * scale - shift[i + t]);
                s[t] = w[t] * (load(slope + at + j) - along[i + t]) * scale;
                store(reinterpret_cast<Number*>(slope + at) + j, s[t]);
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

template <class Number>
void backward_rows(const Forest& f, const Shape& shape, const Rows& at, int64_t h, const Number* query,
                   const Stacks<Number>& key_rows, Panels<Number>& keys, Panels<Number>& values, const Number* out,
                   const float* total, const Number* grad, Number* query_grad, float* key_grad, float* value_grad) {
    const int64_t size = shape.size, step = shape.heads * size, kh = h / (shape.heads / shape.key_heads);
    alignas(64) thread_local static float weight[ROWS * KEYS], slope[ROWS * KEYS], turned[ROWS * KEYS];
    thread_local static std::vector<float> grad_room, query_room;
    float* stacked_slope = Words<Number>::together == 1 ? slope : turned;
    float along[ROWS], *sums = sums_of(size);
    const int64_t here = (at.row * shape.heads + h) * size;
    for (int64_t i = 0; i < at.rows; ++i) {
        vec dot = {};
        for (int64_t d = 0; d < size; d += VL) dot += load(out + here + i * step + d) * load(grad + here + i * step + d);
        along[i] = sum_of(dot);
    }
    const Number* q = query + at.row * shape.query_token + h * shape.query_head;
    const Stack grad_rows = stacked(grad + here, step, at.rows, size, grad_room);
    const Stack query_rows = stacked(q, shape.query_token, at.rows, size, query_room);
    bool begun = false;
    blocks_of(f, at.segment, at.row, at.rows, [&](const Block& b) {
        scores(f, shape, b, query, keys, h, weight);
        rows_by_keys(b, f, grad + here, step, values, kh, slope);
        slopes_of<Number>(b, total + h * f.tokens + at.row, along, shape.scale, weight, slope, stacked_slope);
        const int64_t there = (b.key * shape.heads + h) * size;
        weights_by_rows<Number>(b, size, weight, grad_rows, value_grad + there, step);
        weights_by_rows<Number>(b, size, stacked_slope, query_rows, key_grad + there, step);
        weights_by_keys<Number>(b, size, slope, key_rows.at(f, kh, b.above, b.key - f.start[b.above]), sums, begun);
        begun = true;
    });
    for (int64_t i = 0; i < at.rows; ++i)
        for (int64_t d = 0; d < size; d += VL) store(query_grad + here + i * step + d, load(sums + i * size + d));
}

template <class Number>
void forward(const Forest& f, const Shape& shape, const Number* query, const Number* key, const Number* value,
             Number* out, float* total) {
    Panels<Number> keys(f, shape, key, shape.key_token, shape.key_head);
    const Stacks<Number> values(f, shape, value, shape.value_token, shape.value_head);
    const std::vector<Rows> blocks = row_blocks(f);
    const int64_t tasks = int64_t(blocks.size()) * shape.heads;
#pragma omp parallel for schedule(dynamic) num_threads(shape.threads)
    for (int64_t task = 0; task < tasks; ++task)
        forward_rows(f, shape, blocks[task % blocks.size()], task / blocks.size(), query, keys, values, out, total);
}

template <class Number>
void backward(const Forest& f, const Shape& shape, const Number* query, const Number* key, const Number* value,
              const Number* out, const float* total, const Number* grad, Number* query_grad, float* key_grad, float* value_grad) {
    Panels<Number> keys(f, shape, key, shape.key_token, shape.key_head);
    Panels<Number> values(f, shape, value, shape.value_token, shape.value_head);
    const Stacks<Number> key_rows(f, shape, key, shape.key_token, shape.key_head);
    // A task is one head of one tree: no other writes to the gradients of its keys.
    std::vector<std::vector<Rows>> trees;
    for (const Rows& block : row_blocks(f)) {
        if (f.parent[block.segment] < 0 && block.row == f.start[block.segment]) trees.emplace_back();
        trees.back().push_back(block);
    }
    std::stable_sort(trees.begin(), trees.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
    const int64_t tasks = int64_t(trees.size()) * shape.heads;
#pragma omp parallel for schedule(dynamic) num_threads(shape.threads)
    for (int64_t task = 0; task < tasks; ++task)
        for (const Rows& block : trees[task / shape.heads])
            backward_rows(f, shape, block, task % shape.heads, query, key_rows, keys, values, out, total, grad,
                          query_grad, key_grad, value_grad);
}

}  // namespace

extern "C" {

// out (T, H, D) and total (H, T), the log of each row's softmax denominator. Arrays of Numbers are void here.
void preftree_forward(int64_t narrow, const Forest* f, const Shape* shape, const void* query, const void* key,
                      const void* value, void* out, float* total) {
    with_numbers(narrow, [&](auto* n) {
        forward(*f, *shape, as(n, query), as(n, key), as(n, value), as(n, out), total);
    });
}

// Gradients (T, H, D); key's and value's must hold zeros, and are to be added up over the queries of a key head.
void preftree_backward(int64_t narrow, const Forest* f, const Shape* shape, const void* query, const void* key,
                       const void* value, const void* out, const float* total, const void* grad, void* query_grad,
                       float* key_grad, float* value_grad) {
    with_numbers(narrow, [&](auto* n) {
        backward(*f, *shape, as(n, query), as(n, key), as(n, value), as(n, out), total, as(n, grad), as(n, query_grad),
                 key_grad, value_grad);
    });
}

}  // extern "C"
