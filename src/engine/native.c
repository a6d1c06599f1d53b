/* The two convolutions of ConvNN in evaluation mode, with normalisation folded in, for a CPU. With
   float32 also their gradients with respect to the images.

   Every output pixel is a sum over 5 rows of a padded image whose channels lie last: 5 * inputs
   consecutive numbers per row. A tile of output pixels, by one or two vectors of LANES channels, stays
   in registers while they are added up. The order of additions is fixed, so the result for an image
   does not depend on the other images. The compiler chooses the instructions for the vectors;
   native_numbers.h says what a number is. */

#include <stddef.h>

#include "native_numbers.h"

/* 16 registers of 8 lanes hold twelve sums, two kernels and a pixel; 32 registers of 16 lanes hold
   more. Kernels that are read in whole STEPs leave room for FEW sums. */
enum { TAPS = 5, SIDE = 28, MARGIN = 2, PIXELS = LANES == 16 ? 8 : 6, MOST = 2 * PIXELS, FEW = 8 };

/* A WORD is four bytes of numbers. It is copied to every lane and meets one vector of the kernel.
   A STEP is one or more words. */
#define WORD 4

/* A layer: its kernel, its biases and, for integers, the scale of every sum. The kernel is stored as
   (groups, rows, run / WORD, channels per group, WORD). A group is the channels of one tile, so the
   kernel is read in order. */
struct layer { const char *kernel; const float *bias, *scale; int width; };

/* Which numbers a layer adds up. */
enum kind { OF_PIXELS, OF_FEATURES };

/* The sums at `pixels` places for `vectors` * LANES channels from channel `c` on. Each adds up `rows`
   rows that lie `row` bytes apart, and `run` bytes of each: a multiple of WORD, or of STEP for
   features. */
static inline __attribute__((always_inline)) void tile(
    int pixels, int vectors, enum kind kind, const char *const *from, int rows, size_t row, int run,
    const struct layer *layer, int c, vector total[MOST][2])
{
    const char *kernel = layer->kernel + (size_t)c * rows * run;
    const float *bias = layer->bias + c, *scale = layer->scale + c;
    const int words = kind == OF_FEATURES ? STEP / WORD : 1;
    sums sum[MOST][2];
    for (int p = 0; p < pixels; p++)
        for (int v = 0; v < vectors; v++)
            sum[p][v] = begun(*(const vector *)(bias + v * LANES));
    for (int y = 0; y < rows; y++)
        for (int j = 0; j < run; j += words * WORD) {
            bits weight[2][STEP / WORD];
            for (int k = 0; k < words; k++)
                for (int v = 0; v < vectors; v++, kernel += WORD * LANES)
                    weight[v][k] = *(const bits *)kernel;
#pragma GCC unroll 16
            for (int p = 0; p < pixels; p++)
                for (int v = 0; v < vectors; v++)
                    sum[p][v] = kind == OF_FEATURES
                                    ? add_features(sum[p][v], from[p] + y * row + j, weight[v])
                                    : add_product(sum[p][v], from[p] + y * row + j, weight[v][0]);
        }
    for (int p = 0; p < pixels; p++)
        for (int v = 0; v < vectors; v++)
            total[p][v] = finished(sum[p][v], bias + v * LANES, scale + v * LANES);
}

/* Zero where negative; a NaN stays a NaN. */
static inline vector rectified(vector v) { return (vector)((bits)v & ~(bits)(v < 0)); }

/* Bytes from one image to the next, from one row of places to the next, and from place to place. */
struct steps { size_t image, row, place; };

/* What becomes of a sum. RECTIFIED: stored as features, 0 instead of a negative one; AS_FLOATS: the
   same as float32. For gradients (float32): GATED passes where the feature was positive or NaN, as in
   torch; SQUARE stores the first four channels as the four pixels of a 2x2 square. */
enum fate { RECTIFIED, AS_FLOATS, GATED, SQUARE };

static inline __attribute__((always_inline)) void put(
    vector value, void *to, const void *gate, enum fate fate)
{
    if (fate == SQUARE)
        for (int k = 0; k < 4; k++)
            ((feature *)to)[k / 2 * SIDE + k % 2] = value[k];
    else if (fate == GATED)
        store_features(to, (vector)((bits)value & ~(bits)(*(const vector *)gate <= 0)));
    else if (fate == AS_FLOATS)
        *(vector *)to = rectified(value);
    else
        store_features(to, rectified(value));
}

