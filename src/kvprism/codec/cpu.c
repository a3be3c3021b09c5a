/* kvp.nested/1 at memory speed; codec/reference.py is the definition, docs/format.md section 6 the text.
 *
 * Plain C for the compiler's own vectoriser: no intrinsics, no allocation, no Python. Every float is
 * rounded on its own (-ffp-contract=off), so that each byte is the reference's. cpu.py checks sizes,
 * tiers and dtypes before it calls; a row is one (head, token), rows are counted head by head.
 */
#include <float.h>
#include <stdint.h>
#include <string.h>

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

/* One library for every x86-64: the loader picks the version for the processor that it finds. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define EVERY_CPU __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef EVERY_CPU
#define EVERY_CPU
#endif

#define TILE 16          /* rows whose scales are computed together: divisions overlap */
#define LEVELS 119.0f    /* codes lie in [-LEVELS, LEVELS] */
#define LARGEST 65504.0f /* of float16 */

enum dtype { BFLOAT16, FLOAT16, FLOAT32, FLOAT16_SMALL };
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
    uint8_t kind[16]; /* of each tier of the menu */
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

/* A float16 that is not negative, inf or NaN; also -0. */
INLINE float half_to_float(uint32_t half) {
    uint32_t size = half & 0x7fff;
    float normal = float_of((size << 13) + (112u << 23));
    float x = size < 0x400 ? (float)(int32_t)size * 0x1p-24f : normal;
    return float_of(bits_of(x) | (half & 0x8000) << 16);
}

/* A float16 that is finite: read as float32, subnormal or not, it is 2^112 times too small. */
INLINE float any_half_to_float(uint32_t half) {
    return float_of(bits_of(float_of((half & 0x7fff) << 13) * 0x1p112f) | (half & 0x8000) << 16);
}

