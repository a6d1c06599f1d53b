/* The two convolutions of ConvNN in evaluation mode, normalisation folded in, for a processor.

   Every output pixel is a sum over 5 rows of 5 * inputs consecutive numbers of a padded image whose
   channels lie last. A tile of PIXELS pixels by one or two vectors of LANES channels stays in registers while
   all of these are added up, in one fixed order: what comes out for an image does not depend on
   the images beside it. The compiler chooses the instructions for the vectors. */

#include <stddef.h>

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

/* With 16 registers of 8 lanes twelve sums, two kernels and a pixel fit; with 32 of 16 lanes more. */
enum { TAPS = 5, SIDE = 28, MARGIN = 2, PIXELS = LANES == 16 ? 8 : 6 };

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int bits __attribute__((vector_size(4 * LANES)));
/* A compiler that passes over the attribute would compute something else. */
_Static_assert(sizeof(vector) == 4 * LANES, "no vectors");

/* PIXELS outputs of `vectors` * LANES channels; `run` = 5 * inputs numbers in each of 5 rows. */
static inline __attribute__((always_inline)) void tile(
    int vectors, const float *const *from, size_t row, int run, const float *kernel,
    const float *bias, int channels, float *const *to, int rectify)
{
    vector sum[PIXELS][2];
    for (int p = 0; p < PIXELS; p++)
        for (int v = 0; v < vectors; v++)
            sum[p][v] = *(const vector *)(bias + v * LANES);
    for (int y = 0; y < TAPS; y++)
        for (int j = 0; j < run; j++, kernel += channels) {
            vector weight[2];
            for (int v = 0; v < vectors; v++)
                weight[v] = *(const vector *)(kernel + v * LANES);
#pragma GCC unroll 8
            for (int p = 0; p < PIXELS; p++)
                for (int v = 0; v < vectors; v++)
                    sum[p][v] += from[p][y * row + j] * weight[v];
        }
    for (int p = 0; p < PIXELS; p++)
        for (int v = 0; v < vectors; v++) {
            /* Zero where negative; a NaN stays one. */
            bits keep = rectify ? ~(bits)(sum[p][v] < 0) : ~(bits){0};
            *(vector *)(to[p] + v * LANES) = (vector)((bits)sum[p][v] & keep);
        }
}

/* `images` (n, side + 4, side + 4, inputs) -> `out`, (side / stride) squared with a `margin`. */
static void convolve(const float *images, int n, int side, int stride, int inputs,
                     const float *kernel, const float *bias, int channels, float *out, int margin,
                     int rectify)
{
    int padded = side + 2 * MARGIN, wide = side / stride, pitch = wide + 2 * margin;
    int area = wide * wide, total = n * area, vectors = channels % (2 * LANES) ? 1 : 2;
    for (int c = 0; c < channels; c += vectors * LANES)
        for (int first = 0; first < total; first += PIXELS) {
            const float *from[PIXELS];
            float *to[PIXELS];
            for (int p = 0; p < PIXELS; p++) {
                /* Beyond the end the last pixel, again. */
                int at = first + p < total ? first + p : total - 1;
                int image = at / area, y = at % area / wide, x = at % wide;
                size_t corner = ((size_t)image * padded + y * stride) * padded + x * stride;
                size_t place = ((size_t)image * pitch + y + margin) * pitch + x + margin;
                from[p] = images + corner * inputs;
                to[p] = out + place * channels + c;
            }
            size_t row = (size_t)padded * inputs;
            if (vectors == 2)
                tile(2, from, row, TAPS * inputs, kernel + c, bias + c, channels, to, rectify);
            else
                tile(1, from, row, TAPS * inputs, kernel + c, bias + c, channels, to, rectify);
        }
}

/* The largest of every 2x2 square, zero at least: (side, side, channels) -> half that, a margin. */
static void halve(const float *image, int side, int channels, float *out, int margin)
{
    int wide = side / 2, pitch = wide + 2 * margin;
    for (int y = 0; y < wide; y++)
        for (int x = 0; x < wide; x++) {
            const float *corner = image + ((size_t)2 * y * side + 2 * x) * channels;
            float *to = out + ((size_t)(y + margin) * pitch + x + margin) * channels;
            for (int c = 0; c < channels; c++) {
                float best = 0;
                for (int k = 0; k < 4; k++) {
                    float value = corner[((size_t)(k / 2) * side + k % 2) * channels + c];
                    /* A NaN wins and stays. */
                    best = value <= best ? best : best != best ? best : value;
                }
                to[c] = best;
            }
        }
}

/* Numbers that `features` needs as scratch. */
size_t scratch_size(int pooled, int first, int second)
{
    size_t padded = SIDE + 2 * MARGIN, half = SIDE / 2, inner = half + 2 * MARGIN;
    size_t images = pooled ? 1 : PIXELS, large = SIDE * SIDE * (size_t)first;
    size_t small = half * half * second, whole = large > small ? large : small;
    return images * (padded * padded + inner * inner * first) + (pooled ? whole : 0);
}

/* `images` (n, 28, 28) -> `out` (n, 7, 7, second). Kernels are (5, 5, inputs, channels), numbers
   of channels multiples of LANES; `scratch` holds scratch_size zeros. */
void features(const float *images, int n, int pooled, const float *kernel1, const float *bias1,
              int first, const float *kernel2, const float *bias2, int second, float *scratch,
              float *out)
{
    /* PIXELS images at once fill all tiles and stay in the second-level cache. */
    int group = pooled ? 1 : PIXELS, half = SIDE / 2, padded = SIDE + 2 * MARGIN;
    size_t inner = (size_t)(half + 2 * MARGIN) * (half + 2 * MARGIN) * first;
    float *outer = scratch, *middle = outer + group * padded * padded;
    float *whole = middle + group * inner;
    for (int start = 0; start < n; start += group) {
        int count = n - start < group ? n - start : group;
        const float *pixel = images + (size_t)start * SIDE * SIDE;
        for (int i = 0; i < count; i++)
            for (int y = 0; y < SIDE; y++)
                for (int x = 0; x < SIDE; x++)
                    outer[(i * padded + y + MARGIN) * padded + x + MARGIN] = *pixel++;
        float *to = out + (size_t)start * half * half / 4 * second;
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
