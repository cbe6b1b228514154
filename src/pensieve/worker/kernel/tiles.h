/* Attention of some query rows over some chunks of one KV head: online softmax (Milakov, Gimelshein 2018), a chunk at a time, in fp32.
 *
 * Included once for each kind of number and level of instructions, after defining
 *
 *     NAME(x)                 x, with a suffix of its own
 *     LANES, VEC, L(op)       floats of a vector, its type, its operations (lanes_*.h)
 *     TARGET, INLINE          attributes of functions
 *     TILE                    most rows whose sums fit in the registers, two vectors each
 *     CELL, PACK              a number of the cache, and how many of them make a word of 32 bits
 *     OPERAND                 what queries and weights are multiplied as
 *     WORDS, WORDS_LOAD(p), WORDS_LOAD_LOW(p)   LANES words; with only their lower numbers
 *     SPREAD, SPREAD_LOAD(p)                    PACK operands, for all lanes
 *     DOT(sums, words, spread)                  sums + the products of each word with the operands
 *     QUERY(cell)             a number of the query as an operand
 *     WEIGHTS_STORE(p, vec), OUTPUT_STORE(p, vec)
 *
 * Cells lie as the products want them. K of a chunk and head: [D / PACK][C][PACK], so that a vector holds one word of each of LANES
 * tokens and a score is summed in its own lane. V: [C / PACK][D][PACK], so that a vector holds LANES numbers of PACK tokens.
 * Where C < WIDTH, the lanes beyond read what comes next (there is as much: V follows K), and are never visible.
 *
 * A cell beyond the context may hold anything, NaN too. In K it spoils its own lane only, and what is not visible is replaced, never
 * multiplied by zero. In V the tokens beyond are not read; where one shares a word with the last, its half is cleared.
 */

#define VECTORS (WIDTH / LANES)

/* sums[row][column] += over all steps of words[column] times the row's operands. The same words `ahead` bytes further are asked for. */
INLINE void NAME(multiply)(const int rows, const int columns, VEC sums[TILE][2], const CELL *words, int64_t words_step,
                           const OPERAND *operands, const int row_step, const int operands_step, int64_t steps, int64_t ahead)
{
    for (int64_t step = 0; step < steps; step++) {
        WORDS word[2];
#pragma GCC unroll 2
        for (int column = 0; column < columns; column++)
            word[column] = WORDS_LOAD(words + column * LANES * PACK);
#pragma GCC unroll 2
        for (int byte = 0; byte < columns * LANES * 4; byte += PREFETCH_STEP)
            _mm_prefetch((const char *)words + byte + ahead, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            const SPREAD spread = SPREAD_LOAD(operands + row * row_step);
#pragma GCC unroll 2
            for (int column = 0; column < columns; column++)
                sums[row][column] = DOT(sums[row][column], word[column], spread);
        }
        words += words_step;
        operands += operands_step;
    }
}

/* Scores of all tokens of a chunk, (rows, WIDTH), neither scaled nor masked. `query`: [D / PACK][rows][PACK]. */
INLINE void NAME(score)(const int rows, const OPERAND *query, const CELL *key, int64_t chunk_tokens, int64_t head_dim, int64_t ahead,
                        float *scores)
{
#pragma GCC unroll 2
    for (int first = 0; first < WIDTH; first += 2 * LANES) {
        VEC sums[TILE][2];
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
            sums[row][0] = sums[row][1] = L(zero)();
        NAME(multiply)(rows, 2, sums, key + first * PACK, chunk_tokens * PACK, query, PACK, rows * PACK, head_dim / PACK, ahead);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            L(store)(scores + row * WIDTH + first, sums[row][0]);
            L(store)(scores + row * WIDTH + first + LANES, sums[row][1]);
        }
    }
}

/* The scores as exponents of 2: scaled, capped. */
INLINE VEC NAME(exponent)(const struct scale *scale, VEC score)
{
    if (scale->cap == 0.0f)
        return L(mul)(score, L(all)(scale->factor));
    /* cap * tanh(y), tanh(y) = 1 - 2 / (1 + e^2y); from 10 on it is 1 in a float. */
    VEC y = L(mul)(score, L(all)(scale->factor));
    y = L(min)(L(all)(10.0f), L(max)(L(all)(-10.0f), y));
    const VEC one = L(all)(1.0f);
    const VEC e2y = L(exp2)(L(mul)(y, L(all)(2.0f * LOG2_E)));
    return L(mul)(L(sub)(one, L(div)(L(all)(2.0f), L(add)(one, e2y))), L(all)(scale->cap));
}

/* One row's scores become weights, relative to 2^most. That moves only when a score is above it by so much that weights would grow large;
 * then what was summed before moves with it. */
