/* kvp.nested/1 at memory speed; codec/reference.py is the definition, docs/format.md section 6 the text.
 *
 * C with the compiler's vectors: no allocation, no Python, one intrinsic (`stream`). Every float is rounded on
 * its own (-ffp-contract=off), so that each byte is the reference's. cpu.py checks sizes, tiers and
 * dtypes before it calls; a row is one (head, token), rows are counted head by head.
 */
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

#ifndef KVPRISM_SOURCE
#define KVPRISM_SOURCE "unknown"
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
#define STEP 32          /* channels of each half of a row that vectors take at once */
#define LINE 64          /* bytes that memory moves at once */
#define STAGE 1024       /* bytes of a row that is streamed, at most */
#define WIDEST 256       /* channels of a conditioned row, at most */
#define LEVELS 119.0f    /* codes lie in [-LEVELS, LEVELS] */
#define LARGEST 65504.0f /* of float16 */

enum dtype { BFLOAT16, FLOAT16, FLOAT32 };
enum kind { SKIP, NATIVE, EIGHT, FOUR, KINDS };

/* One block and its planes; cpu.py has the same fields in the same order. Strides are in bytes. */
typedef struct {
    uint8_t *rows; /* [head, token, channel]: `encode` reads it, `decode` writes it */
    const uint8_t *tiers;
    uint8_t *native, *scale, *anchor, *residual;
    int64_t head_stride, token_stride;
    int64_t tier_head_stride, tier_token_stride;
    int64_t tokens, channels, itemsize;
    int32_t dtype;
    int32_t large;    /* more bytes than the caches hold: `decode` may write around them */
    uint8_t kind[16]; /* of each tier of the menu */
    /* Key conditioning, or NULL: [token, channels / 2], [head, channels], [head, channels / 2]. */
    const float *cosine, *sine, *offset, *divisor;
    float normal; /* of the Hadamard transform, 0 without */
} Block;

/* Where the next row of each plane stands. */
typedef struct {
    uint8_t *native, *scale, *anchor, *residual;
} Cursor;

/* Quantised rows that wait until their scales are computed together. */
typedef struct {
    const uint8_t *row[TILE];
    uint8_t eight[TILE];
    int64_t n;
} Tile;

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

/* The smallest float16 that is not below x, for 0 <= x <= LARGEST. */
INLINE uint32_t half_not_below(float x) {
    uint32_t normal = (bits_of(x) - (112u << 23) + 0x1fff) >> 13;
    int32_t tiny = x < 0x1p-14f;
    float steps = float_of(either(tiny, bits_of(x), 0)) * 0x1p24f; /* of a subnormal one: exact */
    int32_t whole = (int32_t)steps;
    return either(tiny, (uint32_t)whole + ((float)whole < steps), normal);
}

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

