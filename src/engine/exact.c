/* Votes of a ConvNN, or of several with their logits added, in integers, from the key of the noise to
   the counts, for a CPU.

   Everything is a whole number, but for the scale between two layers: there a sum below 2^24, which a
   float holds exactly, is multiplied once and rounded to the nearest whole number, ties to even. IEEE
   754 fixes both results. So the votes are the same on every processor, and those of exact.py, which
   is written for the reader. This file says the same for the processor.

   BATCH noisy copies go through the network together. A tile is one or two vectors of LANES channels at
   one place of all copies; its sums stay in registers. Places outside the image are left out. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef LANES
#ifdef __AVX512BW__
#define LANES 16
#else
#define LANES 8
#endif
#endif
#if LANES == 16 && defined(__AVX512BW__)
#define AVX512
#elif LANES == 8 && defined(__AVX2__)
#define AVX2
#endif

#define INLINE static inline __attribute__((always_inline))

enum { SIDE = 28, HALF = 14, QUARTER = 7, TAPS = 5, MARGIN = 2, BATCH = 8 };
/* Bytes of a row, and of a padded image with spare bytes: rows of the kernel are read in whole words. */
enum { ROW = 32, IMAGE = 33 * ROW };
/* Four bytes meet one vector of the kernel. */
enum { WORD = 4, LIMIT = 4095, PIXEL_MOST = 255, FEATURE_MOST = 127, LAST_MOST = 8191 };

typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef float floats __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint64_t longs __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int16_t shorts __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int32_t any_int __attribute__((aligned(1), may_alias));

_Static_assert(sizeof(ints) == 4 * LANES, "no vectors");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first byte is not the lowest");

INLINE ints all(int32_t value) { return value - (ints){0}; }
INLINE ints smaller(ints a, ints b) { ints less = a < b; return (a & less) | (b & ~less); }
INLINE ints larger(ints a, ints b) { ints less = a < b; return (b & less) | (a & ~less); }

/* The noise: Philox4x32-10 (Salmon et al., SC 2011) and an alias table; see noise.py and lattice.py. */

struct law { const uint32_t *entries, *lower; int32_t bits, lowest; };
/* Which noise: `seed` is the key, and the counter holds the block of 4 pixels, the copy, the number of
   the image and the stage. */
struct draw { uint64_t seed; uint32_t image, stage; };

static const uint32_t FACTOR0 = 0xD2511F53, FACTOR1 = 0xCD9E8D57, STEP0 = 0x9E3779B9, STEP1 = 0xBB67AE85;
enum { ROUNDS = 10, GROUP = 64, REFINE = 1 << 8 };

