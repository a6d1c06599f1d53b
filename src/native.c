/* The two convolutions of ConvNN in evaluation mode, normalisation folded in, for a processor.

   Every output pixel is a sum over 5 rows of a padded image whose channels lie last: in each row
   5 * inputs consecutive numbers. A tile of pixels by one or two vectors of LANES channels stays
   in registers while all of these are added up, in one fixed order: what comes out for an image
   does not depend on the images beside it. The compiler chooses the instructions for the vectors.

   With -DBFLOAT16 images, kernels and features are bfloat16, the sums and biases float32, and two
   numbers that lie side by side are multiplied and added at once, by one instruction where the
   processor has it. The instruction takes numbers below 2^-126 for zero; elsewhere they count. */

#include <stddef.h>

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

/* With 16 registers of 8 lanes twelve sums, two kernels and a pixel fit; with 32 of 16 lanes more. */
enum { TAPS = 5, SIDE = 28, MARGIN = 2, PIXELS = LANES == 16 ? 8 : 6, MOST = 2 * PIXELS };

/* Vectors are read wherever their numbers lie. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int bits __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
/* A compiler that passes over the attribute would compute something else. */
_Static_assert(sizeof(vector) == 4 * LANES, "no vectors");

#ifdef BFLOAT16
#if defined(__AVX512BF16__) && LANES == 16
#include <immintrin.h>
#endif
typedef unsigned short number;
typedef number numbers __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int pair __attribute__((aligned(2), may_alias));
/* Numbers that are multiplied at once. */
enum { PAIR = 2 };

/* `sum` + two pixels times two kernels of every channel. */
static inline vector add_product(vector sum, const number *pixel, bits kernel)
{
#if defined(__AVX512BF16__) && LANES == 16
    __m512i two = _mm512_set1_epi32(*(const pair *)pixel);
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)two, (__m512bh)kernel);
#else
    bits two = *(const pair *)pixel - (bits){0}, upper = (bits){0} - 65536;
    sum += (vector)(two << 16) * (vector)(kernel << 16);
    return sum + (vector)(two & upper) * (vector)(kernel & upper);
#endif
}

/* To the nearest bfloat16, ties to even; a NaN stays one. */
static inline void store(number *to, vector values)
{
    bits exact = (bits)values, even = (exact >> 16) & 1, nan = (bits)(values != values);
    bits rounded = ((exact + 32767 + even) >> 16 & ~nan) | ((exact >> 16 | 64) & nan);
    *(numbers *)to = __builtin_convertvector(rounded, numbers);
}

static inline float widened(number value)
{
    union { unsigned whole; float real; } as = {(unsigned)value << 16};
    return as.real;
}
#else
typedef float number;
enum { PAIR = 1 };

static inline vector add_product(vector sum, const number *pixel, bits kernel)
{
    return sum + *pixel * (vector)kernel;
}

static inline void store(number *to, vector values) { *(vector *)to = values; }

static inline float widened(number value) { return value; }
#endif

/* Outputs of `vectors` * LANES channels at `pixels` places, from `run` numbers in each of 5 rows
   (a multiple of PAIR). */
static inline __attribute__((always_inline)) void tile(
    int pixels, int vectors, const number *const *from, size_t row, int run, const number *kernel,
    const float *bias, int channels, number *const *to, int rectify)
{
    vector sum[MOST][2];
    for (int p = 0; p < pixels; p++)
        for (int v = 0; v < vectors; v++)
            sum[p][v] = *(const vector *)(bias + v * LANES);
    for (int y = 0; y < TAPS; y++)
        for (int j = 0; j < run; j += PAIR, kernel += PAIR * channels) {
            bits weight[2];
            for (int v = 0; v < vectors; v++)
                weight[v] = *(const bits *)(kernel + PAIR * v * LANES);
#pragma GCC unroll 16
            for (int p = 0; p < pixels; p++)
                for (int v = 0; v < vectors; v++)
                    sum[p][v] = add_product(sum[p][v], from[p] + y * row + j, weight[v]);
        }
    for (int p = 0; p < pixels; p++)
        for (int v = 0; v < vectors; v++) {
            /* Zero where negative; a NaN stays one. */
            bits keep = rectify ? ~(bits)(sum[p][v] < 0) : ~(bits){0};
            store(to[p] + v * LANES, (vector)((bits)sum[p][v] & keep));
        }
}

/* A row of an image to its place in a padded one. */
static void put_row(const float *row, number *to)
{
    for (int x = 0; x < SIDE; x += LANES) {
        int at = x + LANES > SIDE ? SIDE - LANES : x;
        store(to + at, *(const vector *)(row + at));
    }
}

