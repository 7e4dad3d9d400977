// Vectors of floats as wide as the machine's, in the compiler's own vector types.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

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

inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec all(float x) { return x - (vec){}; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline float sum_of(vec v) { float s = 0; for (int i = 0; i < VL; ++i) s += v[i]; return s; }
inline float max_of(vec v) { float s = v[0]; for (int i = 1; i < VL; ++i) s = std::max(s, v[i]); return s; }

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

}  // namespace
