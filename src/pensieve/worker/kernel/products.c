/* Rows times weights, in bfloat16: sums of floats in registers, each result rounded once.
 *
 * A tile is some rows by one panel of outputs, and all inputs: few rows read the weights at the speed of memory, many compute at the speed of the
 * multipliers. Threads take tiles in turn, so that one that is held up (other programs want processors, too) holds up nobody else.
 */
#include "products.h"

#include "call.h"
#include "threads.h"

int64_t pensieve_products_bytes(void) { return (int64_t)(sizeof(struct weights) + sizeof(struct multiply)); }

#if defined(__x86_64__) && defined(__GNUC__)

#include "bfloat16.h"

enum {
    TILE = 12,         /* rows whose sums fit into registers */
    BLOCK = 8 * TILE,  /* rows for which a panel, once read, stays in the second-level cache */
    AHEAD = 2048,      /* bytes; weights are read once, in their order */
    MOST_PANELS = 8,   /* of an item: reading on is faster than beginning anew */
};

INLINE_BF16 __m512 products_silu(__m512 x)
{
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), avx512_exp2(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)))));
}

/* Lanes of a vector that begins at output `first` and are no filling. */
INLINE_BF16 __mmask16 products_lanes(const struct weights *weights, int64_t first)
{
    const int64_t left = weights->num_outputs - first;
    return left >= 16 ? 0xFFFF : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
}

INLINE_BF16 void products_store(uint16_t *result, __mmask16 lanes, __m512 sum)
{
    _mm256_mask_storeu_epi16(result, lanes, (__m256i)_mm512_cvtneps_pbh(sum));
}

INLINE_BF16 __m512 products_load(const uint16_t *result, __mmask16 lanes)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, result)), 16));
}

INLINE_BF16 void products_tile(const int rows, const struct weights *weights, int64_t panel, const uint16_t *inputs, uint16_t *results)
{
    const int64_t num_inputs = weights->num_inputs;
    const uint16_t *words = weights->panels + panel * num_inputs * PANEL;
    __m512 sums[TILE][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
        sums[row][0] = sums[row][1] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < num_inputs; pair += 2, words += 2 * PANEL) {
        const __m512bh low = (__m512bh)_mm512_load_si512(words), high = (__m512bh)_mm512_load_si512(words + PANEL);
        _mm_prefetch((const char *)words + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)words + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            int32_t numbers;
            memcpy(&numbers, inputs + row * num_inputs + pair, sizeof numbers);
            const __m512bh spread = (__m512bh)_mm512_set1_epi32(numbers);
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], low, spread);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], high, spread);
        }
    }
    if (weights->bias) {
        const __m512 low = _mm512_loadu_ps(weights->bias + panel * PANEL), high = _mm512_loadu_ps(weights->bias + panel * PANEL + 16);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            sums[row][0] = _mm512_add_ps(sums[row][0], low);
            sums[row][1] = _mm512_add_ps(sums[row][1], high);
        }
    }
    if (weights->store == STORE_GATED) {
        const int64_t first = panel * 16;
        const __mmask16 lanes = products_lanes(weights, first);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++)
            products_store(results + row * weights->num_outputs + first, lanes, _mm512_mul_ps(products_silu(sums[row][0]), sums[row][1]));
        return;
    }
    const int64_t first = panel * PANEL;
    const __mmask16 low_lanes = products_lanes(weights, first), high_lanes = products_lanes(weights, first + 16);
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        uint16_t *result = results + row * weights->num_outputs + first;
        if (weights->store == STORE_ADDED) {
            sums[row][0] = _mm512_add_ps(sums[row][0], products_load(result, low_lanes));
            sums[row][1] = _mm512_add_ps(sums[row][1], products_load(result + 16, high_lanes));
        }
        products_store(result, low_lanes, sums[row][0]);
        products_store(result + 16, high_lanes, sums[row][1]);
    }
}

/* A function for each number of rows: their sums are registers, which cannot be counted when it runs. */
#define ROWS(n)                                                                                                                           \
    static TARGET_BF16 void products_tile_##n(const struct weights *weights, int64_t panel, const uint16_t *inputs, uint16_t *results)     \
    {                                                                                                                                     \
        products_tile(n, weights, panel, inputs, results);                                                                                \
    }
ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#undef ROWS

typedef void tile(const struct weights *, int64_t panel, const uint16_t *inputs, uint16_t *results);
static tile *const tiles[TILE] = {
    products_tile_1, products_tile_2, products_tile_3, products_tile_4,  products_tile_5,  products_tile_6,
    products_tile_7, products_tile_8, products_tile_9, products_tile_10, products_tile_11, products_tile_12,
};

static int64_t num_panels(const struct weights *weights)
{
    const int64_t width = weights->store == STORE_GATED ? PANEL / 2 : PANEL;
    return (weights->num_outputs + width - 1) / width;
}

struct multiplying {
    const struct multiply *call;
    int64_t num_panels;
    int64_t item_panels, items_of_a_block;
    int64_t num_blocks;
};

/* Some panels of a block of rows, which is divided into tiles of as equal heights as can be. */
static void multiply_item(void *data, int64_t index, int64_t thread)
{
    const struct multiplying *work = data;
    const struct multiply *call = work->call;
    const struct weights *weights = call->weights;
    const int64_t block = index / work->items_of_a_block, first_panel = index % work->items_of_a_block * work->item_panels;
    const int64_t stop_panel = first_panel + work->item_panels < work->num_panels ? first_panel + work->item_panels : work->num_panels;
    const int64_t first = call->num_rows * block / work->num_blocks, rows = call->num_rows * (block + 1) / work->num_blocks - first;
    const int64_t num_tiles = (rows + TILE - 1) / TILE;
    (void)thread;
    for (int64_t panel = first_panel; panel < stop_panel; panel++) {
        for (int64_t i = 0; i < num_tiles; i++) {
            const int64_t row = first + rows * i / num_tiles, height = first + rows * (i + 1) / num_tiles - row;
            tiles[height - 1](weights, panel, call->inputs + row * weights->num_inputs, call->results + row * weights->num_outputs);
        }
    }
}

void pensieve_multiply(const struct multiply *call)
{
    struct multiplying work = {.call = call, .num_panels = num_panels(call->weights), .num_blocks = (call->num_rows + BLOCK - 1) / BLOCK};
    int64_t panels = work.num_panels / (8 * call->num_threads); /* enough items for threads to end at about the same time */
    panels = panels > MOST_PANELS ? MOST_PANELS : panels;
    work.item_panels = panels < 1 || call->num_rows > 2 * TILE ? 1 : panels;
    work.items_of_a_block = (work.num_panels + work.item_panels - 1) / work.item_panels;
    pensieve_run_items(multiply_item, &work, work.items_of_a_block * work.num_blocks, call->num_threads);
}

#else /* another processor or compiler: Python does not call what is not there */

void pensieve_multiply(const struct multiply *call) { (void)call; }

#endif