/* The lower halves of the longs, multiplied. */
INLINE longs product(longs a, uint32_t factor)
{
    longs b = factor - (longs){0};
#if defined(AVX512)
    return (longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(AVX2)
    return (longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
    return (a & 0xFFFFFFFF) * b;
#endif
}

/* The rounds, on counters in the lower halves of longs. The upper halves may hold anything. */
INLINE void philox(longs c[4], uint64_t seed)
{
    uint32_t key0 = seed, key1 = seed >> 32;
#pragma GCC unroll 10
    for (int round = 0; round < ROUNDS; round++, key0 += STEP0, key1 += STEP1) {
        longs a = product(c[0], FACTOR0), b = product(c[2], FACTOR1);
        c[0] = (b >> 32) ^ c[1] ^ key0;
        c[2] = (a >> 32) ^ c[3] ^ key1;
        c[1] = b, c[3] = a;
    }
}

/* One number of the noise again, with 32 more bits: the first 32 stood exactly at the threshold. */
static __attribute__((noinline)) int32_t refined(
    const struct draw *draw, const struct law *law, uint32_t block, uint32_t copy, int word, uint32_t cell)
{
    longs c[4] = {{block}, {copy}, {draw->image}, {draw->stage | REFINE}};
    philox(c, draw->seed);
    uint32_t below = (uint32_t)c[word][0] < law->lower[cell];
    uint32_t alias = law->entries[cell] & ((1u << law->bits) - 1);
    return (int32_t)(below ? cell : alias) + law->lowest;
}

/* The noise of GROUP pixels: pixel 16 w + l is number w of the block `first` + l. */
INLINE void draw_group(
    const struct draw *draw, const struct law *law, uint32_t first, uint32_t copy, int32_t noise[GROUP])
{
    enum { HALVES = 16 / LANES };
    const uint32_t mask = (1u << law->bits) - 1;
    for (int half = 0; half < HALVES; half++) {
        longs even[4], odd[4];
        for (int l = 0; l < LANES / 2; l++)
            even[0][l] = first + half * LANES + 2 * l;
        odd[0] = even[0] + 1;
        even[1] = odd[1] = copy - (longs){0};
        even[2] = odd[2] = draw->image - (longs){0};
        even[3] = odd[3] = draw->stage - (longs){0};
        philox(even, draw->seed);
        philox(odd, draw->seed);
#pragma GCC unroll 4
        for (int w = 0; w < 4; w++) {
            words random = (words)((even[w] & 0xFFFFFFFF) | odd[w] << 32);
            words cell = random & mask, entry;
#if defined(AVX512)
            entry = (words)_mm512_i32gather_epi32((__m512i)cell, law->entries, 4);
#else
            for (int l = 0; l < LANES; l++)
                entry[l] = law->entries[cell[l]];
#endif
            words found = random >> law->bits, threshold = entry >> law->bits;
            words own = (words)(found < threshold), equal = (words)(found == threshold);
            ints value = (ints)((cell & own) | (entry & mask & ~own)) + law->lowest;
            int32_t *to = noise + 16 * w + half * LANES;
            *(ints *)to = value;
            uint32_t any = 0;
#if defined(AVX512)
            any = _mm512_test_epi32_mask((__m512i)equal, (__m512i)equal);
#elif defined(AVX2)
            any = !_mm256_testz_si256((__m256i)equal, (__m256i)equal);
#else
            for (int l = 0; l < LANES; l++)
                any |= equal[l];
#endif
            if (__builtin_expect(any, 0))
                for (int l = 0; l < LANES; l++)
                    if (equal[l])
                        to[l] = refined(draw, law, first + half * LANES + l, copy, w, cell[l]);
        }
    }
}

/* Noisy copies `first` to `first` + n - 1 of an image of `pixels` whole steps, cut at -limit and limit:
   `out` (n, pixels). `image` is filled up to a multiple of GROUP. */
void noisy(const int32_t *image, uint32_t pixels, int32_t limit, const struct draw *draw,
           const struct law *law, uint32_t first, uint32_t n, int32_t *out)
{
    int32_t noise[GROUP];
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t start = 0; start < pixels; start += GROUP) {
            uint32_t count = pixels - start < GROUP ? pixels - start : GROUP;
            draw_group(draw, law, start / 4, first + i, noise);
            for (int l = 0; l < GROUP; l += LANES) {
                ints sum = *(const ints *)(image + start + l) + *(const ints *)(noise + l);
                *(ints *)(noise + l) = larger(smaller(sum, all(limit)), all(-limit));
            }
            memcpy(out, noise, sizeof(int32_t) * count);
            out += count;
        }
}

/* The network. Kernels are stored as (channels / LANES, ..., LANES, numbers of a WORD): in the order in
   which they are read. Widths are multiples of 16. */
struct layer { const char *kernel; const int32_t *bias; const float *scale; int32_t width; };
/* A pixel of p steps becomes (p * factor + shift) / 2^16, rounded down, cut at 0 and PIXEL_MOST, after p
   was cut at `low` and `high`. `zero` is what 0 becomes. */
struct pixels { int32_t low, high, factor, shift, zero; };
struct network {
    struct pixels pixels;
    struct layer first, second, hidden, output; /* hidden.width is 0 if there is no such layer */
    int32_t classes, multiplier; /* by which the logits are multiplied before they are added */
};

INLINE void store_bytes(uint8_t *to, ints values)
{
#if defined(AVX512)
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)values));
#elif defined(AVX2)
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)values), _mm256_extracti128_si256((__m256i)values, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(half, half));
#else
    *(bytes *)to = __builtin_convertvector(values, bytes);
#endif
}

INLINE void store_shorts(int16_t *to, ints values)
{
#if defined(AVX512)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)values));
#elif defined(AVX2)
    _mm_storeu_si128((__m128i *)to, _mm_packs_epi32(_mm256_castsi256_si128((__m256i)values),
                                                    _mm256_extracti128_si256((__m256i)values, 1)));
#else
    *(shorts *)to = __builtin_convertvector(values, shorts);
#endif
}

