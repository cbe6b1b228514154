/* Attention of many query rows in bfloat16 by hardware tiles (AMX): as tiles.h, but 16 rows by 16 outputs, summed over 32 numbers, an instruction.
 *
 * K and V lie as the second operand wants them: words of two numbers along what is summed. Chunks are of WIDTH tokens and heads of a multiple of
 * 32 numbers; anything else is left to tiles.h. Two strips of 16 rows share what is loaded of K and V.
 *
 * The rows that fill up the last strip hold anything: a row of results depends on its own row only, and theirs are not read. A token's V is
 * multiplied for all rows, by zero too; so the V of a chunk that the context does not fill is copied, with zeros for the rest.
 */

#include "amx.h"

#define STRIPS 2 /* at once */

/* Ask for what a second operand of two columns will be, `ahead` bytes from where it is now: rows of 128 bytes. */
INLINE_AMX void ask_for_pair(const uint16_t *now, int64_t row_bytes, int64_t ahead)
{
    for (int row = 0; row < STRIP; row++) {
        _mm_prefetch((const char *)now + row * row_bytes + ahead, _MM_HINT_T0);
        _mm_prefetch((const char *)now + row * row_bytes + ahead + PREFETCH_STEP, _MM_HINT_T0);
    }
}

/* Scores of all tokens of a chunk, (strips * STRIP, WIDTH). `query`: [strips][D / STEP][STRIP][STEP]. */
INLINE_AMX void amx_score(const int strips, const uint16_t *query, const uint16_t *key, int64_t head_dim, int64_t ahead, float *scores)
{
    amx_clear(strips);
    for (int64_t i = 0; i < head_dim; i += STEP) {
        if (ahead)
            ask_for_pair(key + i * WIDTH, WIDTH * 4, ahead);
        AMX_STEP(strips, query + i * STRIP, STEP * 2, head_dim * STRIP * 2, key + i * WIDTH, WIDTH * 4);
    }
    amx_store(strips, STRIP, scores);
}

