/* Hardware tiles (AMX): 16 rows by 16 results, summed over 32 pairs' numbers an instruction. For compilers that know them, see COMPILES_AMX. */
#ifndef PENSIEVE_AMX_H
#define PENSIEVE_AMX_H

#include <immintrin.h>
#include <stdint.h>

#define STRIP 16 /* rows of a tile, and results of a row */
#define STEP 32  /* numbers that an instruction sums over */

#define TARGET_AMX __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define INLINE_AMX static inline __attribute__((always_inline, target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))

/* Two strips of rows by two columns of results: sums in tiles 0 and 1 (first strip), 2 and 3 (second), first operands in 4 and 5, second
 * operands (of both strips) in 6 and 7. Products take as long as strips have rows. */
INLINE_AMX void amx_shape(int64_t first_rows, int64_t second_rows)
{
    const uint8_t a = (uint8_t)first_rows, b = (uint8_t)second_rows;
    const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {a, a, b, b, a, b, STRIP, STRIP}};
    _tile_loadconfig(&shapes);
}

/* The sums of `strips` += first operands times second ones. `first`: rows `first_bytes` apart, the second strip's `strip_bytes` further on.
 * `words`: rows of 16 words a column, `word_bytes` apart. */
#define AMX_STEP(strips, first, first_bytes, strip_bytes, words, word_bytes)          \
    do {                                                                              \
        _tile_loadd(6, words, word_bytes);                                            \
        _tile_loadd(7, (const uint8_t *)(words) + 64, word_bytes);                    \
        _tile_loadd(4, first, first_bytes);                                           \
        _tile_dpbf16ps(0, 4, 6);                                                      \
        _tile_dpbf16ps(1, 4, 7);                                                      \
        if ((strips) > 1) {                                                           \
            _tile_loadd(5, (const uint8_t *)(first) + (strip_bytes), first_bytes);    \
            _tile_dpbf16ps(2, 5, 6);                                                  \
            _tile_dpbf16ps(3, 5, 7);                                                  \
        }                                                                             \
    } while (0)

INLINE_AMX void amx_clear(const int strips)
{
    _tile_zero(0);
    _tile_zero(1);
    if (strips > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

/* The sums as rows of 32 floats; the second strip's follow those of the first, which has `first_rows`. */
INLINE_AMX void amx_store(const int strips, int64_t first_rows, float *sums)
{
    _tile_stored(0, sums, 2 * STRIP * 4);
    _tile_stored(1, sums + STRIP, 2 * STRIP * 4);
    if (strips > 1) {
        sums += first_rows * 2 * STRIP;
        _tile_stored(2, sums, 2 * STRIP * 4);
        _tile_stored(3, sums + STRIP, 2 * STRIP * 4);
    }
}

#endif