INLINE void NAME(weigh)(const struct scale *scale, uint32_t visible, const float *scores, float *most, float *total, float *output,
                        int64_t head_dim, OPERAND *weights)
{
    VEC x[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++)
        x[i] = NAME(exponent)(scale, L(load)(scores + i * LANES));
    VEC highest = visible == ALL_VISIBLE ? x[0] : L(keep_or_lowest)(visible, x[0]);
#pragma GCC unroll 4
    for (int i = 1; i < VECTORS; i++)
        highest = L(max)(highest, visible == ALL_VISIBLE ? x[i] : L(keep_or_lowest)(visible >> (i * LANES), x[i]));
    VEC sum = L(load)(total);
    if (L(any_above)(highest, L(all)(*most + SLACK))) {
        const float now = L(highest)(highest);
        const VEC shrink = L(exp2)(L(all)(*most - now));
        *most = now;
        sum = L(mul)(sum, shrink);
        for (int64_t i = 0; i < head_dim; i += LANES)
            L(store)(output + i, L(mul)(L(load)(output + i), shrink));
    }
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) {
        VEC weight = L(exp2)(L(sub)(x[i], L(all)(*most)));
        if (visible != ALL_VISIBLE)
            weight = L(keep)(visible >> (i * LANES), weight);
        sum = L(add)(sum, weight);
        WEIGHTS_STORE(weights + i * LANES, weight);
    }
    L(store)(total, sum);
}

/* output += weights times V of the first `tokens` tokens, for one or two vectors of the D numbers. */
INLINE void NAME(gather)(const int rows, const int columns, const OPERAND *weights, const CELL *value, int64_t head_dim, int64_t tokens,
                         int64_t ahead, float *output)
{
    VEC sums[TILE][2];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 2
        for (int column = 0; column < columns; column++)
            sums[row][column] = L(load)(output + row * head_dim + column * LANES);
    }
    const int64_t steps = tokens / PACK;
    NAME(multiply)(rows, columns, sums, value, head_dim * PACK, weights, WIDTH, PACK, steps, ahead);
    if (tokens % PACK) {
#pragma GCC unroll 2
        for (int column = 0; column < columns; column++) {
            const WORDS last = WORDS_LOAD_LOW(value + steps * head_dim * PACK + column * LANES * PACK);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++)
                sums[row][column] = DOT(sums[row][column], last, SPREAD_LOAD(weights + row * WIDTH + steps * PACK));
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 2
        for (int column = 0; column < columns; column++)
            L(store)(output + row * head_dim + column * LANES, sums[row][column]);
    }
}

/* A tile of rows and one chunk. The pointers are those of the tile's first row. */
INLINE void NAME(attend_chunk)(const int rows, const struct scale *scale, const OPERAND *query, const CELL *key, int64_t ahead,
                               int64_t chunk_tokens, int64_t head_dim, int64_t tokens, const uint32_t *visible, const struct room *room, float *most,
                               float *total, float *output)
{
    float *scores = room->scores;
    OPERAND *weights = room->weights;
    NAME(score)(rows, query, key, chunk_tokens, head_dim, ahead, scores);
    for (int row = 0; row < rows; row++)
        NAME(weigh)(scale, visible[row], scores + row * WIDTH, most + row, total + row * LANES, output + row * head_dim, head_dim,
                    weights + row * WIDTH);
    const CELL *value = key + chunk_tokens * head_dim;
    int64_t first = 0;
    for (; first + 2 * LANES <= head_dim; first += 2 * LANES)
        NAME(gather)(rows, 2, weights, value + first * PACK, head_dim, tokens, ahead, output + first);
    if (first < head_dim)
        NAME(gather)(rows, 1, weights, value + first * PACK, head_dim, tokens, ahead, output + first);
}

/* Copy the queries of a part's rows, as operands, tile by tile: [D / PACK][rows of the tile][PACK]. */
static TARGET void NAME(pack_queries)(const struct call *call, const struct part *part, int64_t kv_head, OPERAND *packed)
{
    const int64_t group = call->num_heads / call->num_kv_heads, head_dim = call->head_dim;
    for (int64_t tile = 0; tile < part->num_rows; tile += TILE) {
        const int64_t rows = part->num_rows - tile < TILE ? part->num_rows - tile : TILE;
        for (int64_t row = 0; row < rows; row++) {
            const int64_t folded = part->first_row + tile + row;
            const int64_t token = call->first_rows[part->span] + folded / group, head = kv_head * group + folded % group;
            const CELL *from = (const CELL *)call->query + token * call->query_token_stride + head * call->query_head_stride;
            OPERAND *to = packed + tile * head_dim + row * PACK;
            for (int64_t i = 0; i < head_dim; i += PACK, to += rows * PACK)
                for (int j = 0; j < PACK; j++)
                    to[j] = QUERY(from[i + j]);
        }
    }
}

