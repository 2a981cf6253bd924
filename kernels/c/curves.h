/* exp, tanh and erf of whole vectors, to about one unit in the last place of float32. */
#ifndef WEFT_CURVES_H
#define WEFT_CURVES_H

#include "vectors.h"

static inline vec choose(vec_int where, vec yes, vec no) {
    return (vec)((where & (vec_int)yes) | (~where & (vec_int)no));
}

/* The larger of two; b where a is NaN. */
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }

/* exp(x) for x <= 88; 0 below -87, NaN of NaN, exactly 1 of 0. Cephes' polynomial. */
static inline vec exp_of(vec x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction */
    vec n = (x * 1.44269504088896341f + round) - round;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    vec mantissa = p * (r * r) + r + 1.0f;
    vec bounded = choose(x < -87.0f, (vec){0}, n);
    vec_int power = (__builtin_convertvector(bounded, vec_int) + 127) << 23;
    return choose(x < -87.0f, (vec){0}, mantissa * (vec)power);
}

/* Cephes' polynomial near 0, by exp beyond. */
static inline vec tanh_of(vec x) {
    vec size = larger(x, -x);
    vec square = x * x;
    vec p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    vec near = p * square * x + x;
    vec e = exp_of(size * -2.0f);
    vec far = (1.0f - e) / (1.0f + e);
    return choose(size < 0.625f, near, choose(x < 0.0f, -far, far));
}

/* XLA's quotient of polynomials. */
static inline vec erf_of(vec x) {
    x = choose(x < -4.0f, splat(-4.0f), choose(x > 4.0f, splat(4.0f), x));
    vec square = x * x;
    vec p = square * -2.72614225801306e-10f + 2.77068142495902e-08f;
    p = p * square - 2.10102402080544e-06f;
    p = p * square - 5.69250639462346e-05f;
    p = p * square - 7.34990630326855e-04f;
    p = p * square - 2.95459980854025e-03f;
    p = p * square - 1.60960333262415e-02f;
    vec q = square * -1.45660718464996e-05f - 2.13374055278905e-04f;
    q = q * square - 1.68282697438203e-03f;
    q = q * square - 7.37332916720468e-03f;
    q = q * square - 1.42647390514189e-02f;
    return x * p / q;
}

static inline float exp_of_one(float x) { return exp_of(splat(x))[0]; }

#endif
