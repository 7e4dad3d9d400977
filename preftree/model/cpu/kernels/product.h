// The product of small matrices that attention is made of: C (+)= A·B, C in float32, A and B in words (`Words`).
#pragma once

#include "vectors.h"

namespace {

constexpr int MR = VL == 16 ? 12 : 6;  // rows of the micro kernel, so that 2·MR sums fit the registers
constexpr int NR = 2 * VL;  // columns of a packed panel

// C[i, :] (+)= sum_p A(i, p) · B[p, :] for M rows and N vectors of columns; A(i, p) = a[i·ai + p·ap], all in words.
template <class Number, int M, int N>
inline void micro(int depth, const word* a, int64_t ai, int64_t ap, const word* b, int64_t bs, float* c, int64_t cs,
                  bool add) {
    vec sums[M][N];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) sums[i][j] = add ? load(c + i * cs + j * VL) : (vec){};
    for (int p = 0; p < depth; ++p) {
        vec row[N];
        for (int j = 0; j < N; ++j) row[j] = load(b + p * bs + j * VL);
        for (int i = 0; i < M; ++i)
            for (int j = 0; j < N; ++j) sums[i][j] = Words<Number>::add_product(sums[i][j], a + i * ai + p * ap, row[j]);
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) store(c + i * cs + j * VL, sums[i][j]);
}

template <class Number, int N, int M = MR>
inline void rows_left(int rows, int depth, const word* a, int64_t ai, int64_t ap, const word* b, int64_t bs, float* c,
                      int64_t cs, bool add) {
    if constexpr (M > 0) {
        if (rows == M) return micro<Number, M, N>(depth, a, ai, ap, b, bs, c, cs, add);
        rows_left<Number, N, M - 1>(rows, depth, a, ai, ap, b, bs, c, cs, add);
    }
}

struct Reach {
    int from, to;
};

// C (+)= A·B. `panel` is the distance in B between one group of NR columns and the next; `columns(i)` and `depth(i)` say
// what the row group that begins at i needs of both, so that what lies above a diagonal is left out. Depths and distances
// are in words.
template <class Number, class Columns, class Depth>
void product(int rows, Columns columns, Depth depth, const word* a, int64_t ai, int64_t ap, const word* b, int64_t bs,
             int64_t panel, float* c, int64_t cs, bool add) {
    for (int j = 0, last = columns(rows - 1); j < last; j += NR, b += panel, c += NR)
        for (int i = 0; i < rows; i += MR) {
            const int left = std::min(MR, rows - i), wanted = columns(i + left - 1) - j;
            const Reach p = depth(i);
            if (wanted <= 0) continue;
            const word *x = a + i * ai + p.from * ap, *y = b + p.from * bs;
            if (wanted > VL) rows_left<Number, 2>(left, p.to - p.from, x, ai, ap, y, bs, c + i * cs, cs, add);
            else rows_left<Number, 1>(left, p.to - p.from, x, ai, ap, y, bs, c + i * cs, cs, add);
        }
}

}  // namespace
