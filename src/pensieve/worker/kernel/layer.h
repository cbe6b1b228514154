/* A whole layer of a Llama-like model, in bfloat16, as one call. Mirrored field by field in products.py. */
#ifndef PENSIEVE_LAYER_H
#define PENSIEVE_LAYER_H

#include "call.h"
#include "products.h"
#include "rows_call.h"

struct layer {
    int64_t num_threads;
    int64_t num_tokens;        /* T */
    uint16_t *residual;        /* (T, h), read and written */
    const float *attention_norm, *mlp_norm; /* (h,) */
    const float *query_norm, *key_norm;     /* (D,), null: not normalised */
    const float *angles;       /* see struct rotate_rows */
    const int64_t *positions;  /* (T,) */
    double epsilon;
    struct weights qkv;        /* STORE_PLAIN */
    struct weights out;        /* STORE_ADDED */
    struct weights gate_up;    /* STORE_GATED */
    struct weights down;       /* STORE_ADDED */
    const int64_t *rows;       /* (num_rows,), ascending: after attention only these go on, and move to the front; null: all do */
    int64_t num_rows;
    uint16_t *normed;          /* (T, h), room */
    uint16_t *heads;           /* (T, (H + 2 Hkv) * D), room */
    uint16_t *attended;        /* (T, H * D), room */
    uint16_t *gated;           /* (T, I), room */
};

#endif