/* The smallest float16 that is not below x, for 0 <= x <= LARGEST. */
INLINE uint32_t half_not_below(float x) {
    uint32_t normal = (bits_of(x) - (112u << 23) + 0x1fff) >> 13;
    float steps = x * 0x1p24f; /* of the subnormal float16: exact */
    int32_t whole = x < 0x1p-14f ? (int32_t)steps : 0;
    uint32_t subnormal = (uint32_t)(whole + ((float)whole < steps));
    return x < 0x1p-14f ? subnormal : normal;
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

/* q + 8 in the low 16 bits, for q = round_half_to_even(x * inverse) in [-119, 119]. */
INLINE uint32_t code(float x, float inverse) {
    float product = x * inverse;
    /* At 1.5 * 2^23 a float32 step is 1: the addition rounds, and the low bits are the integer. */
    return bits_of(product + (12582912.0f + 8.0f));
}

/* (16 a - 1/2) * scale, for a + 8 in 0 ... 15. A sixteenth of the code times 16: both are exact. */
INLINE float restored_4(uint32_t raised, float scale) {
    return ((float)(int32_t)raised - (8.0f + 1.0f / 32)) * (16 * scale);
}

/* q * scale, for q + 136 = 16 (a + 8) + residual in 0 ... 255. */
INLINE float restored_8(uint32_t raised, float scale) {
    return (float)((int32_t)raised - 136) * scale;
}

INLINE void encode_row(const void *restrict row, float inverse, int64_t half, int dtype, int eight,
                       uint8_t *restrict anchor, uint8_t *restrict residual) {
    for (int64_t i = 0; i < half; i++) {
        uint8_t low = (uint8_t)code(load(row, i, dtype), inverse);
        uint8_t high = (uint8_t)code(load(row, i + half, dtype), inverse);
        anchor[i] = (uint8_t)(low >> 4 | (high & 0xf0));
        if (eight) residual[i] = (uint8_t)((low & 15) | high << 4);
    }
}

INLINE void decode_row_4(void *restrict row, float scale, int64_t half, int dtype,
                         const uint8_t *restrict anchor) {
    for (int64_t i = 0; i < half; i++) {
        uint32_t both = anchor[i] ^ 0x88u;
        store(row, i, dtype, restored_4(both & 15, scale));
        store(row, i + half, dtype, restored_4(both >> 4, scale));
    }
}

INLINE void decode_row_8(void *restrict row, float scale, int64_t half, int dtype,
                         const uint8_t *restrict anchor, const uint8_t *restrict residual) {
    for (int64_t i = 0; i < half; i++) {
        uint32_t a = anchor[i] ^ 0x88u, r = residual[i];
        store(row, i, dtype, restored_8((a & 15) << 4 | (r & 15), scale));
        store(row, i + half, dtype, restored_8((a & 0xf0) | r >> 4, scale));
    }
}

/* ---- rows of 16-bit values, two channels in a 32-bit word ----
 *
 * The same as above for channels in fours. Taken apart by shifts, the two halves of a word need no
 * move across a vector, which is what costs most in the loops above.
 */

INLINE uint32_t word(const uint8_t *at, int64_t i) {
    uint32_t both;
    memcpy(&both, at + 4 * i, sizeof both);
    return both;
}

INLINE uint32_t pair(const uint8_t *at, int64_t i) {
    uint16_t both;
    memcpy(&both, at + 2 * i, sizeof both);
    return both;
}

INLINE void put_pair(uint8_t *at, int64_t i, uint32_t value) {
    uint16_t both = (uint16_t)value;
    memcpy(at + 2 * i, &both, sizeof both);
}

/* A product of a code and a positive scale, rounded to a float with `bits` bits fewer, halves to even.
 * Such a product has at most 20 significant bits: `large` is an even multiple of the step that the
 * addition rounds to. (Not where the result would be subnormal.) */
INLINE float rounded(float product, int bits) {
    float large = product * (float)(1 << bits);
    return product + large - large;
}

INLINE void put_word(uint8_t *row, int64_t i, int dtype, float even, float odd) {
    uint32_t both, e, o;
    if (dtype == FLOAT16) {
        both = float_to_half(even) | (uint32_t)float_to_half(odd) << 16;
    } else if (dtype == FLOAT16_SMALL) {
        e = bits_of(rounded(even, 13)), o = bits_of(rounded(odd, 13));
        both = (e >> 13 & 0x7fff) | (e >> 16 & 0x8000) | (o << 3 & 0x7fff0000) | (o & 0x80000000u);
    } else {
        both = bits_of(rounded(even, 16)) >> 16 | bits_of(rounded(odd, 16));
    }
    memcpy(row + 4 * i, &both, sizeof both);
}

/* The codes of the two channels of a word: q + 8 in bits 0-7 and 8-15, anything above. */
INLINE uint32_t two_codes(uint32_t both, float inverse, int dtype) {
    float even = dtype == BFLOAT16 ? float_of(both << 16) : any_half_to_float(both & 0xffff);
    float odd = dtype == BFLOAT16 ? float_of(both & 0xffff0000u) : any_half_to_float(both >> 16);
    return (code(even, inverse) & 0xff) | code(odd, inverse) << 8;
}

INLINE void encode_words(const uint8_t *restrict row, float inverse, int64_t n, int dtype, int eight,
                         uint8_t *restrict anchor, uint8_t *restrict residual) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t low = two_codes(word(row, i), inverse, dtype);
        uint32_t high = two_codes(word(row, i + n), inverse, dtype);
        put_pair(anchor, i, (low >> 4 & 0x0f0f) | (high & 0xf0f0));
        if (eight) put_pair(residual, i, (low & 0x0f0f) | (high & 0x0f0f) << 4);
    }
}

INLINE void decode_words_4(uint8_t *restrict row, float scale, int64_t n, int dtype,
                           const uint8_t *restrict anchor) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t a = pair(anchor, i) ^ 0x8888;
        put_word(row, i, dtype, restored_4(a & 15, scale), restored_4(a >> 8 & 15, scale));
        put_word(row, i + n, dtype, restored_4(a >> 4 & 15, scale), restored_4(a >> 12, scale));
    }
}

