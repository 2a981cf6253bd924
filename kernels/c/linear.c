/* y = x W^T + b with W packed once: panels of PANEL columns of y, in each the weights of one k beside each other. Halves lie
 * in pairs of columns c and c + VL, one word that two operations part.
 *
 * Each number of y is summed over k in order, whatever the other rows are and whoever computes it.
 */
#include "pool.h"
#include "vectors.h"

/* FEW_LINES: bytes that loads from memory are asked for ahead; of floats, one row alone reads as fast as the processor guesses. */
enum { PANEL = 2 * VL, FEW_LINES = 1024 };

/* Columns of a panel. */
int64_t weft_panel(void) { return PANEL; }

struct linear {
    const float *x;
    const void *packed;
    const float *bias;
    void *y;
    int64_t rows, d_in, d_out, x_stride, y_stride;
    int format, y_format;
};

static void store_row(const struct linear *job, int64_t row, int64_t column, vec low, vec high) {
    float numbers[PANEL];
    int64_t count = job->d_out - column < PANEL ? job->d_out - column : PANEL;
    if (job->y_format == FLOAT32) {
        float *to = (float *)job->y + row * job->y_stride + column;
        if (count == PANEL) {
            store_f32(to, low);
            store_f32(to + VL, high);
            return;
        }
        store_f32(numbers, low);
        store_f32(numbers + VL, high);
        memcpy(to, numbers, count * sizeof *to);
        return;
    }
    uint16_t halves[PANEL], *to = (uint16_t *)job->y + row * job->y_stride + column;
    store_bf16(halves, low);
    store_bf16(halves + VL, high);
    memcpy(to, halves, count * sizeof *to);
}

/* ROWS rows of one panel: the sums stay in registers. */
#define DEFINE_TILE(NAME, ROWS, NUMBER, LOAD)                                                                         \
    static void NAME(const struct linear *job, int64_t row, int64_t panel) {                                          \
        const NUMBER *w = (const NUMBER *)job->packed + panel * job->d_in * PANEL;                                    \
        const float *x = job->x + row * job->x_stride;                                                                \
        /* The first rows of a panel wait for memory; those after them have the time to ask for the next panel. */    \
        int64_t ahead = row ? job->d_in * PANEL : ROWS > 1 || sizeof *w < 4 ? FEW_LINES / (int64_t)sizeof *w : 0;    \
        vec low[ROWS], high[ROWS];                                                                                    \
        vec first = {0}, second = {0};                                                                                \
        if (job->bias) first = load_f32(job->bias + panel * PANEL), second = load_f32(job->bias + panel * PANEL + VL); \
        for (int r = 0; r < ROWS; r++) low[r] = first, high[r] = second;                                              \
        for (int64_t k = 0; k < job->d_in; k++, w += PANEL) {                                                         \
            vec w0, w1;                                                                                               \
            LOAD(w, &w0, &w1);                                                                                        \
            __builtin_prefetch(w + ahead);                                                                            \
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                                                 \
                vec value = splat(x[r * job->x_stride + k]);                                                          \
                low[r] += value * w0;                                                                                 \
                high[r] += value * w1;                                                                                \
            }                                                                                                         \
        }                                                                                                             \
        for (int r = 0; r < ROWS; r++) store_row(job, row + r, panel * PANEL, low[r], high[r]);                       \
    }

#define DEFINE_TILES(SUFFIX, NUMBER, LOAD)      \
    DEFINE_TILE(tile_1_##SUFFIX, 1, NUMBER, LOAD) \
    DEFINE_TILE(tile_2_##SUFFIX, 2, NUMBER, LOAD) \
    DEFINE_TILE(tile_3_##SUFFIX, 3, NUMBER, LOAD) \
    DEFINE_TILE(tile_4_##SUFFIX, 4, NUMBER, LOAD) \
    DEFINE_TILE(tile_5_##SUFFIX, 5, NUMBER, LOAD) \
    DEFINE_TILE(tile_6_##SUFFIX, 6, NUMBER, LOAD)

DEFINE_TILES(f32, float, load_f32_pair)
DEFINE_TILES(bf16, uint16_t, load_bf16_pair)
#if VL == 16 /* which has twice the registers */
DEFINE_TILE(tile_8_f32, 8, float, load_f32_pair)
DEFINE_TILE(tile_8_bf16, 8, uint16_t, load_bf16_pair)
DEFINE_TILE(tile_12_f32, 12, float, load_f32_pair)
DEFINE_TILE(tile_12_bf16, 12, uint16_t, load_bf16_pair)
#endif

typedef void (*tile)(const struct linear *, int64_t, int64_t);

static const struct { int rows; tile by_format[2]; } TILES[] = {
#if VL == 16
    {12, {tile_12_f32, tile_12_bf16}}, {8, {tile_8_f32, tile_8_bf16}},
#endif
    {6, {tile_6_f32, tile_6_bf16}}, {5, {tile_5_f32, tile_5_bf16}}, {4, {tile_4_f32, tile_4_bf16}},
    {3, {tile_3_f32, tile_3_bf16}}, {2, {tile_2_f32, tile_2_bf16}}, {1, {tile_1_f32, tile_1_bf16}},
};

static void do_panels(void *of, int64_t first, int64_t last) {
    const struct linear *job = of;
    for (int64_t panel = first; panel < last; panel++) {
        int64_t row = 0;
        for (int size = 0; row < job->rows; size++)
            for (; job->rows - row >= TILES[size].rows; row += TILES[size].rows)
                TILES[size].by_format[job->format](job, row, panel);
    }
}

/* x: float32 [rows, d_in]; packed: in `format`; bias: float32, padded to whole panels, or NULL; y: [rows, d_out] in `y_format`.
 */
void weft_linear(const float *x, const void *packed, const float *bias, void *y, int64_t rows, int64_t d_in, int64_t d_out,
                 int64_t x_stride, int64_t y_stride, int format, int y_format, int threads) {
    struct linear job = {x, packed, bias, y, rows, d_in, d_out, x_stride, y_stride, format, y_format};
    int64_t panels = (d_out + PANEL - 1) / PANEL;
    int64_t grain = panels / (4 * threads);
    share(do_panels, &job, panels, grain > 0 ? grain : 1, threads);
}
