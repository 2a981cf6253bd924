#ifndef WEFT_LINEAR_H
#define WEFT_LINEAR_H

#include <stdint.h>

/* x: float32 [rows, d_in]; packed: in `format`; bias: float32, padded to whole panels, or NULL; y: [rows, d_out] in `y_format`.
 */
void weft_linear(const float *x, const void *packed, const float *bias, void *y, int64_t rows, int64_t d_in, int64_t d_out,
                 int64_t x_stride, int64_t y_stride, int format, int y_format, int threads);

#endif
