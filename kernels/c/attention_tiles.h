/* The inner loops of attention: keys turned, scores of them, and values weighed, for some rows and tokens at a time. */
#ifndef WEFT_ATTENTION_TILES_H
#define WEFT_ATTENTION_TILES_H

#include "lanes.h"
#include "vectors.h"

enum { TILE = 64, TURNED = 2 * VL };

/* ---- Keys of TURNED tokens, with one number of each beside the other ---- */

static void turn_f32(const char *const *keys, int64_t d, float *to) {
    int64_t k = 0;
    for (; k + VL <= d; k += VL)
        for (int half = 0; half < TURNED; half += VL) {
            vec v[VL];
            _Pragma("GCC unroll 16") for (int i = 0; i < VL; i++) v[i] = load_f32((const float *)keys[half + i] + k);
            transpose(v);
            _Pragma("GCC unroll 16") for (int i = 0; i < VL; i++) store_f32(to + (k + i) * TURNED + half, v[i]);
        }
    for (; k < d; k++)
        for (int i = 0; i < TURNED; i++) to[k * TURNED + i] = ((const float *)keys[i])[k];
}

/* Two halves are turned as one word. */
static void turn_bf16(const char *const *keys, int64_t d, float *to) {
    int64_t k = 0;
    for (; k + 2 * VL <= d; k += 2 * VL)
        for (int half = 0; half < TURNED; half += VL) {
            vec v[VL];
            _Pragma("GCC unroll 16") for (int i = 0; i < VL; i++)
                memcpy(&v[i], (const uint16_t *)keys[half + i] + k, sizeof v[i]);
            transpose(v);
            _Pragma("GCC unroll 16") for (int i = 0; i < VL; i++) {
                store_f32(to + (k + 2 * i) * TURNED + half, (vec)((vec_bits)v[i] << 16));
                store_f32(to + (k + 2 * i + 1) * TURNED + half, (vec)((vec_bits)v[i] & 0xffff0000));
            }
        }
    for (; k < d; k++)
        for (int i = 0; i < TURNED; i++) to[k * TURNED + i] = bf16_to_f32(((const uint16_t *)keys[i])[k]);
}

/* ---- Products of ROWS rows: the sums stay in registers ---- */

/* Scores of TURNED tokens. */
#define DEFINE_SCORES(ROWS)                                                                             \
    static void scores_##ROWS(const float *query, const float *turned, int64_t d, float *scores) {      \
        vec low[ROWS], high[ROWS];                                                                      \
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) low[r] = high[r] = (vec){0}; \
        for (int64_t k = 0; k < d; k++, turned += TURNED) {                                             \
            vec first = load_f32(turned), second = load_f32(turned + VL);                               \
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                                   \
                vec number = splat(query[r * d + k]);                                                   \
                low[r] += number * first;                                                               \
                high[r] += number * second;                                                             \
            }                                                                                           \
        }                                                                                               \
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) { \
            store_f32(scores + r * TILE, low[r]);                                                       \
            store_f32(scores + r * TILE + VL, high[r]);                                                 \
        }                                                                                               \
    }

/* Adds the values of tokens [from, to), weighted. Of halves, `low` has the even columns and `high` the odd ones. */
#define DEFINE_MIX(SUFFIX, ROWS, NUMBER, LOAD)                                                                      \
    static void mix_##ROWS##_##SUFFIX(const float *weights, const char *const *values, int64_t from, int64_t to,    \
                                      int64_t columns, float *sums) {                                               \
        for (int64_t c = 0; c < columns; c += 2 * VL) {                                                             \
            vec low[ROWS], high[ROWS];                                                                              \
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) { \
                low[r] = load_f32(sums + r * columns + c);                                                          \
                high[r] = load_f32(sums + r * columns + c + VL);                                                    \
            }                                                                                                       \
            for (int64_t j = from; j < to; j++) {                                                                   \
                vec first, second;                                                                                  \
                LOAD((const NUMBER *)values[j] + c, &first, &second);                                               \
                _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                                           \
                    vec weight = splat(weights[r * TILE + j]);                                                      \
                    low[r] += weight * first;                                                                       \
                    high[r] += weight * second;                                                                     \
                }                                                                                                   \
            }                                                                                                       \
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) { \
                store_f32(sums + r * columns + c, low[r]);                                                          \
                store_f32(sums + r * columns + c + VL, high[r]);                                                    \
            }                                                                                                       \
        }                                                                                                           \
    }

#define DEFINE_GROUP(ROWS)                           \
    DEFINE_SCORES(ROWS)                              \
    DEFINE_MIX(f32, ROWS, float, load_f32_pair)      \
    DEFINE_MIX(bf16, ROWS, uint16_t, load_bf16_pair)

DEFINE_GROUP(1)
DEFINE_GROUP(2)
DEFINE_GROUP(3)
DEFINE_GROUP(4)
DEFINE_GROUP(5)
DEFINE_GROUP(6)
#if VL == 16
DEFINE_GROUP(8)
DEFINE_GROUP(12)
#endif

#define GROUP(ROWS) {ROWS, scores_##ROWS, {mix_##ROWS##_f32, mix_##ROWS##_bf16}}

typedef struct {
    int rows;
    void (*score)(const float *, const float *, int64_t, float *);
    void (*mix[2])(const float *, const char *const *, int64_t, int64_t, int64_t, float *);
} group;

static const group GROUPS[] = {
#if VL == 16
    GROUP(12), GROUP(8),
#endif
    GROUP(6), GROUP(5), GROUP(4), GROUP(3), GROUP(2), GROUP(1),
};
static const group *const ONE_ROW = &GROUPS[sizeof GROUPS / sizeof *GROUPS - 1];

static const group *largest_group(int64_t rows) {
    const group *found = GROUPS;
    while (found->rows > rows) found++;
    return found;
}

#endif
