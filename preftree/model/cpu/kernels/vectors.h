// Vectors of floats as wide as the machine's, in the compiler's own vector types, and the two kinds of numbers that
// arrays hold: float32, and bfloat16, of which a sum takes two at once where the machine has an instruction for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vec __attribute__((vector_size(VL * 4)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
typedef uint32_t uvec __attribute__((vector_size(VL * 4)));
typedef double dvec __attribute__((vector_size(VL * 8)));
typedef uint16_t halves __attribute__((vector_size(VL * 2)));
typedef uint16_t bfloat;
typedef float word __attribute__((may_alias));  // 32 bits that are moved about: a float, or two bfloat16

inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec load(const bfloat* p) {
    halves h;
    std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}
inline halves rounded(vec v) {  // to nearest, ties to even
#if defined(__AVX512BF16__)
    return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
    uvec bits = (uvec)v;
    bits = v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 64;
    return __builtin_convertvector(bits, halves);
#endif
}
inline void store(bfloat* p, vec v) { halves h = rounded(v); std::memcpy(p, &h, sizeof h); }
inline vec all(float x) { return x - (vec){}; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }

// What is left of a vector when its halves are put together again and again.
template <class Vector, class Put>
inline auto folded(Vector v, Put put) {
    typedef decltype(v[0] + v[0]) number;
    typedef number half __attribute__((vector_size(sizeof v / 2)));
    typedef number quarter __attribute__((vector_size(sizeof v / 4)));
    half halves[2];
    std::memcpy(halves, &v, sizeof v);
    const half h = put(halves[0], halves[1]);
    quarter quarters[2];
    std::memcpy(quarters, &h, sizeof h);
    const quarter q = put(quarters[0], quarters[1]);
    number all = q[0];
    for (int i = 1; i < VL / 4; ++i) all = put(all, number(q[i]));
    return all;
}
template <class Vector>
inline auto sum_of(Vector v) { return folded(v, [](auto a, auto b) { return a + b; }); }
inline float max_of(vec v) { return folded(v, [](auto a, auto b) { return a > b ? a : b; }); }

// e^x for x <= 0, to a unit in the last place; what is too small for float32 becomes 0.
inline vec exponential(vec x) {
    const vec magic = all(12582912.f);  // 1.5 · 2^23: adding it rounds to a whole number in the low bits
    vec shifted = x * 1.44269504f + magic;
    vec whole = shifted - magic;
    vec rest = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    vec poly = all(1.38370e-3f);
    poly = poly * rest + 8.37378e-3f;
    poly = poly * rest + 4.16695e-2f;
    poly = poly * rest + 1.666652e-1f;
    poly = poly * rest + 4.999999e-1f;
    poly = poly * rest + 1.f;
    poly = poly * rest + 1.f;
    ivec power = ((ivec)shifted - (ivec)magic) << 23;
    return x > -87.f ? (vec)((ivec)poly + power) : (vec){};
}

// tanh(x), within a few units in the last place: near 0 by its series, where the quotient of exponentials cancels.
inline vec hyperbolic_tangent(vec x) {
    const vec size = x < (vec){} ? -x : x, square = x * x, e = exponential(size * -2.f), far = (1.f - e) / (1.f + e);
    vec series = all(0.0218694885f);  // 62/2835
    series = series * square - 0.0539682540f;  // 17/315
    series = series * square + 0.133333333f;
    series = series * square - 0.333333333f;
    return size < 0.25f ? x + x * square * series : (x < (vec){} ? -far : far);
}

// 2^(t - top) for t <= top, a whole number, to a unit in the last place of what is kept of it: the polynomials (minimax on half a
// unit to either side) are off by 2e-9 for float32 and by 3e-6 for bfloat16. What is too small for float32 becomes 0, and
// all other results for two tops differ by a power of two exactly.
constexpr float LOG2E = 1.44269504f;
template <class Number>
inline vec power_of_two(vec t, float top) {
    const vec magic = all(12582912.f), whole = (t + magic) - magic, rest = t - whole;
    vec poly;
    if constexpr (sizeof(Number) == 4) {
        poly = all(1.53533621e-4f) * rest + 1.33988746e-3f;
        poly = poly * rest + 9.61843736e-3f;
        poly = poly * rest + 5.55033247e-2f;
        poly = poly * rest + 2.40226479e-1f;
        poly = poly * rest + 6.93147203e-1f;
    } else {
        poly = all(9.58285322e-3f) * rest + 5.59064262e-2f;
        poly = poly * rest + 2.40240986e-1f;
        poly = poly * rest + 6.93124193e-1f;
    }
    poly = poly * rest + 1.f;
    const vec power = whole - top;
    return power > -126.f ? (vec)((ivec)poly + ((ivec)(power + magic) << 23)) : (vec){};  // magic's own low bits are 0
}

// How arrays of a kind are multiplied: `together` numbers that are adjacent along the sum make a word.
template <class Number>
struct Words;

template <>
struct Words<float> {
    static constexpr int together = 1;
    static vec add_product(vec sum, const word* a, vec b) { return sum + *a * b; }
};

template <>
struct Words<bfloat> {
    static constexpr int together = 2;
    static vec add_product(vec sum, const word* a, vec b) {
        uint32_t pair;
        std::memcpy(&pair, a, sizeof pair);
#if defined(__AVX512BF16__)
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)((uvec){} + pair), (__m512bh)b);
#else
        const uvec low = (uvec){} + (pair << 16), high = (uvec){} + (pair & 0xffff0000u);
        sum += (vec)high * (vec)((uvec)b & 0xffff0000u);
        return sum + (vec)low * (vec)((uvec)b << 16);
#endif
    }
};

// A word's second number is multiplied first, by the instruction as well as above. The products of a sum over rows are
// added up in the rows' order, wherever the first word begins: the earlier row is the second number.
inline vec paired(vec first, vec second) {
    return (vec)(__builtin_convertvector(rounded(second), uvec) | __builtin_convertvector(rounded(first), uvec) << 16);
}

// Stores weights of keys that follow each other, to be multiplied by `paired` rows of those keys; returns them as they are kept.
inline vec store_turned(float* p, vec v) { store(p, v); return v; }
inline vec store_turned(bfloat* p, vec v) {
    typedef uint32_t words __attribute__((vector_size(VL * 2)));
    const halves h = rounded(v);
    words w;
    std::memcpy(&w, &h, sizeof w);
    w = w << 16 | w >> 16;
    std::memcpy(p, &w, sizeof w);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}

// Kernels as they are called from outside: work(pointer of the kind), and arrays as that kind.
template <class Work>
void with_numbers(int64_t is_bfloat, Work work) {
    if (is_bfloat) work(static_cast<bfloat*>(nullptr));
    else work(static_cast<float*>(nullptr));
}
template <class Number>
const Number* as(Number*, const void* array) { return static_cast<const Number*>(array); }
template <class Number>
Number* as(Number*, void* array) { return static_cast<Number*>(array); }

}  // namespace