/* max|x| as float32; inf or NaN when the row holds one. Bit patterns are ordered like sizes. */
INLINE float absmax(const void *row, int64_t channels, int dtype) {
    if (dtype == FLOAT32) {
        const int32_t *x = row;
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

/* Codes are raised by 136, and with them both nibbles by 8, so that none is negative. At 1.5 * 2^23 a
 * float32 step is 1: adding it rounds, halves to even, and the low 16 bits are the integer. */
#define ROUND (12582912.0f + 136.0f)

/* q + 136, for q = round_half_to_even(x * inverse) in [-119, 119]. */
INLINE uint32_t code(float x, float inverse) { return bits_of(x * inverse + ROUND); }

/* (16 a - 1/2) * scale, for a + 8 in 0 ... 15. A sixteenth of the code times 16: both are exact. */
INLINE float restored_4(uint32_t raised, float scale) {
    return ((float)(int32_t)raised - (8.0f + 1.0f / 32)) * (16 * scale);
}

/* q * scale, for q + 136 = 16 (a + 8) + residual in 0 ... 255. */
INLINE float restored_8(uint32_t raised, float scale) {
    return (float)((int32_t)raised - 136) * scale;
}

INLINE void encode_channels(const void *restrict row, float inverse, int64_t half, int dtype,
                            int eight, uint8_t *restrict anchor, uint8_t *restrict residual) {
    for (int64_t i = 0; i < half; i++) {
        uint8_t low = (uint8_t)code(load(row, i, dtype), inverse);
        uint8_t high = (uint8_t)code(load(row, i + half, dtype), inverse);
        anchor[i] = (uint8_t)((low >> 4 | (high & 0xf0)) ^ 0x88);
        if (eight) residual[i] = (uint8_t)((low & 15) | high << 4);
    }
}

INLINE void decode_channels_4(void *restrict row, float scale, int64_t half, int dtype,
                              const uint8_t *restrict anchor) {
    for (int64_t i = 0; i < half; i++) {
        uint32_t both = anchor[i] ^ 0x88u;
        store(row, i, dtype, restored_4(both & 15, scale));
        store(row, i + half, dtype, restored_4(both >> 4, scale));
    }
}

INLINE void decode_channels_8(void *restrict row, float scale, int64_t half, int dtype,
                              const uint8_t *restrict anchor, const uint8_t *restrict residual) {
    for (int64_t i = 0; i < half; i++) {
        uint32_t a = anchor[i] ^ 0x88u, r = residual[i];
        store(row, i, dtype, restored_8((a & 15) << 4 | (r & 15), scale));
        store(row, i + half, dtype, restored_8((a & 0xf0) | r >> 4, scale));
    }
}

/* ---- rows of 16-bit values, STEP channels of each half at once ----
 *
 * The same as above, in vectors of the compiler's own; where the processor has shorter ones, it cuts
 * them. Two channels are taken from a 32-bit word by shifts: no move across a vector.
 */

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

/* Every other 16-bit value of two vectors: the lower ones of their words. */
INLINE Pairs lower(Words a, Words b) {
    return PICK(Pairs, (Pairs)a, (Pairs)b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

/* The lower or the upper 16-bit value of each word as float32. */
INLINE Floats widened(Words both, int upper, int dtype) {
    if (dtype == BFLOAT16) return (Floats)(upper ? both & 0xffff0000u : both << 16);
    Ints value = (Ints)(upper ? both : both << 16);
    return (Floats)((Words)(value >> 3) & 0x8fffe000u) * 0x1p112f;
}

/* q + 136 of the two channels of each word, in bits 0-7 and 8-15; anything above. */
INLINE Words two_codes(const uint8_t *at, Floats inverse, int dtype) {
    Words both;
    GET(both, at);
    Words even = (Words)(widened(both, 0, dtype) * inverse + ROUND);
    return even | (Words)(widened(both, 1, dtype) * inverse + ROUND) << 8;
}

INLINE Pairs codes(const uint8_t *at, Floats inverse, int dtype) {
    return lower(two_codes(at, inverse, dtype), two_codes(at + STEP, inverse, dtype));
}

INLINE void encode_step(const uint8_t *low_at, const uint8_t *high_at, float inverse, int dtype,
                        int eight, uint8_t *anchor, uint8_t *residual) {
    Floats all = (Floats){0} + inverse;
    Pairs low = codes(low_at, all, dtype), high = codes(high_at, all, dtype);
    Pairs upper = ((low >> 4 & 0x0f0f) | (high & 0xf0f0)) ^ 0x8888;
    PUT(anchor, upper);
    if (!eight) return;
    Pairs lower = (low & 0x0f0f) | (high << 4 & 0xf0f0);
    PUT(residual, lower);
}

/* How many bits float32 has more than a dtype. */
#define SURPLUS(dtype) ((dtype) == BFLOAT16 ? 16 : 13)

/* Products of codes and a positive scale, given 2^SURPLUS times as large: as float32 without surplus
 * bits, halves to even. A product has at most 20 significant bits, and the large one is an even
 * multiple of the step that the sum is rounded to. (Not where a result would be subnormal.) */
INLINE Words rounded(Floats large, int dtype) {
    return (Words)(large * (1 + 1.0f / (1 << SURPLUS(dtype))) - large);
}

/* Rounded float32 -> 16-bit values in the upper half of each word, zeros below. */
INLINE Words in_upper(Words x, int dtype) {
    return dtype == BFLOAT16 ? x : (x & 0x80000000u) | (x << 3 & 0x7fff0000u);
}

/* Words of two restored channels each; even, odd: 16-bit lanes that hold raised codes of 8 bits. */
INLINE Words restored(Words even, Words odd, float scale, int dtype) {
    /* The bits of 2^23 stand above each code: subtracting it leaves the integer. */
    Floats low = ((Floats)even - (0x1p23f + 136)) * scale;
    Floats high = ((Floats)odd - (0x1p23f + 136)) * scale;
    return in_upper(rounded(low, dtype), dtype) >> 16 | in_upper(rounded(high, dtype), dtype);
}

/* The first or last four values of each half of x as words, under the upper bits of 2^23. */
#define FIRST(x, k) PICK(Pairs, x, k, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27)
#define LAST(x, k) PICK(Pairs, x, k, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31)

INLINE void decode_half_step_8(uint8_t *row, Pairs raised, float scale, int dtype) {
    Pairs even = raised & 0xff, odd = raised >> 8, above = (Pairs){0} + 0x4b00;
    Words a = restored((Words)FIRST(even, above), (Words)FIRST(odd, above), scale, dtype);
    Words b = restored((Words)LAST(even, above), (Words)LAST(odd, above), scale, dtype);
    PUT(row, a);
    PUT(row + STEP, b);
}

/* In the order that FIRST and LAST take apart. */
INLINE Pairs swapped_at(const uint8_t *at) {
    Longs x;
    GET(x, at);
    return (Pairs)PICK(Longs, x, x, 0, 2, 1, 3);
}

INLINE void decode_step_8(uint8_t *low_at, uint8_t *high_at, float scale, int dtype,
                          const uint8_t *anchor, const uint8_t *residual) {
    Pairs a = swapped_at(anchor) ^ 0x8888, r = swapped_at(residual);
    decode_half_step_8(low_at, (a << 4 & 0xf0f0) | (r & 0x0f0f), scale, dtype);
    decode_half_step_8(high_at, (a & 0xf0f0) | (r >> 4 & 0x0f0f), scale, dtype);
}

/* The sixteen values that a row of 4 bits may hold, their lower bytes and their upper ones. */
typedef struct {
    Sixteen lower, upper;
} Table;

INLINE Table table_of(float scale, int dtype) {
    const Floats first = {0, 1, 2, 3, 4, 5, 6, 7};
    Words a = rounded((first - 1.0f / 32) * scale, dtype);
    Words b = rounded((first - (8 + 1.0f / 32)) * scale, dtype);
    Pairs both = lower(in_upper(a, dtype) >> 16, in_upper(b, dtype) >> 16);
    Sixteen x[2];
    GET(x, &both);
    return (Table){
        PICK(Sixteen, x[0], x[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
        PICK(Sixteen, x[0], x[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31),
    };
}

INLINE void look_up(uint8_t *row, Sixteen at, Table table) {
    Sixteen a = LOOK_UP(table.lower, at), b = LOOK_UP(table.upper, at);
    Sixteen first = PICK(Sixteen, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    Sixteen last = PICK(Sixteen, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    PUT(row, first);
    PUT(row + 16, last);
}

INLINE void decode_step_4(uint8_t *low_at, uint8_t *high_at, Table table, const uint8_t *anchor) {
    for (int i = 0; i < STEP; i += 16) {
        Sixteen both;
        GET(both, anchor + i);
        look_up(low_at + 2 * i, both & 15, table);
        look_up(high_at + 2 * i, both >> 4, table);
    }
}

/* ---- a row ---- */

/* Whether vectors can take a row. Its last step may begin before the one before it ends: what both
 * write is the same. */
INLINE int in_steps(int64_t half, int dtype) { return dtype != FLOAT32 && half >= STEP; }

/* Where the step at `i` begins. */
INLINE int64_t step_at(int64_t i, int64_t half) { return i < half - STEP ? i : half - STEP; }

INLINE void encode_row(const uint8_t *row, float inverse, int64_t half, int dtype, int eight,
                       uint8_t *anchor, uint8_t *residual) {
    if (!in_steps(half, dtype)) {
        encode_channels(row, inverse, half, dtype, eight, anchor, residual);
        return;
    }
    for (int64_t next = 0; next < half; next += STEP) {
        int64_t i = step_at(next, half);
        encode_step(row + 2 * i, row + 2 * (i + half), inverse, dtype, eight, anchor + i,
                    eight ? residual + i : 0);
    }
}

/* Whether a row of this scale holds nothing but zeros and values that are neither subnormal in its
 * dtype nor too large for it. */
INLINE int is_plain(float scale, int dtype) {
    return dtype == BFLOAT16 ? scale > 0 : scale >= 0x1p-13f && scale <= 256.0f;
}

/* Made 2^112 times smaller, the bits of such a float16 are float32's already. */
INLINE float times_surplus(float scale, int dtype) {
    return dtype == BFLOAT16 ? scale * 0x1p16f : scale * (0x1p-112f * 0x1p13f);
}

/* Rows that the vectors cannot take, compiled once; residual is NULL at 4 bits. */
EVERY_CPU static __attribute__((noinline)) void decode_plainly(uint8_t *row, float scale,
                                                               int64_t half, int32_t dtype,
                                                               const uint8_t *anchor,
                                                               const uint8_t *residual) {
#define PLAINLY(dtype)                                                         \
    (residual ? decode_channels_8(row, scale, half, dtype, anchor, residual) \
              : decode_channels_4(row, scale, half, dtype, anchor))
    if (dtype == BFLOAT16) PLAINLY(BFLOAT16);
    if (dtype == FLOAT16) PLAINLY(FLOAT16);
    if (dtype == FLOAT32) PLAINLY(FLOAT32);
}

INLINE void decode_row_4(uint8_t *row, float scale, int64_t half, int dtype, const uint8_t *anchor) {
    if (!in_steps(half, dtype) || !is_plain(scale, dtype)) {
        decode_plainly(row, scale, half, dtype, anchor, 0);
        return;
    }
    Table table = table_of(16 * times_surplus(scale, dtype), dtype);
    for (int64_t next = 0; next < half; next += STEP) {
        int64_t i = step_at(next, half);
        decode_step_4(row + 2 * i, row + 2 * (i + half), table, anchor + i);
    }
}

INLINE void decode_row_8(uint8_t *row, float scale, int64_t half, int dtype, const uint8_t *anchor,
                         const uint8_t *residual) {
    if (!in_steps(half, dtype) || !is_plain(scale, dtype)) {
        decode_plainly(row, scale, half, dtype, anchor, residual);
        return;
    }
    float large = times_surplus(scale, dtype);
    for (int64_t next = 0; next < half; next += STEP) {
        int64_t i = step_at(next, half);
        decode_step_8(row + 2 * i, row + 2 * (i + half), large, dtype, anchor + i, residual + i);
    }
}

/* ---- rows of a block ---- */

INLINE Cursor cursor_at(const Block *block, const int64_t before[KINDS]) {
    int64_t half = block->channels / 2, quantised = before[EIGHT] + before[FOUR];
    Cursor at = {
        block->native ? block->native + before[NATIVE] * block->channels * block->itemsize : 0,
        block->scale ? block->scale + quantised * 2 : 0,
        block->anchor ? block->anchor + quantised * half : 0,
        block->residual ? block->residual + before[EIGHT] * half : 0,
    };
    return at;
}

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

/* The scales of a tile's rows and their inverses; 0 when no scale can hold one of the rows. */
INLINE int32_t scales_of(const Tile *tile, int64_t channels, int dtype, uint16_t *scale,
                         float *inverse) {
    float size[TILE] = {0};
    for (int64_t r = 0; r < tile->n; r++) size[r] = absmax(tile->row[r], channels, dtype);
    int32_t unfit = 0;
    /* A bound that is no constant: unrolled, the loop would not be vectorised. */
    for (int64_t r = 0; r < ((tile->n + 7) & ~7); r++) {
        float least = size[r] / LEVELS;
        uint32_t half = half_not_below(least);
        float exact = 1.0f / half_to_float(half);
        inverse[r] = float_of(either(half != 0, bits_of(exact), 0));
        scale[r] = (uint16_t)half;
        unfit |= !(least <= LARGEST);
    }
    return !unfit;
}

/* Ask for the row that stands a tile further: when this tile is done, it has come. */
INLINE void fetch_next(const uint8_t *row, int64_t token_stride, int64_t nbytes) {
    uintptr_t next = (uintptr_t)row + (uintptr_t)(TILE * token_stride);
    for (int64_t line = 0; line < nbytes; line += 64)
        __builtin_prefetch((const void *)(next + (uintptr_t)line));
}

/* Empty the tile; 0 when no scale can hold one of its rows. */
INLINE int32_t encode_tile(Tile *tile, Cursor *at, int64_t token_stride, int64_t channels,
                           int dtype) {
    float inverse[TILE];
    uint16_t scale[TILE];
    if (!scales_of(tile, channels, dtype, scale, inverse)) return 0;
    memcpy(at->scale, scale, (size_t)tile->n * 2);
    at->scale += tile->n * 2;
    int64_t half = channels / 2;
    for (int64_t r = 0; r < tile->n; r++) {
        fetch_next(tile->row[r], token_stride, channels * (dtype == FLOAT32 ? 4 : 2));
        if (tile->eight[r]) {
            encode_row(tile->row[r], inverse[r], half, dtype, 1, at->anchor, at->residual);
            at->residual += half;
        } else {
            encode_row(tile->row[r], inverse[r], half, dtype, 0, at->anchor, 0);
        }
        at->anchor += half;
    }
    tile->n = 0;
    return 1;
}

/* ---- key conditioning, as condition.py has it, operation by operation ---- */

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

INLINE void turn(float *restrict x, int64_t half, const float *cosine, const float *sine) {
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cosine[i] - second * sine[i];
        x[i + half] = second * cosine[i] + first * sine[i];
    }
}

INLINE void hadamard(float *x, int64_t channels, float normal) {
    for (int64_t width = 1; width < channels; width *= 2)
        for (int64_t i = 0; i < channels; i += 2 * width)
            for (int64_t j = i; j < i + width; j++) {
                float first = x[j], second = x[j + width];
                x[j] = first + second, x[j + width] = first - second;
            }
    for (int64_t i = 0; i < channels; i++) x[i] *= normal;
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

/* ---- blocks ---- */

/* conditioned: whether quantised rows are. dtype: of what is quantised, then float32. */
INLINE int32_t encode_rows(const Block *given, int64_t first, int64_t last, Cursor at,
                           int64_t channels, int dtype, int conditioned) {
    float rows[conditioned ? TILE * WIDEST : 1];
    const Block block = *given; /* of its own: no write to a plane can change it */
    Walk walk = row_at(&block, first / block.tokens, first % block.tokens);
    size_t native = (size_t)(channels * block.itemsize);
    Tile tile;
    tile.n = 0;
    for (int64_t i = first; i < last; i++, step(&walk, &block)) {
        int kind = kind_of(&block, &walk);
        if (kind == NATIVE) {
            memcpy(at.native, walk.row, native);
            at.native += native;
        } else if (kind != SKIP) {
            float *own = rows + tile.n * channels;
            if (conditioned) condition(&block, &walk, channels, own);
            tile.row[tile.n] = conditioned ? (const uint8_t *)own : walk.row;
            tile.eight[tile.n++] = kind == EIGHT;
        }
        if (tile.n == TILE && !encode_tile(&tile, &at, block.token_stride, channels, dtype)) return 0;
    }
    return tile.n == 0 || encode_tile(&tile, &at, block.token_stride, channels, dtype);
}

INLINE float next_scale(Cursor *at) {
    uint16_t half; /* a plane may stand at an odd address */
    memcpy(&half, at->scale, sizeof half);
    at->scale += sizeof half;
    return any_half_to_float(half); /* of -0, too: the reference restores zeros with its sign */
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

INLINE void decode_rows(const Block *given, int64_t first, int64_t last, Cursor at,
                        int64_t channels, int dtype) {
    const Block block = *given;
    Walk walk = row_at(&block, first / block.tokens, first % block.tokens);
    int64_t half = channels / 2, nbytes = channels * (dtype == FLOAT32 ? 4 : 2);
    int streamed = streams(&block);
    _Alignas(LINE) uint8_t stage[STAGE];
    for (int64_t i = first; i < last; i++, step(&walk, &block)) {
        int kind = kind_of(&block, &walk);
        uint8_t *row = streamed ? stage : walk.row;
        const uint8_t *made = stage;
        if (kind == SKIP) continue;
        if (kind == NATIVE) {
            made = at.native;
            if (!streamed) memcpy(row, at.native, (size_t)nbytes);
            at.native += nbytes;
        } else if (kind == EIGHT) {
            decode_row_8(row, next_scale(&at), half, dtype, at.anchor, at.residual);
            at.anchor += half, at.residual += half;
        } else {
            decode_row_4(row, next_scale(&at), half, dtype, at.anchor);
            at.anchor += half;
        }
        if (streamed) stream(walk.row, made, nbytes);
    }
    if (streamed) end_streams();
}

/* 0, with rows half restored, when a restored key is beyond the dtype. */
INLINE int32_t decode_conditioned(const Block *given, int64_t first, int64_t last, Cursor at) {
    float row[WIDEST];
    const Block block = *given;
    Walk walk = row_at(&block, first / block.tokens, first % block.tokens);
    int64_t channels = block.channels, half = channels / 2;
    size_t native = (size_t)(channels * block.itemsize);
    for (int64_t i = first; i < last; i++, step(&walk, &block)) {
        int kind = kind_of(&block, &walk);
        if (kind == NATIVE) {
            memcpy(walk.row, at.native, native);
            at.native += native;
        } else if (kind != SKIP) {
            const uint8_t *residual = kind == EIGHT ? at.residual : 0;
            decode_plainly((uint8_t *)row, next_scale(&at), half, FLOAT32, at.anchor, residual);
            at.anchor += half, at.residual += kind == EIGHT ? half : 0;
            if (!restore(&block, &walk, channels, row)) return 0;
        }
    }
    return 1;
}

/* The usual widths are compiled on their own: a loop of known length has no remainder to handle. */
#define BY_WIDTH(call, dtype)                            \
    (block->channels == 128 ? call(128, dtype)           \
     : block->channels == 64 ? call(64, dtype)           \
                             : call(block->channels, dtype))
#define BY_DTYPE(call)                                    \
    (block->dtype == BFLOAT16  ? BY_WIDTH(call, BFLOAT16) \
     : block->dtype == FLOAT16 ? BY_WIDTH(call, FLOAT16)  \
                               : call(block->channels, FLOAT32))

/* ---- what cpu.py calls ---- */

EXPORT const char *kvprism_source(void) { return KVPRISM_SOURCE; }

/* How many of the rows [first, last) are of each kind; a tier that is not below `menu` is no kind. */
EXPORT EVERY_CPU void kvprism_count(const Block *block, int64_t first, int64_t last, int64_t menu,
                                    int64_t counts[KINDS]) {
    for (int kind = 0; kind < KINDS; kind++) counts[kind] = 0;
    for (int64_t i = first; i < last;) {
        int64_t head = i / block->tokens, token = i % block->tokens;
        int64_t n = block->tokens - token < last - i ? block->tokens - token : last - i;
        n = n < 255 ? n : 255; /* so many fit a byte */
        const uint8_t *tiers =
            block->tiers + head * block->tier_head_stride + token * block->tier_token_stride;
        for (int64_t tier = 0; tier < menu; tier++) {
            uint8_t found = 0;
            if (block->tier_token_stride == 1)
                for (int64_t j = 0; j < n; j++) found += tiers[j] == tier;
            else
                for (int64_t j = 0; j < n; j++) found += tiers[j * block->tier_token_stride] == tier;
            counts[block->kind[tier]] += found;
        }
        i += n;
    }
}

/* 1 when each of n float16 scales is finite and not negative. */
EXPORT EVERY_CPU int32_t kvprism_scales_are_sound(const uint8_t *scale, int64_t n) {
    int32_t sound = 1;
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, scale + 2 * i, sizeof half);
        sound &= (half < 0x7c00) | (half == 0x8000);
    }
    return sound;
}

/* Write the planes of rows [first, last), of whose kinds `before` stand before them. Returns 0, with
 * planes half written, when a quantised tier cannot hold a row. */
EXPORT EVERY_CPU int32_t kvprism_encode(const Block *block, int64_t first, int64_t last,
                                        const int64_t before[KINDS]) {
    Cursor at = cursor_at(block, before);
    if (block->cosine) return encode_rows(block, first, last, at, block->channels, FLOAT32, 1);
#define ENCODE(channels, dtype) encode_rows(block, first, last, at, channels, dtype, 0)
    return BY_DTYPE(ENCODE);
}

/* Restore rows [first, last) from planes whose scales are sound; skipped rows stay as they are.
 * Returns 0, with rows half restored, when a conditioned row comes back beyond the dtype. */
EXPORT EVERY_CPU int32_t kvprism_decode(const Block *block, int64_t first, int64_t last,
                                        const int64_t before[KINDS]) {
    Cursor at = cursor_at(block, before);
    if (block->cosine) return decode_conditioned(block, first, last, at);
#define DECODE(channels, dtype) decode_rows(block, first, last, at, channels, dtype)
    BY_DTYPE(DECODE);
    return 1;
}
