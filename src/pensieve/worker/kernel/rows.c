/* What a Llama-like layer does between its products: norms, rotary positions, the gate. Row by row, for CPUs with AVX2 or more.
 *
 * Called through ctypes: knows no Python and no torch. All sums are of floats; each result is rounded once.
 */
#include "rows_call.h"

#include <math.h>

#include "call.h"
#include "threads.h"

int64_t pensieve_rows_bytes(void) { return (int64_t)(sizeof(struct norm_rows) + sizeof(struct rotate_rows) + sizeof(struct gate_rows)); }

#if defined(__x86_64__) && defined(__GNUC__)

#include "bfloat16.h"

/* ---- fp32 */

#define CELL float
#define LOAD(p) L(load)(p)
#define STORE(p, vec) L(store)(p, vec)
#define LOAD_ONE(p) (*(p))
#define STORE_ONE(p, x) (*(p) = (x))

#define L(op) avx2_##op
#define LANES 8
#define VEC __m256
#define TARGET TARGET_AVX2
#define INLINE INLINE_AVX2
#define NAME(x) x##_float32_avx2
#include "rows.h"
#undef NAME
#undef INLINE
#undef TARGET
#undef VEC
#undef LANES
#undef L

#define L(op) avx512_##op
#define LANES 16
#define VEC __m512
#define TARGET TARGET_AVX512
#define INLINE INLINE_AVX512
#define NAME(x) x##_float32_avx512
#include "rows.h"
#undef NAME
#undef INLINE
#undef TARGET
#undef VEC
#undef LANES
#undef L

#undef CELL
#undef LOAD
#undef STORE
#undef LOAD_ONE
#undef STORE_ONE

/* ---- bfloat16 */

#define CELL uint16_t
#define LOAD(p) L(load_bfloat16)(p)
#define LOAD_ONE(p) float_of(*(p))
#define STORE_ONE(p, x) (*(p) = bfloat16_of(x))

#define L(op) avx2_##op
#define STORE(p, vec) L(store_bfloat16)(p, vec)
#define LANES 8
#define VEC __m256
#define TARGET TARGET_AVX2
#define INLINE INLINE_AVX2
#define NAME(x) x##_bfloat16_avx2
#include "rows.h"
#undef NAME
#undef INLINE
#undef TARGET
#undef VEC
#undef LANES
#undef L

#define L(op) avx512_##op
#define LANES 16
#define VEC __m512
#define TARGET TARGET_AVX512
#define INLINE INLINE_AVX512
#define NAME(x) x##_bfloat16_avx512
#include "rows.h"
#undef NAME
#undef INLINE
#undef TARGET
#undef STORE

#define STORE(p, vec) bf16_store(p, vec)
#define TARGET TARGET_BF16
#define INLINE INLINE_BF16
#define NAME(x) x##_bfloat16_native
#include "rows.h"

/* ---- threads */

enum { ITEM_NUMBERS = 1 << 14 }; /* a few microseconds of work */

typedef void rows_work(const void *data, int64_t first, int64_t stop);

struct shares {
    rows_work *work;
    const void *data;
    int64_t num_rows;
    int64_t item_rows;
};

static void share_item(void *data, int64_t index, int64_t thread)
{
    const struct shares *shares = data;
    const int64_t first = index * shares->item_rows, stop = first + shares->item_rows;
    (void)thread;
    shares->work(shares->data, first, stop < shares->num_rows ? stop : shares->num_rows);
}

static void share(rows_work *work, const struct rows_call *call, int64_t width)
{
    struct shares shares = {work, call, call->num_rows, ITEM_NUMBERS / width + 1};
    const int64_t items = (call->num_rows + shares.item_rows - 1) / shares.item_rows;
    pensieve_run_items(share_item, &shares, items, items > 1 ? call->num_threads : 1);
}

/* Of all variants of a kind of work the one for this call. */
#define VARIANT(name, call)                                                                       \
    ((call)->kind == KIND_FLOAT32                                                                 \
         ? ((call)->level >= LEVEL_AVX512 ? name##_float32_avx512 : name##_float32_avx2)          \
     : (call)->level >= LEVEL_AVX512_BF16 ? name##_bfloat16_native                                \
     : (call)->level >= LEVEL_AVX512      ? name##_bfloat16_avx512                                \
                                          : name##_bfloat16_avx2)

void pensieve_norm(const struct norm_rows *work) { share(VARIANT(norm, &work->call), &work->call, work->width); }
void pensieve_rotate(const struct rotate_rows *work)
{
    share(VARIANT(rotate, &work->call), &work->call, (work->num_heads + work->num_kv_heads) * work->head_dim);
}
void pensieve_gate(const struct gate_rows *work) { share(VARIANT(gate, &work->call), &work->call, 2 * work->width); }

#else /* another processor or compiler: Python does not call what is not there */

void pensieve_norm(const struct norm_rows *work) { (void)work; }
void pensieve_rotate(const struct rotate_rows *work) { (void)work; }
void pensieve_gate(const struct gate_rows *work) { (void)work; }

#endif
