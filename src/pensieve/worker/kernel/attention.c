/* Multi-token attention in place over paged KV, for x86-64 CPUs with AVX2 or more. Called through ctypes: knows no Python and no torch.
 *
 * One shared object serves every CPU: each level of instructions is compiled in, and the caller names one that `pensieve_level` allows.
 * Work is cut into parts (rows of queries of one KV head, some chunks of their context) which threads take in turn.
 */
#include <math.h>
#include <string.h>

#include "call.h"
#include "threads.h"

int64_t pensieve_call_bytes(void) { return (int64_t)sizeof(struct call); }

#if defined(__x86_64__) && defined(__GNUC__)

#include "bfloat16.h"

#define ALL_VISIBLE UINT32_MAX
#define PREFETCH_STEP 64
#define SLACK 8.0f /* weights are at most 2^8, whose sums a float holds as well as those of weights up to 1 */

struct scale {
    float factor; /* of a score */
    float cap;    /* 0: none */
};

static struct scale scale_of(const struct call *call)
{
    if (call->softcap == 0.0)
        return (struct scale){(float)(call->scaling * 1.4426950408889634), 0.0f};
    return (struct scale){(float)(call->scaling / call->softcap), (float)(call->softcap * 1.4426950408889634)};
}

/* The lowest `count` bits; none of them for a negative count, all for a large one. */
static inline uint32_t bits_below(int64_t count)
{
    return count <= 0 ? 0 : count >= 32 ? UINT32_MAX : (UINT32_C(1) << count) - 1;
}

/* Which of a chunk's tokens a query sees. `position` is counted from the chunk's first token. */
static inline uint32_t visible_of(int64_t position, int64_t window, int64_t chunk_tokens)
{
    return bits_below(position < chunk_tokens ? position + 1 : chunk_tokens) & ~bits_below(position - window + 1);
}

/* The positions of a part's rows, ascending. */
static void place_rows(const struct call *call, const struct part *part, int64_t *positions)
{
    const int64_t group = call->num_heads / call->num_kv_heads;
    const int64_t start = call->stops[part->span] - (call->first_rows[part->span + 1] - call->first_rows[part->span]);
    for (int64_t row = 0; row < part->num_rows; row++)
        positions[row] = start + (part->first_row + row) / group;
}

/* ---- fp32 */

#define CELL float
#define PACK 1
#define OPERAND float
#define QUERY(cell) (cell)
#define WORDS_LOAD(p) L(load)(p)
#define WORDS_LOAD_LOW(p) L(load)(p) /* never: a word is one number */
#define SPREAD_LOAD(p) L(all)(*(p))
#define DOT(sums, words, spread) L(fma)(words, spread, sums)
#define WEIGHTS_STORE(p, vec) L(store)(p, vec)
#define OUTPUT_STORE(p, vec) L(store)(p, vec)

#define NAME(x) x##_float32_avx2
#define L(op) avx2_##op
#define LANES 8
#define TILE 4
#define VEC __m256
#define WORDS __m256
#define SPREAD __m256
#define TARGET TARGET_AVX2
#define INLINE INLINE_AVX2
#include "tiles.h"
#undef NAME
#undef L
#undef LANES
#undef TILE
#undef VEC
#undef WORDS
#undef SPREAD
#undef TARGET
#undef INLINE

#define NAME(x) x##_float32_avx512
#define L(op) avx512_##op
#define LANES 16
#define TILE 8
#define VEC __m512
#define WORDS __m512
#define SPREAD __m512
#define TARGET TARGET_AVX512
#define INLINE INLINE_AVX512
#include "tiles.h"
#undef NAME
#undef WORDS
#undef SPREAD

#undef CELL
#undef PACK
#undef OPERAND
#undef QUERY
#undef WORDS_LOAD
#undef WORDS_LOAD_LOW
#undef SPREAD_LOAD
#undef DOT
#undef WEIGHTS_STORE
#undef OUTPUT_STORE

/* ---- bfloat16 */

#define CELL uint16_t
#define PACK 2

/* With instructions for it: products of pairs, summed in fp32. */
#undef TARGET
#undef INLINE
#define TARGET TARGET_BF16
#define INLINE INLINE_BF16

