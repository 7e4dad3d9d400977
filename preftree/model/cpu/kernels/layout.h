// What attention is given, and its arrays laid out as products want them (`Words`).
#pragma once

#include "product.h"

#include <vector>

extern "C" {

struct Forest {
    int64_t tokens, segments;
    int64_t known;  // the first tokens are keys only; no segment lies on both sides
    const int64_t *start, *end, *parent, *position;  // of each segment; parents come before children
};

struct Shape {
    int64_t heads, key_heads, size, value_size;  // H, K, D of queries and keys, D of values and outputs
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;  // strides, in numbers
    float scale;
    float softcap;  // scaled scores become softcap · tanh(score / softcap), or 0
    const float* slopes;  // ALiBi, (H,), or null
    int64_t window, chunk;  // a token sees that many tokens back, itself included; its own chunk only; or 0
    int64_t threads;
};

}  // extern "C"

namespace {

constexpr word NOTHING = 0.f;

// The first path position that a token sees.
int64_t first_seen(const Shape& shape, int64_t position) {
    int64_t first = 0;
    if (shape.window) first = std::max(first, position - shape.window + 1);
    if (shape.chunk) first = std::max(first, position - position % shape.chunk);
    return first;
}

// Where groups of `group` rows of each segment begin, one segment behind the other.
struct Groups {
    std::vector<int64_t> first;
    int64_t count = 0;
    Groups(const Forest& f, int64_t group) {
        for (int64_t s = 0; s < f.segments; ++s) {
            first.push_back(count);
            count += (f.end[s] - f.start[s] + group - 1) / group;
        }
    }
};

// Keys (or values) of all segments, with the words of a row leading, in panels of NR keys that begin where segments do.
template <class Number>
struct Panels {
    Groups groups;
    std::vector<float> data;
    int64_t words;

    Panels(const Forest& f, const Shape& shape, const Number* source, int64_t token, int64_t head, int64_t size)
        : groups(f, NR), words(size / Words<Number>::together) {
        data.resize(shape.key_heads * groups.count * words * NR);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(shape.threads)
        for (int64_t h = 0; h < shape.key_heads; ++h)
            for (int64_t s = 0; s < f.segments; ++s)
                for (int64_t key = f.start[s]; key < f.end[s]; key += NR)
                    fill(at(h, s, key - f.start[s]), source + key * token + h * head, token,
                         std::min<int64_t>(NR, f.end[s] - key));
    }
    void fill(word* to, const Number* rows, int64_t token, int64_t count) const {
        for (int64_t i = 0; i < NR; ++i) {
            const word* row = reinterpret_cast<const word*>(rows + std::min(i, count - 1) * token);
            for (int64_t w = 0; w < words; ++w) std::memcpy(to + w * NR + i, i < count ? row + w : &NOTHING, sizeof(word));
        }
    }
    word* at(int64_t head, int64_t segment, int64_t offset) {
        return data.data() + (head * groups.count + groups.first[segment] + offset / NR) * words * NR;
    }
};

// Rows to sum over, one below the other in words: of `together` rows that follow each other, the numbers of a column
// make a word. For float32 these are the rows themselves.
struct Stack {
    const word* data;
    int64_t step;
};

Stack stacked(const float* rows, int64_t step, int64_t, int64_t, std::vector<float>&) { return {rows, step}; }

void stack(const bfloat* rows, int64_t step, int64_t count, int64_t size, word* to) {
    for (int64_t i = 0; i < count; i += 2, to += size)
        for (int64_t d = 0; d < size; d += VL) {
            const bfloat* row = rows + i * step + d;
            store(to + d, paired(load(row), i + 1 < count ? load(row + step) : (vec){}));
        }
}

Stack stacked(const bfloat* rows, int64_t step, int64_t count, int64_t size, std::vector<float>& room) {
    room.resize(std::max<size_t>(room.size(), (count + 1) / 2 * size));
    stack(rows, step, count, size, room.data());
    return {room.data(), size};
}

// The same of all segments, for keys or values.
template <class Number>
struct Stacks;

template <>
struct Stacks<float> {
    const float* source;
    int64_t token, head;
    Stacks(const Forest&, const Shape&, const float* source, int64_t token, int64_t head, int64_t)
        : source(source), token(token), head(head) {}
    Stack at(const Forest& f, int64_t key_head, int64_t segment, int64_t offset) const {
        return {source + (f.start[segment] + offset) * token + key_head * head, token};
    }
};

template <>
struct Stacks<bfloat> {
    Groups groups;
    std::vector<float> data;
    int64_t size;
    Stacks(const Forest& f, const Shape& shape, const bfloat* source, int64_t token, int64_t head, int64_t size)
        : groups(f, 2), size(size) {
        data.resize(shape.key_heads * groups.count * size);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(shape.threads)
        for (int64_t h = 0; h < shape.key_heads; ++h)
            for (int64_t s = 0; s < f.segments; ++s)
                stack(source + f.start[s] * token + h * head, token, f.end[s] - f.start[s], size,
                      data.data() + (h * groups.count + groups.first[s]) * size);
    }
    Stack at(const Forest&, int64_t key_head, int64_t segment, int64_t offset) const {
        return {data.data() + (key_head * groups.count + groups.first[segment] + offset / 2) * size, size};
    }
};

}  // namespace