/* Steps of pixels in the middle of `to`, a padded image of bytes. */
static void put_pixels(const struct pixels *as, const int32_t *steps, uint8_t *to)
{
    uint8_t packed[SIDE * SIDE + LANES];
    for (int i = 0; i < SIDE * SIDE; i += LANES) {
        ints p = larger(smaller(*(const ints *)(steps + i), all(as->high)), all(as->low));
        p = (p * as->factor + as->shift) >> 16;
        store_bytes(packed + i, larger(smaller(p, all(PIXEL_MOST)), all(0)));
    }
    for (int y = 0; y < SIDE; y++)
        memcpy(to + (y + MARGIN) * ROW + MARGIN, packed + y * SIDE, SIDE);
}

/* A sum plus the products of four bytes at `four` with LANES channels' weights. */
INLINE ints add_word(ints sum, const uint8_t *four, ints weights)
{
    ints pixels = all(*(const any_int *)four);
#if defined(AVX512) && defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)pixels, (__m512i)weights);
#elif defined(AVX512)
    __m512i pairs = _mm512_maddubs_epi16((__m512i)pixels, (__m512i)weights);
    return sum + (ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(AVX2) && defined(__AVXVNNI__)
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)pixels, (__m256i)weights);
#elif defined(AVX2)
    __m256i pairs = _mm256_maddubs_epi16((__m256i)pixels, (__m256i)weights);
    return sum + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int byte = 0; byte < 4; byte++)
        sum += (pixels >> 8 * byte & 255) * (weights << (24 - 8 * byte) >> 24);
    return sum;
#endif
}

#if defined(AVX2) && !defined(__AVXVNNI__)
#define SUMMED 4
#else
#define SUMMED 1
#endif

/* SUMMED words at once. Where there is no instruction for dot products, products of neighbours are
   added in 16 bits, SUMMED times; exact.py keeps the weights small enough for that. */
INLINE ints add_words(ints sum, const uint8_t *from, const ints *weights)
{
#if SUMMED == 1
    return add_word(sum, from, weights[0]);
#else
    __m256i pairs = _mm256_maddubs_epi16((__m256i)all(*(const any_int *)from), (__m256i)weights[0]);
    for (int k = 1; k < SUMMED; k++)
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(
            (__m256i)all(*(const any_int *)(from + WORD * k)), (__m256i)weights[k]));
    return sum + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

/* A sum plus two products of 16 bits for each of LANES channels. */
INLINE ints add_pair(ints sum, const int16_t *two, ints weights)
{
    ints values = all(*(const any_int *)two);
#if defined(AVX512)
    return sum + (ints)_mm512_madd_epi16((__m512i)values, (__m512i)weights);
#elif defined(AVX2)
    return sum + (ints)_mm256_madd_epi16((__m256i)values, (__m256i)weights);
#else
    return sum + (values << 16 >> 16) * (weights << 16 >> 16) + (values >> 16) * (weights >> 16);
#endif
}

/* The sums as the next layer counts, from 0 to `most`. */
INLINE ints scaled(ints sum, const float *scale, int most)
{
    floats value = __builtin_convertvector(sum, floats) * *(const floats *)scale;
#if defined(AVX512)
    value = (floats)_mm512_min_ps(_mm512_max_ps((__m512)value, _mm512_setzero_ps()), _mm512_set1_ps(most));
    return (ints)_mm512_cvtps_epi32((__m512)value);
#elif defined(AVX2)
    value = (floats)_mm256_min_ps(_mm256_max_ps((__m256)value, _mm256_setzero_ps()), _mm256_set1_ps(most));
    return (ints)_mm256_cvtps_epi32((__m256)value);
#else
    floats top = (floats){0} + (float)most;
    ints over = value > top;
    value = (floats)((ints)value & ~(ints)(value < 0));
    value = (floats)(((ints)value & ~over) | ((ints)top & over));
    /* A float of this size has no room for fractions, so the addition rounds. */
    floats large = (floats){0} + 12582912;
    return __builtin_convertvector(value + large - large, ints);
#endif
}

/* Features lie as (places, BATCH, width). This adds `places` neighbours of them, from `from` on, to the
   sums of `vectors` * LANES channels. `stride` are bytes from the kernel of one vector to the next. */
