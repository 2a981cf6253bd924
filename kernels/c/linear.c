/* y = x W^T + b with W packed once: panels of PANEL columns of y, in each the weights of one k beside each other. Halves lie
 * in pairs of columns c and c + VL, one word that two operations part.
 *
 * Each number of y is summed over k in order, whatever the other rows are and whoever computes it.
 */
#include "linear.h"
#include "pool.h"
#include "vectors.h"

#include <stdatomic.h>
#include <stdbool.h>

/* FEW_LINES: bytes that loads from memory are asked for ahead; one row alone reads as fast as the processor guesses. */
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

/* ROWS rows of PANELS panels side by side: the sums stay in registers. Few rows wait for the weights, and several streams of
 * them come faster than one. */
#define DEFINE_TILE(NAME, ROWS, PANELS, NUMBER, LOAD)                                                              \
    static void NAME(const struct linear *job, int64_t row, int64_t panel) {                                       \
        const int64_t size = job->d_in * PANEL;                                                                    \
        const NUMBER *w = (const NUMBER *)job->packed + panel * size;                                              \
        const float *x = job->x + row * job->x_stride;                                                             \
        /* The first rows of a panel wait for memory; those after them have the time to ask for the next panel. */ \
        const int64_t ahead = row ? size : ROWS > 1 ? FEW_LINES / (int64_t)sizeof *w : 0;                          \
        vec low[PANELS][ROWS], high[PANELS][ROWS];                                                                 \
        for (int p = 0; p < PANELS; p++) {                                                                         \
            const float *bias = job->bias ? job->bias + (panel + p) * PANEL : NULL;                                \
            vec first = bias ? load_f32(bias) : (vec){0}, second = bias ? load_f32(bias + VL) : first;             \
            for (int r = 0; r < ROWS; r++) low[p][r] = first, high[p][r] = second;                                 \
        }                                                                                                          \
        for (int64_t k = 0; k < job->d_in; k++, w += PANEL) {                                                      \
            _Pragma("GCC unroll 16") for (int p = 0; p < PANELS; p++) {                                            \
                vec w0, w1;                                                                                        \
                LOAD(w + p * size, &w0, &w1);                                                                      \
                __builtin_prefetch(w + p * size + ahead);                                                          \
                _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                                          \
                    vec value = splat(x[r * job->x_stride + k]);                                                   \
                    low[p][r] += value * w0;                                                                       \
                    high[p][r] += value * w1;                                                                      \
                }                                                                                                  \
            }                                                                                                      \
        }                                                                                                          \
        for (int p = 0; p < PANELS; p++)                                                                           \
            for (int r = 0; r < ROWS; r++) store_row(job, row + r, (panel + p) * PANEL, low[p][r], high[p][r]);    \
    }

#define DEFINE_TILES(ROWS, PANELS)                                                            \
    DEFINE_TILE(tile_##ROWS##_by_##PANELS##_f32, ROWS, PANELS, float, load_f32_pair)          \
    DEFINE_TILE(tile_##ROWS##_by_##PANELS##_bf16, ROWS, PANELS, uint16_t, load_bf16_pair)

DEFINE_TILES(1, 4)
DEFINE_TILES(2, 3)
DEFINE_TILES(1, 1)
DEFINE_TILES(2, 1)
DEFINE_TILES(3, 1)
DEFINE_TILES(4, 1)
DEFINE_TILES(5, 1)
DEFINE_TILES(6, 1)
#if VL == 16 /* which has twice the registers */
DEFINE_TILES(8, 1)
DEFINE_TILES(12, 1)
#endif

struct tile {
    int rows, panels;
    void (*by_format[2])(const struct linear *, int64_t row, int64_t panel);
};

#define TILE(ROWS, PANELS) {ROWS, PANELS, {tile_##ROWS##_by_##PANELS##_f32, tile_##ROWS##_by_##PANELS##_bf16}}

/* For jobs of no more rows than these, by their number. */
static const struct tile FEW[] = {{0, 1, {0, 0}}, TILE(1, 4), TILE(2, 3)};

static const struct tile TILES[] = {
#if VL == 16
    TILE(12, 1), TILE(8, 1),
#endif
    TILE(6, 1), TILE(5, 1), TILE(4, 1), TILE(3, 1), TILE(2, 1), TILE(1, 1),
};

static int panels_at_once(const struct linear *job) { return job->rows <= 2 ? FEW[job->rows].panels : 1; }

static void do_panels(void *of, int64_t first, int64_t last) {
    const struct linear *job = of;
    const int at_once = panels_at_once(job);
    int64_t panel = first;
    if (at_once > 1)
        for (; panel + at_once <= last; panel += at_once) FEW[job->rows].by_format[job->format](job, 0, panel);
    for (; panel < last; panel++) {
        int64_t row = 0;
        for (int size = 0; row < job->rows; size++)
            for (; job->rows - row >= TILES[size].rows; row += TILES[size].rows)
                TILES[size].by_format[job->format](job, row, panel);
    }
}

void weft_linear(const float *x, const void *packed, const float *bias, void *y, int64_t rows, int64_t d_in, int64_t d_out,
                 int64_t x_stride, int64_t y_stride, int format, int y_format, int threads) {
    struct linear job = {x, packed, bias, y, rows, d_in, d_out, x_stride, y_stride, format, y_format};
    int64_t panels = (d_out + PANEL - 1) / PANEL;
    int64_t at_once = panels_at_once(&job), grain = panels / (4 * threads * at_once) * at_once;
    share(do_panels, &job, panels, grain > 0 ? grain : at_once, threads);
}

struct pack {
    const void *weight;
    void *packed;
    int64_t d_out, d_in;
    int weight_format, format;
    atomic_bool is_exact;
};

/* Columns of a panel are read beside each other, each along its row, some k at a time that stay near. */
static void pack_panels(void *of, int64_t first, int64_t last) {
    struct pack *job = of;
    const uint32_t *singles = job->weight;
    const uint16_t *halves = job->weight;
    bool is_exact = true;
    for (int64_t panel = first; panel < last && atomic_load(&job->is_exact); panel++) {
        for (int64_t start = 0; start < job->d_in; start += PANEL)
            for (int64_t column = 0; column < PANEL; column++) {
                const int64_t row = panel * PANEL + column;
                if (row >= job->d_out) continue;
                for (int64_t k = start; k < job->d_in && k < start + PANEL; k++) {
                    const int64_t from = row * job->d_in + k, to = (panel * job->d_in + k) * PANEL;
                    const uint32_t bits = job->weight_format == FLOAT32 ? singles[from] : (uint32_t)halves[from] << 16;
                    is_exact &= job->format == FLOAT32 || (bits & 0xffff) == 0;
                    if (job->format == FLOAT32)
                        ((uint32_t *)job->packed)[to + column] = bits;
                    else
                        ((uint16_t *)job->packed)[to + 2 * (column % VL) + column / VL] = (uint16_t)(bits >> 16);
                }
            }
        if (!is_exact) atomic_store(&job->is_exact, false);
    }
}

/* weight: [d_out, d_in] in weight_format; packed: whole panels in `format`, zeroes. Returns whether the format holds each
 * number; where it does not, `packed` is of no use. */
int weft_pack(const void *weight, void *packed, int64_t d_out, int64_t d_in, int weight_format, int format, int threads) {
    struct pack job = {weight, packed, d_out, d_in, weight_format, format, true};
    share(pack_panels, &job, (d_out + PANEL - 1) / PANEL, 1, threads);
    return job.is_exact;
}
