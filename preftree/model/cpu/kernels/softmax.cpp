// The passes over the vocabulary that a softmax takes, a row at a time while it lies in the cache.

#include "vectors.h"

namespace {

// The last vector of a row, padded with `pad`.
template <class Number>
vec rest_of(const Number* line, int64_t count, float pad) {
    Number numbers[VL];
    store(numbers, all(pad));
    std::copy_n(line, count, numbers);
    return load(numbers);
}

// Logits become exp(logit − top of the row), of which `total` is the sum; `logprob` is that of the target. `entropy` is
// that of the row, in nats; null: not wanted.
template <class Number>
void exponentiate(int64_t rows, int64_t size, int64_t threads, Number* logits, const int64_t* target, float* logprob,
                  float* total, float* entropy) {
    constexpr float NOTHING = -1e30f;  // its exponential is 0
    const int64_t whole = size / VL * VL, left = size - whole;
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        Number* line = logits + r * size;
        vec highest = left ? rest_of(line + whole, left, NOTHING) : all(NOTHING);
        for (int64_t i = 0; i < whole; i += VL) highest = larger(highest, load(line + i));
        const float top = max_of(highest), wanted = rest_of(line + target[r], 1, 0.f)[0] - top;
        vec sum = {}, along = {};
        for (int64_t i = 0; i < whole; i += VL) {
            const vec below = load(line + i) - top, e = exponential(below);
            sum += e;
            along += e > (vec){} ? e * below : (vec){};  // a logit may be -inf
            store(line + i, e);
        }
        if (left) {
            const vec below = rest_of(line + whole, left, NOTHING) - top, e = exponential(below);
            sum += e;
            along += e > (vec){} ? e * below : (vec){};
            Number numbers[VL];
            store(numbers, e);
            std::copy_n(numbers, left, line + whole);
        }
        total[r] = sum_of(sum);
        logprob[r] = wanted - std::log(total[r]);
        if (entropy) entropy[r] = std::log(total[r]) - sum_of(along) / total[r];
    }
}

}  // namespace

extern "C" {

// logits (rows, size), in place; target, logprob, total and entropy (rows,)
void preftree_exponentiate(int64_t is_bfloat, int64_t rows, int64_t size, int64_t threads, void* logits,
                           const int64_t* target, float* logprob, float* total, float* entropy) {
    with_numbers(is_bfloat, [&](auto* n) {
        exponentiate(rows, size, threads, as(n, logits), target, logprob, total, entropy);
    });
}

}  // extern "C"