INLINE void add_places(ints sum[BATCH][2], int vectors, const uint8_t *from, int places, int width,
                       const char *kernel, size_t stride)
{
    for (int x = 0; x < places; x++, from += (size_t)BATCH * width)
        for (int k = 0; k < width; k += WORD * SUMMED, kernel += WORD * SUMMED * LANES) {
            ints weights[2][SUMMED];
            for (int v = 0; v < vectors; v++)
                for (int s = 0; s < SUMMED; s++)
                    weights[v][s] = *(const ints *)(kernel + v * stride + s * WORD * LANES);
#pragma GCC unroll 8
            for (int p = 0; p < BATCH; p++)
                for (int v = 0; v < vectors; v++)
                    sum[p][v] = add_words(sum[p][v], from + p * width + k, weights[v]);
        }
}

/* The first convolution: padded images (BATCH, IMAGE) -> `out` (14 * 14, BATCH, width). */
INLINE void convolve_pixels(const uint8_t *images, const struct layer *layer, uint8_t *out, int vectors)
{
    enum { RUN = 2 * WORD };
    const size_t stride = TAPS * RUN * LANES;
    for (int c = 0; c < layer->width; c += vectors * LANES) {
        const char *kernel = layer->kernel + c / LANES * stride;
        for (int y = 0; y < HALF; y++)
            for (int x = 0; x < HALF; x++) {
                const uint8_t *from = images + 2 * y * ROW + 2 * x;
                ints sum[BATCH][2];
                for (int p = 0; p < BATCH; p++)
                    for (int v = 0; v < vectors; v++)
                        sum[p][v] = *(const ints *)(layer->bias + c + v * LANES);
#pragma GCC unroll 5
                for (int row = 0; row < TAPS; row++)
#pragma GCC unroll 2
                    for (int k = 0; k < RUN; k += WORD)
#pragma GCC unroll 2
                        for (int v = 0; v < vectors; v++) {
                            ints weights = *(const ints *)(kernel + v * stride + (row * RUN + k) * LANES);
#pragma GCC unroll 8
                            for (int p = 0; p < BATCH; p++)
                                sum[p][v] = add_word(sum[p][v], from + p * IMAGE + row * ROW + k, weights);
                        }
                uint8_t *to = out + (size_t)(y * HALF + x) * BATCH * layer->width + c;
                for (int p = 0; p < BATCH; p++)
                    for (int v = 0; v < vectors; v++)
                        store_bytes(to + p * layer->width + v * LANES,
                                    scaled(sum[p][v], layer->scale + c + v * LANES, FEATURE_MOST));
            }
    }
}

/* Where the sums of a layer go: bytes for the next but one layer, 16 bits for the output. */
INLINE void put(ints sum, const float *scale, void *out, size_t at, int last)
{
    if (last)
        store_shorts((int16_t *)out + at, scaled(sum, scale, LAST_MOST));
    else
        store_bytes((uint8_t *)out + at, scaled(sum, scale, FEATURE_MOST));
}

/* The second convolution: `in` (14 * 14, BATCH, width) -> `out` (7 * 7, BATCH, layer->width). */
INLINE void convolve_features(
    const uint8_t *in, int width, const struct layer *layer, void *out, int last, int vectors)
{
    const size_t stride = (size_t)TAPS * TAPS * width * LANES;
    for (int c = 0; c < layer->width; c += vectors * LANES)
        for (int y = 0; y < QUARTER; y++)
            for (int x = 0; x < QUARTER; x++) {
                int left = 2 * x - MARGIN, start = left < 0 ? 0 : left;
                int places = (left + TAPS > HALF ? HALF : left + TAPS) - start;
                ints sum[BATCH][2];
                for (int p = 0; p < BATCH; p++)
                    for (int v = 0; v < vectors; v++)
                        sum[p][v] = *(const ints *)(layer->bias + c + v * LANES);
                for (int row = 0; row < TAPS; row++) {
                    int line = 2 * y - MARGIN + row;
                    if (line < 0 || line >= HALF)
                        continue;
                    const char *kernel = layer->kernel + c / LANES * stride;
                    kernel += (size_t)(row * TAPS + start - left) * width * LANES;
                    add_places(sum, vectors, in + (size_t)(line * HALF + start) * BATCH * width, places,
                               width, kernel, stride);
                }
                for (int p = 0; p < BATCH; p++)
                    for (int v = 0; v < vectors; v++) {
                        size_t at = ((size_t)(y * QUARTER + x) * BATCH + p) * layer->width + c + v * LANES;
                        put(sum[p][v], layer->scale + c + v * LANES, out, at, last);
                    }
            }
}

