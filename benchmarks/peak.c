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

/* `n` times 8 dot products of a WORD, in registers: enough to hide how long one takes. */
int peak(int64_t n)
{
    ints a = all(0), b = a, c = a, d = a, e = a, f = a, g = a, h = a, weights = all(0x01020301);
    uint8_t four[WORD] = {1, 2, 3, 4};
    /* The compiler must not add up several at once, nor multiply once for all. */
#define ADD(sum) sum = add_word(sum, four, weights); __asm__ volatile("" : KEEP(sum), KEEP(weights))
    for (int64_t i = 0; i < n; i++) {
        ADD(a); ADD(b); ADD(c); ADD(d); ADD(e); ADD(f); ADD(g); ADD(h);
    }
    return (a + b + c + d + e + f + g + h)[0];
}