INLINE void decode_words_8(uint8_t *restrict row, float scale, int64_t n, int dtype,
                           const uint8_t *restrict anchor, const uint8_t *restrict residual) {
    for (int64_t i = 0; i < n; i++) {
        uint16_t a = (uint16_t)(pair(anchor, i) ^ 0x8888), r = (uint16_t)pair(residual, i);
        uint16_t low = (uint16_t)((a << 4 & 0xf0f0) | (r & 0x0f0f));
        uint16_t high = (uint16_t)((a & 0xf0f0) | (r >> 4 & 0x0f0f));
        put_word(row, i, dtype, restored_8(low & 0xff, scale), restored_8(low >> 8, scale));
        put_word(row, i + n, dtype, restored_8(high & 0xff, scale), restored_8(high >> 8, scale));
    }
}

INLINE int in_words(int64_t channels, int dtype) { return dtype != FLOAT32 && channels % 4 == 0; }

INLINE void encode_any(const uint8_t *row, float inverse, int64_t channels, int dtype, int eight,
                       uint8_t *anchor, uint8_t *residual) {
    if (in_words(channels, dtype))
        encode_words(row, inverse, channels / 4, dtype, eight, anchor, residual);
    else
        encode_row(row, inverse, channels / 2, dtype, eight, anchor, residual);
}

/* Whether a float16 row of this scale holds nothing but zeros and values that are neither subnormal
 * nor too large. Made 2^112 times smaller (FLOAT16_SMALL), their bits are the float16's already. */
INLINE int plain_half(float scale) { return scale >= 0x1p-13f && scale <= 256.0f; }

INLINE void decode_any_4(uint8_t *row, float scale, int64_t channels, int dtype,
                         const uint8_t *anchor) {
    if (!in_words(channels, dtype) || !(scale > 0))
        decode_row_4(row, scale, channels / 2, dtype, anchor);
    else if (dtype == FLOAT16 && plain_half(scale))
        decode_words_4(row, scale * 0x1p-112f, channels / 4, FLOAT16_SMALL, anchor);
    else
        decode_words_4(row, scale, channels / 4, dtype, anchor);
}

INLINE void decode_any_8(uint8_t *row, float scale, int64_t channels, int dtype,
                         const uint8_t *anchor, const uint8_t *residual) {
    if (!in_words(channels, dtype) || !(scale > 0))
        decode_row_8(row, scale, channels / 2, dtype, anchor, residual);
    else if (dtype == FLOAT16 && plain_half(scale))
        decode_words_8(row, scale * 0x1p-112f, channels / 4, FLOAT16_SMALL, anchor, residual);
    else
        decode_words_8(row, scale, channels / 4, dtype, anchor, residual);
}

/* ---- blocks ---- */

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

INLINE int kind_of(const Block *block, int64_t head, int64_t token) {
    int64_t at = head * block->tier_head_stride + token * block->tier_token_stride;
    return block->kind[block->tiers[at] & 15];
}

/* Empty the tile; 0 when no scale can hold one of its rows. */
INLINE int32_t encode_tile(Tile *tile, Cursor *at, int64_t channels, int dtype) {
    float size[TILE] = {0}, inverse[TILE];
    uint16_t scale[TILE];
    for (int64_t r = 0; r < tile->n; r++) size[r] = absmax(tile->row[r], channels, dtype);
    int32_t unfit = 0;
    for (int64_t r = 0; r < TILE; r++) {
        float least = size[r] / LEVELS;
        uint32_t half = half_not_below(least);
        float s = half_to_float(half);
        inverse[r] = s > 0 ? 1.0f / s : 0.0f;
        scale[r] = (uint16_t)half;
        unfit |= !(least <= LARGEST);
    }
    if (unfit) return 0;
    memcpy(at->scale, scale, (size_t)tile->n * 2);
    at->scale += tile->n * 2;
    for (int64_t r = 0; r < tile->n; r++) {
        if (tile->eight[r]) {
            encode_any(tile->row[r], inverse[r], channels, dtype, 1, at->anchor, at->residual);
            at->residual += channels / 2;
        } else {
            encode_any(tile->row[r], inverse[r], channels, dtype, 0, at->anchor, 0);
        }
        at->anchor += channels / 2;
    }
    tile->n = 0;
    return 1;
}