/* The hidden layer: `in` (7 * 7, BATCH, width) -> `out` (BATCH, layer->width). */
static void connect(const uint8_t *in, int width, const struct layer *layer, int16_t *out)
{
    enum { VECTORS = LANES == 16 ? 2 : 1 };
    const size_t stride = (size_t)QUARTER * QUARTER * width * LANES;
    for (int c = 0; c < layer->width; c += VECTORS * LANES) {
        int vectors = layer->width - c < VECTORS * LANES ? 1 : VECTORS;
        const char *kernel = layer->kernel + c / LANES * stride;
        ints sum[BATCH][2];
        for (int p = 0; p < BATCH; p++)
            for (int v = 0; v < vectors; v++)
                sum[p][v] = *(const ints *)(layer->bias + c + v * LANES);
        if (vectors == 2)
            add_places(sum, 2, in, QUARTER * QUARTER, width, kernel, stride);
        else
            add_places(sum, 1, in, QUARTER * QUARTER, width, kernel, stride);
        for (int p = 0; p < BATCH; p++)
            for (int v = 0; v < vectors; v++)
                put(sum[p][v], layer->scale + c + v * LANES, out, (size_t)p * layer->width + c + v * LANES, 1);
    }
}

/* The output: `in` (places, BATCH, width) -> `out` (BATCH, layer->width). */
static void put_logits(const int16_t *in, int places, int width, const struct layer *layer, int32_t *out)
{
    const size_t stride = (size_t)places * width * sizeof(int16_t) * LANES;
    for (int c = 0; c < layer->width; c += LANES) {
        const char *kernel = layer->kernel + c / LANES * stride;
        const int16_t *from = in;
        ints sum[BATCH];
        for (int p = 0; p < BATCH; p++)
            sum[p] = *(const ints *)(layer->bias + c);
        for (int place = 0; place < places; place++, from += (size_t)BATCH * width)
            for (int k = 0; k < width; k += 2, kernel += WORD * LANES) {
                ints weights = *(const ints *)kernel;
#pragma GCC unroll 8
                for (int p = 0; p < BATCH; p++)
                    sum[p] = add_pair(sum[p], from + p * width + k, weights);
            }
        for (int p = 0; p < BATCH; p++)
            *(ints *)(out + (size_t)p * layer->width + c) = sum[p];
    }
}

/* Bytes that `logits_of` needs as scratch. */
static size_t features_size(const struct network *network)
{
    size_t second = 2 * QUARTER * QUARTER * network->second.width, hidden = 2 * network->hidden.width;
    size_t first = HALF * HALF * network->first.width, logits = 4 * network->output.width;
    return BATCH * (first + second + hidden + logits) + 64;
}

/* Logits (BATCH, output.width), which lie in `scratch`, of padded images (BATCH, IMAGE). */
static const int32_t *logits_of(const struct network *network, const uint8_t *images, char *scratch)
{
    const struct layer *first = &network->first, *second = &network->second;
    int hidden = network->hidden.width, places = hidden ? 1 : QUARTER * QUARTER;
    uint8_t *middle = (uint8_t *)scratch;
    void *features = middle + (size_t)BATCH * HALF * HALF * first->width;
    int16_t *last = (int16_t *)features + (hidden ? BATCH * QUARTER * QUARTER * second->width : 0);
    int32_t *logits = (int32_t *)(last + (size_t)BATCH * places * (hidden ? hidden : second->width));
    enum { VECTORS = LANES == 16 ? 2 : 1 };
    if (first->width % (VECTORS * LANES))
        convolve_pixels(images, first, middle, 1);
    else
        convolve_pixels(images, first, middle, VECTORS);
#define CONVOLVE(width, vectors) convolve_features(middle, width, second, features, !hidden, vectors)
    if (second->width % (VECTORS * LANES))
        CONVOLVE(first->width, 1);
    else if (first->width == 16)
        CONVOLVE(16, VECTORS);
    else if (first->width == 32)
        CONVOLVE(32, VECTORS);
    else
        CONVOLVE(first->width, VECTORS);
    if (hidden)
        connect(features, second->width, &network->hidden, last);
    put_logits(last, places, hidden ? hidden : second->width, &network->output, logits);
    return logits;
}

