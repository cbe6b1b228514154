/* A tile: some rows by one panel of outputs, for weights of one kind. Included once for each; see products.c.
 *
 * Expects NAME, TARGET and INLINE as in tiles.h, TILE_ROWS_MOST, and
 *     BYTES              of one weight
 *     CONSTANTS          what WORDS needs, once a tile
 *     WORDS(p, low, high)   the panel's words of one pair of inputs, as bfloat16: outputs 0 to 15, and 16 to 31
 */

INLINE void NAME(tile)(const int rows, const struct weights *weights, int64_t panel, const uint16_t *inputs, uint16_t *results)
{
    const int64_t num_inputs = weights->num_inputs;
    const uint8_t *words = (const uint8_t *)weights->panels + panel * num_inputs * PANEL * BYTES;
    __m512 sums[TILE_ROWS_MOST][2];
    CONSTANTS
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
        sums[row][0] = sums[row][1] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < num_inputs; pair += 2, words += 2 * PANEL * BYTES) {
        __m512bh low, high;
        WORDS(words, low, high);
        for (int byte = 0; byte < 2 * PANEL * BYTES; byte += 64)
            _mm_prefetch((const char *)words + AHEAD + byte, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            int32_t numbers;
            memcpy(&numbers, inputs + row * num_inputs + pair, sizeof numbers);
            const __m512bh spread = (__m512bh)_mm512_set1_epi32(numbers);
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], low, spread);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], high, spread);
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
        store(weights, panel, sums[row][0], sums[row][1], results + row * row_words(weights));
}

/* A function for each number of rows: their sums are registers, which cannot be counted when it runs. */
#define ROWS(n)                                                                                                                           \
    static TARGET void NAME(tile_##n)(const struct weights *weights, int64_t panel, const uint16_t *inputs, uint16_t *results)             \
    {                                                                                                                                     \
        NAME(tile)(n, weights, panel, inputs, results);                                                                                   \
    }
ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10)
#if TILE_ROWS_MOST > 10
ROWS(11) ROWS(12)
#endif
#undef ROWS

static tile *const NAME(tiles)[TILE_ROWS_MOST] = {
    NAME(tile_1), NAME(tile_2), NAME(tile_3), NAME(tile_4), NAME(tile_5), NAME(tile_6), NAME(tile_7), NAME(tile_8), NAME(tile_9), NAME(tile_10),
#if TILE_ROWS_MOST > 10
    NAME(tile_11), NAME(tile_12),
#endif
};