INLINE_BF16 __m512bh bf16_words(const void *p) { return (__m512bh)_mm512_loadu_si512(p); }
INLINE_BF16 __m512bh bf16_low_words(const void *p) { return (__m512bh)_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0xFFFF)); }
INLINE_BF16 __m512bh bf16_spread(const uint16_t *p)
{
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}
#define NAME(x) x##_bfloat16_native
#define OPERAND uint16_t
#define QUERY(cell) (cell)
#define WORDS __m512bh
#define SPREAD __m512bh
#define WORDS_LOAD(p) bf16_words(p)
#define WORDS_LOAD_LOW(p) bf16_low_words(p)
#define SPREAD_LOAD(p) bf16_spread(p)
#define DOT(sums, words, spread) _mm512_dpbf16_ps(sums, words, spread)
#define WEIGHTS_STORE(p, vec) bf16_store(p, vec)
#define OUTPUT_STORE(p, vec) bf16_store(p, vec)
#include "tiles.h"
#undef NAME
#undef OPERAND
#undef QUERY
#undef WORDS
#undef SPREAD
#undef WORDS_LOAD
#undef WORDS_LOAD_LOW
#undef SPREAD_LOAD
#undef DOT
#undef WEIGHTS_STORE
#undef OUTPUT_STORE

#if COMPILES_AMX
#include "tiles_amx.h"
#endif

/* Without: both halves of a word become floats. */
struct halves_avx512 { __m512 low, high; };
struct halves_avx2 { __m256 low, high; };

#define OPERAND float
#define QUERY(cell) float_of(cell)
#define WORDS_LOAD(p) ((WORDS){L(low_half)(p), L(high_half)(p)})
#define WORDS_LOAD_LOW(p) ((WORDS){L(low_half)(p), L(zero)()})
#define SPREAD_LOAD(p) ((SPREAD){L(all)((p)[0]), L(all)((p)[1])})
#define DOT(sums, words, spread) L(fma)((words).low, (spread).low, L(fma)((words).high, (spread).high, sums))
#define WEIGHTS_STORE(p, vec) L(store)(p, vec)
#define OUTPUT_STORE(p, vec) L(store_bfloat16)(p, vec)

#undef TARGET
#undef INLINE
#define NAME(x) x##_bfloat16_avx512
#define WORDS struct halves_avx512
#define SPREAD struct halves_avx512
#define TARGET TARGET_AVX512
#define INLINE INLINE_AVX512
#include "tiles.h"
#undef NAME
#undef L
#undef LANES
#undef TILE
#undef VEC
#undef WORDS
#undef SPREAD
#undef TARGET
#undef INLINE

#define NAME(x) x##_bfloat16_avx2
#define L(op) avx2_##op
#define LANES 8
#define TILE 4
#define VEC __m256
#define WORDS struct halves_avx2
#define SPREAD struct halves_avx2
#define TARGET TARGET_AVX2
#define INLINE INLINE_AVX2
#include "tiles.h"

/* ---- which of them */

struct variant {
    attend_part *attend;
    void (*finish)(const struct call *, const struct part *, int64_t kv_head, const float *partials, float *sum);
};

static struct variant variant_of(const struct call *call)
{
    if (call->kind == KIND_FLOAT32) {
        if (call->level >= LEVEL_AVX512)
            return (struct variant){attend_part_float32_avx512, finish_float32_avx512};
        return (struct variant){attend_part_float32_avx2, finish_float32_avx2};
    }
#if COMPILES_AMX
    if (call->level >= LEVEL_AMX && call->chunk_tokens == WIDTH && call->head_dim % STEP == 0)
        return (struct variant){attend_part_bfloat16_amx, finish_bfloat16_native};
#endif
    if (call->level >= LEVEL_AVX512_BF16)
        return (struct variant){attend_part_bfloat16_native, finish_bfloat16_native};
    if (call->level >= LEVEL_AVX512)
        return (struct variant){attend_part_bfloat16_avx512, finish_bfloat16_avx512};
    return (struct variant){attend_part_bfloat16_avx2, finish_bfloat16_avx2};
}

/* ---- attending */

enum { ROOM_ALIGNMENT = 64 };
static int64_t aligned(int64_t bytes) { return (bytes + ROOM_ALIGNMENT - 1) / ROOM_ALIGNMENT * ROOM_ALIGNMENT; }

