/* Vectors of floats as wide as the processor's, and the number formats that are loaded into them and stored from them.
 *
 * GCC's and Clang's vector extensions: the same source serves every level that it is compiled for. The processor's own
 * instructions are named only where GCC 12 does not find them: for the loads that widen.
 */
#ifndef WEFT_VECTORS_H
#define WEFT_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(VL) /* set for a trial of one width on another processor */
#elif defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif

typedef float vec __attribute__((vector_size(VL * 4)));
typedef uint32_t vec_bits __attribute__((vector_size(VL * 4)));
typedef int32_t vec_int __attribute__((vector_size(VL * 4)));
typedef uint16_t vec_half __attribute__((vector_size(VL * 2)));
typedef int8_t vec_byte __attribute__((vector_size(VL)));

/* How numbers lie in memory; the same values as in native.py. */
enum format { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

static inline vec splat(float value) { return value - (vec){0}; }

static inline vec load_f32(const float *from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline void store_f32(float *to, vec v) { memcpy(to, &v, sizeof v); }

static inline vec load_bf16(const uint16_t *from) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from)), 16);
#else
    vec_half half;
    memcpy(&half, from, sizeof half);
    return (vec)(__builtin_convertvector(half, vec_bits) << 16);
#endif
}

static inline vec load_i8(const int8_t *from) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)from)));
#else
    vec_byte byte;
    memcpy(&byte, from, sizeof byte);
    return __builtin_convertvector(byte, vec);
#endif
}

static inline void load_f32_pair(const float *from, vec *low, vec *high) {
    *low = load_f32(from);
    *high = load_f32(from + VL);
}

/* Two vectors whose numbers lie in pairs, the low one's first. */
static inline void load_bf16_pair(const uint16_t *from, vec *low, vec *high) {
    vec_bits pairs;
    memcpy(&pairs, from, sizeof pairs);
    *low = (vec)(pairs << 16);
    *high = (vec)(pairs & 0xffff0000);
}

static inline float bf16_to_f32(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounds to the nearest, ties to even; NaN stays NaN. */
static inline uint16_t f32_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The same for a whole vector. */
static inline void store_bf16(uint16_t *to, vec v) {
    vec_bits bits = (vec_bits)v;
    vec_bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    vec_bits quiet = bits >> 16 | 0x40;
    vec_bits is_nan = (vec_bits)(v != v);
    vec_half half = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), vec_half);
    memcpy(to, &half, sizeof half);
}

/* By halves. */
static inline float sum_of(vec v) {
#if VL == 16
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif VL == 8
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
#else
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
#endif
    return v[0] + v[1];
}

#endif
