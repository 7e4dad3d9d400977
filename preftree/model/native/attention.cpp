// Attention over token trees in float32: forward and backward, tile by tile, without a mask and without keeping weights.
//
// A query row attends its own segment up to itself and all of the segments above it. Row blocks and key blocks never
// cross a segment, so a block is either seen whole or triangular. The weights of a block live in a thread's own memory
// only (FlashAttention-2, arXiv 2307.08691): the forward pass keeps out and, per row, the log of the softmax's total;
// the backward pass forms the weights again.
//
// All products are one micro kernel, C += A·B over a few rows and two vectors of columns, in the compiler's own vector
// types: no intrinsics, no headers beside the standard ones.
//
// Arrays: query, out and their gradients (T, H, D), key and value (T, K, D), strides given in floats, D contiguous.

#include "vectors.h"

#include <vector>

namespace {

constexpr int MR = VL == 16 ? 12 : 6;  // rows of the micro kernel, so that 2·MR sums fit the registers
constexpr int NR = 2 * VL;  // keys of a packed panel
constexpr int ROWS = 96, KEYS = 128;  // of a block: its weights fit the second-level cache
constexpr float LOWEST = -1e30f;  // stands for -inf, but subtracting it from itself is no NaN

// C[i, :] (+)= sum_p A(i, p) · B[p, :] for M rows and N vectors of columns; A(i, p) = a[i·ai + p·ap].
template <int M, int N>
inline void micro(int depth, const float* a, int64_t ai, int64_t ap, const float* b, int64_t bs, float* c, int64_t cs,
                  bool add) {
    vec sums[M][N];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) sums[i][j] = add ? load(c + i * cs + j * VL) : (vec){};
    for (int p = 0; p < depth; ++p) {
        vec row[N];
        for (int j = 0; j < N; ++j) row[j] = load(b + p * bs + j * VL);
        for (int i = 0; i < M; ++i) {
            const float x = a[i * ai + p * ap];
            for (int j = 0; j < N; ++j) sums[i][j] += x * row[j];
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) store(c + i * cs + j * VL, sums[i][j]);
}

template <int N, int M = MR>
inline void rows_left(int rows, int depth, const float* a, int64_t ai, int64_t ap, const float* b, int64_t bs, float* c,
                      int64_t cs, bool add) {
    if constexpr (M > 0) {
        if (rows == M) return micro<M, N>(depth, a, ai, ap, b, bs, c, cs, add);
        rows_left<N, M - 1>(rows, depth, a, ai, ap, b, bs, c, cs, add);
    }
}

struct Reach {
    int from, to;
};

// C (+)= A·B. `panel` is the distance in B between one group of NR columns and the next; `columns(i)` and `depth(i)` say
// what the row group that begins at i needs of both, so that what lies above a diagonal is left out.
template <class Columns, class Depth>
void product(int rows, Columns columns, Depth depth, const float* a, int64_t ai, int64_t ap, const float* b, int64_t bs,
             int64_t panel, float* c, int64_t cs, bool add) {
    for (int j = 0, last = columns(rows - 1); j < last; j += NR, b += panel, c += NR)
        for (int i = 0; i < rows; i += MR) {
            const int left = std::min(MR, rows - i), wanted = columns(i + left - 1) - j;
            const Reach p = depth(i);
            if (wanted <= 0) continue;
            const float *x = a + i * ai + p.from * ap, *y = b + p.from * bs;
            if (wanted > VL) rows_left<2>(left, p.to - p.from, x, ai, ap, y, bs, c + i * cs, cs, add);
            else rows_left<1>(left, p.to - p.from, x, ai, ap, y, bs, c + i * cs, cs, add);
        }
}

}  // namespace

extern "C" {

struct Forest {
    int64_t tokens, segments;
    int64_t known;  // the first tokens are keys only; no segment lies on both sides
    const int64_t *start, *end, *parent, *position;  // of each segment; parents come before children
};

struct Shape {
    int64_t heads, key_heads, size;  // H, K, D
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;  // strides, in floats
    float scale;
    const float* slopes;  // ALiBi, (H,), or null
    int64_t threads;
};

}  // extern "C"

namespace {

// Keys (or values) of all segments, times a factor, with the head size leading, in panels of NR keys that begin where segments do.
struct Panels {
    std::vector<float> data;
    std::vector<int64_t> first;  // panel where each segment begins
    int64_t per_head = 0, size;