/* output (strips * STRIP, D) += weights (strips * STRIP, WIDTH) times V. */
INLINE_AMX void amx_gather(const int strips, const uint16_t *weights, const uint16_t *value, int64_t head_dim, int64_t ahead,
                           float *output)
{
    _tile_loadd(4, weights, WIDTH * 2);
    if (strips > 1)
        _tile_loadd(5, weights + STRIP * WIDTH, WIDTH * 2);
    for (int64_t i = 0; i < head_dim; i += 2 * STRIP) {
        float *first = output + i, *second = first + STRIP * head_dim;
        if (ahead)
            ask_for_pair(value + i * 2, head_dim * 4, ahead);
        _tile_loadd(6, value + i * 2, head_dim * 4);
        _tile_loadd(7, value + (i + STRIP) * 2, head_dim * 4);
        _tile_loadd(0, first, head_dim * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(1, first + STRIP, head_dim * 4);
        _tile_dpbf16ps(1, 4, 7);
        if (strips > 1) {
            _tile_loadd(2, second, head_dim * 4);
            _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(3, second + STRIP, head_dim * 4);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, first, head_dim * 4);
        _tile_stored(1, first + STRIP, head_dim * 4);
        if (strips > 1) {
            _tile_stored(2, second, head_dim * 4);
            _tile_stored(3, second + STRIP, head_dim * 4);
        }
    }
}

/* V of a chunk's first tokens, and zeros for the others. */
static void copy_filled(uint16_t *restrict to, const uint16_t *restrict value, int64_t head_dim, int64_t tokens)
{
    const int64_t whole = tokens / 2 * head_dim * 2;
    memcpy(to, value, (size_t)whole * sizeof *to);
    memset(to + whole, 0, (size_t)(WIDTH * head_dim - whole) * sizeof *to);
    if (tokens % 2)
        for (int64_t i = 0; i < head_dim; i++)
            to[whole + 2 * i] = value[whole + 2 * i];
}

/* Copy the queries of a part's rows as first operands: [strip][D / STEP][STRIP][STEP]. */
static void amx_pack_queries(const struct call *call, const struct part *part, int64_t kv_head, uint16_t *packed)
{
    const int64_t group = call->num_heads / call->num_kv_heads, head_dim = call->head_dim;
    for (int64_t row = 0; row < part->num_rows; row++) {
        const int64_t folded = part->first_row + row;
        const int64_t token = call->first_rows[part->span] + folded / group, head = kv_head * group + folded % group;
        const uint16_t *from = (const uint16_t *)call->query + token * call->query_token_stride + head * call->query_head_stride;
        uint16_t *to = packed + row / STRIP * STRIP * head_dim + row % STRIP * STEP;
        for (int64_t i = 0; i < head_dim; i += STEP)
            memcpy(to + i * STRIP, from + i, STEP * sizeof *to);
    }
}

/* See `attend_part` of tiles.h. */
static TARGET_AMX void attend_part_bfloat16_amx(const struct call *call, const struct part *part, int64_t kv_head, const struct room *room,
                                                float *partials)
{
    const int64_t head_dim = call->head_dim, num_rows = part->num_rows, window = call->window;
    const int64_t *table = call->tables + part->span * call->table_width;
    const struct scale scale = scale_of(call);
    uint16_t *packed = room->query, *weights = room->weights;
    amx_pack_queries(call, part, kv_head, packed);
    place_rows(call, part, room->positions);
    memset(room->output, 0, (size_t)(num_rows * head_dim) * sizeof(float));
    for (int64_t row = 0; row < num_rows; row++) {
        room->most[row] = -FLT_MAX;
        avx512_store(room->total + row * 16, avx512_zero());
    }
    amx_shape(num_rows < STRIP ? num_rows : STRIP, STRIP);
    for (int64_t chunk = part->first_chunk; chunk < part->stop_chunk; chunk++) {
        const uint16_t *key = (const uint16_t *)head_cells(call, table[chunk], kv_head), *value = key + cell_count(call);
        int64_t ahead = chunk + 1 < part->stop_chunk ? (table[chunk + 1] - table[chunk]) * call->slot_bytes : 0;
        for (int64_t first = 0; first < num_rows; first += STRIPS * STRIP) {
            const int64_t rows = num_rows - first < STRIPS * STRIP ? num_rows - first : STRIPS * STRIP;
            const int64_t base = chunk * WIDTH, lowest = room->positions[first] - base, last = room->positions[first + rows - 1] - base;
            if (last < 0 || lowest - window >= WIDTH - 1)
                continue; /* none of them sees any of it */
            const int all_visible = lowest >= WIDTH - 1 && last < window;
            float *output = room->output + first * head_dim;
            if (rows > STRIP)
                amx_score(2, packed + first * head_dim, key, head_dim, ahead, room->scores);
            else
                amx_score(1, packed + first * head_dim, key, head_dim, ahead, room->scores);
            for (int64_t row = 0; row < rows; row++) {
                const int64_t position = room->positions[first + row] - base;
                const uint32_t visible = all_visible ? ALL_VISIBLE : visible_of(position, window, WIDTH);
                weigh_bfloat16_native(&scale, visible, room->scores + row * WIDTH, room->most + first + row, room->total + (first + row) * 16,
                                      output + row * head_dim, head_dim, weights + row * WIDTH);
            }
            const uint16_t *gathered = value;
            if (last < WIDTH - 1) {
                copy_filled(room->cells, value, head_dim, last + 1);
                gathered = room->cells;
            }
            if (rows > STRIP)
                amx_gather(2, weights, gathered, head_dim, ahead, output);
            else
                amx_gather(1, weights, gathered, head_dim, ahead, output);
            ahead = 0; /* once is enough */
        }
    }
    _tile_release();

    partials += part->index * num_rows * (head_dim + 2);
    for (int64_t row = 0; row < num_rows; row++) {
        float *result = partials + row * (head_dim + 2);
        result[0] = avx512_sum(avx512_load(room->total + row * 16));
        result[1] = room->most[row];
        memcpy(result + 2, room->output + row * head_dim, (size_t)head_dim * sizeof(float));
    }
}
