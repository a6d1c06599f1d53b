/* The two convolutions of ConvNN in evaluation mode, with normalisation folded in, and their gradients
   with respect to the images, in float32, for a CPU. exact.c has the network in whole numbers.

   Every output pixel is a sum over 5 rows of a padded image whose channels lie last: 5 * inputs
   consecutive numbers per row. A tile of output pixels, by one or two vectors of LANES channels, stays
   in registers while they are added up. The order of additions is fixed, so the result for an image
   does not depend on the other images. The compiler chooses the instructions for the vectors. */

#include <stddef.h>
#include <string.h>

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

/* Vectors of LANES floats or integers; they may be read at any address. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
/* A compiler that ignores the attribute would compute something else. */
_Static_assert(sizeof(vector) == 4 * LANES, "no vectors");

/* 16 registers of 8 lanes hold twelve sums, two kernels and a pixel; 32 registers of 16 lanes hold
   more. */
enum { TAPS = 5, SIDE = 28, MARGIN = 2, PIXELS = LANES == 16 ? 8 : 6, MOST = 2 * PIXELS };

/* A layer: its kernel and its biases. The kernel is stored as (groups, rows, run, channels per group). A
   group is the channels of one tile, so the kernel is read in order. */
struct layer { const float *kernel, *bias; int width; };

/* The sums at `pixels` places for `vectors` * LANES channels from channel `c` on. Each adds up `rows`
   rows that lie `row` numbers apart, and `run` numbers of each. */
static inline __attribute__((always_inline)) void tile(
    int pixels, int vectors, const float *const *from, int rows, size_t row, int run,
    const struct layer *layer, int c, vector sum[MOST][2])
{
    const float *kernel = layer->kernel + (size_t)c * rows * run;
    for (int p = 0; p < pixels; p++)
        for (int v = 0; v < vectors; v++)
            sum[p][v] = *(const vector *)(layer->bias + c + v * LANES);
    for (int y = 0; y < rows; y++)
        for (int j = 0; j < run; j++, kernel += vectors * LANES)
#pragma GCC unroll 16
            for (int p = 0; p < pixels; p++)
                for (int v = 0; v < vectors; v++)
                    sum[p][v] += from[p][y * row + j] * *(const vector *)(kernel + v * LANES);
}

/* Numbers from one image to the next, from one row of places to the next, and from place to place. */
struct steps { size_t image, row, place; };

/* What becomes of a sum. RECTIFIED: stored, 0 instead of a negative one. For gradients: GATED passes
   where the feature was positive or NaN, as in torch; SQUARE stores the first four channels as the four
   pixels of a 2x2 square. */
enum fate { RECTIFIED, GATED, SQUARE };

static inline __attribute__((always_inline)) void put(
    vector value, float *to, const float *gate, enum fate fate)
{
    if (fate == SQUARE)
        for (int k = 0; k < 4; k++)
            to[k / 2 * SIDE + k % 2] = value[k];
    else if (fate == GATED)
        *(vector *)to = (vector)((bits)value & ~(bits)(*(const vector *)gate <= 0));
    else /* A NaN stays a NaN. */
        *(vector *)to = (vector)((bits)value & ~(bits)(value < 0));
}

/* Puts the sums of a layer, as `tile` has them, at `wide` squared places of each of `n` images. `in`
   are the steps of `images`, `to` those of `out` and of `gates`, the features for GATED. */
static inline __attribute__((always_inline)) void convolve_by(
    int pixels, int vectors, const float *images, struct steps in, int n, int wide, int rows, size_t row,
    int run, const struct layer *layer, float *out, struct steps to, const float *gates, enum fate fate)
{
    for (int c = 0; c < layer->width; c += vectors * LANES) {
        int image = 0, y = 0, x = 0;
        for (int left = n * wide * wide; left > 0; left -= pixels) {
            const float *from[MOST];
            size_t at[MOST];
            vector sum[MOST][2];
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
            tile(pixels, vectors, from, rows, row, run, layer, c, sum);
            for (int p = 0; p < pixels; p++)
                for (int v = 0; v < vectors; v++, at[p] += LANES)
                    put(sum[p][v], out + at[p], gates + at[p], fate);
        }
    }
}

