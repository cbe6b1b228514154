/* Work cut into items, which threads take in turn. */
#ifndef PENSIEVE_THREADS_H
#define PENSIEVE_THREADS_H

#include <stdint.h>

/* Runs item(data, index, thread) for each index below `count`; thread < num_threads. Returns when all are done. */
void pensieve_run_items(void (*item)(void *data, int64_t index, int64_t thread), void *data, int64_t count, int64_t num_threads);

#endif
