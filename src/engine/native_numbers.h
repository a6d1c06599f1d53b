/* The numbers that native.c computes with: float32; with -DINT16 integers of 16 bits; with -DINT8
   pixels of 16 bits, and features and later weights of 8. Every section defines the types number (of a
   pixel), feature and sums, and:
   UNIT            a pixel is counted in steps of 1 / UNIT
   PIXEL_LIMIT, FEATURE_LIMIT   where integers are cut
   STEP            bytes of features that are added up at once
   begun           the sum to begin with, given the biases
   add_product     a sum plus a WORD of numbers times the kernels of LANES channels
   add_features    the same for a STEP of features
   finished        the sum with the biases, as the next layer counts
   store           rounds values to the nearest numbers, ties to even; a NaN becomes the integer 0
   store_features  rounds values to the nearest features */

#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

/* Vectors of LANES floats or integers; they may be read at any address. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int bits __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef short shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
/* A compiler that ignores the attribute would compute something else. */
_Static_assert(sizeof(vector) == 4 * LANES, "no vectors");

#if defined(INT16) || defined(INT8)

/* The first of two numbers is in the lower half of 32 bits. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the last byte is not the highest");

typedef short number;
typedef bits sums;
/* src/engine/quantized.py has the same limits. It chooses the kernels such that sums fit into 32 bits
   and, with 8 bits, sums of 8 products of features into 16. */
enum { UNIT = 2048, PIXEL_LIMIT = 32767 };
#ifdef INT8
enum { FEATURE_LIMIT = 127 };
#define STEP 16
#else
enum { FEATURE_LIMIT = 8191 };
#define STEP 4
#endif

/* Four bytes, in every lane. */
typedef int word __attribute__((aligned(2), may_alias));
static inline bits in_every_lane(const void *four) { return *(const word *)four - (bits){0}; }

static inline sums add_product(sums sum, const void *pixel, bits kernel)
{
    bits two = in_every_lane(pixel);
#if LANES == 16 && defined(__AVX512VNNI__)
    return (sums)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)two, (__m512i)kernel);
#elif LANES == 16 && defined(__AVX512BW__)
    return sum + (sums)_mm512_madd_epi16((__m512i)two, (__m512i)kernel);
#elif LANES == 8 && defined(__AVX2__)
    return sum + (sums)_mm256_madd_epi16((__m256i)two, (__m256i)kernel);
#else
    return sum + (two << 16 >> 16) * (kernel << 16 >> 16) + (two >> 16) * (kernel >> 16);
#endif
}

#ifdef INT8
/* A STEP is four words. Without VNNI, products of neighbours are added in 16 bits, then four of these. */
static inline sums add_features(sums sum, const void *pixel, const bits *kernel)
{
    const char *from = pixel;
#if LANES == 8 && defined(__AVX2__)
    __m256i pairs = _mm256_maddubs_epi16((__m256i)in_every_lane(from), (__m256i)kernel[0]);
    for (int k = 1; k < 4; k++)
        pairs = _mm256_add_epi16(
            pairs, _mm256_maddubs_epi16((__m256i)in_every_lane(from + 4 * k), (__m256i)kernel[k]));
    return sum + (sums)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int k = 0; k < 4; k++) {
        bits four = in_every_lane(from + 4 * k);
#if LANES == 16 && defined(__AVX512VNNI__)
        sum = (sums)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)four, (__m512i)kernel[k]);
#else
        for (int byte = 0; byte < 4; byte++)
            sum += (four >> 8 * byte & 255) * (kernel[k] << (24 - 8 * byte) >> 24);
#endif
    }
    return sum;
#endif
}
#endif

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
    /* A float of this size has no room for fractions, so the addition rounds. */
    vector large = (vector){0} + 12582912;
    /* In two steps: gcc 12 would convert to shorts lane by lane. */
    bits whole = __builtin_convertvector(values + large - large, bits);
    *(shorts *)to = __builtin_convertvector(whole, shorts);
}

#else

#define FLOAT32
typedef float number;
typedef vector sums;
enum { UNIT = 1, PIXEL_LIMIT = 0, FEATURE_LIMIT = 0 };
#define STEP 4

/* Floats begin with the biases and have no scale. */
static inline sums begun(vector bias) { return bias; }

static inline sums add_product(sums sum, const void *pixel, bits kernel)
{
    return sum + *(const number *)pixel * (vector)kernel;
}

static inline vector finished(sums sum, const float *bias, const float *scale)
{
    (void)bias, (void)scale;
    return sum;
}

static inline void store(number *to, vector v, int limit) { (void)limit, *(vector *)to = v; }

#endif

#ifdef INT8

typedef unsigned char feature;
typedef unsigned char bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

static inline void store_features(feature *to, vector values)
{
#if LANES == 8 && defined(__AVX2__)
    /* Rounds to even, and cuts at zero where it packs. */
    __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps((__m256)values, _mm256_set1_ps(FEATURE_LIMIT)));
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(half, half));
#else
    short whole[LANES];
    store(whole, values, FEATURE_LIMIT);
    *(bytes *)to = __builtin_convertvector(*(shorts *)whole & ~(*(shorts *)whole < 0), bytes);
#endif
}

#else

typedef number feature;
#define add_features(sum, pixel, kernel) add_product(sum, pixel, *(kernel))
static inline void store_features(feature *to, vector values) { store(to, values, FEATURE_LIMIT); }

#endif
