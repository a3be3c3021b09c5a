/* What the codes' kernels share: blocks, rows, float32 and its bits.
 *
 * C with the compiler's vectors: no allocation, no Python, one intrinsic (`stream`). Every float is
 * rounded on its own (-ffp-contract=off), so that each byte is the reference's. cpu.py checks sizes,
 * tiers and dtypes before it calls; a row is one (head, token), rows are counted head by head.
 */
#ifndef KVPRISM_CPU_H
#define KVPRISM_CPU_H

#include <float.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#if FLT_EVAL_METHOD != 0
#error "float32 is not computed in float32 here: the bytes would differ from the reference"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "planes are little-endian, and so must be the machine"
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

/* One library for every x86-64: the loader picks the version for the processor that it finds. Without
 * SSSE3 a vector cannot be looked up in: the last version is right, and slow at it. (-DEVERY_CPU= makes
 * one version, for the processor that the compiler is told of.) */
#if !defined(EVERY_CPU) && defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define EVERY_CPU __attribute__((target_clones("avx2", "sse4.1", "default")))
#endif
#endif
#ifndef EVERY_CPU
#define EVERY_CPU
#endif

#define TILE 32          /* rows whose scales are computed together: divisions overlap */
#define LINE 64          /* bytes that memory moves at once */
#define STAGE 1024       /* bytes of a row that is streamed, at most */
#define WIDEST 256       /* channels of a row that is no plain one of kvp.nested/1, at most */
#define LARGEST 65504.0f /* of float16 */

enum dtype { BFLOAT16, FLOAT16, FLOAT32 };
enum kind { SKIP, NATIVE, EIGHT, FOUR, KINDS };

/* One block and its planes; cpu.py has the same fields in the same order. Strides are in bytes. */
typedef struct {
    uint8_t *rows; /* [head, token, channel]: `encode` reads it, `decode` writes it */
    const uint8_t *tiers;
    uint8_t *native, *scale, *anchor, *residual, *byte;
    int64_t head_stride, token_stride;
    int64_t tier_head_stride, tier_token_stride;
    int64_t tokens, channels, itemsize;
    int64_t group; /* channels of a row that share a scale: all, 32, or 1 where rows share it */
    int32_t dtype;
    int32_t large;    /* more bytes than the caches hold: `decode` may write around them */
    uint8_t kind[16]; /* of each tier of the menu */
    /* Key conditioning, or NULL: [token, channels / 2], [head, channels], [head, channels / 2]. */
    const float *cosine, *sine, *offset, *divisor;
    float normal; /* of the Hadamard transform, 0 without */
} Block;

/* ---- vectors of the compiler's own; where the processor has shorter ones, it cuts them ---- */

#define VECTOR(bytes) __attribute__((vector_size(bytes)))
typedef float Floats VECTOR(32);
typedef int32_t Ints VECTOR(32);
typedef uint32_t Words VECTOR(32);
typedef uint16_t Pairs VECTOR(32);
typedef uint64_t Longs VECTOR(32);
typedef uint8_t Sixteen VECTOR(16);

#ifdef __clang__
#define PICK(mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define LOOK_UP(table, at) each_looked_up(table, at) /* clang has no such operation */
INLINE Sixteen each_looked_up(Sixteen table, Sixteen at) {
    Sixteen found;
    for (int i = 0; i < 16; i++) found[i] = table[at[i]];
    return found;
}
#else
#define PICK(mask, a, b, ...) __builtin_shuffle(a, b, (mask){__VA_ARGS__})
#define LOOK_UP(table, at) __builtin_shuffle(table, at)
#endif

/* Read or write a vector at any address. */
#define GET(x, at) memcpy(&(x), at, sizeof(x))
#define PUT(at, x) memcpy(at, &(x), sizeof(x))

/* ---- float32 and its bits ---- */

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* `yes` if `condition` (0 or 1), else `no`: no branch that would keep a loop from being vectorised. */
INLINE uint32_t either(uint32_t condition, uint32_t yes, uint32_t no) {
    return (yes & -condition) | (no & ~-condition);
}

