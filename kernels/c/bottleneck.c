/* A bottleneck adapter's network on rows of one step: made = y + up(act(down(x))).
 *
 * Everything between y and made is float32, and each number is summed as linear.c sums it: a row comes out the same
 * whatever the other rows are.
 */
#include "activations.h"
#include "linear.h"
#include "pool.h"
#include "vectors.h"

enum { ROWS = 12 }; /* that are done together: linear.c's largest tile */

/* What the network reads; the same values as in bottleneck.py. */
enum reads { OUTPUT = 0, RESIDUAL = 1, SUM = 2 };

/* down, up: packed, as linear.c takes them, of width -> rank and back; the biases: float32, padded to whole panels. */
struct bottleneck {
    const void *down, *up;
    const float *down_bias, *up_bias;
    int64_t width, rank;
    int down_format, up_format, activation, reads;
};

struct job {
    const struct bottleneck *network;
    const void *y, *residual;
    void *made;
    float *scratch;
    int64_t rows, y_stride, residual_stride;
    int format;
};

static inline float read_number(int format, const void *from, int64_t i) {
    return format == FLOAT32 ? ((const float *)from)[i] : bf16_to_f32(((const uint16_t *)from)[i]);
}

static inline const void *row_of(int format, const void *from, int64_t row, int64_t stride) {
    return (const char *)from + row * stride * (format == FLOAT32 ? 4 : 2);
}

static inline void gather(const struct job *job, int format, int64_t row, float *x) {
    const struct bottleneck *network = job->network;
    const void *y = row_of(format, job->y, row, job->y_stride);
    const void *residual = row_of(format, job->residual, row, job->residual_stride);
    if (network->reads == OUTPUT)
        for (int64_t i = 0; i < network->width; i++) x[i] = read_number(format, y, i);
    else if (network->reads == RESIDUAL)
        for (int64_t i = 0; i < network->width; i++) x[i] = read_number(format, residual, i);
    else
        for (int64_t i = 0; i < network->width; i++)
            x[i] = read_number(format, y, i) + read_number(format, residual, i);
}

static inline void add(const struct job *job, int format, int64_t row, const float *term) {
    int64_t width = job->network->width;
    const void *y = row_of(format, job->y, row, job->y_stride);
    for (int64_t i = 0; i < width; i++) {
        float sum = read_number(format, y, i) + term[i];
        if (format == FLOAT32)
            ((float *)job->made)[row * width + i] = sum;
        else
            ((uint16_t *)job->made)[row * width + i] = f32_to_bf16(sum);
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

/* Items are pieces of ROWS rows. Of each row, scratch holds x, where the term comes to be, and what is between. */
static void do_pieces(void *of, int64_t first, int64_t last) {
    const struct job *job = of;
    const struct bottleneck *network = job->network;
    int64_t width = network->width, rank = network->rank, stride = width + rank;
    for (int64_t start = first * ROWS; start < last * ROWS && start < job->rows; start += ROWS) {
        int64_t rows = job->rows - start < ROWS ? job->rows - start : ROWS;
        float *x = job->scratch + start * stride, *hidden = x + width;
        for (int64_t r = 0; r < rows; r++)
            if (job->format == FLOAT32)
                gather(job, FLOAT32, start + r, x + r * stride);
            else
                gather(job, BFLOAT16, start + r, x + r * stride);
        weft_linear(x, network->down, network->down_bias, hidden, rows, width, rank, stride, stride, network->down_format,
                    FLOAT32, 1);
        for (int64_t r = 0; r < rows; r++) activate_row(network->activation, hidden + r * stride, rank);
        weft_linear(hidden, network->up, network->up_bias, x, rows, rank, width, stride, stride, network->up_format, FLOAT32,
                    1);
        for (int64_t r = 0; r < rows; r++)
            if (job->format == FLOAT32)
                add(job, FLOAT32, start + r, x + r * stride);
            else
                add(job, BFLOAT16, start + r, x + r * stride);
    }
}

/* y, residual: [rows, width], made: the same without gaps, all in one format. scratch: [rows, width + rank]. */
void weft_bottleneck(const struct bottleneck *network, const void *y, const void *residual, void *made, float *scratch,
                     int64_t rows, int64_t y_stride, int64_t residual_stride, int format, int threads) {
    struct job job = {network, y, residual, made, scratch, rows, y_stride, residual_stride, format};
    share(do_pieces, &job, (rows + ROWS - 1) / ROWS, 1, threads);
}
