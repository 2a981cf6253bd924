/* What is done to each row by itself between the products: norms, rotary embeddings, activations.
 *
 * Maths is in float32; what torch would round on the way in bfloat16 is rounded here too.
 */
#include "activations.h"
#include "pool.h"

enum { PAIR = 2 * VL, NUMBERS_A_PIECE = 1 << 15 };

/* PAIR adjacent numbers: of halves the even and the odd ones, since only order-blind things are done to them. */
typedef struct {
    vec a, b;
} pair;

static inline int64_t bytes_of(int format) { return format == FLOAT32 ? 4 : 2; }

static inline pair load_pair(int format, const void *from, int64_t at) {
    if (format == FLOAT32) {
        const float *numbers = (const float *)from + at;
        return (pair){load_f32(numbers), load_f32(numbers + VL)};
    }
    vec_bits both;
    memcpy(&both, (const uint16_t *)from + at, sizeof both);
    return (pair){(vec)(both << 16), (vec)(both & 0xffff0000)};
}

/* The bits of each number rounded to bfloat16, in the upper half of its word. NaN stays NaN: those that come of halves have
 * no bits that rounding could carry over. */
static inline vec_bits round_bits(vec v) {
    vec_bits bits = (vec_bits)v;
    return (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
}

/* What storing and loading would make of the numbers. */
static inline pair round_pair(int format, pair v) {
    if (format == FLOAT32) return v;
    return (pair){(vec)round_bits(v.a), (vec)round_bits(v.b)};
}

static inline void store_pair(int format, void *to, int64_t at, pair v) {
    if (format == FLOAT32) {
        float *numbers = (float *)to + at;
        store_f32(numbers, v.a);
        store_f32(numbers + VL, v.b);
        return;
    }
    vec_bits both = round_bits(v.a) >> 16 | round_bits(v.b);
    memcpy((uint16_t *)to + at, &both, sizeof both);
}

/* The same where only the numbers before `end` are there; the others are loaded as zeros. */
static inline pair load_some(int format, const void *from, int64_t at, int64_t end) {
    if (end - at >= PAIR) return load_pair(format, from, at);
    float room[PAIR] = {0};
    memcpy(room, (const char *)from + at * bytes_of(format), (end - at) * bytes_of(format));
    return load_pair(format, room, 0);
}

static inline void store_some(int format, void *to, int64_t at, int64_t end, pair v) {
    if (end - at >= PAIR) {
        store_pair(format, to, at, v);
        return;
    }
    float room[PAIR];
    store_pair(format, room, 0, v);
    memcpy((char *)to + at * bytes_of(format), room, (end - at) * bytes_of(format));
}

static inline float number_at(int format, const void *from, int64_t at) {
    return format == FLOAT32 ? ((const float *)from)[at] : bf16_to_f32(((const uint16_t *)from)[at]);
}

static inline void put_number(int format, void *to, int64_t at, float value) {
    if (format == FLOAT32)
        ((float *)to)[at] = value;
    else
        ((uint16_t *)to)[at] = f32_to_bf16(value);
}

static void share_rows(work do_rows, void *job, int64_t rows, int64_t numbers_a_row, int threads) {
    share(do_rows, job, rows, 1 + NUMBERS_A_PIECE / (numbers_a_row + 1), threads);
}

/* y = round(x - mean) / sqrt(mean((x - mean)^2) + eps)) * weight + bias, by the bits of `how`. */
enum norm { CENTERED = 1, PLUS_ONE = 2, ROUNDED_FIRST = 4 };

struct norm_job {
    const void *x, *weight, *bias;
    void *y;
    int64_t groups, size, x_stride, y_stride;
    float eps;
    int how, format;
};

static inline float mean_of(int format, const void *x, int64_t size) {
    pair sum = {{0}, {0}};
    float rest = 0;
    int64_t i = 0;
    for (; i + PAIR <= size; i += PAIR) {
        pair v = load_pair(format, x, i);
        sum.a += v.a;
        sum.b += v.b;
    }
    for (; i < size; i++) rest += number_at(format, x, i);
    return (sum_of(sum.a + sum.b) + rest) / size;
}

static inline float variance_of(int format, const void *x, int64_t size, float mean) {
    pair sum = {{0}, {0}};
    float rest = 0;
    int64_t i = 0;
    for (; i + PAIR <= size; i += PAIR) {
        pair v = load_pair(format, x, i);
        v.a -= mean;
        v.b -= mean;
        sum.a += v.a * v.a;
        sum.b += v.b * v.b;
    }
    for (; i < size; i++) {
        float v = number_at(format, x, i) - mean;
        rest += v * v;
    }
    return (sum_of(sum.a + sum.b) + rest) / size;
}

static inline void norm_group(const struct norm_job *job, int format, const void *x, void *y) {
    int64_t size = job->size;
    float mean = job->how & CENTERED ? mean_of(format, x, size) : 0;
    float scale = 1 / __builtin_sqrtf(variance_of(format, x, size, mean) + job->eps);
    float one = job->how & PLUS_ONE ? 1 : 0;
    for (int64_t i = 0; i < size; i += PAIR) {
        pair v = load_some(format, x, i, size);
        v.a = (v.a - mean) * scale;
        v.b = (v.b - mean) * scale;
        if (job->how & ROUNDED_FIRST) v = round_pair(format, v);
        if (job->weight) {
            pair weight = load_some(format, job->weight, i, size);
            v.a *= weight.a + one;
            v.b *= weight.b + one;
        }
        if (job->bias) {
            pair bias = load_some(format, job->bias, i, size);
            v.a += bias.a;
            v.b += bias.b;
        }
        store_some(format, y, i, size, v);
    }
}

static inline void norm_rows(const struct norm_job *job, int format, int64_t first, int64_t last) {
    int64_t bytes = bytes_of(format);
    for (int64_t row = first; row < last; row++)
        for (int64_t group = 0; group < job->groups; group++)
            norm_group(job, format, (const char *)job->x + (row * job->x_stride + group * job->size) * bytes,
                       (char *)job->y + (row * job->y_stride + group * job->size) * bytes);
}

static void do_norm(void *of, int64_t first, int64_t last) {
    const struct norm_job *job = of;
    if (job->format == FLOAT32)
        norm_rows(job, FLOAT32, first, last);
    else
        norm_rows(job, BFLOAT16, first, last);
}

/* x, y: [rows, groups, size], each group a norm of its own; weight, bias: [size] or NULL. All in one format. */
void weft_norm(const void *x, const void *weight, const void *bias, void *y, int64_t rows, int64_t groups, int64_t size,
               int64_t x_stride, int64_t y_stride, float eps, int how, int format, int threads) {
    struct norm_job job = {x, weight, bias, y, groups, size, x_stride, y_stride, eps, how, format};
    share_rows(do_norm, &job, rows, groups * size, threads);
}

/* Rotary embedding: number pairs (c, s) turn pairs of numbers of each head, which lie half a head apart or, INTERLEAVED,
 * beside each other. Each number has its own cosine and sine unless they are SHARED by the two of a pair. */
enum rotary { SHARED = 1, INTERLEAVED = 2 };

struct rotary_job {
    void *x;
    const void *cos, *sin;
    int64_t heads, head_dim, rotary_dim, x_stride, table_stride;
    int style, format;
};

static inline void turn_halves(int format, void *x, const void *cos, const void *sin, int64_t half, int64_t second) {
    for (int64_t i = 0; i < half; i += PAIR) {
        int64_t far = half + i, end = half + half, at = second + i;
        pair low = load_some(format, x, i, half), high = load_some(format, x, far, end);
        pair c0 = load_some(format, cos, i, half), s0 = load_some(format, sin, i, half);
        pair c1 = load_some(format, cos, at, second + half), s1 = load_some(format, sin, at, second + half);
        pair straight = round_pair(format, (pair){low.a * c0.a, low.b * c0.b});
        pair across = round_pair(format, (pair){high.a * s0.a, high.b * s0.b});
        pair far_straight = round_pair(format, (pair){high.a * c1.a, high.b * c1.b});
        pair far_across = round_pair(format, (pair){low.a * s1.a, low.b * s1.b});
        store_some(format, x, i, half, (pair){straight.a - across.a, straight.b - across.b});
        store_some(format, x, far, end, (pair){far_straight.a + far_across.a, far_straight.b + far_across.b});
    }
}

static inline void turn_neighbours(int format, void *x, const void *cos, const void *sin, int64_t half, int shared) {
    for (int64_t i = 0; i < half; i++) {
        int64_t at = shared ? i : 2 * i, next = shared ? i : 2 * i + 1;
        float left = number_at(format, x, 2 * i), right = number_at(format, x, 2 * i + 1);
        put_number(format, x, 2 * i, left * number_at(format, cos, at) - right * number_at(format, sin, at));
        put_number(format, x, 2 * i + 1, right * number_at(format, cos, next) + left * number_at(format, sin, next));
    }
}

static inline void rotate_rows(const struct rotary_job *job, int format, int64_t first, int64_t last) {
    int64_t bytes = bytes_of(format), half = job->rotary_dim / 2, shared = job->style & SHARED;
    for (int64_t row = first; row < last; row++) {
        const void *cos = (const char *)job->cos + row * job->table_stride * bytes;
        const void *sin = (const char *)job->sin + row * job->table_stride * bytes;
        for (int64_t head = 0; head < job->heads; head++) {
            void *x = (char *)job->x + (row * job->x_stride + head * job->head_dim) * bytes;
            if (job->style & INTERLEAVED)
                turn_neighbours(format, x, cos, sin, half, shared);
            else
                turn_halves(format, x, cos, sin, half, shared ? 0 : half);
        }
    }
}

static void do_rotate(void *of, int64_t first, int64_t last) {
    const struct rotary_job *job = of;
    if (job->format == FLOAT32)
        rotate_rows(job, FLOAT32, first, last);
    else
        rotate_rows(job, BFLOAT16, first, last);
}

/* x: [rows, heads, head_dim], changed in place in its first rotary_dim numbers a head; cos, sin: [rows, table_stride]. */
void weft_rotate(void *x, const void *cos, const void *sin, int64_t rows, int64_t heads, int64_t head_dim,
                 int64_t rotary_dim, int64_t x_stride, int64_t table_stride, int style, int format, int threads) {
    struct rotary_job job = {x, cos, sin, heads, head_dim, rotary_dim, x_stride, table_stride, style, format};
    share_rows(do_rotate, &job, rows, heads * head_dim, threads);
}

/* y = act(gate) * up, or act(gate). */
struct act_job {
    const void *gate, *up;
    void *y;
    int64_t size, x_stride, y_stride;
    int kind, format;
};

static inline void act_rows(const struct act_job *job, int kind, int format, int64_t first, int64_t last) {
    int64_t bytes = bytes_of(format);
    for (int64_t row = first; row < last; row++) {
        const void *gate = (const char *)job->gate + row * job->x_stride * bytes;
        const void *up = job->up ? (const char *)job->up + row * job->x_stride * bytes : NULL;
        void *y = (char *)job->y + row * job->y_stride * bytes;
        for (int64_t i = 0; i < job->size; i += PAIR) {
            pair v = load_some(format, gate, i, job->size);
            v.a = activate(kind, v.a);
            v.b = activate(kind, v.b);
            if (up) {
                pair by = load_some(format, up, i, job->size);
                v = round_pair(format, v);
                v.a *= by.a;
                v.b *= by.b;
            }
            store_some(format, y, i, job->size, v);
        }
    }
}

#define ACT_ROWS(KIND)                              \
    if (job->format == FLOAT32)                     \
        act_rows(job, KIND, FLOAT32, first, last);  \
    else                                            \
        act_rows(job, KIND, BFLOAT16, first, last);

static void do_act(void *of, int64_t first, int64_t last) {
    const struct act_job *job = of;
    switch (job->kind) {
    case SILU: ACT_ROWS(SILU) break;
    case GELU: ACT_ROWS(GELU) break;
    default: ACT_ROWS(GELU_TANH) break;
    }
}

/* gate, up: [rows, size], rows x_stride apart, up may be NULL; y: [rows, size]. All in one format. */
void weft_act(const void *gate, const void *up, void *y, int64_t rows, int64_t size, int64_t x_stride, int64_t y_stride,
              int kind, int format, int threads) {
    struct act_job job = {gate, up, y, size, x_stride, y_stride, kind, format};
    share_rows(do_act, &job, rows, 4 * size, threads);
}