/* A float16 that is not negative, inf or NaN; the sign of -0 is lost. */
INLINE float half_to_float(uint32_t half) {
    uint32_t size = half & 0x7fff, normal = (size << 13) + (112u << 23);
    return float_of(either(size < 0x400, bits_of((float)(int32_t)size * 0x1p-24f), normal));
}

/* A float16 that is finite: read as float32, subnormal or not, it is 2^112 times too small. */
INLINE float any_half_to_float(uint32_t half) {
    return float_of((uint32_t)((int32_t)(half << 16) >> 3) & 0x8fffe000) * 0x1p112f;
}

/* The float16 next to x that is not below it (up: 1) or not above it (0), for 0 <= x <= LARGEST. */
INLINE uint32_t half_beside(float x, uint32_t up) {
    uint32_t normal = (bits_of(x) - (112u << 23) + (0x1fff & -up)) >> 13;
    int32_t tiny = x < 0x1p-14f;
    float steps = float_of(either(tiny, bits_of(x), 0)) * 0x1p24f; /* of a subnormal one: exact */
    int32_t whole = (int32_t)steps;
    return either(tiny, (uint32_t)whole + (up & ((float)whole < steps)), normal);
}

INLINE uint32_t half_not_below(float x) { return half_beside(x, 1); }

/* Nearest float16, halves to even; what is too large becomes inf. x is not NaN. */
INLINE uint16_t float_to_half(float x) {
    uint32_t sign = bits_of(x) & 0x80000000u, size = bits_of(x) ^ sign;
    uint32_t normal = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
    /* At 0.5 a float32 step is the subnormal float16 step: the addition rounds. */
    uint32_t subnormal = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    uint32_t half = size < 0x38800000u ? subnormal : normal;
    half = size >= 0x477ff000u ? 0x7c00u : half;
    return (uint16_t)(half | sign >> 16);
}

/* Nearest bfloat16 in the upper 16 bits, anything below; halves to even. x is not NaN. */
INLINE uint32_t nearest_bfloat(float x) {
    uint32_t bits = bits_of(x);
    return bits + 0x7fff + (bits >> 16 & 1);
}

/* ---- rows ---- */

INLINE float load(const void *row, int64_t i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)row)[i];
    uint32_t half = ((const uint16_t *)row)[i];
    return dtype == BFLOAT16 ? float_of(half << 16) : any_half_to_float(half);
}

INLINE void store(void *row, int64_t i, int dtype, float x) {
    if (dtype == FLOAT32) ((float *)row)[i] = x;
    if (dtype == FLOAT16) ((uint16_t *)row)[i] = float_to_half(x);
    if (dtype == BFLOAT16) ((uint16_t *)row)[i] = (uint16_t)(nearest_bfloat(x) >> 16);
}

/* The bits of values that were written as float32. */
typedef int32_t Pattern __attribute__((may_alias));

/* max|x| as float32; inf or NaN when the row holds one. Bit patterns are ordered like sizes. */
INLINE float absmax(const void *row, int64_t channels, int dtype) {
    if (dtype == FLOAT32) {
        const Pattern *x = row;
        int32_t most = 0;
        for (int64_t i = 0; i < channels; i++) {
            int32_t size = x[i] & 0x7fffffff;
            most = size > most ? size : most;
        }
        return float_of((uint32_t)most);
    }
    const int16_t *x = row;
    int16_t most = 0;
    for (int64_t i = 0; i < channels; i++) {
        int16_t size = (int16_t)(x[i] & 0x7fff);
        most = size > most ? size : most;
    }
    if (dtype == BFLOAT16) return float_of((uint32_t)most << 16);
    return most < 0x7c00 ? half_to_float((uint32_t)most) : float_of(0x7f800000u);
}

INLINE void widen(const uint8_t *row, int64_t channels, int32_t dtype, float *x) {
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < channels; i++) x[i] = load(row, i, BFLOAT16);
    else if (dtype == FLOAT16)
        for (int64_t i = 0; i < channels; i++) x[i] = load(row, i, FLOAT16);
    else
        memcpy(x, row, (size_t)channels * sizeof *x);
}

