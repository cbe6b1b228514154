/* Sixteen floats at a time: AVX-512 as every CPU since Skylake-X and Zen 4 has it. */
#ifndef PENSIEVE_LANES_AVX512_H
#define PENSIEVE_LANES_AVX512_H

#include <float.h>
#include <immintrin.h>
#include <stdint.h>

#define TARGET_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE_AVX512 static inline __attribute__((always_inline, target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))

typedef __m512 avx512_vec;

INLINE_AVX512 __m512 avx512_zero(void) { return _mm512_setzero_ps(); }
INLINE_AVX512 __m512 avx512_all(float x) { return _mm512_set1_ps(x); }
INLINE_AVX512 __m512 avx512_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE_AVX512 void avx512_store(float *p, __m512 a) { _mm512_storeu_ps(p, a); }
INLINE_AVX512 __m512 avx512_add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
INLINE_AVX512 __m512 avx512_sub(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
INLINE_AVX512 __m512 avx512_mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
INLINE_AVX512 __m512 avx512_div(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
INLINE_AVX512 __m512 avx512_fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

/* Of two numbers one of which is NaN these give b: put there what must not be lost. */
INLINE_AVX512 __m512 avx512_max(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
INLINE_AVX512 __m512 avx512_min(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }

/* Zero in the lanes whose bit is not set, whatever was there. */
INLINE_AVX512 __m512 avx512_keep(uint32_t bits, __m512 a) { return _mm512_maskz_mov_ps((__mmask16)bits, a); }

/* The lowest float in the lanes whose bit is not set. */
INLINE_AVX512 __m512 avx512_keep_or_lowest(uint32_t bits, __m512 a)
{
    return _mm512_mask_mov_ps(_mm512_set1_ps(-FLT_MAX), (__mmask16)bits, a);
}

INLINE_AVX512 int avx512_any_above(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE_AVX512 float avx512_highest(__m512 a) { return _mm512_reduce_max_ps(a); }
INLINE_AVX512 float avx512_sum(__m512 a) { return _mm512_reduce_add_ps(a); }

/* As avx2_exp2, but it reaches down to the smallest floats. */
INLINE_AVX512 __m512 avx512_exp2(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x); /* minus infinity has no distance to a whole number */
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.3333558e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

/* Two bfloat16 of a 32-bit word as floats. */
INLINE_AVX512 __m512 avx512_low_half(const void *p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
INLINE_AVX512 __m512 avx512_high_half(const void *p)
{
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xFFFF0000)));
}

#endif