/* The first of the largest logits of every copy: `classes` (count,). */
static void decide(const struct network *network, const int64_t *logits, int count, int32_t *classes)
{
    for (int p = 0; p < count; p++, logits += network->output.width) {
        classes[p] = 0;
        for (int c = 1; c < network->classes; c++)
            if (logits[c] > logits[classes[p]])
                classes[p] = c;
    }
}

/* Several networks are the `members` of an ensemble, and one network is its only member. The functions
   below need so many bytes as scratch: for padded images (members, BATCH, IMAGE), sums of logits (BATCH,
   output.width), and what `logits_of` needs. */
size_t scratch_size(const struct network *networks, int32_t members)
{
    size_t features = 0;
    for (int m = 0; m < members; m++)
        if (features < features_size(networks + m))
            features = features_size(networks + m);
    return BATCH * ((size_t)members * IMAGE + sizeof(int64_t) * networks->output.width) + features;
}

static void clear_images(const struct network *networks, int32_t members, char *scratch)
{
    for (int m = 0; m < members; m++)
        memset(scratch + (size_t)m * BATCH * IMAGE, networks[m].pixels.zero, BATCH * IMAGE);
}

/* Copy number p of a batch, for every member. */
static void put_copy(
    const struct network *networks, int32_t members, const int32_t *steps, int p, char *scratch)
{
    for (int m = 0; m < members; m++)
        put_pixels(&networks[m].pixels, steps, (uint8_t *)scratch + ((size_t)m * BATCH + p) * IMAGE);
}

/* Sums of the logits (BATCH, output.width) of the copies that `put_copy` put, which lie in `scratch`. */
static const int64_t *sums_of(const struct network *networks, int32_t members, char *scratch)
{
    const size_t count = BATCH * networks->output.width;
    int64_t *sums = (int64_t *)(scratch + (size_t)members * BATCH * IMAGE);
    memset(sums, 0, sizeof(int64_t) * count);
    for (int m = 0; m < members; m++) {
        const uint8_t *images = (const uint8_t *)scratch + (size_t)m * BATCH * IMAGE;
        const int32_t *logits = logits_of(networks + m, images, (char *)(sums + count));
        for (size_t i = 0; i < count; i++)
            sums[i] += (int64_t)logits[i] * networks[m].multiplier;
    }
    return sums;
}

/* Sums of the logits of `images` (n, 784), in whole steps within the limit: `out` (n, output.width). */
void forward(const int32_t *images, int32_t n, const struct network *networks, int32_t members,
             char *scratch, int64_t *out)
{
    const size_t width = networks->output.width;
    clear_images(networks, members, scratch);
    int32_t steps[SIDE * SIDE + LANES] = {0};
    for (int32_t start = 0; start < n; start += BATCH) {
        int count = n - start < BATCH ? n - start : BATCH;
        for (int p = 0; p < count; p++) {
            memcpy(steps, images + (size_t)(start + p) * SIDE * SIDE, sizeof(int32_t) * SIDE * SIDE);
            put_copy(networks, members, steps, p, scratch);
        }
        memcpy(out + start * width, sums_of(networks, members, scratch), sizeof(int64_t) * count * width);
    }
}

/* Adds the votes on the noisy copies `first` to `first` + n - 1 to `counts` (classes,). `image` (832,)
   are whole steps, filled up. */
void votes(const int32_t *image, const struct draw *draw, const struct law *law, uint32_t first, uint32_t n,
           const struct network *networks, int32_t members, char *scratch, int64_t *counts)
{
    enum { GROUPS = (SIDE * SIDE + GROUP - 1) / GROUP };
    int32_t steps[GROUPS * GROUP], classes[BATCH];
    clear_images(networks, members, scratch);
    for (uint32_t start = 0; start < n; start += BATCH) {
        int count = n - start < BATCH ? n - start : BATCH;
        for (int p = 0; p < count; p++) {
            for (int g = 0; g < GROUPS; g++)
                draw_group(draw, law, g * GROUP / 4, first + start + p, steps + g * GROUP);
            for (int i = 0; i < GROUPS * GROUP; i += LANES)
                *(ints *)(steps + i) += *(const ints *)(image + i);
            put_copy(networks, members, steps, p, scratch);
        }
        decide(networks, sums_of(networks, members, scratch), count, classes);
        for (int p = 0; p < count; p++)
            counts[classes[p]]++;
    }
}

int lanes(void) { return LANES; }
