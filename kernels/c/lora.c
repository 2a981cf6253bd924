/* y[t] += sum over the pages of row t of  s * B^T (A x[t]), for all modules of a group.
 *
 * Rows with the same list of pages lie together in chunks. First every page's A meets its rows: coefs, s * A x[t]. Then y
 * takes its terms, page by page in the chunk's order, in float32, and is rounded once. Each number is summed in the same
 * order whatever the other rows are and whoever computes it: tiles differ in how many they do side by side, and in no sum.
 */
#include "pool.h"
#include "vectors.h"

enum {
    PAGE = 8,         /* rank rows of a page */
    HALF = PAGE / 2,  /* rank rows that are done side by side where rows are, too; pages that are half empty cost half */
    TILE = 6,         /* rows of y that are done side by side at the most */
    BLOCK = 512,      /* columns of y that are done before the next: their sums and a page's part of B stay near */
    ALONE = 1 << 15,  /* multiplications that take no longer than to wake another thread */
};

/* a: [sites, pages, PAGE, d_in]; b: for each site [pages, PAGE, d_out], one after the other. a_scale, b_scale:
 * [sites, pages, PAGE], what the rows of 8 bits are multiplied by, else NULL. first_site: of the group, in `touched`. */
struct lora_group {
    const void *a, *b;
    const float *a_scale, *b_scale;
    const int64_t *d_outs;
    int64_t sites, first_site, pages, d_in, format;
};

/* rows: of x and y, chunk by chunk; chunk c has those from first_row[c] to first_row[c + 1], and the entries from
 * first_entry[c] on. An entry is a page on the rows of its chunk: count, its rank rows; scale, s; coef, where its
 * coefficients begin, [PAGE, rows]; sites: which row of `touched` [., num_sites] says what modules it is for. */
struct lora_plan {
    const int32_t *rows, *first_row, *first_entry;
    const int32_t *chunk, *page, *count, *sites;
    const float *scale;
    const int64_t *coef;
    const uint8_t *touched;
    float *coefs;
    int64_t num_sites, num_chunks, num_entries, num_coefs;
};

struct lora {
    const struct lora_group *group;
    const struct lora_plan *plan;
    const float *x;
    void *y;
    int64_t x_stride, y_stride, blocks;
    int format;
};

static inline int is_touched(const struct lora *job, int64_t entry, int64_t site) {
    const struct lora_plan *plan = job->plan;
    return plan->touched[plan->sites[entry] * plan->num_sites + job->group->first_site + site];
}

/* Whether any page of a chunk is for a site. */
static int has_work(const struct lora *job, int64_t chunk, int64_t site) {
    const struct lora_plan *plan = job->plan;
    for (int64_t entry = plan->first_entry[chunk]; entry < plan->first_entry[chunk + 1]; entry++)
        if (is_touched(job, entry, site)) return 1;
    return 0;
}

static inline float i8_to_f32(int8_t byte) { return byte; }
static inline float f32_to_f32(float value) { return value; }

/* RANKS rows of A, each times ROWS rows of x: to[k * stride + r] = scales[k] * A[k] x[r]. */
#define DEFINE_SHRINK(NAME, RANKS, ROWS, NUMBER, LOAD, WIDEN)                                                       \
    static void NAME(const void *from, int64_t d_in, const float *const *x, const float *scales, float *restrict to, \
                     int64_t stride) {                                                                              \
        const NUMBER *a = from;                                                                                     \
        vec sums[RANKS][ROWS] = {0};                                                                                \
        int64_t i = 0;                                                                                              \
        for (; i + VL <= d_in; i += VL) {                                                                           \
            vec values[ROWS];                                                                                       \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) values[r] = load_f32(x[r] + i);                  \
            _Pragma("GCC unroll 8") for (int k = 0; k < RANKS; k++) {                                               \
                vec row = LOAD(a + k * d_in + i);                                                                   \
                _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) sums[k][r] += row * values[r];               \
            }                                                                                                       \
        }                                                                                                           \
        _Pragma("GCC unroll 8") for (int k = 0; k < RANKS; k++)                                                     \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) {                                                \
                float sum = sum_of(sums[k][r]);                                                                     \
                for (int64_t j = i; j < d_in; j++) sum += WIDEN(a[k * d_in + j]) * x[r][j];                         \
                to[k * stride + r] = scales[k] * sum;                                                               \
            }                                                                                                       \
    }