/* Bytes of one thread's room; its fields point into it. */
static int64_t lay_out_room(const struct call *call, uint8_t *base, struct room *room, float **partials, float **sum)
{
    const int64_t numbers[] = {
        BLOCK_ROWS * call->head_dim, BLOCK_ROWS * call->head_dim, BLOCK_ROWS, BLOCK_ROWS * 16, TILE_ROWS * WIDTH, TILE_ROWS * WIDTH,
        2 * BLOCK_ROWS, WIDTH * call->head_dim, BLOCK_ROWS * (call->head_dim + 2), call->head_dim,
    };
    uint8_t *places[10];
    int64_t bytes = 0;
    for (int i = 0; i < 10; i++) {
        places[i] = base + bytes;
        bytes += aligned(numbers[i] * (int64_t)sizeof(float));
    }
    *room = (struct room){places[0], (float *)places[1], (float *)places[2], (float *)places[3], (float *)places[4], places[5],
                          (int64_t *)places[6], places[7]};
    *partials = (float *)places[8];
    *sum = (float *)places[9];
    return bytes;
}

/* What a part costs, in units of one row and chunk: reading a chunk costs as much as 16 rows computed with it. */
static int64_t cost_of(int64_t chunks, int64_t rows) { return chunks * (16 + rows); }

/* Visits the blocks of rows of all spans; the last rows of a span, which cost most, come first. */
struct blocks {
    int64_t rows; /* of a block, at most */
    int64_t span;
    int64_t row;  /* of the span; blocks end here */
    struct part part;
};

static int64_t rows_of(const struct call *call, int64_t span)
{
    return (call->first_rows[span + 1] - call->first_rows[span]) * (call->num_heads / call->num_kv_heads);
}

static int next_block(const struct call *call, struct blocks *blocks)
{
    while (blocks->row == 0) {
        if (++blocks->span == call->num_spans)
            return 0;
        blocks->row = rows_of(call, blocks->span);
    }
    const int64_t first = (blocks->row - 1) / blocks->rows * blocks->rows, group = call->num_heads / call->num_kv_heads;
    const int64_t start = call->stops[blocks->span] - (call->first_rows[blocks->span + 1] - call->first_rows[blocks->span]);
    const int64_t lowest = start + first / group - call->window + 1, last = start + (blocks->row - 1) / group;
    blocks->part = (struct part){
        .span = (int32_t)blocks->span, .first_row = (int32_t)first, .num_rows = (int32_t)(blocks->row - first),
        .first_chunk = lowest <= 0 ? 0 : (int32_t)(lowest / call->chunk_tokens), .stop_chunk = (int32_t)(last / call->chunk_tokens + 1), .num_parts = 1,
    };
    blocks->row = first;
    return 1;
}

static int64_t parts_of(const struct call *call, const struct plan *plan, const struct part *block)
{
    const int64_t chunks = block->stop_chunk - block->first_chunk;
    const int64_t wanted = cost_of(chunks, block->num_rows) / plan->budget, most = chunks / call->part_chunks;
    const int64_t parts = wanted < most ? wanted : most;
    return parts < 1 ? 1 : parts;
}

static struct plan plan_of(const struct call *call)
{
    struct plan plan = {.block_rows = call->head_dim <= 64 ? BLOCK_ROWS : call->head_dim <= 128 ? BLOCK_ROWS / 2 : BLOCK_ROWS / 4};
    const int64_t items = 8 * call->num_threads; /* enough for threads to end at about the same time */
    if (call->num_threads > 1) {
        int64_t rows = 0;
        for (int64_t span = 0; span < call->num_spans; span++)
            rows += rows_of(call, span);
        while (plan.block_rows > LEAST_BLOCK_ROWS && rows * call->num_kv_heads < items * plan.block_rows)
            plan.block_rows /= 2;
    }
    int64_t cost = 0;
    struct blocks blocks = {.rows = plan.block_rows, .span = -1};
    while (next_block(call, &blocks))
        cost += cost_of(blocks.part.stop_chunk - blocks.part.first_chunk, blocks.part.num_rows) * call->num_kv_heads;
    plan.num_threads = cost < 600 ? 1 : call->num_threads; /* some 10 microseconds of work: not worth waking others */
    plan.budget = plan.num_threads == 1 ? INT64_MAX : cost / items + 1;
    blocks = (struct blocks){.rows = plan.block_rows, .span = -1};
    while (next_block(call, &blocks)) {
        const int64_t parts = parts_of(call, &plan, &blocks.part);
        plan.num_parts += parts;
        if (parts > 1) {
            plan.num_blocks++;
            plan.partials += parts * blocks.part.num_rows * (call->head_dim + 2);
        }
    }
    return plan;
}

