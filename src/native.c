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

/* A gradient, zero where the feature was cut off; where that is a NaN it passes, as in torch. */
static inline vector gated(vector values, vector feature)
{
    return (vector)((bits)values & ~(bits)(feature <= 0));
}

/* A row of an image to its place in a padded one. */
static void put_row(const float *row, number *to)
{
    for (int x = 0; x < SIDE; x += LANES) {
        int at = x + LANES > SIDE ? SIDE - LANES : x;
        store(to + at, UNIT * *(const vector *)(row + at), PIXEL_LIMIT);
    }
}

/* Numbers from one image to the next, from one row of places to the next, and from place to place. */
struct steps { size_t image, row, place; };

/* What becomes of a sum: it is stored, or zero in place of a negative one. Of gradients, which are
   float32: it passes where a feature was not cut off by its ReLU, or it is one of the four pixels of
   a 2x2 square, the first channels. */
enum fate { PLAIN, RECTIFIED, GATED, SQUARE };

static inline __attribute__((always_inline)) void put(
    vector value, number *to, const number *feature, enum fate fate)
{
    if (fate == SQUARE)
        for (int k = 0; k < 4; k++)
            to[k / 2 * SIDE + k % 2] = value[k];
    else if (fate == GATED)
        store(to, gated(value, *(const vector *)feature), FEATURE_LIMIT);
    else
        store(to, fate == RECTIFIED ? rectified(value) : value, FEATURE_LIMIT);
}

/* Sums at `wide` squared places of each of `n` images, over `rows` rows of `run` numbers that lie
   `row` apart; `gates` are features that lie as `out` does. */
static inline __attribute__((always_inline)) void convolve_by(
    int vectors, const number *images, struct steps in, int n, int wide, int rows, size_t row, int run,
    const struct layer *layer, number *out, struct steps to, const number *gates, enum fate fate)
{
    const int pixels = MOST / vectors;
    for (int c = 0; c < layer->width; c += vectors * LANES) {
        int image = 0, y = 0, x = 0;
        for (int left = n * wide * wide; left > 0; left -= pixels) {
            const number *from[MOST];
            size_t at[MOST];
            vector total[MOST][2];
            for (int p = 0; p < pixels; p++) {
                from[p] = images + image * in.image + y * in.row + x * in.place;
                at[p] = image * to.image + y * to.row + x * to.place + c;
                /* The next place; after the end the last one, again. */
                if (p + 1 < left && ++x == wide) {
                    x = 0;
                    if (++y == wide)
                        y = 0, image++;
                }
            }
            tile(pixels, vectors, from, rows, row, run, layer, c, total);
            for (int p = 0; p < pixels; p++)
                for (int v = 0; v < vectors; v++, at[p] += LANES)
                    put(total[p][v], out + at[p], gates + at[p], fate);
        }
    }
}

/* Compiled once: inlined everywhere it would take the compiler many times as long. */
static __attribute__((noinline)) void convolve_all(
    const number *images, struct steps in, int n, int wide, int rows, size_t row, int run,
    const struct layer *layer, number *out, struct steps to, const number *gates, enum fate fate)
{
    if (layer->width % (2 * LANES))
        convolve_by(1, images, in, n, wide, rows, row, run, layer, out, to, gates, fate);
    else
        convolve_by(2, images, in, n, wide, rows, row, run, layer, out, to, gates, fate);
}