/* Puts the sums of a layer, as `tile` has them, at `wide` squared places of each of `n` images. `in`
   are the steps of `images`, `to` those of `out` and of `gates`, the features for GATED. */
static inline __attribute__((always_inline)) void convolve_by(
    int pixels, int vectors, enum kind kind, const void *images, struct steps in, int n, int wide,
    int rows, size_t row, int run, const struct layer *layer, void *out, struct steps to,
    const void *gates, enum fate fate)
{
    const size_t size = fate == AS_FLOATS ? sizeof(float) : sizeof(feature);
    for (int c = 0; c < layer->width; c += vectors * LANES) {
        int image = 0, y = 0, x = 0;
        for (int left = n * wide * wide; left > 0; left -= pixels) {
            const char *from[MOST];
            size_t at[MOST];
            vector total[MOST][2];
            for (int p = 0; p < pixels; p++) {
                from[p] = (const char *)images + image * in.image + y * in.row + x * in.place;
                at[p] = image * to.image + y * to.row + x * to.place + c * size;
                /* The next place; after the end the last one, again. */
                if (p + 1 < left && ++x == wide) {
                    x = 0;
                    if (++y == wide)
                        y = 0, image++;
                }
            }
            tile(pixels, vectors, kind, from, rows, row, run, layer, c, total);
            for (int p = 0; p < pixels; p++)
                for (int v = 0; v < vectors; v++, at[p] += LANES * size)
                    put(total[p][v], (char *)out + at[p], (const char *)gates + at[p], fate);
        }
    }
}

/* The same with the tile that suits the layer. Compiled once: inlined everywhere, it would take the
   compiler many times as long. */
static __attribute__((noinline)) void convolve_all(
    enum kind kind, const void *images, struct steps in, int n, int wide, int rows, size_t row, int run,
    const struct layer *layer, void *out, struct steps to, const void *gates, enum fate fate)
{
#define CONVOLVE(pixels, vectors, kind) \
    convolve_by(pixels, vectors, kind, images, in, n, wide, rows, row, run, layer, out, to, gates, fate)
    int one = layer->width % (2 * LANES);
    if (kind == OF_FEATURES && STEP > WORD)
        one ? CONVOLVE(FEW, 1, OF_FEATURES) : CONVOLVE(FEW / 2, 2, OF_FEATURES);
    else
        one ? CONVOLVE(MOST, 1, OF_PIXELS) : CONVOLVE(PIXELS, 2, OF_PIXELS);
}

/* Convolution with stride 2 and ReLU: `images` (n, side + 4, side + 4, inputs) -> the middle of `out`
   (n, side / 2 + 2 * margin, side / 2 + 2 * margin, width). */
static void convolve(enum kind kind, const void *images, int n, int side, int inputs,
                     const struct layer *layer, feature *out, int margin)
{
    int padded = side + 2 * MARGIN, wide = side / 2, pitch = wide + 2 * margin;
    int size = kind == OF_FEATURES ? sizeof(feature) : sizeof(number);
    int step = kind == OF_FEATURES ? STEP : WORD, width = layer->width;
    int run = (TAPS * inputs * size + step - 1) / step * step;
    size_t row = (size_t)padded * inputs * size, place = width * sizeof(feature);
    struct steps in = {padded * row, 2 * row, (size_t)2 * inputs * size};
    struct steps to = {pitch * pitch * place, pitch * place, place};
    out += (size_t)margin * (pitch + 1) * width;
    convolve_all(kind, images, in, n, wide, TAPS, row, run, layer, out, to, out, RECTIFIED);
}

/* Copies images (n, 28, 28), counted in steps of 1 / UNIT, to the middle of padded ones. */
static void put_images(const float *pixel, int n, number *to)
{
    int padded = SIDE + 2 * MARGIN;
    for (int i = 0; i < n; i++)
        for (int y = 0; y < SIDE; y++, pixel += SIDE) {
            number *row = to + ((size_t)i * padded + y + MARGIN) * padded + MARGIN;
            for (int x = 0; x < SIDE; x += LANES) {
                /* The last vector ends with the row. */
                int start = x + LANES > SIDE ? SIDE - LANES : x;
                store(row + start, UNIT * *(const vector *)(pixel + start), PIXEL_LIMIT);
            }
        }
}

