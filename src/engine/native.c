/* The two convolutions of ConvNN in evaluation mode, normalisation folded in, for a processor, and
   with floats of 32 bits their gradients by the images.

   Every output pixel is a sum over 5 rows of a padded image whose channels lie last: in each row
   5 * inputs consecutive numbers. A tile of pixels by one or two vectors of LANES channels stays
   in registers while all of these are added up, in one fixed order: what comes out for an image
   does not depend on the images beside it. The compiler chooses the instructions for the vectors;
   native_numbers.h says what a number is. */

#include <stddef.h>

#include "native_numbers.h"

/* With 16 registers of 8 lanes twelve sums, two kernels and a pixel fit; with 32 of 16 lanes more. With
   whole steps of the kernel there is room for few. */
enum { TAPS = 5, SIDE = 28, MARGIN = 2, PIXELS = LANES == 16 ? 8 : 6, MOST = 2 * PIXELS, FEW = 8 };

/* Four bytes of numbers, in every lane, meet a vector of the kernel; so do STEP, one after another. */
#define WORD 4

/* A kernel, biases, and for integers the scale of every sum. The kernel is (groups, rows, run / WORD,
   width of a group, WORD): a group are the channels that a tile takes, so it is read in order. */
struct layer { const char *kernel; const float *bias, *scale; int width; };

/* Which numbers a layer adds up. */
enum kind { OF_PIXELS, OF_FEATURES };

/* Sums of `vectors` * LANES channels from `c` on at `pixels` places, over `rows` rows that lie `row`
   bytes apart, of `run` bytes, a multiple of WORD, or of features of STEP. */
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
                    sum[p][v] = kind == OF_FEATURES && STEP > WORD
                                    ? add_features(sum[p][v], from[p] + y * row + j, weight[v])
                                    : add_product(sum[p][v], from[p] + y * row + j, weight[v][0]);
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

/* Bytes from one image to the next, from one row of places to the next, and from place to place. */
struct steps { size_t image, row, place; };

/* What becomes of a sum: it is stored, or zero in place of a negative one. Of gradients, which are
   float32: it passes where a feature was not cut off by its ReLU, or it is one of the four pixels of
   a 2x2 square, the first channels. */
enum fate { PLAIN, RECTIFIED, GATED, SQUARE };

static inline __attribute__((always_inline)) void put(
    vector value, feature *to, const feature *gate, enum fate fate)
{
    if (fate == SQUARE)
        for (int k = 0; k < 4; k++)
            to[k / 2 * SIDE + k % 2] = value[k];
    else if (fate == GATED)
        store_features(to, gated(value, *(const vector *)gate));
    else
        store_features(to, fate == RECTIFIED ? rectified(value) : value);
}

/* Sums at `wide` squared places of each of `n` images, over `rows` rows of `run` bytes that lie
   `row` apart; `gates` are features that lie as `out` does. */
static inline __attribute__((always_inline)) void convolve_by(
    int pixels, int vectors, enum kind kind, const void *images, struct steps in, int n, int wide,
    int rows, size_t row, int run, const struct layer *layer, feature *out, struct steps to,
    const feature *gates, enum fate fate)
{
    for (int c = 0; c < layer->width; c += vectors * LANES) {
        int image = 0, y = 0, x = 0;
        for (int left = n * wide * wide; left > 0; left -= pixels) {
            const char *from[MOST];
            size_t at[MOST];
            vector total[MOST][2];
            for (int p = 0; p < pixels; p++) {
                from[p] = (const char *)images + image * in.image + y * in.row + x * in.place;
                at[p] = (image * to.image + y * to.row + x * to.place) / sizeof(feature) + c;
                /* The next place; after the end the last one, again. */
                if (p + 1 < left && ++x == wide) {
                    x = 0;
                    if (++y == wide)
                        y = 0, image++;
                }
            }
            tile(pixels, vectors, kind, from, rows, row, run, layer, c, total);
            for (int p = 0; p < pixels; p++)
                for (int v = 0; v < vectors; v++, at[p] += LANES)
                    put(total[p][v], out + at[p], gates + at[p], fate);
        }
    }
}

/* Compiled once: inlined everywhere it would take the compiler many times as long. */
static __attribute__((noinline)) void convolve_all(
    enum kind kind, const void *images, struct steps in, int n, int wide, int rows, size_t row, int run,
    const struct layer *layer, feature *out, struct steps to, const feature *gates, enum fate fate)
{
#define CONVOLVE(pixels, vectors, kind) \
    convolve_by(pixels, vectors, kind, images, in, n, wide, rows, row, run, layer, out, to, gates, fate)
    int one = layer->width % (2 * LANES);
    if (kind == OF_FEATURES && STEP > WORD)
        one ? CONVOLVE(FEW, 1, OF_FEATURES) : CONVOLVE(FEW / 2, 2, OF_FEATURES);
    else
        one ? CONVOLVE(MOST, 1, OF_PIXELS) : CONVOLVE(PIXELS, 2, OF_PIXELS);
}