/* `images` (n, side + 4, side + 4, inputs) -> `out`, (side / stride) squared with a `margin`. */
static void convolve(const number *images, int n, int side, int stride, int inputs,
                     const struct layer *layer, number *out, int margin, enum fate fate)
{
    int padded = side + 2 * MARGIN, wide = side / stride, pitch = wide + 2 * margin;
    int run = (TAPS * inputs + PAIR - 1) / PAIR * PAIR, width = layer->width;
    size_t row = (size_t)padded * inputs;
    struct steps in = {padded * row, stride * row, stride * inputs};
    struct steps to = {(size_t)pitch * pitch * width, (size_t)pitch * width, width};
    out += margin * (to.row + to.place);
    convolve_all(images, in, n, wide, TAPS, row, run, layer, out, to, out, fate);
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

/* Images (n, 28, 28) to the middle of padded ones. */
static void put_images(const float *pixel, int n, number *to)
{
    int padded = SIDE + 2 * MARGIN;
    for (int i = 0; i < n; i++)
        for (int y = 0; y < SIDE; y++, pixel += SIDE)
            put_row(pixel, to + ((size_t)i * padded + y + MARGIN) * padded + MARGIN);
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
        put_images(images + (size_t)start * SIDE * SIDE, count, outer);
        number *to = out + (size_t)start * half * half / 4 * second;
        if (pooled) {
            convolve(outer, 1, SIDE, 1, 1, layer1, whole, 0, PLAIN);
            halve(whole, SIDE, first, middle, MARGIN);
            convolve(middle, 1, half, 1, first, layer2, whole, 0, PLAIN);
            halve(whole, half, second, to, 0);
        } else {
            convolve(outer, count, SIDE, 2, 1, layer1, middle, MARGIN, RECTIFIED);
            convolve(middle, count, half, 2, first, layer2, to, 0, RECTIFIED);
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

#if !defined(BFLOAT16) && !defined(INT16)

/* Bytes that `gradients` needs as scratch. */
size_t gradients_scratch_size(int first, int second)
{
    size_t padded = SIDE + 2 * MARGIN, wide = SIDE / 2 + 2 * MARGIN, narrow = SIDE / 4 + 2;
    return sizeof(float) * PIXELS * (padded * padded + 2 * wide * wide * first + narrow * narrow * second);
}

/* Gradients by the images of a network with strides: `slope` (n, 7, 7, second), the gradients by the
   `features` that it makes of `images` (n, 28, 28) -> `out` like the images.

   Back through a convolution of stride 2, the gradients at the four places of a 2x2 square are sums
   over 3x3, 3x2, 2x3 and 2x2 places of those that come in. `back2` are the four kernels; in `back1`
   they are one of 3x3 with four channels, filled up to LANES. `scratch` holds
   gradients_scratch_size zeros. */
void gradients(const float *images, int n, int second, const struct layer *layer1,
               const struct layer *back2, const struct layer *back1, const float *features,
               const float *slope, float *scratch, float *out)
{
    int first = layer1->width, half = SIDE / 2, quarter = half / 2;
    size_t padded = SIDE + 2 * MARGIN, wide = half + 2 * MARGIN, narrow = quarter + 2;
    size_t last_row = narrow * second, middle_row = wide * first;
    float *outer = scratch, *middle = outer + PIXELS * padded * padded;
    float *middle_slope = middle + PIXELS * wide * middle_row;
    float *last_slope = middle_slope + PIXELS * wide * middle_row;
    struct steps last = {narrow * last_row, last_row, second};
    struct steps every_other = {wide * middle_row, 2 * middle_row, 2 * first};
    struct steps every = {wide * middle_row, middle_row, first}, squares = {SIDE * SIDE, 2 * SIDE, 2};
    for (int start = 0; start < n; start += PIXELS) {
        int count = n - start < PIXELS ? n - start : PIXELS;
        put_images(images + (size_t)start * SIDE * SIDE, count, outer);
        convolve(outer, count, SIDE, 2, 1, layer1, middle, MARGIN, RECTIFIED);
        for (int i = 0; i < count; i++)
            for (int y = 0; y < quarter; y++) {
                size_t from = ((size_t)(start + i) * quarter + y) * quarter * second;
                float *to = last_slope + (i * narrow + y + 1) * last_row + second;
                for (int x = 0; x < quarter * second; x += LANES)
                    put(*(const vector *)(slope + from + x), to + x, features + from + x, GATED);
            }
        for (int y = 0; y < 2; y++)
            for (int x = 0; x < 2; x++) {
                size_t at = (MARGIN + y) * middle_row + (MARGIN + x) * first;
                convolve_all(last_slope + y * last_row + x * second, last, count, quarter, 3 - y, last_row,
                             (3 - x) * second, back2 + 2 * y + x, middle_slope + at, every_other,
                             middle + at, GATED);
            }
        convolve_all(middle_slope + (MARGIN - 1) * (middle_row + first), every, count, half, 3, middle_row,
                     3 * first, back1, out + (size_t)start * SIDE * SIDE, squares, out, SQUARE);
    }
}

#endif

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
