/* What Python says to rows.c: one struct a kind of work, mirrored field by field in rows.py. */
#ifndef PENSIEVE_ROWS_CALL_H
#define PENSIEVE_ROWS_CALL_H

#include <stdint.h>

struct rows_call {
    int64_t kind;  /* KIND_... */
    int64_t level; /* LEVEL_..., one that this CPU has */
    int64_t num_threads;
    int64_t num_rows;
};

/* residual += delta, rounded; output = residual / its root mean square * weight. All (rows, width), contiguous. */
struct norm_rows {
    struct rows_call call;
    void *residual;
    const void *delta;   /* null: none */
    const float *weight; /* (width,) */
    void *output;
    int64_t width;
    double epsilon;
};

/* Queries and keys of each row, in place: normalised head by head, then turned by the angles of its position. */
struct rotate_rows {
    struct rows_call call;
    void *heads;               /* (rows, H + Hkv, D); D even, the heads of a row side by side */
    int64_t row_stride;        /* numbers from one row to the next */
    int64_t num_heads;         /* H */
    int64_t num_kv_heads;      /* Hkv */
    int64_t head_dim;          /* D */
    const float *angles;       /* (positions, D): D / 2 cosines, then D / 2 sines; null: none */
    const int64_t *positions;  /* (rows,) */
    const float *query_weight; /* (D,), null: queries are not normalised */
    const float *key_weight;   /* (D,), likewise */
    double epsilon;
};

/* output = gate * sigmoid(gate) * up. */
struct gate_rows {
    struct rows_call call;
    const void *gate_up; /* (rows, 2, width), contiguous */
    void *output;        /* (rows, width), contiguous */
    int64_t width;
};

void pensieve_norm(const struct norm_rows *work);
void pensieve_rotate(const struct rotate_rows *work);
void pensieve_gate(const struct gate_rows *work);

#endif