    Panels(const Forest& f, int64_t size) : size(size) {
        for (int64_t s = 0; s < f.segments; ++s) {
            first.push_back(per_head);
            per_head += (f.end[s] - f.start[s] + NR - 1) / NR;
        }
    }
    void fill(const Forest& f, const Shape& shape, const float* source, int64_t token, int64_t head, float factor) {
        data.resize(shape.key_heads * per_head * size * NR);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(shape.threads)
        for (int64_t h = 0; h < shape.key_heads; ++h)
            for (int64_t s = 0; s < f.segments; ++s)
                for (int64_t key = f.start[s]; key < f.end[s]; key += NR) {
                    float* to = at(h, s, key - f.start[s]);
                    const int64_t count = std::min<int64_t>(NR, f.end[s] - key);
                    for (int64_t d = 0; d < size; ++d)
                        for (int64_t i = 0; i < NR; ++i)
                            to[d * NR + i] = i < count ? factor * source[(key + i) * token + h * head + d] : 0.f;
                }
    }
    float* at(int64_t head, int64_t segment, int64_t offset) {
        return data.data() + ((head * per_head + first[segment] + offset / NR) * size) * NR;
    }
};

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

// Rows times packed keys or values of a block, as far as each group of rows reaches.
void rows_by_keys(const Block& b, const Forest& f, int size, const float* a, int64_t step, Panels& panels, int64_t kh,
                  float* out) {
    product(
        b.rows, [&](int i) { return b.seen(i); }, [&](int) { return Reach{0, size}; }, a, step, 1,
        panels.at(kh, b.above, b.key - f.start[b.above]), NR, size * NR, out, KEYS, false);
}

// Weights (or their gradients) of a block times rows that stand for its keys, added to one row for each query.
void weights_by_keys(const Block& b, int size, const float* weight, const float* rows, int64_t step, float* to,
                     int64_t to_step, bool add) {
    product(
        b.rows, [&](int) { return size; }, [&](int i) { return Reach{0, b.reach(i)}; }, weight, KEYS, 1, rows, step, NR,
        to, to_step, add);
}

// The transpose: added to one row for each key.
void weights_by_rows(const Block& b, int size, const float* weight, const float* rows, int64_t step, float* to,
                     int64_t to_step) {
    product(
        b.keys, [&](int) { return size; }, [&](int j) { return Reach{b.first(j), int(b.rows)}; }, weight, 1, KEYS, rows,
        step, NR, to, to_step, true);
}

// Scores of a block with ALiBi added; keys that a row does not see, as far as its group reaches, are LOWEST.
void scores(const Forest& f, const Shape& shape, const Block& b, const float* query, Panels& keys, int64_t h, float* out) {
    const float* q = query + b.row * shape.query_token + h * shape.query_head;
    rows_by_keys(b, f, shape.size, q, shape.query_token, keys, h / (shape.heads / shape.key_heads), out);
    for (int64_t i = 0; i < b.rows; ++i) {
        float* line = out + i * KEYS;
        const int64_t reach = whole(b.reach(i));
        if (shape.slopes) {
            // Softmax ignores what is constant along a row; counting from the row's own position keeps numbers small.
            const int64_t away = f.position[b.above] + b.key - f.start[b.above] - f.position[b.own] - b.row - i + f.start[b.own];
            for (int64_t j = 0; j < reach; ++j) line[j] += shape.slopes[h] * float(away + j);
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

void forward_rows(const Forest& f, const Shape& shape, const Rows& at, int64_t h, const float* query, Panels& keys,
                  const float* value, float* out, float* total) {
    const int64_t size = shape.size, group = shape.heads / shape.key_heads;
    alignas(64) thread_local static float weight[ROWS * KEYS];
    float top[ROWS], sum[ROWS];
    std::fill_n(top, at.rows, LOWEST);
    std::fill_n(sum, at.rows, 0.f);
    float* to = out + (at.row * shape.heads + h) * size;
    const int64_t step = shape.heads * size;
    bool begun = false;
    blocks_of(f, at.segment, at.row, at.rows, [&](const Block& b) {
        scores(f, shape, b, query, keys, h, weight);
        for (int64_t i = 0; i < b.rows; ++i) {
            float* line = weight + i * KEYS;
            const int64_t reach = whole(b.reach(i));
            vec highest = all(top[i]);
            for (int64_t j = 0; j < reach; j += VL) highest = larger(highest, load(line + j));
            const float now = max_of(highest);
            vec sums = {};
            for (int64_t j = 0; j < reach; j += VL) {
                vec e = exponential(load(line + j) - now);
                sums += e;
                store(line + j, e);
            }
            const float shrink = top[i] == now ? 1.f : std::exp(top[i] - now);
            sum[i] = sum[i] * shrink + sum_of(sums);
            top[i] = now;
            if (begun && shrink != 1.f)
                for (int64_t d = 0; d < size; d += VL) store(to + i * step + d, load(to + i * step + d) * shrink);
        }
        const float* v = value + b.key * shape.value_token + (h / group) * shape.value_head;
        weights_by_keys(b, size, weight, v, shape.value_token, to, step, begun);
        begun = true;
    });
    for (int64_t i = 0; i < at.rows; ++i) {
        const float share = 1.f / sum[i];
        for (int64_t d = 0; d < size; d += VL) store(to + i * step + d, load(to + i * step + d) * share);
        total[h * f.tokens + at.row + i] = top[i] + std::log(sum[i]);
    }
}

struct Gradients {
    float *query, *key, *value;  // (T, H, D) each: those of a key head's queries are added up by the caller
};

void backward_rows(const Forest& f, const Shape& shape, const Rows& at, int64_t h, const float* query, const float* key,
                   Panels& keys, Panels& values, const float* out, const float* total, const float* grad,
                   const Gradients& to) {
    const int64_t size = shape.size, step = shape.heads * size, kh = h / (shape.heads / shape.key_heads);
    alignas(64) thread_local static float weight[ROWS * KEYS], slope[ROWS * KEYS];
    float along[ROWS];
    const int64_t here = (at.row * shape.heads + h) * size;
    for (int64_t i = 0; i < at.rows; ++i) {
        vec dot = {};
        for (int64_t d = 0; d < size; d += VL) dot += load(out + here + i * step + d) * load(grad + here + i * step + d);
        along[i] = sum_of(dot);
    }
    bool begun = false;
    blocks_of(f, at.segment, at.row, at.rows, [&](const Block& b) {
        scores(f, shape, b, query, keys, h, weight);
        rows_by_keys(b, f, size, grad + here, step, values, kh, slope);
        for (int64_t i = 0; i < b.rows; ++i) {
            const float shift = total[h * f.tokens + at.row + i];
            const int64_t line = i * KEYS, reach = whole(b.reach(i));
            for (int64_t j = line; j < line + reach; j += VL) {
                vec w = exponential(load(weight + j) - shift);
                store(weight + j, w);
                store(slope + j, w * (load(slope + j) - along[i]) * shape.scale);
            }
            // A key's group of rows may begin in a group of rows that does not reach its last key.
            for (float* rest : {weight, slope}) std::fill(rest + line + reach, rest + line + KEYS, 0.f);
        }
        const int64_t there = (b.key * shape.heads + h) * size;
        const float* q = query + b.row * shape.query_token + h * shape.query_head;
        const float* k = key + b.key * shape.key_token + kh * shape.key_head;
        weights_by_rows(b, size, weight, grad + here, step, to.value + there, step);
        weights_by_rows(b, size, slope, q, shape.query_token, to.key + there, step);
        weights_by_keys(b, size, slope, k, shape.key_token, to.query + here, step, begun);
        begun = true;
    });
}

}  // namespace

extern "C" {

// out (T, H, D) and total (H, T), the log of each row's softmax denominator.
void preftree_forward(const Forest* f, const Shape* shape, const float* query, const float* key, const float* value,
                      float* out, float* total) {
    Panels keys(*f, shape->size);
    keys.fill(*f, *shape, key, shape->key_token, shape->key_head, shape->scale);
    const std::vector<Rows> blocks = row_blocks(*f);
    const int64_t tasks = int64_t(blocks.size()) * shape->heads;
#pragma omp parallel for schedule(dynamic) num_threads(shape->threads)
    for (int64_t task = 0; task < tasks; ++task)
        forward_rows(*f, *shape, blocks[task % blocks.size()], task / blocks.size(), query, keys, value, out, total);
}

// Gradients (T, H, D); key's and value's must hold zeros, and are to be added up over the queries of a key head.
void preftree_backward(const Forest* f, const Shape* shape, const float* query, const float* key, const float* value,
                       const float* out, const float* total, const float* grad, float* query_grad, float* key_grad,
                       float* value_grad) {
    Panels keys(*f, shape->size), values(*f, shape->size);
    keys.fill(*f, *shape, key, shape->key_token, shape->key_head, shape->scale);
    values.fill(*f, *shape, value, shape->value_token, shape->value_head, 1.f);
    const Gradients to{query_grad, key_grad, value_grad};
    // A task is one head of one tree: no other writes to the gradients of its keys.
    std::vector<std::vector<Rows>> trees;
    for (const Rows& block : row_blocks(*f)) {
        if (f->parent[block.segment] < 0 && block.row == f->start[block.segment]) trees.emplace_back();
        trees.back().push_back(block);
    }
    std::stable_sort(trees.begin(), trees.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
    const int64_t tasks = int64_t(trees.size()) * shape->heads;
#pragma omp parallel for schedule(dynamic) num_threads(shape->threads)
    for (int64_t task = 0; task < tasks; ++task)
        for (const Rows& block : trees[task / shape->heads])
            backward_rows(*f, *shape, block, task % shape->heads, query, key, keys, values, out, total, grad, to);
}

}  // extern "C"
