/* What lies between a layer's products, for one kind of numbers and one level of instructions. Included once for each; see rows.c.
 *
 * Expects, besides NAME, L, LANES, VEC, TARGET and INLINE as in tiles.h:
 *     CELL                a number as it lies in memory
 *     LOAD(p), STORE(p, vec)        LANES cells as floats, floats as LANES cells
 *     LOAD_ONE(p), STORE_ONE(p, x)  one of them
 *
 * All sums are of floats. What is read back after a STORE is what was rounded.
 */

/* to = values * scale * weight. */
INLINE void NAME(scale)(CELL *to, const CELL *values, float factor, const float *weight, int64_t count)
{
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        STORE(to + i, L(mul)(L(mul)(LOAD(values + i), L(all)(factor)), L(load)(weight + i)));
    for (; i < count; i++)
        STORE_ONE(to + i, LOAD_ONE(values + i) * factor * weight[i]);
}

/* 1 / root of the mean square. */
INLINE float NAME(inverse_norm)(float squares, int64_t count, double epsilon)
{
    return 1.0f / sqrtf(squares / (float)count + (float)epsilon);
}

INLINE float NAME(squares)(const CELL *values, int64_t count)
{
    VEC sums[4] = {L(zero)(), L(zero)(), L(zero)(), L(zero)()};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            const VEC x = LOAD(values + i + j * LANES);
            sums[j] = L(fma)(x, x, sums[j]);
        }
    for (; i + LANES <= count; i += LANES) {
        const VEC x = LOAD(values + i);
        sums[0] = L(fma)(x, x, sums[0]);
    }
    float sum = L(sum)(L(add)(L(add)(sums[0], sums[1]), L(add)(sums[2], sums[3])));
    for (; i < count; i++)
        sum += LOAD_ONE(values + i) * LOAD_ONE(values + i);
    return sum;
}

static TARGET void NAME(norm)(const void *data, int64_t first, int64_t stop)
{
    const struct norm_rows *work = data;
    const int64_t width = work->width;
    for (int64_t row = first; row < stop; row++) {
        CELL *residual = (CELL *)work->residual + row * width;
        if (work->delta) {
            const CELL *delta = (const CELL *)work->delta + row * width;
            int64_t i = 0;
            for (; i + LANES <= width; i += LANES)
                STORE(residual + i, L(add)(LOAD(residual + i), LOAD(delta + i)));
            for (; i < width; i++)
                STORE_ONE(residual + i, LOAD_ONE(residual + i) + LOAD_ONE(delta + i));
        }
        const float factor = NAME(inverse_norm)(NAME(squares)(residual, width), width, work->epsilon);
        NAME(scale)((CELL *)work->output + row * width, residual, factor, work->weight, width);
    }
}

/* The two halves of a head as coordinates of planes, each turned by its angle. */
INLINE void NAME(turn)(CELL *head, const float *cosines, const float *sines, int64_t half)
{
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const VEC x = LOAD(head + i), y = LOAD(head + half + i), c = L(load)(cosines + i), s = L(load)(sines + i);
        STORE(head + i, L(sub)(L(mul)(x, c), L(mul)(y, s)));
        STORE(head + half + i, L(fma)(y, c, L(mul)(x, s)));
    }
    for (; i < half; i++) {
        const float x = LOAD_ONE(head + i), y = LOAD_ONE(head + half + i);
        STORE_ONE(head + i, x * cosines[i] - y * sines[i]);
        STORE_ONE(head + half + i, y * cosines[i] + x * sines[i]);
    }
}

static TARGET void NAME(rotate)(const void *data, int64_t first, int64_t stop)
{
    const struct rotate_rows *work = data;
    const int64_t head_dim = work->head_dim, half = head_dim / 2;
    for (int64_t row = first; row < stop; row++) {
        CELL *head = (CELL *)work->heads + row * work->row_stride;
        const float *angles = work->angles ? work->angles + work->positions[row] * head_dim : 0;
        for (int64_t i = 0; i < work->num_heads + work->num_kv_heads; i++, head += head_dim) {
            const float *weight = i < work->num_heads ? work->query_weight : work->key_weight;
            if (weight)
                NAME(scale)(head, head, NAME(inverse_norm)(NAME(squares)(head, head_dim), head_dim, work->epsilon), weight, head_dim);
            if (angles)
                NAME(turn)(head, angles, angles + half, half);
        }
    }
}

static TARGET void NAME(gate)(const void *data, int64_t first, int64_t stop)
{
    const struct gate_rows *work = data;
    const int64_t width = work->width;
    for (int64_t row = first; row < stop; row++) {
        const CELL *gate = (const CELL *)work->gate_up + row * 2 * width, *up = gate + width;
        CELL *output = (CELL *)work->output + row * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            const VEC x = LOAD(gate + i), decay = L(exp2)(L(mul)(x, L(all)(-LOG2_E)));
            STORE(output + i, L(mul)(L(div)(x, L(add)(L(all)(1.0f), decay)), LOAD(up + i)));
        }
        for (; i < width; i++) {
            const float x = LOAD_ONE(gate + i);
            STORE_ONE(output + i, x / (1.0f + expf(-x)) * LOAD_ONE(up + i));
        }
    }
}