static void cut(const struct call *call, const struct plan *plan, struct part *parts)
{
    int32_t block = 0;
    int64_t partial = 0;
    struct blocks blocks = {.rows = plan->block_rows, .span = -1};
    while (next_block(call, &blocks)) {
        const struct part whole = blocks.part;
        const int64_t count = parts_of(call, plan, &whole), chunks = whole.stop_chunk - whole.first_chunk;
        for (int64_t i = 0; i < count; i++) {
            struct part *part = parts++;
            *part = whole;
            part->first_chunk = (int32_t)(whole.first_chunk + chunks * i / count);
            part->stop_chunk = (int32_t)(whole.first_chunk + chunks * (i + 1) / count);
            part->index = (int32_t)i;
            part->num_parts = (int32_t)count;
            part->block = block;
            part->partial = partial;
        }
        if (count > 1) {
            block++;
            partial += count * whole.num_rows * (call->head_dim + 2);
        }
    }
}

struct attending {
    const struct call *call;
    struct variant variant;
    struct plan plan;
    const struct part *parts;
    int32_t *settled; /* atomic, parts of each divided block and KV head that are done */
    float *partials;
    uint8_t *rooms;
    int64_t room_bytes;
};

static void attend_item(void *data, int64_t index, int64_t thread)
{
    const struct attending *attending = data;
    const struct call *call = attending->call;
    const int64_t kv_head = index % call->num_kv_heads;
    const struct part *part = attending->parts + index / call->num_kv_heads;
    struct room room;
    float *partials, *sum;
    lay_out_room(call, attending->rooms + thread * attending->room_bytes, &room, &partials, &sum);
    if (part->num_parts > 1)
        partials = attending->partials + kv_head * attending->plan.partials + part->partial;
    attending->variant.attend(call, part, kv_head, &room, partials);
    if (part->num_parts > 1) {
        int32_t *settled = attending->settled + part->block * call->num_kv_heads + kv_head;
        if (__atomic_add_fetch(settled, 1, __ATOMIC_ACQ_REL) < part->num_parts)
            return; /* the thread that finishes last combines them, in their order */
    }
    attending->variant.finish(call, part, kv_head, partials, sum);
}

struct division pensieve_divide(const struct call *call)
{
    struct division division = {.plan = plan_of(call)};
    const struct plan *plan = &division.plan;
    struct room room;
    float *partials, *sum;
    division.room_bytes = lay_out_room(call, 0, &room, &partials, &sum);
    division.parts_bytes = aligned(plan->num_parts * (int64_t)sizeof(struct part));
    division.settled_bytes = aligned(plan->num_blocks * call->num_kv_heads * (int64_t)sizeof(int32_t));
    division.partials_bytes = aligned(plan->partials * call->num_kv_heads * (int64_t)sizeof(float));
    division.need = ROOM_ALIGNMENT + division.parts_bytes + division.settled_bytes + division.partials_bytes + call->num_threads * division.room_bytes;
    return division;
}

/* Attention of all rows of a layer, in as much scratch as the division needs. */
void pensieve_attend_divided(const struct call *call, const struct division *division)
{
    struct attending attending = {.call = call, .variant = variant_of(call), .plan = division->plan, .room_bytes = division->room_bytes};
    uint8_t *base = (uint8_t *)aligned((int64_t)call->scratch);
    struct part *parts = (struct part *)base;
    cut(call, &attending.plan, parts);
    attending.parts = parts;
    attending.settled = (int32_t *)(base + division->parts_bytes);
    memset(attending.settled, 0, (size_t)division->settled_bytes);
    attending.partials = (float *)(base + division->parts_bytes + division->settled_bytes);
    attending.rooms = base + division->parts_bytes + division->settled_bytes + division->partials_bytes;
    pensieve_run_items(attend_item, &attending, attending.plan.num_parts * call->num_kv_heads, attending.plan.num_threads);
}

/* The same. Returns 0, or the bytes of scratch that it needs, and then nothing was done. */
int64_t pensieve_attend(const struct call *call)
{
    const struct division division = pensieve_divide(call);
    if (division.need > call->scratch_bytes)
        return division.need;
    pensieve_attend_divided(call, &division);
    return 0;
}

