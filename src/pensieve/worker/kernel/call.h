/* What Python and the kernel say to each other: one struct a layer, mirrored field by field in attention/native.py. */
#ifndef PENSIEVE_CALL_H
#define PENSIEVE_CALL_H

#include <stdint.h>

#define LOG2_E 1.44269504f
#define WIDTH 32 /* tokens at once, and the most that a slot holds */

enum { LEVEL_NONE, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AVX512_BF16, LEVEL_AMX };
#if defined(__linux__) && defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define COMPILES_AMX 1
#endif
enum { KIND_FLOAT32, KIND_BFLOAT16 };

/* Strides count numbers, not bytes; the D numbers of a head always lie side by side. */
struct call {
    /* The cache. */
    uint8_t *store;        /* slot 0, layer 0 */
    int64_t slot_bytes;
    int64_t layer_bytes;
    int64_t kind;          /* KIND_... */
    int64_t num_kv_heads;
    int64_t head_dim;      /* D, a multiple of 16 */
    int64_t chunk_tokens;  /* C, even, from 4 to WIDTH */
    int64_t level;         /* LEVEL_..., one that this CPU has */
    int64_t num_threads;
    int64_t part_chunks;   /* a context is divided among threads into parts of at least so many chunks */
    /* The step. */
    const int64_t *first_rows;   /* (S + 1,), row of T at which each span begins */
    const int64_t *stops;        /* (S,), context of each span's last token */
    const int64_t *tables;       /* (S, B), slots */
    const int64_t *slot_mapping; /* (T,), slot * C + offset */
    int64_t num_spans;
    int64_t table_width;         /* B */
    int64_t num_tokens;          /* T */
    /* The layer: what is written. */
    int64_t layer;
    const void *key;   /* (T, Hkv, D) */
    const void *value; /* (T, Hkv, D) */
    int64_t key_token_stride, key_head_stride;
    int64_t value_token_stride, value_head_stride;
    /* The layer: what attends. */
    const void *query; /* (T, H, D) */
    int64_t query_token_stride, query_head_stride;
    int64_t num_heads; /* H */
    void *output;      /* (T, H, D), contiguous */
    const float *sinks; /* (H,), or null */
    double scaling;
    double softcap;     /* 0: none */
    int64_t window;     /* a key is visible iff 0 <= query position - key position < window */
    /* Room to work in. */
    uint8_t *scratch;
    int64_t scratch_bytes;
};

/* Some query rows of one span, all heads of a KV head's group folded together (row = query * G + head of the group), and the
 * chunks of their context that one thread reads. */
struct part {
    int32_t span;
    int32_t first_row;   /* of the span's Q * G rows */
    int32_t num_rows;
    int32_t first_chunk; /* chunks [first_chunk, stop_chunk) of the span's context */
    int32_t stop_chunk;
    int32_t index;       /* which part of this block of rows */
    int32_t num_parts;
    int32_t block;       /* blocks in several parts are counted: which one */
    int64_t partial;     /* where the block's partial results begin, in numbers; num_parts * num_rows * (D + 2) of them a KV head */
};

/* One thread's room. */
struct room {
    void *query;     /* the rows' queries, packed for the kernel */
    float *output;   /* (rows, D), not yet divided by the sum of weights */
    float *most;     /* (rows,), to this the exponents are relative, in powers of two */
    float *total;    /* (rows, lanes), sums of weights */
    float *scores;   /* (rows of a tile, WIDTH) */
    void *weights;   /* (rows of a tile, WIDTH) */
    int64_t *positions; /* (rows,) */
    void *cells;     /* V of a chunk */
};

#define BLOCK_ROWS 64 /* most rows of a part: their queries and results stay in the first-level cache */
#define LEAST_BLOCK_ROWS 16
#define TILE_ROWS 32  /* most rows at once, of any level */

/* Numbers of K, or of V, of one slot and KV head. */
static inline int64_t cell_count(const struct call *call) { return call->chunk_tokens * call->head_dim; }
static inline int64_t number_bytes(const struct call *call) { return call->kind == KIND_BFLOAT16 ? 2 : 4; }

/* K of one slot and KV head; its V follows. */
static inline uint8_t *head_cells(const struct call *call, int64_t slot, int64_t kv_head)
{
    return call->store + slot * call->slot_bytes + call->layer * call->layer_bytes + kv_head * 2 * cell_count(call) * number_bytes(call);
}

/* How a layer's work is cut. */
struct plan {
    int64_t block_rows;
    int64_t budget;     /* blocks that cost more are divided */
    int64_t num_threads;
    int64_t num_parts;  /* of one KV head */
    int64_t num_blocks; /* of one KV head that are divided */
    int64_t partials;   /* numbers of one KV head */
};

/* How a call's scratch is divided. */
struct division {
    struct plan plan;
    int64_t parts_bytes, settled_bytes, partials_bytes, room_bytes;
    int64_t need;       /* bytes of it all */
};

/* See attention.c. */
struct division pensieve_divide(const struct call *call);
void pensieve_attend_divided(const struct call *call, const struct division *division);
int64_t pensieve_attend(const struct call *call);
void pensieve_write(struct call *call);

typedef void attend_part(const struct call *, const struct part *, int64_t kv_head, const struct room *, float *partials);

#endif
