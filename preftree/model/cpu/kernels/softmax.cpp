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

// Logits become exp(logit − top of the row), of which `total` is the sum; `logprob` is that of the target.
template <class Number>
void exponentiate(int64_t rows, int64_t size, int64_t threads, Number* logits, const int64_t* target, float* logprob,
                  float* total) {
    constexpr float NOTHING = -1e30f;  // its exponential is 0
    const int64_t whole = size / VL * VL, left = size - whole;
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        Number* line = logits + r * size;
        vec highest = left ? rest_of(line + whole, left, NOTHING) : all(NOTHING);
        for (int64_t i = 0; i < whole; i += VL) highest = larger(highest, load(line + i));
        const float top = max_of(highest), wanted = rest_of(line + target[r], 1, 0.f)[0] - top;
        vec sum = {};
        for (int64_t i = 0; i < whole; i += VL) {
            const vec e = exponential(load(line + i) - top);
            sum += e;
            store(line + i, e);
        }
        if (left) {
            const vec e = exponential(rest_of(line + whole, left, NOTHING) - top);
            sum += e;
            Number numbers[VL];
            store(numbers, e);
            std::copy_n(numbers, left, line + whole);
        }
        total[r] = sum_of(sum);
        logprob[r] = wanted - std::log(total[r]);
    }
}

}  // namespace

extern "C" {

// logits (rows, size), in place; target, logprob and total (rows,)
void preftree_exponentiate(int64_t is_bfloat, int64_t rows, int64_t size, int64_t threads, void* logits,
                           const int64_t* target, float* logprob, float* total) {
    with_numbers(is_bfloat, [&](auto* n) { exponentiate(rows, size, threads, as(n, logits), target, logprob, total); });
}

}  // extern "C"
