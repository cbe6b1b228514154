/* The processor, and the threads that work on it. */
#include "threads.h"

#include "call.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <cpuid.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives a process the registers of AMX when it asks for them: for all threads, and at once again if asked twice. */
static int may_use_tiles(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#else
static int may_use_tiles(void) { return 0; }
#endif

/* Whether matrices are multiplied in hardware tiles here: leaf 7 of CPUID, AMX-BF16 and AMX-TILE, and a system that lets us. */
int64_t pensieve_has_amx(void)
{
    const unsigned both = 1u << 22 | 1u << 24;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & both) == both && may_use_tiles();
}

/* The highest level this CPU and its system support. */
int64_t pensieve_level(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return LEVEL_NONE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
        return LEVEL_AVX2;
    if (!__builtin_cpu_supports("avx512bf16"))
        return LEVEL_AVX512;
#if COMPILES_AMX
    if (pensieve_has_amx())
        return LEVEL_AMX;
#endif
    return LEVEL_AVX512_BF16;
}

#else /* another processor or compiler: Python does not call what is not there */

int64_t pensieve_level(void) { return LEVEL_NONE; }
int64_t pensieve_has_amx(void) { return 0; }

#endif

/* The OpenMP runtime that torch runs on: a second pool of threads would spin against the first. */
typedef void parallel(void (*work)(void *), void *data, unsigned num_threads, unsigned flags);
static parallel *torch_parallel;

/* Hand over libgomp's GOMP_parallel; null: everything runs on the caller's thread. */
void pensieve_use_threads(parallel *function) { torch_parallel = function; }

/* Items that threads take in turn. */
struct queue {
    void (*item)(void *data, int64_t index, int64_t thread);
    void *data;
    int64_t count;
    int64_t next;    /* atomic */
    int64_t threads; /* atomic, those that have begun */
};

static void take_items(void *data)
{
    struct queue *queue = data;
    const int64_t thread = __atomic_fetch_add(&queue->threads, 1, __ATOMIC_RELAXED);
    for (;;) {
        const int64_t index = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED);
        if (index >= queue->count)
            return;
        queue->item(queue->data, index, thread);
    }
}

/* Always all threads or one: libgomp ends the threads that a smaller team leaves out, and starts them anew for the next one. */
void pensieve_run_items(void (*item)(void *, int64_t, int64_t), void *data, int64_t count, int64_t num_threads)
{
    struct queue queue = {item, data, count, 0, 0};
    if (num_threads > 1 && torch_parallel)
        torch_parallel(take_items, &queue, (unsigned)num_threads, 0);
    else
        take_items(&queue);
}
