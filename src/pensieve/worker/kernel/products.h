/* Rows times weights, in bfloat16, on CPUs with instructions for it. What Python hands over is mirrored field by field in products.py. */
#ifndef PENSIEVE_PRODUCTS_H
#define PENSIEVE_PRODUCTS_H

#include <stdint.h>

#define PANEL 32 /* outputs computed together: two vectors */

enum { STORE_PLAIN, STORE_ADDED, STORE_GATED, STORE_FLOAT };

/* Weights of several outputs. Panel by panel: [K / 2][PANEL][2], so that a vector holds a pair of one input's numbers for each of 16 outputs;
 * outputs that fill up the last panel have weights of 0. For STORE_GATED a panel's first half are gates, its second half what they gate. */
struct weights {
    const void *panels;     /* 64-byte aligned; bfloat16, or where there are scales int8 (for their order see products.c) */
    const float *scales;    /* an output each, in the panels' order, as many as fill them; null: weights are bfloat16 */
    const float *bias;      /* likewise; null: none */
    int64_t num_inputs;     /* K, even */
    int64_t num_outputs;    /* numbers of a row of results */
    int64_t level;          /* LEVEL_..., see call.h */
    int64_t store;          /* STORE_PLAIN: result = product; STORE_ADDED: result += product; STORE_GATED: result = silu(gate) * up;
                             * STORE_FLOAT: result = product, as a float that is not rounded */
};

struct multiply {
    const struct weights *weights;
    const uint16_t *inputs; /* (rows, K), contiguous */
    uint16_t *results;      /* (rows, outputs), contiguous; floats for STORE_FLOAT */
    int64_t num_rows;
    int64_t num_threads;
};

/* Half-words of a row of results. */
static inline int64_t row_words(const struct weights *weights) { return weights->num_outputs * (weights->store == STORE_FLOAT ? 2 : 1); }

void pensieve_multiply(const struct multiply *call);

#endif