/* The same with the tile that suits the layer. Compiled once: inlined everywhere, it would take the
   compiler many times as long. */
static __attribute__((noinline)) void convolve_all(
    const float *images, struct steps in, int n, int wide, int rows, size_t row, int run,
    const struct layer *layer, float *out, struct steps to, const float *gates, enum fate fate)
{
#define CONVOLVE(pixels, vectors) \
    convolve_by(pixels, vectors, images, in, n, wide, rows, row, run, layer, out, to, gates, fate)
    layer->width % (2 * LANES) ? CONVOLVE(MOST, 1) : CONVOLVE(PIXELS, 2);
}

/* Convolution with stride 2 and ReLU: `images` (n, side + 4, side + 4, inputs) -> the middle of `out`
   (n, side / 2 + 2 * margin, side / 2 + 2 * margin, width). */
static void convolve(const float *images, int n, int side, int inputs, const struct layer *layer,
                     float *out, int margin)
{
    int padded = side + 2 * MARGIN, wide = side / 2, pitch = wide + 2 * margin;
    size_t row = (size_t)padded * inputs, place = layer->width;
    struct steps in = {padded * row, 2 * row, (size_t)2 * inputs};
    struct steps to = {pitch * pitch * place, pitch * place, place};
    out += margin * (pitch + 1) * place;
    convolve_all(images, in, n, wide, TAPS, row, TAPS * inputs, layer, out, to, out, RECTIFIED);
}

/* Copies images (n, 28, 28) to the middle of padded ones. */
static void put_images(const float *pixel, int n, float *to)
{
    int padded = SIDE + 2 * MARGIN;
    for (int i = 0; i < n; i++)
        for (int y = 0; y < SIDE; y++, pixel += SIDE)
            memcpy(to + ((size_t)i * padded + y + MARGIN) * padded + MARGIN, pixel, SIDE * sizeof(float));
}

/* Bytes that `features` needs as scratch. */
size_t scratch_size(int first)
{
    size_t padded = SIDE + 2 * MARGIN, inner = SIDE / 2 + 2 * MARGIN;
    return PIXELS * sizeof(float) * (padded * padded + inner * inner * first);
}

/* `images` (n, 28, 28) -> `out` (n, 7, 7, second width). Widths are multiples of LANES. `scratch` holds
   scratch_size zeros. */
void features(const float *images, int n, const struct layer *layer1, const struct layer *layer2,
              float *scratch, float *out)
{
    int half = SIDE / 2, padded = SIDE + 2 * MARGIN, first = layer1->width;
    float *outer = scratch, *middle = outer + PIXELS * padded * padded;
    /* PIXELS images at once fill the tiles and stay in the second-level cache. */
    for (int start = 0; start < n; start += PIXELS) {
        int count = n - start < PIXELS ? n - start : PIXELS;
        put_images(images + (size_t)start * SIDE * SIDE, count, outer);
        float *to = out + (size_t)start * half * half / 4 * layer2->width;
        convolve(outer, count, SIDE, 1, layer1, middle, MARGIN);
        convolve(middle, count, half, first, layer2, to, 0);
    }
}

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
    size_t middle_image = wide * middle_row;
    struct steps last = {narrow * last_row, last_row, second};
    struct steps every_other = {middle_image, 2 * middle_row, 2 * first};
    struct steps every = {middle_image, middle_row, first};
    struct steps squares = {SIDE * SIDE, 2 * SIDE, 2};
    for (int start = 0; start < n; start += PIXELS) {
        int count = n - start < PIXELS ? n - start : PIXELS;
        put_images(images + (size_t)start * SIDE * SIDE, count, outer);
        convolve(outer, count, SIDE, 1, layer1, middle, MARGIN);
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
                convolve_all(last_slope + y * last_row + x * second, last, count, quarter,
                             3 - y, last_row, (3 - x) * second, back2 + 2 * y + x,
                             middle_slope + at, every_other, middle + at, GATED);
            }
        convolve_all(middle_slope + (MARGIN - 1) * (middle_row + first), every, count, half, 3,
                     middle_row, 3 * first, back1, out + (size_t)start * SIDE * SIDE, squares,
                     out, SQUARE);
    }
}

int lanes(void) { return LANES; }
