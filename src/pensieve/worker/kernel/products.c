/* Rows times weights, in bfloat16: sums of floats in registers, each result rounded once, or left a float.
 *
 * A tile is some rows by one panel of outputs, and all inputs: few rows read the weights at the speed of memory, many compute at the speed of the
 * multipliers. Threads take tiles in turn, so that one that is held up (other programs want processors, too) delays no other.
 */
#include "products.h"

#include "call.h"
#include "threads.h"

int64_t pensieve_products_bytes(void) { return (int64_t)(sizeof(struct weights) + sizeof(struct multiply)); }

#if defined(__x86_64__) && defined(__GNUC__)

#include "bfloat16.h"

enum {
    TILE = 12,         /* rows whose sums fit into registers */
    BYTES_TILE = 10,   /* the same beside the tables that int8 is translated by */
    BLOCK = 8 * TILE,  /* rows for which a panel, once read, stays in the second-level cache */
    AHEAD = 2048,      /* bytes; weights are read once, in their order */
    AMX_BLOCK = 256,   /* rows, as BLOCK: hardware tiles are so fast that they would wait for weights */
    MOST_PANELS = 8,   /* of an item: reading on is faster than beginning anew */
};

#define TARGET_BYTES __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")))
#define INLINE_BYTES static inline __attribute__((always_inline, target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")))

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

/* One row's sums become results, as its weights say. */
INLINE_BF16 void store(const struct weights *weights, int64_t panel, __m512 low, __m512 high, uint16_t *results)
{
    if (weights->scales) {
        low = _mm512_mul_ps(low, _mm512_loadu_ps(weights->scales + panel * PANEL));
        high = _mm512_mul_ps(high, _mm512_loadu_ps(weights->scales + panel * PANEL + 16));
    }
    if (weights->bias) {
        low = _mm512_add_ps(low, _mm512_loadu_ps(weights->bias + panel * PANEL));
        high = _mm512_add_ps(high, _mm512_loadu_ps(weights->bias + panel * PANEL + 16));
    }
    if (weights->store == STORE_GATED) {
        const int64_t first = panel * 16;
        products_store(results + first, products_lanes(weights, first), _mm512_mul_ps(products_silu(low), high));
        return;
    }
    const int64_t first = panel * PANEL;
    const __mmask16 low_lanes = products_lanes(weights, first), high_lanes = products_lanes(weights, first + 16);
    if (weights->store == STORE_FLOAT) {
        float *floats = (float *)results + first;
        _mm512_mask_storeu_ps(floats, low_lanes, low);
        _mm512_mask_storeu_ps(floats + 16, high_lanes, high);
        return;
    }
    if (weights->store == STORE_ADDED) {
        low = _mm512_add_ps(low, products_load(results + first, low_lanes));
        high = _mm512_add_ps(high, products_load(results + first + 16, high_lanes));
    }
    products_store(results + first, low_lanes, low);
    products_store(results + first + 16, high_lanes, high);
}

typedef void tile(const struct weights *, int64_t panel, const uint16_t *inputs, uint16_t *results);

#define NAME(x) x##_bfloat16
#define TARGET TARGET_BF16
#define INLINE INLINE_BF16
#define TILE_ROWS_MOST 12
#define BYTES 2
#define CONSTANTS
#define WORDS(p, low, high) ((low) = (__m512bh)_mm512_load_si512(p), (high) = (__m512bh)_mm512_load_si512((p) + 64))
#include "products_tile.h"
#undef NAME
#undef TARGET
#undef INLINE
#undef TILE_ROWS_MOST
#undef BYTES
#undef CONSTANTS
#undef WORDS

/* The two bytes of 0 to 127 as bfloat16. A weight of -127 to 127 is translated by its magnitude, and keeps its sign. */
static uint8_t upper_bytes[128] __attribute__((aligned(64))), lower_bytes[128] __attribute__((aligned(64)));

static __attribute__((constructor)) void make_tables(void)
{
    for (int i = 0; i < 128; i++) {
        const uint16_t bits = bfloat16_of((float)i);
        upper_bytes[i] = (uint8_t)(bits >> 8);
        lower_bytes[i] = (uint8_t)bits;
    }
}

