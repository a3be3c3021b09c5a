/* kvp.nested/1 at memory speed; codec/reference.py is the definition, docs/format.md section 6 the text. */
#include "cpu.h"

#ifndef KVPRISM_SOURCE
#define KVPRISM_SOURCE "unknown"
#endif

#define STEP 32       /* channels of each half of a row that vectors take at once */
#define LEVELS 119.0f /* codes lie in [-LEVELS, LEVELS] */

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

/* ---- rows ---- */

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