/* RANKS rows of B, each times ROWS rows of coefficients, onto sums [ROWS, BLOCK], for `width` columns. KEPT: restrict where
 * all coefficients go into registers; else GCC must not know that it could load them but once. */
#define DEFINE_EXPAND(NAME, RANKS, ROWS, NUMBER, LOAD, WIDEN, KEPT)                                                 \
    static void NAME(const void *from, int64_t d_out, int64_t width, const float *KEPT coefs, int64_t stride,       \
                     float *sums) {                                                                                 \
        const NUMBER *b = from;                                                                                     \
        int64_t c = 0;                                                                                              \
        for (; c + 2 * VL <= width; c += 2 * VL) {                                                                  \
            vec low[ROWS], high[ROWS];                                                                              \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) {                                                \
                low[r] = load_f32(sums + r * BLOCK + c);                                                            \
                high[r] = load_f32(sums + r * BLOCK + c + VL);                                                      \
            }                                                                                                       \
            _Pragma("GCC unroll 8") for (int k = 0; k < RANKS; k++) {                                               \
                vec b0 = LOAD(b + k * d_out + c), b1 = LOAD(b + k * d_out + c + VL);                                \
                _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) {                                            \
                    vec coef = splat(coefs[k * stride + r]);                                                        \
                    low[r] += coef * b0;                                                                            \
                    high[r] += coef * b1;                                                                           \
                }                                                                                                   \
            }                                                                                                       \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) {                                                \
                store_f32(sums + r * BLOCK + c, low[r]);                                                            \
                store_f32(sums + r * BLOCK + c + VL, high[r]);                                                      \
            }                                                                                                       \
        }                                                                                                           \
        for (; c < width; c++)                                                                                      \
            for (int k = 0; k < RANKS; k++)                                                                         \
                for (int r = 0; r < ROWS; r++)                                                                      \
                    sums[r * BLOCK + c] += coefs[k * stride + r] * WIDEN(b[k * d_out + c]);                         \
    }

typedef void (*shrink)(const void *, int64_t, const float *const *, const float *, float *, int64_t);
typedef void (*expand)(const void *, int64_t, int64_t, const float *, int64_t, float *);

