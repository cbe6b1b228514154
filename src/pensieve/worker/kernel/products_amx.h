/* Some rows by one panel of outputs, weights in bfloat16, by hardware tiles. See products.c. */

#include "amx.h"

#define NEXT_INPUTS 256 /* bytes further on in a row: what comes in four steps */

/* `first_rows` and then `second_rows` rows, at most STRIP each; the tiles have their shape. `cold`: the panel comes from memory. */
INLINE_AMX void amx_panel(const int strips, const struct weights *weights, int64_t panel, int64_t first_rows, int64_t second_rows, int cold,
                          const uint16_t *inputs, uint16_t *results)
{
    const int64_t num_inputs = weights->num_inputs, row_bytes = num_inputs * 2;
    const uint16_t *words = (const uint16_t *)weights->panels + panel * num_inputs * PANEL;
    float sums[2 * STRIP * PANEL] __attribute__((aligned(64)));
    amx_clear(strips);
    for (int64_t i = 0; i < num_inputs; i += STEP) {
        if (cold)
            for (int byte = 0; byte < STEP * PANEL * 2; byte += 64)
                _mm_prefetch((const char *)(words + i * PANEL) + 2 * AHEAD + byte, _MM_HINT_T0);
        for (int64_t row = 0; row < strips * STRIP; row++)
            _mm_prefetch((const char *)(inputs + row * num_inputs + i) + NEXT_INPUTS, _MM_HINT_T0);
        AMX_STEP(strips, inputs + i, row_bytes, first_rows * row_bytes, words + i * PANEL, PANEL * 4);
    }
    amx_store(strips, first_rows, sums);
    for (int64_t row = 0; row < first_rows + second_rows; row++)
        store(weights, panel, _mm512_load_ps(sums + row * PANEL), _mm512_load_ps(sums + row * PANEL + 16), results + row * row_words(weights));
}

/* Rows of a block by some panels. They are divided into strips of as equal heights as can be, which go two by two. */
static TARGET_AMX void amx_multiply(const struct weights *weights, int64_t first_panel, int64_t stop_panel, int64_t rows, const uint16_t *inputs,
                                    uint16_t *results)
{
    const int64_t strips = (rows + STRIP - 1) / STRIP;
    int64_t shaped_first = 0, shaped_second = 0;
    for (int64_t panel = first_panel; panel < stop_panel; panel++) {
        for (int64_t i = 0; i < strips; i += 2) {
            const int64_t begin = rows * i / strips, middle = rows * (i + 1) / strips, end = i + 1 < strips ? rows * (i + 2) / strips : middle;
            const int64_t first = middle - begin, second = end - middle;
            if (first != shaped_first || (second && second != shaped_second)) {
                amx_shape(first, second ? second : STRIP);
                shaped_first = first;
                shaped_second = second ? second : STRIP;
            }
            const uint16_t *from = inputs + begin * weights->num_inputs;
            uint16_t *to = results + begin * row_words(weights);
            if (second)
                amx_panel(2, weights, panel, first, second, i == 0, from, to);
            else
                amx_panel(1, weights, panel, first, 0, i == 0, from, to);
        }
    }
    _tile_release();
}
