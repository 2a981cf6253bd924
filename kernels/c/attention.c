/* Attention over a paged KV cache, read where it lies: softmax(scale q k^T) v of each query row over its own sequence.
 *
 * The context is taken in tiles of TILE tokens, counted from the first token of the sequence, one after the other, with a
 * running peak, mass and weighted sum of the values (Milakov and Gimelshein 2018). What a row and head come to depends on
 * their query and on the tokens that they see, and on nothing else: not on the chunk, the batch or the threads.
 */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "attention_tiles.h"
#include "curves.h"
#include "lanes.h"
#include "pool.h"
#include "vectors.h"

enum { ITEM_ROWS = 96, WRITTEN_AT_ONCE = 64 };

/* As in attention.py. Strides in numbers; the last dimension of each tensor is dense. */
struct attention {
    const void *query, *key, *value; /* [heads, rows, d], [kv_heads, rows, d], [kv_heads, rows, d_v] */
    void *out;                       /* [rows, heads, d_v] */
    void *keys, *values;             /* the cache: [slots, kv_heads, d], [slots, kv_heads, d_v] */
    const int64_t *slots;            /* [rows]: where the new keys and values go */
    const int64_t *runs;             /* [num_runs, 4]: see struct run */
    const int64_t *table;            /* blocks of all runs */
    const float *sinks;              /* [heads] or NULL */
    int64_t query_head, query_row, key_head, key_row, value_head, value_row;
    int64_t rows, num_runs, heads, kv_heads, d, d_v, block_tokens;
    int64_t window; /* tokens that a row sees, itself and those before it; 0: all */
    float scale;
    float softcap; /* 0: none */
    int both_sides; /* whether a row sees as many after it as before it; a run is then a whole sequence */
    int format, threads;
};

/* Rows of one sequence that follow each other: they are the last of its `context` tokens. */
struct run {
    int64_t first_row, num_rows, context, first_block;
};

/* One item of work: some rows of a run, and some KV heads. */
struct part {
    int64_t run, first, count, kv_head, kv_heads;
};

struct attention_job {
    const struct attention *of;
    const struct part *parts;
    int64_t columns; /* d_v, padded to whole pairs of vectors */
};

/* Rows of an item: by KV head, then by query, then by the KV head's own heads. */
struct rows {
    float *query;   /* [rows, d], scaled */
    float *sums;    /* [rows, columns]: the values, weighted */
    float *weights; /* [rows, TILE]: scores, then weights */
    float *mass;    /* [rows, VL] */
    float *peaks;   /* [rows] */
};

/* Where the tokens of a tile are, for one KV head. Those that no row sees only have to be somewhere. */
struct found {
    const char *keys[TILE], *values[TILE];
};