INLINE int32_t encode_rows(const Block *block, int64_t first, int64_t last, Cursor at,
                           int64_t channels, int dtype) {
    int64_t head = first / block->tokens, token = first % block->tokens;
    size_t native = (size_t)(channels * block->itemsize);
    Tile tile;
    tile.n = 0;
    for (int64_t i = first; i < last; i++) {
        int kind = kind_of(block, head, token);
        const uint8_t *row = block->rows + head * block->head_stride + token * block->token_stride;
        if (kind == NATIVE) {
            memcpy(at.native, row, native);
            at.native += native;
        } else if (kind != SKIP) {
            tile.row[tile.n] = row, tile.eight[tile.n++] = kind == EIGHT;
        }
        if (tile.n == TILE && !encode_tile(&tile, &at, channels, dtype)) return 0;
        if (++token == block->tokens) token = 0, head++;
    }
    return tile.n == 0 || encode_tile(&tile, &at, channels, dtype);
}

INLINE float next_scale(Cursor *at) {
    uint16_t half; /* a plane may stand at an odd address */
    memcpy(&half, at->scale, sizeof half);
    at->scale += sizeof half;
    return half_to_float(half);
}

INLINE void decode_rows(const Block *block, int64_t first, int64_t last, Cursor at,
                        int64_t channels, int dtype) {
    int64_t head = first / block->tokens, token = first % block->tokens, half = channels / 2;
    size_t native = (size_t)(channels * block->itemsize);
    for (int64_t i = first; i < last; i++) {
        uint8_t *row = block->rows + head * block->head_stride + token * block->token_stride;
        int kind = kind_of(block, head, token);
        if (kind == NATIVE) {
            memcpy(row, at.native, native);
            at.native += native;
        } else if (kind == EIGHT) {
            decode_any_8(row, next_scale(&at), channels, dtype, at.anchor, at.residual);
            at.anchor += half, at.residual += half;
        } else if (kind == FOUR) {
            decode_any_4(row, next_scale(&at), channels, dtype, at.anchor);
            at.anchor += half;
        }
        if (++token == block->tokens) token = 0, head++;
    }
}

/* The usual widths are compiled on their own: a loop of known length has no remainder to handle. */
#define BY_WIDTH(call, dtype)                            \
    (block->channels == 128 ? call(128, dtype)           \
     : block->channels == 64 ? call(64, dtype)           \
                             : call(block->channels, dtype))
#define BY_DTYPE(call)                                          \
    (block->dtype == BFLOAT16  ? BY_WIDTH(call, BFLOAT16)       \
     : block->dtype == FLOAT16 ? BY_WIDTH(call, FLOAT16)        \
                               : BY_WIDTH(call, FLOAT32))

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
#define ENCODE(channels, dtype) encode_rows(block, first, last, at, channels, dtype)
    return BY_DTYPE(ENCODE);
}

/* Restore rows [first, last) from planes whose scales are sound; skipped rows stay as they are. */
EXPORT EVERY_CPU void kvprism_decode(const Block *block, int64_t first, int64_t last,
                                     const int64_t before[KINDS]) {
    Cursor at = cursor_at(block, before);
#define DECODE(channels, dtype) decode_rows(block, first, last, at, channels, dtype)
    BY_DTYPE(DECODE);
}