/* A pair of inputs has 64 bytes; of each 16 of them the first 8 belong to 4 outputs of the first vector, the others to 4 of the second, because bytes
 * are woven into words 16 at a time. */
#define NAME(x) x##_int8
#define TARGET TARGET_BYTES
#define INLINE INLINE_BYTES
#define TILE_ROWS_MOST 10
#define BYTES 1
#define CONSTANTS                                                                                                                         \
    const __m512i upper_0 = _mm512_load_si512(upper_bytes), upper_1 = _mm512_load_si512(upper_bytes + 64);                                 \
    const __m512i lower_0 = _mm512_load_si512(lower_bytes), lower_1 = _mm512_load_si512(lower_bytes + 64);                                 \
    const __m512i sign = _mm512_set1_epi8(-128);
#define WORDS(p, low, high)                                                                                                               \
    do {                                                                                                                                  \
        const __m512i bytes = _mm512_load_si512(p), magnitudes = _mm512_abs_epi8(bytes);                                                   \
        const __m512i upper = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(upper_0, magnitudes, upper_1), bytes, sign, 0xF8);        \
        const __m512i lower = _mm512_permutex2var_epi8(lower_0, magnitudes, lower_1);                                                      \
        (low) = (__m512bh)_mm512_unpacklo_epi8(lower, upper);                                                                              \
        (high) = (__m512bh)_mm512_unpackhi_epi8(lower, upper);                                                                             \
    } while (0)
#include "products_tile.h"

/* Whether this CPU translates bytes by tables. */
int64_t pensieve_has_bytes(void) { return __builtin_cpu_supports("avx512vbmi") != 0; }

#if COMPILES_AMX
#include "products_amx.h"
#endif

/* Whether hardware tiles multiply. They do however few the rows are, so that a row's results have the same bits in any company. */
static int in_tiles(const struct weights *weights)
{
#if COMPILES_AMX
    return weights->level >= LEVEL_AMX && !weights->scales && weights->num_inputs % STEP == 0;
#else
    (void)weights;
    return 0;
#endif
}

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
    const int64_t height_most = weights->scales ? BYTES_TILE : TILE;
    tile *const *const tiles = weights->scales ? tiles_int8 : tiles_bfloat16;
    const int64_t num_tiles = (rows + height_most - 1) / height_most;
    (void)thread;
#if COMPILES_AMX
    if (in_tiles(weights)) {
        amx_multiply(weights, first_panel, stop_panel, rows, call->inputs + first * weights->num_inputs, call->results + first * row_words(weights));
        return;
    }
#endif
    for (int64_t panel = first_panel; panel < stop_panel; panel++) {
        for (int64_t i = 0; i < num_tiles; i++) {
            const int64_t row = first + rows * i / num_tiles, height = first + rows * (i + 1) / num_tiles - row;
            tiles[height - 1](weights, panel, call->inputs + row * weights->num_inputs, call->results + row * row_words(weights));
        }
    }
}

void pensieve_multiply(const struct multiply *call)
{
    const int64_t block = in_tiles(call->weights) ? AMX_BLOCK : BLOCK;
    struct multiplying work = {.call = call, .num_panels = num_panels(call->weights), .num_blocks = (call->num_rows + block - 1) / block};
    int64_t panels = work.num_panels / (8 * call->num_threads); /* enough items for threads to end at about the same time */
    panels = panels > MOST_PANELS ? MOST_PANELS : panels;
    work.item_panels = panels < 1 || call->num_rows > 2 * TILE ? 1 : panels;
    work.items_of_a_block = (work.num_panels + work.item_panels - 1) / work.item_panels;
    pensieve_run_items(multiply_item, &work, work.items_of_a_block * work.num_blocks, call->num_threads);
}

#else /* another processor or compiler: Python does not call what is not there */

void pensieve_multiply(const struct multiply *call) { (void)call; }
int64_t pensieve_has_bytes(void) { return 0; }

#endif