/* What one thread works on: the rows of one KV head, and what it makes of a tile. */
struct desk {
    struct rows rows;
    float *turned; /* [d, TURNED]: keys of some tokens */
    char *padded;  /* [TILE, columns]: values whose rows don't fill whole vectors */
    struct found *now, *next;
    struct found both[2];
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t size_of(int format) { return format == FLOAT32 ? 4 : 2; }

/* ---- One item ---- */

/* Where an item is: its rows, and the tile at hand. */
struct place {
    const struct attention *of;
    struct run run;
    int64_t row, count, kv_head, per_query; /* row: the first of `count` queries; per_query: heads of the KV head */
    int64_t position;                       /* of the first query in its sequence */
    int64_t columns, tile;
};

/* Where what a position sees begins, and where it ends. */
static inline int64_t seen_from(const struct attention *of, int64_t position) {
    return of->window ? most(0, position + 1 - of->window) : 0;
}

static inline int64_t seen_until(const struct attention *of, int64_t context, int64_t position) {
    if (!of->both_sides) return position + 1;
    return of->window ? least(context, position + of->window) : context;
}

/* Tokens of the tile that a row of the desk sees, from `low` to before `high`; none where low >= high. */
static inline void see(const struct place *at, int64_t desk_row, int64_t *low, int64_t *high) {
    int64_t position = at->position + desk_row / at->per_query;
    *low = most(0, seen_from(at->of, position) - at->tile);
    *high = least(TILE, seen_until(at->of, at->run.context, position) - at->tile);
}

/* What some rows see, all of them and any of them. What is seen moves with the position: the first and last tell. */
struct view {
    int64_t any_low, any_high, all_low, all_high;
};

static inline struct view view_of(const struct place *at, int64_t desk_row, int64_t rows) {
    struct view v;
    see(at, desk_row, &v.any_low, &v.all_high);
    see(at, desk_row + rows - 1, &v.all_low, &v.any_high);
    return v;
}

static void take_queries(const struct place *at, struct desk *desk) {
    const struct attention *of = at->of;
    float *to = desk->rows.query;
    for (int64_t i = 0; i < at->count; i++)
        for (int64_t g = 0; g < at->per_query; g++, to += of->d) {
            int64_t from = (at->kv_head * at->per_query + g) * of->query_head + (at->row + i) * of->query_row;
            for (int64_t k = 0; k < of->d; k++) {
                float number = of->format == FLOAT32 ? ((const float *)of->query)[from + k]
                                                     : bf16_to_f32(((const uint16_t *)of->query)[from + k]);
                to[k] = number * of->scale;
            }
        }
}

/* Tokens of the KV head that follow each other in the cache. */
struct stretch {
    int64_t slot, count;
};

/* From a token of the tile on, up to before `high`. */
static inline struct stretch stretch_at(const struct place *at, int64_t low, int64_t high) {
    int64_t block_tokens = at->of->block_tokens, block = (at->tile + low) / block_tokens;
    int64_t offset = at->tile + low - block * block_tokens;
    return (struct stretch){at->of->table[at->run.first_block + block] * block_tokens + offset,
                            least(high - low, block_tokens - offset)};
}

static inline const char *key_of(const struct place *at, int64_t slot) {
    return (const char *)at->of->keys + (slot * at->of->kv_heads + at->kv_head) * at->of->d * size_of(at->of->format);
}

static inline const char *value_of(const struct place *at, int64_t slot) {
    return (const char *)at->of->values +
           (slot * at->of->kv_heads + at->kv_head) * at->of->d_v * size_of(at->of->format);
}

/* The tokens of the tile that any row sees. */
static void find_tokens(const struct place *at, struct found *found) {
    int64_t size = size_of(at->of->format), step = at->of->kv_heads * at->of->d * size;
    int64_t value_step = at->of->kv_heads * at->of->d_v * size;
    struct view seen = view_of(at, 0, at->count * at->per_query);
    int64_t j = seen.any_low;
    while (j < seen.any_high) {
        struct stretch tokens = stretch_at(at, j, seen.any_high);
        const char *key = key_of(at, tokens.slot), *value = value_of(at, tokens.slot);
        for (int64_t stop = j + tokens.count; j < stop; j++, key += step, value += value_step)
            found->keys[j] = key, found->values[j] = value;
    }
    for (; j < TILE; j++) found->keys[j] = found->keys[seen.any_low], found->values[j] = found->values[seen.any_low];
    for (j = 0; j < seen.any_low; j++)
        found->keys[j] = found->keys[seen.any_low], found->values[j] = found->values[seen.any_low];
}

/* Copies of the values, with room behind them for whole vectors. */
static void pad_values(const struct place *at, struct desk *desk) {
    int64_t size = size_of(at->of->format);
    for (int64_t j = 0; j < TILE; j++) {
        char *copy = desk->padded + j * at->columns * size;
        memcpy(copy, desk->now->values[j], at->of->d_v * size);
        desk->now->values[j] = copy;
    }
}

/* Have tokens from `first` on brought near. They are read: what was only to be prefetched came late, or not at all. */
static inline void touch(const struct place *at, const struct found *next, int64_t first) {
    int64_t key_bytes = at->of->d * size_of(at->of->format), value_bytes = at->of->d_v * size_of(at->of->format);
    for (int64_t j = first; j < first + TURNED; j++) {
        for (int64_t i = 0; i < key_bytes; i += 64) (void)*(const volatile char *)(next->keys[j] + i);
        for (int64_t i = 0; i < value_bytes; i += 64) (void)*(const volatile char *)(next->values[j] + i);
    }
}

/* All scores of the tile. next: whether another comes after it, which has been found. */
static void score(const struct place *at, struct desk *desk, int64_t rows, bool next) {
    const struct attention *of = at->of;
    struct view all = view_of(at, 0, rows);
    for (int64_t first = all.any_low / TURNED * TURNED; first < all.any_high; first += TURNED) {
        if (next) touch(at, desk->next, first);
        (of->format == FLOAT32 ? turn_f32 : turn_bf16)(desk->now->keys + first, of->d, desk->turned);
        const group *group;
        for (int64_t r = 0; r < rows; r += group->rows) {
            group = largest_group(rows - r);
            struct view seen = view_of(at, r, group->rows);
            if (seen.any_low < first + TURNED && seen.any_high > first)
                group->score(desk->rows.query + r * of->d, desk->turned, of->d, desk->rows.weights + r * TILE + first);
        }
    }
}

/* A row's scores of tokens [low, high) become weights, and what it has so far is measured by the new peak. */
static void weigh(const struct place *at, struct desk *desk, int64_t row, int64_t low, int64_t high) {
    float *scores = desk->rows.weights + row * TILE, *sums = desk->rows.sums + row * at->columns;
    float *mass = desk->rows.mass + row * VL;
    float softcap = at->of->softcap;
    int64_t start = low / VL * VL;
    vec top = splat(-INFINITY);
    for (int64_t j = start; j < high; j += VL) {
        vec s = load_f32(scores + j);
        if (softcap) s = tanh_of(s / softcap) * softcap;
        if (j < low || j + VL > high) {
            vec lanes = lanes_from(j);
            s = choose((lanes >= (float)low) & (lanes < (float)high), s, splat(-INFINITY));
        }
        store_f32(scores + j, s);
        top = larger(s, top);
    }
    float before = desk->rows.peaks[row], peak = largest_of(top);
    peak = peak > before ? peak : before;
    float base = peak == -INFINITY ? 0 : peak;
    vec total = load_f32(mass);
    if (peak != before) {
        vec factor = splat(exp_of_one(before - base));
        total *= factor;
        for (int64_t c = 0; c < at->columns; c += VL) store_f32(sums + c, load_f32(sums + c) * factor);
        desk->rows.peaks[row] = peak;
    }
    for (int64_t j = start; j < high; j += VL) {
        vec weight = exp_of(load_f32(scores + j) - base);
        store_f32(scores + j, weight);
        total += weight;
    }
    store_f32(mass, total);
}

/* Add the values that some rows see. Those that not all of them see are added row by row: 0 times NaN is NaN. */
static void mix(const struct place *at, struct desk *desk, int64_t row, const group *group) {
    int format = at->of->format;
    struct view seen = view_of(at, row, group->rows);
    float *weights = desk->rows.weights + row * TILE, *sums = desk->rows.sums + row * at->columns;
    int64_t low = seen.all_low, high = most(low, seen.all_high);
    if (low != seen.any_low || high != seen.any_high)
        for (int64_t r = 0; r < group->rows; r++) {
            int64_t own_low, own_high;
            see(at, row + r, &own_low, &own_high);
            ONE_ROW->mix[format](weights + r * TILE, desk->now->values, own_low, least(low, own_high), at->columns,
                                 sums + r * at->columns);
        }
    group->mix[format](weights, desk->now->values, low, high, at->columns, sums);
    if (high != seen.any_high)
        for (int64_t r = 0; r < group->rows; r++) {
            int64_t own_low, own_high;
            see(at, row + r, &own_low, &own_high);
            ONE_ROW->mix[format](weights + r * TILE, desk->now->values, most(high, own_low), own_high, at->columns,
                                 sums + r * at->columns);
        }
}

/* The sums over the mass, as the caller wants them. */
static void give_row(const struct place *at, const struct desk *desk, int64_t desk_row) {
    const struct attention *of = at->of;
    int64_t head = at->kv_head * at->per_query + desk_row % at->per_query;
    int64_t to = ((at->row + desk_row / at->per_query) * of->heads + head) * of->d_v;
    const float *sums = desk->rows.sums + desk_row * at->columns;
    float mass = sum_of(load_f32(desk->rows.mass + desk_row * VL)), factor = 1;
    if (of->sinks) {
        float sink = of->sinks[head], peak = desk->rows.peaks[desk_row];
        float base = sink > peak ? sink : peak;
        factor = exp_of_one(peak - base);
        mass = mass * factor + exp_of_one(sink - base);
    }
    for (int64_t c = 0; c < of->d_v; c += 2 * VL) {
        vec low = load_f32(sums + c) * factor / mass, high = load_f32(sums + c + VL) * factor / mass;
        int64_t count = least(2 * VL, of->d_v - c);
        if (of->format == FLOAT32) {
            float numbers[2 * VL];
            store_f32(numbers, low);
            store_f32(numbers + VL, high);
            memcpy((float *)of->out + to + c, numbers, count * sizeof *numbers);
        } else {
            uint16_t even[VL], odd[VL], halves[2 * VL];
            store_bf16(even, low);
            store_bf16(odd, high);
            for (int i = 0; i < VL; i++) halves[2 * i] = even[i], halves[2 * i + 1] = odd[i];
            memcpy((uint16_t *)of->out + to + c, halves, count * sizeof *halves);
        }
    }
}

/* One tile for the rows of one KV head. next: where comes after it, or NULL. */
static void attend_tile(const struct place *at, struct desk *desk, const struct place *next) {
    int64_t rows = at->count * at->per_query;
    struct found *now = desk->now;
    if (next) find_tokens(next, desk->next);
    if (at->columns != at->of->d_v) pad_values(at, desk);
    score(at, desk, rows, next != NULL);
    for (int64_t r = 0; r < rows; r++) {
        int64_t low, high;
        see(at, r, &low, &high);
        if (low < high) weigh(at, desk, r, low, high);
    }
    const group *group;
    for (int64_t r = 0; r < rows; r += group->rows) {
        group = largest_group(rows - r);
        mix(at, desk, r, group);
    }
    desk->now = desk->next;
    desk->next = now;
}

static struct rows rows_after(const struct place *at, struct rows rows, int64_t count) {
    return (struct rows){rows.query + count * at->of->d, rows.sums + count * at->columns, rows.weights + count * TILE,
                         rows.mass + count * VL, rows.peaks + count};
}

/* at: where the item begins, and `after` the next one, or NULL. All its KV heads of a tile lie beside each other. */
static void attend_item(struct place at, struct desk *desk, int64_t kv_heads, const struct place *after) {
    int64_t rows = at.count * at.per_query, first_head = at.kv_head;
    int64_t end = seen_until(at.of, at.run.context, at.position + at.count - 1);
    struct rows first_rows = desk->rows;
    memset(first_rows.sums, 0, kv_heads * rows * at.columns * sizeof(float));
    memset(first_rows.mass, 0, kv_heads * rows * VL * sizeof(float));
    for (int64_t r = 0; r < kv_heads * rows; r++) first_rows.peaks[r] = -INFINITY;
    for (int64_t head = 0; head < kv_heads; head++, at.kv_head++) {
        desk->rows = rows_after(&at, first_rows, head * rows);
        take_queries(&at, desk);
    }
    for (at.kv_head = first_head; at.tile < end; at.tile += TILE, at.kv_head = first_head)
        for (int64_t head = 0; head < kv_heads; head++, at.kv_head++) {
            struct place next = at;
            next.kv_head = head + 1 < kv_heads ? at.kv_head + 1 : first_head;
            next.tile += head + 1 < kv_heads ? 0 : TILE;
            desk->rows = rows_after(&at, first_rows, head * rows);
            attend_tile(&at, desk, next.tile < end ? &next : after);
        }
    for (int64_t head = 0; head < kv_heads; head++, at.kv_head++) {
        desk->rows = rows_after(&at, first_rows, head * rows);
        for (int64_t r = 0; r < rows; r++) give_row(&at, desk, r);
    }
    desk->rows = first_rows;
}

/* ---- The job ---- */

static char *set_desk(const struct attention_job *job, struct desk *desk) {
    const struct attention *of = job->of;
    int64_t rows = most(ITEM_ROWS, of->heads / of->kv_heads);
    int64_t numbers = rows * (of->d + job->columns + TILE + VL + 1) + of->d * TURNED + TILE * job->columns;
    float *at = malloc(numbers * sizeof *at);
    if (!at) abort();
    desk->now = &desk->both[0];
    desk->next = &desk->both[1];
    desk->rows.query = at;
    desk->rows.sums = desk->rows.query + rows * of->d;
    desk->rows.weights = desk->rows.sums + rows * job->columns;
    desk->rows.mass = desk->rows.weights + rows * TILE;
    desk->rows.peaks = desk->rows.mass + rows * VL;
    desk->turned = desk->rows.peaks + rows;
    desk->padded = (char *)(desk->turned + of->d * TURNED);
    return (char *)at;
}

/* Where an item begins. */
static struct place place_of(const struct attention_job *job, const struct part *part) {
    const struct attention *of = job->of;
    struct place at = {.of = of, .count = part->count, .kv_head = part->kv_head, .columns = job->columns};
    memcpy(&at.run, of->runs + 4 * part->run, sizeof at.run);
    at.per_query = of->heads / of->kv_heads;
    at.row = at.run.first_row + part->first;
    at.position = at.run.context - at.run.num_rows + part->first;
    at.tile = seen_from(of, at.position) / TILE * TILE;
    return at;
}

static void attend_items(void *of_job, int64_t first, int64_t last) {
    const struct attention_job *job = of_job;
    struct desk desk;
    char *memory = set_desk(job, &desk);
    struct place at = place_of(job, &job->parts[first]);
    find_tokens(&at, desk.now);
    for (int64_t item = first; item < last; item++) {
        struct place after = at;
        if (item + 1 < last) after = place_of(job, &job->parts[item + 1]);
        attend_item(at, &desk, job->parts[item].kv_heads, item + 1 < last ? &after : NULL);
        at = after;
    }
    free(memory);
}

static void write_rows(void *of_job, int64_t first, int64_t last) {
    const struct attention *of = of_job;
    int64_t size = size_of(of->format);
    for (int64_t row = first; row < last; row++)
        for (int64_t head = 0; head < of->kv_heads; head++) {
            int64_t slot = of->slots[row] * of->kv_heads + head;
            memcpy((char *)of->keys + slot * of->d * size,
                   (const char *)of->key + (head * of->key_head + row * of->key_row) * size, of->d * size);
            memcpy((char *)of->values + slot * of->d_v * size,
                   (const char *)of->value + (head * of->value_head + row * of->value_row) * size, of->d_v * size);
        }
}

/* Cut the work into parts; of each run the last rows, which see the most, come first. Returns how many there are.
 *
 * Few rows take several KV heads, whose keys lie beside each other, as long as each thread has some parts.
 */
static int64_t cut(const struct attention *of, struct part *parts) {
    int64_t num_parts = 0, per_query = of->heads / of->kv_heads, size = most(1, ITEM_ROWS / per_query);
    int64_t fair = of->threads > 1 ? of->num_runs * of->kv_heads / (2 * of->threads) : of->kv_heads;
    for (int64_t run = 0; run < of->num_runs; run++) {
        int64_t rows = of->runs[4 * run + 1];
        for (int64_t first = (rows - 1) / size * size; first >= 0; first -= size) {
            int64_t count = least(size, rows - first);
            int64_t kv_heads = most(1, least(fair, ITEM_ROWS / (count * per_query)));
            for (int64_t head = 0; head < of->kv_heads; head += kv_heads, num_parts++)
                if (parts)
                    parts[num_parts] = (struct part){run, first, count, head, least(kv_heads, of->kv_heads - head)};
        }
    }
    return num_parts;
}

/* Write the new keys and values, then attend for every row; runs that cost the most come first. */
void weft_attend(const struct attention *of) {
    if (of->rows == 0) return;
    share(write_rows, (void *)of, of->rows, WRITTEN_AT_ONCE, of->threads);
    int64_t num_parts = cut(of, NULL);
    struct part *parts = malloc((num_parts + 1) * sizeof *parts);
    if (!parts) abort();
    cut(of, parts);
    struct attention_job job = {of, parts, (of->d_v + 2 * VL - 1) / (2 * VL) * (2 * VL)};
    share(attend_items, &job, num_parts, most(1, num_parts / (8 * of->threads)), of->threads);
    free(parts);
}
