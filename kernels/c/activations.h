/* Non-linearities of whole vectors. NaN stays NaN. */
#ifndef WEFT_ACTIVATIONS_H
#define WEFT_ACTIVATIONS_H

#include "curves.h"

/* The first three as pointwise.py numbers them; all as bottleneck.py does. */
enum activation { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, LEAKY_RELU = 4, TANH = 5, SIGMOID = 6 };

/* x times the logistic function of t. */
static inline vec times_logistic(vec x, vec t) {
    t = choose(t < -88.f, splat(-88.f), t);
    return x / (exp_of(-t) + 1.f);
}

static inline vec activate(int kind, vec x) {
    switch (kind) {
    case SILU: return times_logistic(x, x);
    case GELU: return x * 0.5f * (erf_of(x * 0.70710678f) + 1.f);
    case GELU_TANH: return times_logistic(x, (x * x * x * 0.044715f + x) * 1.5957691216f); /* 2 sqrt(2 / pi) */
    case RELU: return larger((vec){0}, x);
    case LEAKY_RELU: return choose(x < 0.f, x * 0.01f, x);
    case TANH: return tanh_of(x);
    default: return times_logistic(splat(1.f), x);
    }
}

#endif
