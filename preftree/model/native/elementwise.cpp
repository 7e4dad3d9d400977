// One pass over memory where torch makes four to ten: the gated activation and the root-mean-square norm, each with
// its gradient. Rows are contiguous; `size` is a multiple of the vector length.

#include "vectors.h"

namespace {

// The logistic function, by the exponential of a number that is never positive.
inline vec sigmoid(vec x) {
    vec e = exponential(x > (vec){} ? -x : x);
    return (x > (vec){} ? all(1.f) : e) / (1.f + e);
}

}  // namespace

extern "C" {

int preftree_vector_length() { return VL; }

// out = silu(gate) · up
void preftree_swiglu(int64_t count, int64_t threads, const float* gate, const float* up, float* out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += VL) {
        vec g = load(gate + i);
        store(out + i, g * sigmoid(g) * load(up + i));
    }
}

void preftree_swiglu_backward(int64_t count, int64_t threads, const float* gate, const float* up, const float* grad,
                              float* gate_grad, float* up_grad) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += VL) {
        vec g = load(gate + i), s = sigmoid(g), d = load(grad + i);
        store(up_grad + i, d * g * s);
        store(gate_grad + i, d * load(up + i) * s * (1.f + g * (1.f - s)));
    }
}

// out = weight · x · scale, where scale = (mean x² + epsilon)^-1/2 is kept for each row
void preftree_rms(int64_t rows, int64_t size, int64_t threads, float epsilon, const float* x, const float* weight,
                  float* out, float* scale) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const float* line = x + r * size;
        vec squares = {};
        for (int64_t i = 0; i < size; i += VL) squares += load(line + i) * load(line + i);
        const float s = scale[r] = 1.f / std::sqrt(sum_of(squares) / float(size) + epsilon);
        for (int64_t i = 0; i < size; i += VL) store(out + r * size + i, load(weight + i) * (load(line + i) * s));
    }
}

// With n = x · scale and g = weight · grad: x_grad = scale · (g − n · mean(g · n))
void preftree_rms_backward(int64_t rows, int64_t size, int64_t threads, const float* x, const float* weight,
                           const float* scale, const float* grad, float* x_grad) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const float *line = x + r * size, *above = grad + r * size;
        const float s = scale[r];
        vec along = {};
        for (int64_t i = 0; i < size; i += VL) along += load(above + i) * load(weight + i) * load(line + i);
        const float share = sum_of(along) * s * s / float(size);
        for (int64_t i = 0; i < size; i += VL)
            store(x_grad + r * size + i, s * (load(above + i) * load(weight + i) - share * load(line + i)));
    }
}

}  // extern "C"