/* ---- writing */

enum { WRITE_TOKENS = 32 }; /* of an item */

static void write_float32(const struct call *call, int64_t first, int64_t stop, int64_t kv_head)
{
    const int64_t head_dim = call->head_dim, size = call->chunk_tokens;
    for (int64_t token = first; token < stop; token++) {
        const int64_t slot = call->slot_mapping[token] / size, offset = call->slot_mapping[token] % size;
        float *key_cells = (float *)head_cells(call, slot, kv_head), *value_cells = key_cells + cell_count(call);
        const float *key = (const float *)call->key + token * call->key_token_stride + kv_head * call->key_head_stride;
        const float *value = (const float *)call->value + token * call->value_token_stride + kv_head * call->value_head_stride;
        for (int64_t i = 0; i < head_dim; i++)
            key_cells[i * size + offset] = key[i];
        memcpy(value_cells + offset * head_dim, value, (size_t)head_dim * sizeof(float));
    }
}

/* Numbers of two neighbouring tokens side by side. */
static void weave(uint16_t *restrict cells, const uint16_t *restrict even, const uint16_t *restrict odd, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        cells[2 * i] = even[i];
        cells[2 * i + 1] = odd[i];
    }
}

static void write_bfloat16(const struct call *call, int64_t first, int64_t stop, int64_t kv_head)
{
    const int64_t head_dim = call->head_dim, size = call->chunk_tokens, *slots = call->slot_mapping;
    for (int64_t token = first; token < stop; token++) {
        const int64_t slot = slots[token] / size, offset = slots[token] % size;
        uint16_t *cells = (uint16_t *)head_cells(call, slot, kv_head) + offset * 2;
        const uint16_t *key = (const uint16_t *)call->key + token * call->key_token_stride + kv_head * call->key_head_stride;
        for (int64_t i = 0; i < head_dim; i += 2)
            memcpy(cells + i * size, key + i, 2 * sizeof(uint16_t));
    }
    for (int64_t token = first; token < stop; token++) {
        const int64_t slot = slots[token] / size, offset = slots[token] % size;
        uint16_t *cells = (uint16_t *)head_cells(call, slot, kv_head) + cell_count(call) + offset / 2 * head_dim * 2;
        const uint16_t *value = (const uint16_t *)call->value + token * call->value_token_stride + kv_head * call->value_head_stride;
        if (offset % 2 == 0 && token + 1 < stop && slots[token + 1] == slots[token] + 1) {
            weave(cells, value, value + call->value_token_stride, head_dim);
            token++;
        } else { /* its neighbour stays as it is */
            for (int64_t i = 0; i < head_dim; i++)
                cells[2 * i + offset % 2] = value[i];
        }
    }
}

static void write_item(void *data, int64_t index, int64_t thread)
{
    const struct call *call = data;
    const int64_t kv_head = index % call->num_kv_heads, first = index / call->num_kv_heads * WRITE_TOKENS;
    const int64_t stop = first + WRITE_TOKENS < call->num_tokens ? first + WRITE_TOKENS : call->num_tokens;
    (void)thread;
    (call->kind == KIND_BFLOAT16 ? write_bfloat16 : write_float32)(call, first, stop, kv_head);
}

/* How many parts `pensieve_attend` would cut this call into, all KV heads together. */
int64_t pensieve_count_parts(const struct call *call) { return plan_of(call).num_parts * call->num_kv_heads; }

/* Put a layer's new K and V into their cells. */
void pensieve_write(struct call *call)
{
    const int64_t numbers = call->num_tokens * call->num_kv_heads * call->head_dim;
    const int64_t count = (call->num_tokens + WRITE_TOKENS - 1) / WRITE_TOKENS * call->num_kv_heads;
    pensieve_run_items(write_item, call, count, numbers < 32768 ? 1 : call->num_threads);
}

#else /* another processor or compiler: Python does not call what is not there */

int64_t pensieve_attend(const struct call *call) { (void)call; return 0; }
struct division pensieve_divide(const struct call *call) { (void)call; return (struct division){0}; }
void pensieve_attend_divided(const struct call *call, const struct division *division) { (void)call; (void)division; }
int64_t pensieve_count_parts(const struct call *call) { (void)call; return 0; }
void pensieve_write(struct call *call) { (void)call; }

#endif
