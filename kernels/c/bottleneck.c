/* y += up(act(down(x))) for the rows of one step, each by its own adapter's network.
 *
 * Everything between y and y is float32, and each number is summed as linear.c sums it: a row comes out the same whatever
 * the other rows are.
 */
#include "activations.h"
#include "linear.h"
#include "pool.h"
#include "vectors.h"

/* What the network reads; the same values as in bottleneck.py. */
enum reads { OUTPUT = 0, RESIDUAL = 1, SUM = 2 };

/* down, up: packed, as linear.c takes them, of width -> rank and back; the biases: float32, padded to whole panels. */
struct bottleneck {
    const void *down, *up;
    const float *down_bias, *up_bias;
    int64_t width, rank;
    int down_format, up_format, activation, reads;
};

/* Adjacent rows of one adapter. */
struct piece {
    const struct bottleneck *network;
    int64_t first, rows;
};

struct job {
    const struct piece *pieces;
    void *y;
    const void *residual;
    float *scratch;
    int64_t y_stride, residual_stride, scratch_stride;
    int format;
};

static inline float read_number(int format, const void *from, int64_t i) {
    return format == FLOAT32 ? ((const float *)from)[i] : bf16_to_f32(((const uint16_t *)from)[i]);
}

static inline void *row_of(int format, const void *from, int64_t row, int64_t stride) {
    return (char *)from + row * stride * (format == FLOAT32 ? 4 : 2);
}

static inline void gather(const struct job *job, int format, const struct bottleneck *network, int64_t row, float *x) {
    const void *y = row_of(format, job->y, row, job->y_stride);
    const void *residual = row_of(format, job->residual, row, job->residual_stride);
    if (network->reads == SUM)
        for (int64_t i = 0; i < network->width; i++)
            x[i] = read_number(format, y, i) + read_number(format, residual, i);
    else
        for (int64_t i = 0; i < network->width; i++) x[i] = read_number(format, network->reads == OUTPUT ? y : residual, i);
}

static inline void add(const struct job *job, int format, int64_t width, int64_t row, const float *term) {
    void *y = row_of(format, job->y, row, job->y_stride);
    for (int64_t i = 0; i < width; i++) {
        float sum = read_number(format, y, i) + term[i];
        if (format == FLOAT32)
            ((float *)y)[i] = sum;
        else
            ((uint16_t *)y)[i] = f32_to_bf16(sum);
    }
}

static void activate_row(int kind, float *x, int64_t size) {
    for (int64_t i = 0; i < size; i += VL) {
        vec v = {0};
        size_t bytes = (size - i < VL ? size - i : VL) * sizeof *x;
        memcpy(&v, x + i, bytes);
        v = activate(kind, v);
        memcpy(x + i, &v, bytes);
    }
}

/* Of each row, scratch holds x, in whose place the term comes to be, and behind it what is between. */
static inline void do_piece(const struct job *job, int format, const struct piece *piece) {
    const struct bottleneck *network = piece->network;
    int64_t width = network->width, rank = network->rank, stride = job->scratch_stride;
    float *x = job->scratch + piece->first * stride, *hidden = x + width;
    for (int64_t r = 0; r < piece->rows; r++) gather(job, format, network, piece->first + r, x + r * stride);
    weft_linear(x, network->down, network->down_bias, hidden, piece->rows, width, rank, stride, stride,
                network->down_format, FLOAT32, 1);
    for (int64_t r = 0; r < piece->rows; r++) activate_row(network->activation, hidden + r * stride, rank);
    weft_linear(hidden, network->up, network->up_bias, x, piece->rows, rank, width, stride, stride, network->up_format,
                FLOAT32, 1);
    for (int64_t r = 0; r < piece->rows; r++) add(job, format, width, piece->first + r, x + r * stride);
}

static void do_pieces(void *of, int64_t first, int64_t last) {
    const struct job *job = of;
    for (int64_t i = first; i < last; i++)
        if (job->format == FLOAT32)
            do_piece(job, FLOAT32, job->pieces + i);
        else
            do_piece(job, BFLOAT16, job->pieces + i);
}

/* y, changed in place, and residual: [rows, width] in one format; scratch: [rows, scratch_stride], which is at least the
 * width and the rank of any network. */
void weft_bottleneck(const struct piece *pieces, int64_t count, void *y, const void *residual, float *scratch,
                     int64_t y_stride, int64_t residual_stride, int64_t scratch_stride, int format, int threads) {
    struct job job = {pieces, y, residual, scratch, y_stride, residual_stride, scratch_stride, format};
    share(do_pieces, &job, count, 1, threads);
}