#define DEFINE_FORMAT(NAME, NUMBER, LOAD, WIDEN)                                   \
    DEFINE_SHRINK(shrink_8_1_##NAME, PAGE, 1, NUMBER, LOAD, WIDEN)                 \
    DEFINE_SHRINK(shrink_4_1_##NAME, HALF, 1, NUMBER, LOAD, WIDEN)                 \
    DEFINE_SHRINK(shrink_4_2_##NAME, HALF, 2, NUMBER, LOAD, WIDEN)                 \
    DEFINE_SHRINK(shrink_4_3_##NAME, HALF, 3, NUMBER, LOAD, WIDEN)                 \
    DEFINE_EXPAND(expand_8_1_##NAME, PAGE, 1, NUMBER, LOAD, WIDEN, restrict)         \
    DEFINE_EXPAND(expand_8_2_##NAME, PAGE, 2, NUMBER, LOAD, WIDEN, )                 \
    DEFINE_EXPAND(expand_8_4_##NAME, PAGE, 4, NUMBER, LOAD, WIDEN, )                 \
    DEFINE_EXPAND(expand_8_6_##NAME, PAGE, TILE, NUMBER, LOAD, WIDEN, )              \
    DEFINE_EXPAND(expand_4_1_##NAME, HALF, 1, NUMBER, LOAD, WIDEN, restrict)         \
    DEFINE_EXPAND(expand_4_2_##NAME, HALF, 2, NUMBER, LOAD, WIDEN, )                 \
    DEFINE_EXPAND(expand_4_4_##NAME, HALF, 4, NUMBER, LOAD, WIDEN, )                 \
    DEFINE_EXPAND(expand_4_6_##NAME, HALF, TILE, NUMBER, LOAD, WIDEN, )              \
    static const struct tiles TILES_##NAME = {                                     \
        sizeof(NUMBER),                                                            \
        shrink_8_1_##NAME,                                                         \
        {shrink_4_1_##NAME, shrink_4_2_##NAME, shrink_4_3_##NAME},                 \
        {expand_8_6_##NAME, expand_8_4_##NAME, expand_8_2_##NAME, expand_8_1_##NAME}, \
        {expand_4_6_##NAME, expand_4_4_##NAME, expand_4_2_##NAME, expand_4_1_##NAME}, \
    };

/* What does a page of one number format: its size; shrink of a whole page, and of halves by rows; expand by ROWS. */
struct tiles {
    int64_t size;
    shrink whole, by_rows[3];
    expand pages[4], halves[4];
};

static const int ROWS[] = {TILE, 4, 2, 1};

DEFINE_FORMAT(f32, float, load_f32, f32_to_f32)
DEFINE_FORMAT(bf16, uint16_t, load_bf16, bf16_to_f32)
DEFINE_FORMAT(i8, int8_t, load_i8, i8_to_f32)

static const struct tiles *const LORA_TILES[] = {&TILES_f32, &TILES_bf16, &TILES_i8};

static const void *page_of(const void *pool, int64_t size, int64_t page, int64_t width) {
    return (const char *)pool + page * PAGE * width * size;
}

/* Items are (entry, site). */
static void shrink_items(void *of, int64_t first, int64_t last) {
    const struct lora *job = of;
    const struct lora_group *group = job->group;
    const struct lora_plan *plan = job->plan;
    const struct tiles *tiles = LORA_TILES[group->format];
    for (int64_t item = first; item < last; item++) {
        int64_t entry = item / group->sites, site = item % group->sites;
        if (!is_touched(job, entry, site)) continue;
        int64_t page = site * group->pages + plan->page[entry];
        const char *a = page_of(group->a, tiles->size, page, group->d_in);
        float scales[PAGE];
        for (int k = 0; k < PAGE; k++) {
            scales[k] = plan->scale[entry];
            if (group->a_scale) scales[k] *= group->a_scale[page * PAGE + k] * group->b_scale[page * PAGE + k];
        }
        const int32_t *rows = plan->rows + plan->first_row[plan->chunk[entry]];
        int64_t count = plan->first_row[plan->chunk[entry] + 1] - plan->first_row[plan->chunk[entry]];
        float *to = plan->coefs + site * plan->num_coefs + plan->coef[entry];
        for (int64_t r = 0, step; r < count; r += step) {
            const float *x[3];
            /* Four as two and two: one row alone waits for its own sums. */
            step = count - r == 4 ? 2 : count - r < 3 ? count - r : 3;
            for (int i = 0; i < step; i++) x[i] = job->x + rows[r + i] * job->x_stride;
            if (count == 1 && plan->count[entry] > HALF) {
                tiles->whole(a, group->d_in, x, scales, to, count);
                continue;
            }
            for (int k = 0; k < plan->count[entry]; k += HALF)
                tiles->by_rows[step - 1](a + k * group->d_in * tiles->size, group->d_in, x, scales + k,
                                         to + k * count + r, count);
        }
    }
}

static void load_sums(const struct lora *job, int64_t row, int64_t column, int64_t width, float *sums) {
    if (job->format == FLOAT32) {
        memcpy(sums, (const float *)job->y + row * job->y_stride + column, width * sizeof *sums);
        return;
    }
    const uint16_t *y = (const uint16_t *)job->y + row * job->y_stride + column;
    int64_t c = 0;
    for (; c + VL <= width; c += VL) store_f32(sums + c, load_bf16(y + c));
    for (; c < width; c++) sums[c] = bf16_to_f32(y[c]);
}

static void store_sums(const struct lora *job, int64_t row, int64_t column, int64_t width, const float *sums) {
    if (job->format == FLOAT32) {
        memcpy((float *)job->y + row * job->y_stride + column, sums, width * sizeof *sums);
        return;
    }
    uint16_t *y = (uint16_t *)job->y + row * job->y_stride + column;
    int64_t c = 0;
    for (; c + VL <= width; c += VL) store_bf16(y + c, load_f32(sums + c));
    for (; c < width; c++) y[c] = f32_to_bf16(sums[c]);
}

/* The terms of up to TILE rows of a chunk, from its row `r` on, in some columns of one site. b: of the site. */
static void expand_tile(const struct lora *job, int64_t chunk, int64_t site, const void *b, int64_t d_out, int64_t start,
                        int64_t width, int64_t r, int size, float *sums) {
    const struct lora_plan *plan = job->plan;
    const struct tiles *tiles = LORA_TILES[job->group->format];
    int64_t count = plan->first_row[chunk + 1] - plan->first_row[chunk];
    for (int64_t entry = plan->first_entry[chunk]; entry < plan->first_entry[chunk + 1]; entry++) {
        if (!is_touched(job, entry, site)) continue;
        const char *page = page_of(b, tiles->size, plan->page[entry], d_out);
        const float *coefs = plan->coefs + site * plan->num_coefs + plan->coef[entry] + r;
        (plan->count[entry] > HALF ? tiles->pages : tiles->halves)[size](page + start * tiles->size, d_out, width, coefs,
                                                                         count, sums);
    }
}

/* Items are (chunk, site, block of columns). */
static void expand_items(void *of, int64_t first, int64_t last) {
    const struct lora *job = of;
    const struct lora_group *group = job->group;
    const struct lora_plan *plan = job->plan;
    const struct tiles *tiles = LORA_TILES[group->format];
    float sums[TILE * BLOCK];
    for (int64_t item = first; item < last; item++) {
        int64_t start = item % job->blocks * BLOCK, site = item / job->blocks % group->sites;
        int64_t chunk = item / job->blocks / group->sites;
        int64_t d_out = group->d_outs[site], column = start;
        if (start >= d_out || !has_work(job, chunk, site)) continue;
        int64_t width = d_out - start < BLOCK ? d_out - start : BLOCK;
        const char *b = group->b;
        for (int64_t s = 0; s < site; s++) {
            column += group->d_outs[s];
            b += group->pages * PAGE * group->d_outs[s] * tiles->size;
        }
        const int32_t *rows = plan->rows + plan->first_row[chunk];
        int64_t count = plan->first_row[chunk + 1] - plan->first_row[chunk], r = 0;
        for (int size = 0; r < count; size++)
            for (; count - r >= ROWS[size]; r += ROWS[size]) {
                for (int i = 0; i < ROWS[size]; i++) load_sums(job, rows[r + i], column, width, sums + i * BLOCK);
                expand_tile(job, chunk, site, b, d_out, start, width, r, size, sums);
                for (int i = 0; i < ROWS[size]; i++) store_sums(job, rows[r + i], column, width, sums + i * BLOCK);
            }
    }
}

static void share_fairly(work do_items, struct lora *job, int64_t count, int threads) {
    int64_t grain = count / (4 * threads);
    share(do_items, job, count, grain > 0 ? grain : 1, threads);
}

/* x: float32; y: float32 or bfloat16, of all columns of the group; both [rows, .], and rows may lie apart. */
void weft_lora(const struct lora_group *group, const struct lora_plan *plan, const float *x, void *y, int64_t x_stride,
               int64_t y_stride, int y_format, int threads) {
    int64_t widest = 0, d_out = 0;
    for (int64_t site = 0; site < group->sites; site++) {
        d_out += group->d_outs[site];
        if (group->d_outs[site] > widest) widest = group->d_outs[site];
    }
    struct lora job = {group, plan, x, y, x_stride, y_stride, (widest + BLOCK - 1) / BLOCK, y_format};
    if (plan->num_coefs * (group->sites * group->d_in + d_out) < ALONE) threads = 1;
    share_fairly(shrink_items, &job, plan->num_entries * group->sites, threads);
    share_fairly(expand_items, &job, plan->num_chunks * group->sites * job.blocks, threads);
}