/* Results of all parts of a block become output: (total, most, D numbers) of each part and row, parts outermost. */
static TARGET void NAME(finish)(const struct call *call, const struct part *part, int64_t kv_head, const float *partials, float *sum)
{
    const int64_t group = call->num_heads / call->num_kv_heads, head_dim = call->head_dim, width = head_dim + 2;
    for (int64_t row = 0; row < part->num_rows; row++) {
        const int64_t folded = part->first_row + row, head = kv_head * group + folded % group;
        const int64_t token = call->first_rows[part->span] + folded / group;
        const float *first = partials + row * width;
        const int64_t step = part->num_rows * width;
        float most = first[1], total = 0.0f;
        for (int64_t i = 1; i < part->num_parts; i++)
            most = first[i * step + 1] > most ? first[i * step + 1] : most;
        if (call->sinks) {
            const float sink = call->sinks[head] * LOG2_E;
            most = sink > most ? sink : most;
            total = exp2f(sink - most);
        }
        for (int64_t j = 0; j < head_dim; j += LANES)
            L(store)(sum + j, L(zero)());
        for (int64_t i = 0; i < part->num_parts; i++) {
            const float *result = first + i * step;
            const float share = exp2f(result[1] - most);
            total += result[0] * share;
            for (int64_t j = 0; j < head_dim; j += LANES)
                L(store)(sum + j, L(fma)(L(load)(result + 2 + j), L(all)(share), L(load)(sum + j)));
        }
        CELL *to = (CELL *)call->output + (token * call->num_heads + head) * head_dim;
        for (int64_t j = 0; j < head_dim; j += LANES)
            OUTPUT_STORE(to + j, L(div)(L(load)(sum + j), L(all)(total)));
    }
}

/* Attend one part; see `struct part`. Its results go to its place in `partials`, (total, most, D numbers) a row. */
static TARGET void NAME(attend_part)(const struct call *call, const struct part *part, int64_t kv_head, const struct room *room,
                                     float *partials)
{
    const int64_t head_dim = call->head_dim, num_rows = part->num_rows, chunk_tokens = call->chunk_tokens;
    const int64_t *table = call->tables + part->span * call->table_width;
    const struct scale scale = scale_of(call);
    OPERAND *packed = room->query;
    NAME(pack_queries)(call, part, kv_head, packed);
    place_rows(call, part, room->positions);
    for (int64_t i = 0; i < num_rows * head_dim; i += LANES)
        L(store)(room->output + i, L(zero)());
    for (int64_t row = 0; row < num_rows; row++) {
        room->most[row] = -FLT_MAX;
        L(store)(room->total + row * LANES, L(zero)());
    }

    for (int64_t chunk = part->first_chunk; chunk < part->stop_chunk; chunk++) {
        const CELL *key = (const CELL *)head_cells(call, table[chunk], kv_head);
        const int64_t next = chunk + 1 < part->stop_chunk ? table[chunk + 1] : table[chunk];
        const int64_t ahead = (next - table[chunk]) * call->slot_bytes;
        for (int64_t tile = 0; tile < num_rows; tile += TILE) {
            const int64_t rows = num_rows - tile < TILE ? num_rows - tile : TILE;
            uint32_t visible[TILE], any = 0;
            for (int64_t row = 0; row < rows; row++) {
                visible[row] = visible_of(room->positions[tile + row] - chunk * chunk_tokens, call->window, chunk_tokens);
                any |= visible[row];
            }
            if (!any)
                continue;
            const int64_t last = room->positions[tile + rows - 1] - chunk * chunk_tokens;
            const int64_t tokens = last < chunk_tokens ? last + 1 : chunk_tokens;
#define ROWS(n)                                                                                                                           \
    case n:                                                                                                                               \
        NAME(attend_chunk)(n, &scale, packed + tile * head_dim, key, ahead, chunk_tokens, head_dim, tokens, visible, room,               \
                           room->most + tile, room->total + tile * LANES, room->output + tile * head_dim);                                \
        break;
            switch (rows) {
                ROWS(1) ROWS(2) ROWS(3) ROWS(4)
#if TILE > 4
                ROWS(5) ROWS(6) ROWS(7) ROWS(8)
#endif
            }
#undef ROWS
        }
    }

    partials += part->index * num_rows * (head_dim + 2);
    for (int64_t row = 0; row < num_rows; row++) {
        float *result = partials + row * (head_dim + 2);
        result[0] = L(sum)(L(load)(room->total + row * LANES));
        result[1] = room->most[row];
        memcpy(result + 2, room->output + row * head_dim, (size_t)head_dim * sizeof(float));
    }
}

#undef VECTORS