/* Bytes that `features` needs as scratch. */
size_t scratch_size(int first)
{
    size_t padded = SIDE + 2 * MARGIN, inner = SIDE / 2 + 2 * MARGIN;
    return PIXELS * (padded * padded * sizeof(number) + inner * inner * first * sizeof(feature)) + STEP;
}

/* `images` (n, 28, 28) -> `out` (n, 7, 7, second width). Widths are multiples of LANES. Runs of
   5 * inputs numbers are filled up with zero weights to whole words, those of features to whole steps.
   `scratch` holds scratch_size zeros. */
void features(const float *images, int n, const struct layer *layer1, const struct layer *layer2,
              number *scratch, feature *out)
{
    int half = SIDE / 2, padded = SIDE + 2 * MARGIN, first = layer1->width;
    /* A run that was filled up also reads the numbers behind it, with zero weights. They belong to the
       next row or image, or to the spare bytes of scratch. */
    number *outer = scratch;
    feature *middle = (feature *)(outer + PIXELS * padded * padded);
    /* PIXELS images at once fill the tiles and stay in the second-level cache. */
    for (int start = 0; start < n; start += PIXELS) {
        int count = n - start < PIXELS ? n - start : PIXELS;
        put_images(images + (size_t)start * SIDE * SIDE, count, outer);
        feature *to = out + (size_t)start * half * half / 4 * layer2->width;
        convolve(OF_PIXELS, outer, count, SIDE, 1, layer1, middle, MARGIN);
        convolve(OF_FEATURES, middle, count, half, first, layer2, to, 0);
    }
}

/* A fully connected layer and its ReLU: `in` (n, inputs), whole steps -> `out` (n, width). */
void connected(const feature *in, int n, int inputs, const struct layer *layer, float *out)
{
    int run = inputs * sizeof(feature);
    struct steps from = {run, 0, 0}, to = {layer->width * sizeof(float), 0, 0};
    convolve_all(OF_FEATURES, in, from, n, 1, 1, 0, run, layer, out, to, out, AS_FLOATS);
}

#ifdef FLOAT32

/* Bytes that `gradients` needs as scratch. */
size_t gradients_scratch_size(int first, int second)
{
    size_t padded = SIDE + 2 * MARGIN, wide = SIDE / 2 + 2 * MARGIN, narrow = SIDE / 4 + 2;
    return sizeof(float) * PIXELS * (padded * padded + 2 * wide * wide * first + narrow * narrow * second);
}

/* Gradients with respect to `images` (n, 28, 28) -> `out`, shaped like them. `slope` (n, 7, 7, second)
   are the gradients with respect to the `features` of the images.

   Backwards through a convolution of stride 2, the gradients at the four places of a 2x2 square are
   sums over 3x3, 3x2, 2x3 and 2x2 places of the incoming ones. `back2` holds these four kernels.
   `back1` holds them as one 3x3 kernel with four channels, filled up to LANES. `scratch` holds
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
    size_t size = sizeof(float), middle_image = wide * middle_row * size;
    struct steps last = {narrow * last_row * size, last_row * size, second * size};
    struct steps every_other = {middle_image, 2 * middle_row * size, 2 * first * size};
    struct steps every = {middle_image, middle_row * size, first * size};
    struct steps squares = {SIDE * SIDE * size, 2 * SIDE * size, 2 * size};
    for (int start = 0; start < n; start += PIXELS) {
        int count = n - start < PIXELS ? n - start : PIXELS;
        put_images(images + (size_t)start * SIDE * SIDE, count, outer);
        convolve(OF_PIXELS, outer, count, SIDE, 1, layer1, middle, MARGIN);
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
                convolve_all(OF_FEATURES, last_slope + y * last_row + x * second, last, count, quarter,
                             3 - y, last_row * size, (3 - x) * second * size, back2 + 2 * y + x,
                             middle_slope + at, every_other, middle + at, GATED);
            }
        convolve_all(OF_FEATURES, middle_slope + (MARGIN - 1) * (middle_row + first), every, count, half, 3,
                     middle_row * size, 3 * first * size, back1, out + (size_t)start * SIDE * SIDE, squares,
                     out, SQUARE);
    }
}

#endif

int lanes(void) { return LANES; }
