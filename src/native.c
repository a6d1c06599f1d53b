/* The two convolutions of ConvNN in evaluation mode, normalisation folded in, for a processor.

   Every output pixel is a sum over 5 rows of a padded image whose channels lie last: in each row
   5 * inputs consecutive numbers. A tile of pixels by one or two vectors of LANES channels stays
   in registers while all of these are added up, in one fixed order: what comes out for an image
   does not depend on the images beside it. The compiler chooses the instructions for the vectors;
   native_numbers.h says what a number is. */

#include <stddef.h>

#include "native_numbers.h"

/* With 16 registers of 8 lanes twelve sums, two kernels and a pixel fit; with 32 of 16 lanes more. */
enum { TAPS = 5, SIDE = 28, MARGIN = 2, PIXELS = LANES == 16 ? 8 : 6, MOST = 2 * PIXELS };

/* A kernel, biases, and for integers the scale of every sum. The kernel is (groups, rows, run / PAIR,
   width of a group, PAIR): a group are the channels that a tile takes, so it is read in order. */
struct layer { const number *kernel; const float *bias, *scale; int width; };

/* Sums of `vectors` * LANES channels from `c` on at `pixels` places, over `rows` rows that lie `row`
   apart, of `run` numbers, a multiple of PAIR. */
static inline __attribute__((always_inline)) void tile(
    int pixels, int vectors, const number *const *from, int rows, size_t row, int run,
    const struct layer *layer, int c, vector total[MOST][2])
{
    const number *kernel = layer->kernel + (size_t)c * rows * run;
    const float *bias = layer->bias + c, *scale = layer->scale + c;
    sums sum[MOST][2];
    for (int p = 0; p < pixels; p++)
        for (int v = 0; v < vectors; v++)
            sum[p][v] = begun(*(const vector *)(bias + v * LANES));
    for (int y = 0; y < rows; y++)
        for (int j = 0; j < run; j += PAIR, kernel += PAIR * vectors * LANES) {
            bits weight[2];
            for (int v = 0; v < vectors; v++)
                weight[v] = *(const bits *)(kernel + PAIR * v * LANES);
#pragma GCC unroll 16
            for (int p = 0; p < pixels; p++)
                for (int v = 0; v < vectors; v++)
                    sum[p][v] = add_product(sum[p][v], from[p] + y * row + j, weight[v]);
        }
    for (int p = 0; p < pixels; p++)
        for (int v = 0; v < vectors; v++)
            total[p][v] = finished(sum[p][v], bias + v * LANES, scale + v * LANES);
}

/* Zero where negative; a NaN stays one. */
static inline vector rectified(vector values)
{
    return (vector)((bits)values & ~(bits)(values < 0));
}

/* A row of an image to its place in a padded one. */
static void put_row(const float *row, number *to)
{
    for (int x = 0; x < SIDE; x += LANES) {
        int at = x + LANES > SIDE ? SIDE - LANES : x;
        store(to + at, UNIT * *(const vector *)(row + at), PIXEL_LIMIT);
    }
}

static inline __attribute__((always_inline)) void convolve_by(
    int vectors, const number *images, int n, int side, int stride, int inputs,
    const struct layer *layer, number *out, int margin, int rectify)
{
    int padded = side + 2 * MARGIN, wide = side / stride, pitch = wide + 2 * margin;
    int run = (TAPS * inputs + PAIR - 1) / PAIR * PAIR;
    size_t row = (size_t)padded * inputs;
    const int pixels = MOST / vectors;
    for (int c = 0; c < layer->width; c += vectors * LANES) {
        int image = 0, y = 0, x = 0;
        for (int left = n * wide * wide; left > 0; left -= pixels) {
            const number *from[MOST];
            number *to[MOST];
            vector total[MOST][2];
            for (int p = 0; p < pixels; p++) {
                size_t corner = ((size_t)image * padded + y * stride) * padded + x * stride;
                size_t place = ((size_t)image * pitch + y + margin) * pitch + x + margin;
                from[p] = images + corner * inputs;
                to[p] = out + place * layer->width + c;
                /* The next place; after the end the last one, again. */
                if (p + 1 < left && ++x == wide) {
                    x = 0;
                    if (++y == wide)
                        y = 0, image++;
                }
            }
            tile(pixels, vectors, from, TAPS, row, run, layer, c, total);
            for (int p = 0; p < pixels; p++)
                for (int v = 0; v < vectors; v++) {
                    vector value = rectify ? rectified(total[p][v]) : total[p][v];
                    store(to[p] + v * LANES, value, FEATURE_LIMIT);
                }
        }
    }
}

/* `images` (n, side + 4, side + 4, inputs) -> `out`, (side / stride) squared with a `margin`. */
static void convolve(const number *images, int n, int side, int stride, int inputs,
                     const struct layer *layer, number *out, int margin, int rectify)
{
    if (layer->width % (2 * LANES))
        convolve_by(1, images, n, side, stride, inputs, layer, out, margin, rectify);
    else
        convolve_by(2, images, n, side, stride, inputs, layer, out, margin, rectify);
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

/* `images` (n, 28, 28) -> `out` (n, 7, 7, second width). Runs of 5 * inputs numbers are filled up
   with zeros to a multiple of PAIR; widths are multiples of LANES; `scratch` holds scratch_size
   zeros. */
void features(const float *images, int n, int pooled, const struct layer *layer1,
              const struct layer *layer2, number *scratch, number *out)
{
    /* PIXELS images at once fill the tiles and stay in the second-level cache. */
    int group = pooled ? 1 : PIXELS, half = SIDE / 2, padded = SIDE + 2 * MARGIN;
    int first = layer1->width, second = layer2->width;
    size_t inner = (size_t)(half + 2 * MARGIN) * (half + 2 * MARGIN) * first;
    /* A run that was filled up ends, with a weight of zero, in the number after it, which at the end
       of a row is in the margin of the next row or image. */
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
            convolve(outer, 1, SIDE, 1, 1, layer1, whole, 0, 0);
            halve(whole, SIDE, first, middle, MARGIN);
            convolve(middle, 1, half, 1, first, layer2, whole, 0, 0);
            halve(whole, half, second, to, 0);
        } else {
            convolve(outer, count, SIDE, 2, 1, layer1, middle, MARGIN, 1);
            convolve(middle, count, half, 2, first, layer2, to, 0, 1);
        }
    }
}

static inline __attribute__((always_inline)) void connect_by(
    int vectors, const number *in, int n, int inputs, const struct layer *layer, float *out)
{
    const int pixels = MOST / vectors;
    for (int c = 0; c < layer->width; c += vectors * LANES)
        for (int first = 0; first < n; first += pixels) {
            const number *from[MOST];
            float *to[MOST];
            vector total[MOST][2];
            for (int p = 0; p < pixels; p++) {
                size_t at = first + p < n ? first + p : n - 1;
                from[p] = in + at * inputs;
                to[p] = out + at * layer->width + c;
            }
            tile(pixels, vectors, from, 1, 0, inputs, layer, c, total);
            for (int p = 0; p < pixels; p++)
                for (int v = 0; v < vectors; v++)
                    *(vector *)(to[p] + v * LANES) = rectified(total[p][v]);
        }
}

/* A fully connected layer and its ReLU: `in` (n, inputs) -> `out` (n, width). */
void connected(const number *in, int n, int inputs, const struct layer *layer, float *out)
{
    if (layer->width % (2 * LANES))
        connect_by(1, in, n, inputs, layer, out);
    else
        connect_by(2, in, n, inputs, layer, out);
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