/* 0 when a value is beyond the dtype, or NaN. */
INLINE int32_t narrow(const float *x, int64_t channels, int32_t dtype, uint8_t *row) {
    float most = dtype == BFLOAT16 ? 0x1.fep127f : dtype == FLOAT16 ? LARGEST : FLT_MAX;
    int32_t beyond = 0;
    for (int64_t i = 0; i < channels; i++) beyond |= !(float_of(bits_of(x[i]) & 0x7fffffff) <= most);
    if (beyond) return 0;
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < channels; i++) store(row, i, BFLOAT16, x[i]);
    else if (dtype == FLOAT16)
        for (int64_t i = 0; i < channels; i++) store(row, i, FLOAT16, x[i]);
    else
        memcpy(row, x, (size_t)channels * sizeof *x);
    return 1;
}

/* ---- the Walsh-Hadamard transform, each addition as condition.py has it ---- */

/* x + y, and x - y in the lanes of `minus`: to subtract is to add with the other sign. */
INLINE Floats added(Floats x, Floats y, Words minus) { return x + (Floats)((Words)y ^ minus); }

/* The butterflies of widths 1, 2 and 4. */
INLINE Floats narrow_butterflies(Floats x) {
    const uint32_t m = 0x80000000u;
    x = added(PICK(Ints, x, x, 0, 0, 2, 2, 4, 4, 6, 6), PICK(Ints, x, x, 1, 1, 3, 3, 5, 5, 7, 7),
              (Words){0, m, 0, m, 0, m, 0, m});
    x = added(PICK(Ints, x, x, 0, 1, 0, 1, 4, 5, 4, 5), PICK(Ints, x, x, 2, 3, 2, 3, 6, 7, 6, 7),
              (Words){0, 0, m, m, 0, 0, m, m});
    return added(PICK(Ints, x, x, 0, 1, 2, 3, 0, 1, 2, 3), PICK(Ints, x, x, 4, 5, 6, 7, 4, 5, 6, 7),
                 (Words){0, 0, 0, 0, m, m, m, m});
}

/* Those of two widths more, at four places that far from each other; narrow: of 1, 2 and 4 before. */
INLINE void four_butterflies(float *x, int64_t width, int narrow) {
    Floats a, b, c, d;
    GET(a, x);
    GET(b, x + width);
    GET(c, x + 2 * width);
    GET(d, x + 3 * width);
    if (narrow) {
        a = narrow_butterflies(a), b = narrow_butterflies(b);
        c = narrow_butterflies(c), d = narrow_butterflies(d);
    }
    Floats ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
    a = ab + cd, b = a_b + c_d, c = ab - cd, d = a_b - c_d;
    PUT(x, a);
    PUT(x + width, b);
    PUT(x + 2 * width, c);
    PUT(x + 3 * width, d);
}

/* Those of one width. */
INLINE void butterflies(float *x, int64_t channels, int64_t width) {
    for (int64_t i = 0; i < channels; i += 2 * width)
        for (int64_t j = i; j < i + width; j++) {
            float first = x[j], second = x[j + width];
            x[j] = first + second, x[j + width] = first - second;
        }
}

/* channels: a power of two. */
INLINE void hadamard(float *x, int64_t channels, float normal) {
    int64_t width = channels < 32 ? 1 : 32;
    for (int64_t i = 0; i + 32 <= channels; i += 32) four_butterflies(x + i, 8, 1);
    for (; width >= 32 && 2 * width < channels; width *= 4)
        for (int64_t i = 0; i < channels; i += 4 * width)
            for (int64_t j = i; j < i + width; j += 8) four_butterflies(x + j, width, 0);
    for (; width < channels; width *= 2) butterflies(x, channels, width);
    for (int64_t i = 0; i < channels; i++) x[i] *= normal;
}

/* ---- rows of a block ---- */

