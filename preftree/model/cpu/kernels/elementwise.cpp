// One pass over memory where torch makes four to ten: the gated activation and the root-mean-square norm, each with
// its gradient. Rows are contiguous; `size` is a multiple of the vector length. Arithmetic is float32 whatever the arrays.

#include "vectors.h"

namespace {

// The logistic function, by the exponential of a number that is never positive.
inline vec sigmoid(vec x) {
    vec e = exponential(x > (vec){} ? -x : x);
    return (x > (vec){} ? all(1.f) : e) / (1.f + e);
}

// out = silu(gate) · up
template <class Number>
void swiglu(int64_t count, int64_t threads, const Number* gate, const Number* up, Number* out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += VL) {
        vec g = load(gate + i);
        store(out + i, g * sigmoid(g) * load(up + i));
    }
}

template <class Number>
void swiglu_backward(int64_t count, int64_t threads, const Number* gate, const Number* up, const Number* grad,
                     Number* gate_grad, Number* up_grad) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += VL) {
        vec g = load(gate + i), s = sigmoid(g), d = load(grad + i);
        store(up_grad + i, d * g * s);
        store(gate_grad + i, d * load(up + i) * s * (1.f + g * (1.f - s)));
    }
}

// out = weight · x · scale, where scale = (mean x² + epsilon)^-1/2 is kept for each row
template <class Number>
void rms(int64_t rows, int64_t size, int64_t threads, float epsilon, const Number* x, const Number* weight, Number* out,
         float* scale) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const Number* line = x + r * size;
        vec squares = {};
        for (int64_t i = 0; i < size; i += VL) squares += load(line + i) * load(line + i);
        const float s = scale[r] = 1.f / std::sqrt(sum_of(squares) / float(size) + epsilon);
        for (int64_t i = 0; i < size; i += VL) store(out + r * size + i, load(weight + i) * (load(line + i) * s));
    }
}

// With n = x · scale and g = weight · grad: x_grad = scale · (g − n · mean(g · n)). The weight's gradient, grad · n summed
// over rows, is left in one line for each `group` of rows, so that the number of threads changes no bit; null: not wanted.
template <class Number>
void rms_backward(int64_t rows, int64_t size, int64_t group, int64_t threads, const Number* x, const Number* weight,
                  const float* scale, const Number* grad, Number* x_grad, float* weight_sums) {
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < rows; first += group) {
        float* sums = weight_sums ? weight_sums + first / group * size : nullptr;
        if (sums) std::fill_n(sums, size, 0.f);
        for (int64_t r = first; r < std::min(first + group, rows); ++r) {
            const Number *line = x + r * size, *above = grad + r * size;
            const float s = scale[r];
            vec along = {};
            for (int64_t i = 0; i < size; i += VL) along += load(above + i) * load(weight + i) * load(line + i);
            const float share = sum_of(along) * s * s / float(size);
            for (int64_t i = 0; i < size; i += VL)
                store(x_grad + r * size + i, s * (load(above + i) * load(weight + i) - share * load(line + i)));
            if (sums)
                for (int64_t i = 0; i < size; i += VL) store(sums + i, load(sums + i) + load(above + i) * (load(line + i) * s));
        }
    }
}

}  // namespace

extern "C" {

int preftree_vector_length() { return VL; }

void preftree_swiglu(int64_t is_bfloat, int64_t count, int64_t threads, const void* gate, const void* up, void* out) {
    with_numbers(is_bfloat, [&](auto* n) { swiglu(count, threads, as(n, gate), as(n, up), as(n, out)); });
}

void preftree_swiglu_backward(int64_t is_bfloat, int64_t count, int64_t threads, const void* gate, const void* up,
                              const void* grad, void* gate_grad, void* up_grad) {
    with_numbers(is_bfloat, [&](auto* n) {
        swiglu_backward(count, threads, as(n, gate), as(n, up), as(n, grad), as(n, gate_grad), as(n, up_grad));
    });
}

void preftree_rms(int64_t is_bfloat, int64_t rows, int64_t size, int64_t threads, float epsilon, const void* x,
                  const void* weight, void* out, float* scale) {
    with_numbers(is_bfloat, [&](auto* n) {
        rms(rows, size, threads, epsilon, as(n, x), as(n, weight), as(n, out), scale);
    });
}

void preftree_rms_backward(int64_t is_bfloat, int64_t rows, int64_t size, int64_t group, int64_t threads, const void* x,
                           const void* weight, const float* scale, const void* grad, void* x_grad, float* weight_sums) {
    with_numbers(is_bfloat, [&](auto* n) {
        rms_backward(rows, size, group, threads, as(n, x), as(n, weight), scale, as(n, grad), as(n, x_grad), weight_sums);
    });
}

}  // extern "C"
