/* Work shared between threads.
 *
 * A job is cut into pieces that threads take one by one, so that a thread that the system has put aside holds up nothing
 * but the piece it is in: a fixed share for each thread, as OpenMP gives, stalls the whole job until it is back.
 */
#ifndef WEFT_POOL_H
#define WEFT_POOL_H

#include <stdint.h>

/* Does the items [first, last) of a job. */
typedef void (*work)(void *job, int64_t first, int64_t last);

/* Do `count` items in pieces of `grain` on up to `threads` threads, this one among them; back when all are done. */
void share(work do_items, void *job, int64_t count, int64_t grain, int threads);

#endif