/* `images` (n, side + 4, side + 4, inputs) -> `out`, (side / stride) squared with a `margin`. */
static void convolve(const number *images, int n, int side, int stride, int inputs,
                     const number *kernel, const float *bias, int channels, number *out,
                     int margin, int rectify)
{
    int padded = side + 2 * MARGIN, wide = side / stride, pitch = wide + 2 * margin;
    int area = wide * wide, total = n * area, vectors = channels % (2 * LANES) ? 1 : 2;
    int pixels = MOST / vectors, run = (TAPS * inputs + PAIR - 1) / PAIR * PAIR;
    size_t row = (size_t)padded * inputs;
    for (int c = 0; c < channels; c += vectors * LANES)
        for (int first = 0; first < total; first += pixels) {
            const number *from[MOST], *weights = kernel + PAIR * c;
            number *to[MOST];
            for (int p = 0; p < pixels; p++) {
                /* Beyond the end the last pixel, again. */
                int at = first + p < total ? first + p : total - 1;
                int image = at / area, y = at % area / wide, x = at % wide;
                size_t corner = ((size_t)image * padded + y * stride) * padded + x * stride;
                size_t place = ((size_t)image * pitch + y + margin) * pitch + x + margin;
                from[p] = images + corner * inputs;
                to[p] = out + place * channels + c;
            }
            if (vectors == 2)
                tile(PIXELS, 2, from, row, run, weights, bias + c, channels, to, rectify);
            else
                tile(MOST, 1, from, row, run, weights, bias + c, channels, to, rectify);
        }
}

/* The largest of every 2x2 square, zero at least: (side, side, channels) -> half that, a margin. */
static void halve(const number *image, int side, int channels, number *out, int margin)
{
    int wide = side / 2, pitch = wide + 2 * margin;
    for (int y = 0; y < wide; y++)
        for (int x = 0; x < wide; x++) {
            const number *corner = image + ((size_t)2 * y * side + 2 * x) * channels;
            number *to = out + ((size_t)(y + margin) * pitch + x + margin) * channels;
            for (int c = 0; c < channels; c++) {
                number best = 0;
                for (int k = 0; k < 4; k++) {
                    number value = corner[((size_t)(k / 2) * side + k % 2) * channels + c];
                    float old = widened(best);
                    /* A NaN wins and stays. */
                    best = widened(value) <= old || old != old ? best : value;
                }
                to[c] = best;
            }
        }
}

/* Bytes that `features` needs as scratch. */
size_t scratch_size(int pooled, int first, int second)
{
    size_t padded = SIDE + 2 * MARGIN, half = SIDE / 2, inner = half + 2 * MARGIN;
    size_t images = pooled ? 1 : PIXELS, large = SIDE * SIDE * (size_t)first;
    size_t small = half * half * second, whole = large > small ? large : small;
    size_t padding = padded * padded + inner * inner * first;
    return sizeof(number) * (images * padding + (pooled ? whole : 0));
}

/* `images` (n, 28, 28) -> `out` (n, 7, 7, second). Kernels are (5, run / PAIR, channels, PAIR), a
   run of 5 * inputs numbers filled up with zeros to a multiple of PAIR; numbers of channels are
   multiples of LANES; `scratch` holds scratch_size zeros. */
void features(const float *images, int n, int pooled, const number *kernel1, const float *bias1,
              int first, const number *kernel2, const float *bias2, int second, number *scratch,
              number *out)
{
    /* PIXELS images at once fill all tiles and stay in the second-level cache. */
    int group = pooled ? 1 : PIXELS, half = SIDE / 2, padded = SIDE + 2 * MARGIN;
    size_t inner = (size_t)(half + 2 * MARGIN) * (half + 2 * MARGIN) * first;
    /* The last run of an image filled up ends in what follows it: zeros of a margin. */
    number *outer = scratch, *middle = outer + group * padded * padded;
    number *whole = middle + group * inner;
    for (int start = 0; start < n; start += group) {
        int count = n - start < group ? n - start : group;
        const float *pixel = images + (size_t)start * SIDE * SIDE;
        for (int i = 0; i < count; i++)
            for (int y = 0; y < SIDE; y++, pixel += SIDE)
                put_row(pixel, outer + ((size_t)i * padded + y + MARGIN) * padded + MARGIN);
        number *to = out + (size_t)start * half * half / 4 * second;
        if (pooled) {
            convolve(outer, 1, SIDE, 1, 1, kernel1, bias1, first, whole, 0, 0);
            halve(whole, SIDE, first, middle, MARGIN);
            convolve(middle, 1, half, 1, first, kernel2, bias2, second, whole, 0, 0);
            halve(whole, half, second, to, 0);
        } else {
            convolve(outer, count, SIDE, 2, 1, kernel1, bias1, first, middle, MARGIN, 1);
            convolve(middle, count, half, 2, first, kernel2, bias2, second, to, 0, 1);
        }
    }
}

int lanes(void) { return LANES; }

/* Whether the processor has units for whole tiles of bfloat16, several times as fast as vectors. */
int matrix_units(void)
{
#ifdef __AMX_BF16__
    return 1;
#else
    return 0;
#endif
}