/* `images` (n, side + 4, side + 4, inputs) -> `out`, (side / stride) squared with a `margin`. */
static void convolve(enum kind kind, const void *images, int n, int side, int stride, int inputs,
                     const struct layer *layer, feature *out, int margin, enum fate fate)
{
    int padded = side + 2 * MARGIN, wide = side / stride, pitch = wide + 2 * margin;
    int size = kind == OF_FEATURES ? sizeof(feature) : sizeof(number);
    int step = kind == OF_FEATURES ? STEP : WORD, width = layer->width;
    int run = (TAPS * inputs * size + step - 1) / step * step;
    size_t row = (size_t)padded * inputs * size, place = width * sizeof(feature);
    struct steps in = {padded * row, stride * row, (size_t)stride * inputs * size};
    struct steps to = {pitch * pitch * place, pitch * place, place};
    out += (size_t)margin * (pitch + 1) * width;
    convolve_all(kind, images, in, n, wide, TAPS, row, run, layer, out, to, out, fate);
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
size_t scratch_size(int first)
{
    size_t padded = SIDE + 2 * MARGIN, inner = SIDE / 2 + 2 * MARGIN;
    return PIXELS * (padded * padded * sizeof(number) + inner * inner * first * sizeof(feature)) + STEP;
}

/* `images` (n, 28, 28) -> `out` (n, 7, 7, second width). Runs of 5 * inputs numbers are filled up
   with zeros to whole words, of features to whole steps; widths are multiples of LANES; `scratch`
   holds scratch_size zeros. */
void features(const float *images, int n, const struct layer *layer1, const struct layer *layer2,
              number *scratch, feature *out)
{
    /* PIXELS images at once fill the tiles and stay in the second-level cache. */
    int half = SIDE / 2, padded = SIDE + 2 * MARGIN, first = layer1->width;
    /* A run that was filled up ends, with weights of zero, in the numbers after it: in the next row or
       image, or in what scratch has to spare. */
    number *outer = scratch;
    feature *middle = (feature *)(outer + PIXELS * padded * padded);
    for (int start = 0; start < n; start += PIXELS) {
        int count = n - start < PIXELS ? n - start : PIXELS;
        put_images(images + (size_t)start * SIDE * SIDE, count, outer);
        feature *to = out + (size_t)start * half * half / 4 * layer2->width;
        convolve(OF_PIXELS, outer, count, SIDE, 2, 1, layer1, middle, MARGIN, RECTIFIED);
        convolve(OF_FEATURES, middle, count, half, 2, first, layer2, to, 0, RECTIFIED);
    }
}

static inline __attribute__((always_inline)) void connect_by(
    int pixels, int vectors, enum kind kind, const feature *in, int n, int inputs,
    const struct layer *layer, float *out)
{
    for (int c = 0; c < layer->width; c += vectors * LANES)
        for (int first = 0; first < n; first += pixels) {
            const char *from[MOST];
            float *to[MOST];
            vector total[MOST][2];
            for (int p = 0; p < pixels; p++) {
                size_t at = first + p < n ? first + p : n - 1;
                from[p] = (const char *)(in + at * inputs);
                to[p] = out + at * layer->width + c;
            }
            tile(pixels, vectors, kind, from, 1, 0, inputs * sizeof(feature), layer, c, total);
            for (int p = 0; p < pixels; p++)
                for (int v = 0; v < vectors; v++)
                    *(vector *)(to[p] + v * LANES) = rectified(total[p][v]);
        }
}

/* A fully connected layer and its ReLU: `in` (n, inputs), whole steps, -> `out` (n, width). */
void connected(const feature *in, int n, int inputs, const struct layer *layer, float *out)
{
    int one = layer->width % (2 * LANES);
    if (STEP > WORD)
        one ? connect_by(FEW, 1, OF_FEATURES, in, n, inputs, layer, out)
            : connect_by(FEW / 2, 2, OF_FEATURES, in, n, inputs, layer, out);
    else
        one ? connect_by(MOST, 1, OF_PIXELS, in, n, inputs, layer, out)
            : connect_by(PIXELS, 2, OF_PIXELS, in, n, inputs, layer, out);
}

#ifdef FLOAT32

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
    size_t size = sizeof(float), middle_image = wide * middle_row * size;
    struct steps last = {narrow * last_row * size, last_row * size, second * size};
    struct steps every_other = {middle_image, 2 * middle_row * size, 2 * first * size};
    struct steps every = {middle_image, middle_row * size, first * size};
    struct steps squares = {SIDE * SIDE * size, 2 * SIDE * size, 2 * size};
    for (int start = 0; start < n; start += PIXELS) {
        int count = n - start < PIXELS ? n - start : PIXELS;
        put_images(images + (size_t)start * SIDE * SIDE, count, outer);
        convolve(OF_PIXELS, outer, count, SIDE, 2, 1, layer1, middle, MARGIN, RECTIFIED);
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
