/* How fast this processor adds up products of integers, for benchmarks/certification.py. */

#include "../src/engine/exact.c"

/* Any vector register; without vectors, memory. */
#if defined(AVX512)
#define KEEP(value) "+v"(value)
#elif defined(AVX2)
#define KEEP(value) "+x"(value)
#else
#define KEEP(value) "+m"(value)
#endif

/* `n` times 16 dot products of a WORD, in registers. */
int peak(int64_t n)
{
    enum { SUMS = LANES == 16 ? 16 : 8 };
    ints sum[SUMS] = {{0}}, weights = all(0x01020301);
    uint8_t four[WORD] = {1, 2, 3, 4};
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++) {
            sum[k % SUMS] = add_word(sum[k % SUMS], four, weights);
            /* The compiler must not add up several at once. */
            __asm__ volatile("" : KEEP(sum[k % SUMS]));
        }
    int total = 0;
    for (int k = 0; k < SUMS; k++)
        total += sum[k][0];
    return total;
}
