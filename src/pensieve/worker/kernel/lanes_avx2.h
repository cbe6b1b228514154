/* Eight floats at a time: AVX2 and FMA. */
#ifndef PENSIEVE_LANES_AVX2_H
#define PENSIEVE_LANES_AVX2_H

#include <float.h>
#include <immintrin.h>
#include <stdint.h>

#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define INLINE_AVX2 static inline __attribute__((always_inline, target("avx2,fma")))

typedef __m256 avx2_vec;

INLINE_AVX2 __m256 avx2_zero(void) { return _mm256_setzero_ps(); }
INLINE_AVX2 __m256 avx2_all(float x) { return _mm256_set1_ps(x); }
INLINE_AVX2 __m256 avx2_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE_AVX2 void avx2_store(float *p, __m256 a) { _mm256_storeu_ps(p, a); }
INLINE_AVX2 __m256 avx2_add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
INLINE_AVX2 __m256 avx2_sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
INLINE_AVX2 __m256 avx2_mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
INLINE_AVX2 __m256 avx2_div(__m256 a, __m256 b) { return _mm256_div_ps(a, b); }
INLINE_AVX2 __m256 avx2_fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

/* Of two numbers one of which is NaN these give b: put there what must not be lost. */
INLINE_AVX2 __m256 avx2_max(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
INLINE_AVX2 __m256 avx2_min(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }

/* All ones in the lanes whose bit is set. */
INLINE_AVX2 __m256 avx2_lanes(uint32_t bits)
{
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), each), each));
}

/* Zero in the lanes whose bit is not set, whatever was there. */
INLINE_AVX2 __m256 avx2_keep(uint32_t bits, __m256 a) { return _mm256_and_ps(avx2_lanes(bits), a); }

/* The lowest float in the lanes whose bit is not set. */
INLINE_AVX2 __m256 avx2_keep_or_lowest(uint32_t bits, __m256 a)
{
    return _mm256_blendv_ps(_mm256_set1_ps(-FLT_MAX), a, avx2_lanes(bits));
}

INLINE_AVX2 int avx2_any_above(__m256 a, __m256 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }

INLINE_AVX2 float avx2_highest(__m256 a)
{
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

INLINE_AVX2 float avx2_sum(__m256 a)
{
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

/* 2^f for f in [-0.5, 0.5] times 2^n, n whole. Taylor's series to the 6th power: off by 1.2e-7 of the value at most. Below 2^-126 it is 0. */
INLINE_AVX2 __m256 avx2_exp2(__m256 x)
{
    x = _mm256_min_ps(_mm256_set1_ps(127.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), x));
    const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(x, n);
    __m256 y = _mm256_set1_ps(1.5403530e-4f);
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.3333558e-3f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(9.6181291e-3f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(5.5504109e-2f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(2.4022651e-1f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(6.9314718e-1f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.0f));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

/* Two bfloat16 of a 32-bit word as floats. */
INLINE_AVX2 __m256 avx2_low_half(const void *p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)p), 16)); }
INLINE_AVX2 __m256 avx2_high_half(const void *p)
{
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi32((int)0xFFFF0000)));
}

#endif
