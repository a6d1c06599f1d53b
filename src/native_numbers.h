/* The numbers that native.c computes with: float32, with -DBFLOAT16 bfloat16, with -DINT16
   integers of 16 bits. Each section says what a number is, how many are multiplied at once (PAIR), in
   what steps of 1 / UNIT pixels are counted, at what LIMIT integers are cut, and:
   begun        the sum with which to begin, given the biases
   add_product  a sum plus PAIR numbers of a pixel times the kernels of LANES channels
   finished     the sum with the biases, as the next layer counts
   store        values as the nearest numbers, ties to even; a NaN stays one, as an integer 0
   widened      a number as a float */

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

/* Vectors of LANES floats or integers, read wherever their numbers lie. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int bits __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef unsigned words __attribute__((vector_size(4 * LANES), may_alias));
/* A compiler that passes over the attribute would compute something else. */
_Static_assert(sizeof(vector) == 4 * LANES, "no vectors");

/* Two numbers of 16 bits, in every lane. */
typedef int pair __attribute__((aligned(2), may_alias));
typedef short shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline bits in_every_lane(const void *two) { return *(const pair *)two - (bits){0}; }

#if defined(BFLOAT16)

typedef unsigned short number;
typedef vector sums;
enum { PAIR = 2, UNIT = 1, PIXEL_LIMIT = 0, FEATURE_LIMIT = 0 };

static inline sums add_product(sums sum, const number *pixel, bits kernel)
{
    bits two = in_every_lane(pixel);
#if LANES == 16 && defined(__AVX512BF16__)
    return (sums)_mm512_dpbf16_ps((__m512)sum, (__m512bh)two, (__m512bh)kernel);
#else
    /* The instruction above takes numbers below 2^-126 for zero; here they count. It also adds the
       second product first. */
    bits upper = (bits){0} - 65536;
    sum += (vector)(two << 16) * (vector)(kernel << 16);
    return sum + (vector)(two & upper) * (vector)(kernel & upper);
#endif
}

static inline void store(number *to, vector values, int limit)
{
    (void)limit;
    words exact = (words)values, even = (exact >> 16) & 1, nan = (words)(values != values);
    words rounded = ((exact + 32767 + even) >> 16 & ~nan) | ((exact >> 16 | 64) & nan);
    *(shorts *)to = __builtin_convertvector(rounded, shorts);
}

static inline float widened(number value)
{
    union { unsigned whole; float real; } as = {(unsigned)value << 16};
    return as.real;
}

#elif defined(INT16)

/* Which half of 32 bits is the first of two numbers. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the last byte is not the highest");

typedef short number;
typedef bits sums;
/* Sums fit into 32 bits by how src/quantized.py chooses the kernels, which has these limits. */
enum { PAIR = 2, UNIT = 2048, PIXEL_LIMIT = 32767, FEATURE_LIMIT = 8191 };

static inline sums add_product(sums sum, const number *pixel, bits kernel)
{
#if LANES == 16 && defined(__AVX512VNNI__)
    return (sums)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)in_every_lane(pixel), (__m512i)kernel);
#elif LANES == 16 && defined(__AVX512BW__)
    return sum + (sums)_mm512_madd_epi16((__m512i)in_every_lane(pixel), (__m512i)kernel);
#elif LANES == 8 && defined(__AVX2__)
    return sum + (sums)_mm256_madd_epi16((__m256i)in_every_lane(pixel), (__m256i)kernel);
#else
    return sum + pixel[0] * (kernel << 16 >> 16) + pixel[1] * (kernel >> 16);
#endif
}

static inline sums begun(vector bias) { (void)bias; return (sums){0}; }

static inline vector finished(sums sum, const float *bias, const float *scale)
{
    return (*(const vector *)bias + __builtin_convertvector(sum, vector)) * *(const vector *)scale;
}

static inline void store(number *to, vector values, int limit)
{
    values = (vector)((bits)values & (bits)(values == values));
    vector most = (vector){0} + (float)limit;
    bits over = (bits)(values > most), under = (bits)(values < -most);
    values = (vector)(((bits)values & ~over) | ((bits)most & over));
    values = (vector)(((bits)values & ~under) | ((bits)-most & under));
    /* A float so large leaves no room for fractions. */
    vector large = (vector){0} + 12582912;
    /* At once gcc 12 would do it lane by lane. */
    bits whole = __builtin_convertvector(values + large - large, bits);
    *(shorts *)to = __builtin_convertvector(whole, shorts);
}

static inline float widened(number value) { return value; }

#else

typedef float number;
typedef vector sums;
enum { PAIR = 1, UNIT = 1, PIXEL_LIMIT = 0, FEATURE_LIMIT = 0 };

static inline sums add_product(sums sum, const number *pixel, bits kernel)
{
    return sum + *pixel * (vector)kernel;
}

static inline void store(number *to, vector values, int limit)
{
    (void)limit;
    *(vector *)to = values;
}

static inline float widened(number value) { return value; }

#endif

#ifndef INT16

/* Floats begin with the biases, in the steps of the next layer. */
static inline sums begun(vector bias) { return bias; }

static inline vector finished(sums sum, const float *bias, const float *scale)
{
    (void)bias, (void)scale;
    return sum;
}

#endif