/* A row of a block, and the rows after it. */
typedef struct {
    uint8_t *row;
    const uint8_t *tier;
    int64_t head, token;
} Walk;

INLINE Walk row_at(const Block *block, int64_t head, int64_t token) {
    return (Walk){
        block->rows + head * block->head_stride + token * block->token_stride,
        block->tiers + head * block->tier_head_stride + token * block->tier_token_stride,
        head,
        token,
    };
}

INLINE void step(Walk *at, const Block *block) {
    at->row += block->token_stride, at->tier += block->tier_token_stride;
    if (++at->token == block->tokens) *at = row_at(block, at->head + 1, 0);
}

INLINE int kind_of(const Block *block, const Walk *at) { return block->kind[*at->tier & 15]; }

/* Ask for the row that stands a tile further: when this tile is done, it has come. */
INLINE void fetch_next(const uint8_t *row, int64_t token_stride, int64_t nbytes) {
    uintptr_t next = (uintptr_t)row + (uintptr_t)(TILE * token_stride);
    for (int64_t line = 0; line < nbytes; line += 64)
        __builtin_prefetch((const void *)(next + (uintptr_t)line));
}

/* ---- key conditioning, as condition.py has it, operation by operation ---- */

INLINE void turn(float *restrict x, int64_t half, const float *cosine, const float *sine) {
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cosine[i] - second * sine[i];
        x[i + half] = second * cosine[i] + first * sine[i];
    }
}

INLINE void condition(const Block *block, const Walk *at, int64_t channels, float *restrict x) {
    int64_t half = channels / 2;
    const float *offset = block->offset + at->head * channels;
    const float *divisor = block->divisor + at->head * half;
    widen(at->row, channels, block->dtype, x);
    turn(x, half, block->cosine + at->token * half, block->sine + at->token * half);
    for (int64_t i = 0; i < half; i++) {
        x[i] = (x[i] - offset[i]) / divisor[i];
        x[i + half] = (x[i + half] - offset[i + half]) / divisor[i];
    }
    if (block->normal > 0) hadamard(x, channels, block->normal);
}

/* 0 when a value is beyond the dtype. */
INLINE int32_t restore(const Block *block, const Walk *at, int64_t channels, float *restrict x) {
    int64_t half = channels / 2;
    const float *offset = block->offset + at->head * channels;
    const float *divisor = block->divisor + at->head * half;
    if (block->normal > 0) hadamard(x, channels, block->normal);
    for (int64_t i = 0; i < half; i++) {
        x[i] = x[i] * divisor[i] + offset[i];
        x[i + half] = x[i + half] * divisor[i] + offset[i + half];
    }
    turn(x, half, block->cosine + at->token * half, block->sine + at->token * half);
    return narrow(x, channels, block->dtype, at->row);
}

/* ---- rows written around the caches ----
 *
 * An ordinary store first reads the line that it overwrites. Of a block that no cache holds, rows are
 * made in a stage that the nearest cache holds, and leave it by stores that read nothing. Those are
 * cheap only where whole lines are written one after the other.
 */

INLINE int streams(const Block *block) {
#ifdef __SSE2__
    int64_t nbytes = block->channels * block->itemsize;
    uint64_t any = (uint64_t)(uintptr_t)block->rows | (uint64_t)block->head_stride |
                   (uint64_t)block->token_stride | (uint64_t)nbytes;
    return block->large && nbytes <= STAGE && any % LINE == 0;
#else
    (void)block;
    return 0;
#endif
}

/* memcpy to whole lines, of a block that `streams`. */
INLINE void stream(uint8_t *row, const uint8_t *from, int64_t nbytes) {
#ifdef __SSE2__
    for (int64_t i = 0; i < nbytes; i += 16)
        _mm_stream_si128((__m128i *)(row + i), _mm_loadu_si128((const __m128i *)(from + i)));
#else
    memcpy(row, from, (size_t)nbytes);
#endif
}

/* Streamed rows are in no order with other stores until here. */
INLINE void end_streams(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

#endif
