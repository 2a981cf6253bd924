/* What goes on between the lanes of vectors. */
#ifndef WEFT_LANES_H
#define WEFT_LANES_H

#include "curves.h"
#include "vectors.h"

#if VL == 4
#define OF_LANES(F, h) F(0, h), F(1, h), F(2, h), F(3, h)
#elif VL == 8
#define OF_LANES(F, h) F(0, h), F(1, h), F(2, h), F(3, h), F(4, h), F(5, h), F(6, h), F(7, h)
#else
#define OF_LANES(F, h)                                                                                              \
    F(0, h), F(1, h), F(2, h), F(3, h), F(4, h), F(5, h), F(6, h), F(7, h), F(8, h), F(9, h), F(10, h), F(11, h),   \
        F(12, h), F(13, h), F(14, h), F(15, h)
#endif
#define UPPER(l, h) ((l) & (h) ? (l) - (h) + VL : (l))
#define LOWER(l, h) ((l) & (h) ? (l) + VL : (l) + (h))
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec_int){__VA_ARGS__})
#endif
/* Swaps squares of side h across the diagonal. */
#define SWAP(v, h)                                                  \
    _Pragma("GCC unroll 16") for (int i = 0; i < VL; i++) {         \
        if (i & (h)) continue;                                      \
        vec a = (v)[i], b = (v)[i + (h)];                           \
        (v)[i] = SHUFFLE(a, b, OF_LANES(UPPER, h));                 \
        (v)[i + (h)] = SHUFFLE(a, b, OF_LANES(LOWER, h));           \
    }

static inline __attribute__((always_inline)) void transpose(vec v[VL]) {
    SWAP(v, 1)
    SWAP(v, 2)
#if VL >= 8
    SWAP(v, 4)
#endif
#if VL >= 16
    SWAP(v, 8)
#endif
}

/* first, first + 1, ... */
static inline vec lanes_from(int64_t first) {
#define LANE(l, unused) l
    return (vec){OF_LANES(LANE, 0)} + (float)first;
}

static inline float largest_of(vec v) {
#define ACROSS(l, h) ((l) ^ (h))
    v = larger(v, SHUFFLE(v, v, OF_LANES(ACROSS, 1)));
    v = larger(v, SHUFFLE(v, v, OF_LANES(ACROSS, 2)));
#if VL >= 8
    v = larger(v, SHUFFLE(v, v, OF_LANES(ACROSS, 4)));
#endif
#if VL >= 16
    v = larger(v, SHUFFLE(v, v, OF_LANES(ACROSS, 8)));
#endif
    return v[0];
}

#endif
