/* The affine codes at memory speed; codec/affine.py is the definition, docs/format.md section 6 the text.
 *
 * A group of `block->group` channels has a scale and an offset of its own: 32 in kvp.affine-g32/1, all
 * of a row in the others. In kvp.affine-hadamard/1 (`block->normal`) rows are transformed first. In the
 * keys of kvp.kivi/1 it is 1: there TILE quantised rows of a head share the numbers of a channel.
 */
#include "cpu.h"

#define GROUP 32 /* the one width that is compiled on its own */
#define GROUPS (WIDEST / GROUP)
#define NUMBERS 4 /* bytes of a scale and an offset */

/* Where the next row of each plane stands. */
typedef struct {
    uint8_t *native, *scale, *anchor, *byte;
} Cursor;

/* Quantised rows that wait until their numbers are computed together, group by group of each. */
typedef struct {
    const uint8_t *row[TILE];
    uint8_t eight[TILE];
    int64_t n, groups;                                /* rows, and groups of a row */
    float least[TILE * GROUPS], most[TILE * GROUPS]; /* of each group */
    float levels[TILE * GROUPS];
    float base[TILE * GROUPS], inverse[TILE * GROUPS];
    uint32_t numbers[TILE * GROUPS]; /* scale, and offset in the upper half */
} Tile;

INLINE Cursor cursor_at(const Block *block, const int64_t before[KINDS]) {
    int64_t quantised = before[EIGHT] + before[FOUR], groups = block->channels / block->group;
    Cursor at = {
        block->native ? block->native + before[NATIVE] * block->channels * block->itemsize : 0,
        block->scale ? block->scale + quantised * groups * NUMBERS : 0,
        block->anchor ? block->anchor + before[FOUR] * (block->channels / 2) : 0,
        block->byte ? block->byte + before[EIGHT] * block->channels : 0,
    };
    return at;
}

/* ---- groups ---- */

/* Ordered as integers like the numbers that the bits stand for; twice, it is undone. */
INLINE int32_t ordered(int32_t bits) { return bits ^ (int32_t)((uint32_t)(bits >> 31) >> 1); }
INLINE int16_t ordered_16(int16_t bits) { return (int16_t)(bits ^ (bits >> 15 & 0x7fff)); }

/* The least and the largest value of a group; beyond LARGEST when one is not finite. */
INLINE void extremes(const void *row, int64_t n, int dtype, float *least, float *most) {
    if (dtype == FLOAT32) {
        const Pattern *x = row;
        int32_t low = INT32_MAX, high = INT32_MIN;
        for (int64_t i = 0; i < n; i++) {
            int32_t key = ordered(x[i]);
            low = key < low ? key : low, high = key > high ? key : high;
        }
        *least = float_of((uint32_t)ordered(low)), *most = float_of((uint32_t)ordered(high));
        return;
    }
    const int16_t *x = row;
    int16_t low = INT16_MAX, high = INT16_MIN;
    for (int64_t i = 0; i < n; i++) {
        int16_t key = ordered_16(x[i]);
        low = key < low ? key : low, high = key > high ? key : high;
    }
    low = ordered_16(low), high = ordered_16(high);
    *least = load(&low, 0, dtype), *most = load(&high, 0, dtype);
}

/* Offsets and scales of the first n groups of a tile, and what codes are made with. */
INLINE void numbers_of(Tile *tile, int64_t n) {
    /* A bound that is no constant: unrolled, the loop would not be vectorised. */
    for (int64_t i = 0; i < ((n + 7) & ~7); i++) {
        float least = tile->least[i] + 0.0f, most = tile->most[i] + 0.0f; /* -0 becomes 0 */
        uint32_t negative = bits_of(least) >> 31;
        uint32_t offset = half_beside(float_of(bits_of(least) & 0x7fffffff), negative);
        float base = float_of(bits_of(half_to_float(offset)) | negative << 31);
        uint32_t scale = half_not_below((most - base) / tile->levels[i]);
        float exact = 1.0f / half_to_float(scale);
        tile->base[i] = base;
        tile->inverse[i] = float_of(either(scale != 0, bits_of(exact), 0));
        tile->numbers[i] = scale | offset << 16 | negative << 31;
    }
}

/* At 1.5 * 2^23 a float32 step is 1: adding it rounds, halves to even. The scale was rounded up, so that
 * no code exceeds its levels: what the two roundings before add is far below a half. */
INLINE uint8_t code(float x, float base, float inverse) {
    return (uint8_t)bits_of((x - base) * inverse + 12582912.0f);
}

INLINE void encode_group(const uint8_t *restrict row, int64_t n, int dtype, float base,
                         float inverse, uint8_t *restrict codes) {
    for (int64_t i = 0; i < n; i++) codes[i] = code(load(row, i, dtype), base, inverse);
}

/* 0 when a value is beyond the dtype: of the others, no scale and offset of float16 come so far. */
INLINE int32_t decode_group(const uint8_t *restrict codes, int64_t n, int dtype, float scale,
                            float base, uint8_t *restrict row) {
    int32_t beyond = 0;
    for (int64_t i = 0; i < n; i++) {
        float x = (float)(int32_t)codes[i] * scale + base;
        if (dtype == FLOAT16) beyond |= x > LARGEST;
        store(row, i, dtype, x);
    }
    return !beyond;
}

INLINE void pack(const uint8_t *restrict codes, int64_t half, uint8_t *restrict anchor) {
    for (int64_t i = 0; i < half; i++) anchor[i] = (uint8_t)(codes[i] | codes[i + half] << 4);
}

INLINE void unpack(const uint8_t *restrict anchor, int64_t half, uint8_t *restrict codes) {
    for (int64_t i = 0; i < half; i++)
        codes[i] = anchor[i] & 15, codes[i + half] = anchor[i] >> 4;
}

/* ---- encode ---- */

/* Take in a row; 0 when no scale can hold it. rotated: where its transform goes, or NULL. */
INLINE int32_t push(Tile *tile, const Block *block, const uint8_t *row, int eight, int64_t group,
                    int dtype, float *rotated) {
    int64_t r = tile->n++, n = tile->groups, size = dtype == FLOAT32 ? 4 : 2;
    if (rotated) {
        widen(row, block->channels, block->dtype, rotated);
        if (!(absmax(rotated, block->channels, FLOAT32) * (float)block->channels <= LARGEST))
            return 0;
        hadamard(rotated, block->channels, block->normal);
    }
    tile->row[r] = rotated ? (const uint8_t *)rotated : row, tile->eight[r] = (uint8_t)eight;
    int32_t unfit = 0;
    for (int64_t i = r * n; i < (r + 1) * n; i++) {
        float *least = tile->least + i, *most = tile->most + i;
        extremes(tile->row[r] + (i - r * n) * group * size, group, dtype, least, most);
        if (!rotated) unfit |= !(*least >= -LARGEST / 2) | !(*most <= LARGEST / 2);
        tile->levels[i] = eight ? 255 : 15;
    }
    return !unfit;
}

/* Empty the tile. */
INLINE void flush(Tile *tile, Cursor *at, const Block *block, int64_t group, int dtype) {
    uint8_t codes[WIDEST];
    int64_t channels = block->channels, size = dtype == FLOAT32 ? 4 : 2;
    numbers_of(tile, tile->n * tile->groups);
    size_t nbytes = (size_t)(tile->n * tile->groups * NUMBERS);
    if (nbytes) memcpy(at->scale, tile->numbers, nbytes);
    at->scale += nbytes;
    for (int64_t r = 0; r < tile->n; r++) {
        const uint8_t *row = tile->row[r];
        uint8_t *to = tile->eight[r] ? at->byte : codes;
        for (int64_t g = 0, i = r * tile->groups; g < tile->groups; g++, i++)
            encode_group(row + g * group * size, group, dtype, tile->base[i], tile->inverse[i],
                         to + g * group);
        if (tile->eight[r]) {
            at->byte += channels;
        } else {
            pack(codes, channels / 2, at->anchor);
            at->anchor += channels / 2;
        }
    }
    tile->n = 0;
}

/* dtype: of what is quantised, then float32. */
INLINE int32_t encode_rows(const Block *given, int64_t first, int64_t last, Cursor at,
                           int64_t group, int dtype, int rotate) {
    float rotated[rotate ? TILE * WIDEST : 1];
    const Block block = *given; /* of its own: no write to a plane can change it */
    Walk walk = row_at(&block, first / block.tokens, first % block.tokens);
    int64_t native = block.channels * block.itemsize;
    Tile tile = {.n = 0, .groups = block.channels / group};
    for (int64_t i = first; i < last; i++, step(&walk, &block)) {
        int kind = kind_of(&block, &walk);
        if (kind == NATIVE) {
            memcpy(at.native, walk.row, (size_t)native);
            at.native += native;
        } else if (kind != SKIP) {
            float *own = rotate ? rotated + tile.n * block.channels : 0;
            fetch_next(walk.row, block.token_stride, native);
            if (!push(&tile, &block, walk.row, kind == EIGHT, group, dtype, own)) return 0;
        }
        if (tile.n == TILE) flush(&tile, &at, &block, group, dtype);
    }
    flush(&tile, &at, &block, group, dtype);
    return 1;
}

/* ---- decode ---- */

INLINE float next_number(Cursor *at) {
    uint16_t half; /* a plane may stand at an odd address */
    memcpy(&half, at->scale, sizeof half);
    at->scale += sizeof half;
    return any_half_to_float(half);
}

/* 0, with rows half restored, when a value is beyond the dtype. */
INLINE int32_t decode_rows(const Block *given, int64_t first, int64_t last, Cursor at,
                           int64_t group, int dtype, int rotate) {
    const Block block = *given;
    Walk walk = row_at(&block, first / block.tokens, first % block.tokens);
    int64_t channels = block.channels, size = dtype == FLOAT32 ? 4 : 2;
    int64_t nbytes = channels * block.itemsize;
    int32_t sound = 1;
    int streamed = streams(&block);
    uint8_t unpacked[WIDEST];
    float rotated[rotate ? WIDEST : 1];
    _Alignas(LINE) uint8_t stage[STAGE];
    for (int64_t i = first; i < last && sound; i++, step(&walk, &block)) {
        int kind = kind_of(&block, &walk);
        uint8_t *row = streamed ? stage : walk.row, *to = rotate ? (uint8_t *)rotated : row;
        if (kind == SKIP) continue;
        if (kind == NATIVE) {
            memcpy(row, at.native, (size_t)nbytes);
            at.native += nbytes;
        } else {
            const uint8_t *codes = kind == EIGHT ? at.byte : unpacked;
            if (kind == EIGHT)
                at.byte += channels;
            else
                unpack(at.anchor, channels / 2, unpacked), at.anchor += channels / 2;
            for (int64_t c = 0; c < channels; c += group) {
                float scale = next_number(&at), base = next_number(&at);
                sound &= decode_group(codes + c, group, dtype, scale, base, to + c * size);
            }
            if (rotate) {
                hadamard(rotated, channels, block.normal);
                sound &= narrow(rotated, channels, block.dtype, row);
            }
        }
        if (streamed) stream(walk.row, stage, nbytes);
    }
    if (streamed) end_streams();
    return sound;
}

/* ---- groups of rows: KIVI's keys ---- */

INLINE void flush_rows(Tile *tile, Cursor *at, int64_t channels, int dtype) {
    float *least = tile->least, *most = tile->most;
    for (int64_t c = 0; c < channels; c++) least[c] = LARGEST, most[c] = -LARGEST;
    for (int64_t r = 0; r < tile->n; r++)
        for (int64_t c = 0; c < channels; c++) {
            float x = load(tile->row[r], c, dtype);
            least[c] = x < least[c] ? x : least[c], most[c] = x > most[c] ? x : most[c];
        }
    for (int64_t c = 0; c < channels; c++) tile->levels[c] = 15;
    numbers_of(tile, channels);
    memcpy(at->scale, tile->numbers, (size_t)(channels * NUMBERS));
    at->scale += channels * NUMBERS;
    const float *base = tile->base, *inverse = tile->inverse;
    int64_t half = channels / 2;
    for (int64_t r = 0; r < tile->n; r++, at->anchor += half)
        for (int64_t i = 0, j = half; i < half; i++, j++) {
            uint8_t low = code(load(tile->row[r], i, dtype), base[i], inverse[i]);
            uint8_t high = code(load(tile->row[r], j, dtype), base[j], inverse[j]);
            at->anchor[i] = (uint8_t)(low | high << 4);
        }
    tile->n = 0;
}

/* Rows of whole heads; 0 when no scale can hold one of them. */
INLINE int32_t encode_by_channel(const Block *given, int64_t first, int64_t last, Cursor at,
                                 int dtype) {
    const Block block = *given;
    Walk walk = row_at(&block, first / block.tokens, 0);
    int64_t channels = block.channels, native = channels * block.itemsize;
    Tile tile = {.n = 0};
    for (int64_t i = first; i < last; i++, step(&walk, &block)) {
        int kind = kind_of(&block, &walk);
        if (tile.n == TILE || (tile.n && !walk.token)) flush_rows(&tile, &at, channels, dtype);
        if (kind == NATIVE) {
            memcpy(at.native, walk.row, (size_t)native);
            at.native += native;
        } else if (kind != SKIP) {
            if (!(absmax(walk.row, channels, dtype) <= LARGEST / 2)) return 0;
            tile.row[tile.n++] = walk.row;
        }
    }
    if (tile.n) flush_rows(&tile, &at, channels, dtype);
    return 1;
}

/* 0, with rows half restored, when a value is beyond the dtype. */
INLINE int32_t decode_by_channel(const Block *given, int64_t first, int64_t last, Cursor at,
                                 int dtype) {
    const Block block = *given;
    Walk walk = row_at(&block, first / block.tokens, 0);
    int64_t half = block.channels / 2, nbytes = block.channels * block.itemsize, left = 0;
    float scale[WIDEST], base[WIDEST];
    int32_t beyond = 0;
    for (int64_t i = first; i < last && !beyond; i++, step(&walk, &block)) {
        int kind = kind_of(&block, &walk);
        if (!walk.token) left = 0;
        if (kind == NATIVE) {
            memcpy(walk.row, at.native, (size_t)nbytes);
            at.native += nbytes;
        } else if (kind != SKIP) {
            if (!left) {
                for (int64_t c = 0; c < 2 * half; c++)
                    scale[c] = next_number(&at), base[c] = next_number(&at);
                left = TILE;
            }
            for (int64_t c = 0, d = half; c < half; c++, d++) {
                float low = (float)(at.anchor[c] & 15) * scale[c] + base[c];
                float high = (float)(at.anchor[c] >> 4) * scale[d] + base[d];
                if (dtype == FLOAT16) beyond |= (low > LARGEST) | (high > LARGEST);
                store(walk.row, c, dtype, low);
                store(walk.row, d, dtype, high);
            }
            at.anchor += half, left--;
        }
    }
    return !beyond;
}

#define BY_CHANNEL(call)                                           \
    (block->dtype == BFLOAT16  ? call(block, first, last, at, BFLOAT16) \
     : block->dtype == FLOAT16 ? call(block, first, last, at, FLOAT16)  \
                               : call(block, first, last, at, FLOAT32))

/* A float16 loop of known length would be unrolled, and then not be vectorised. */
#define BY_GROUP(call, dtype) \
    (block->group == GROUP ? call(GROUP, dtype, 0) : call(block->channels, dtype, 0))
#define BY_DTYPE(call)                                           \
    (block->normal > 0           ? call(block->channels, FLOAT32, 1) \
     : block->dtype == BFLOAT16 ? BY_GROUP(call, BFLOAT16)       \
     : block->dtype == FLOAT16  ? call(block->group, FLOAT16, 0) \
                                 : BY_GROUP(call, FLOAT32))

/* ---- what cpu.py calls ---- */

/* 1 when each of n scales is finite and not negative, and each offset finite. */
EXPORT EVERY_CPU int32_t kvprism_numbers_are_sound(const uint8_t *numbers, int64_t n) {
    int32_t sound = 1;
    for (int64_t i = 0; i < n; i++) {
        uint32_t both;
        memcpy(&both, numbers + NUMBERS * i, sizeof both);
        uint32_t scale = both & 0xffff, offset = both >> 16 & 0x7fff;
        sound &= ((scale < 0x7c00) | (scale == 0x8000)) & (offset < 0x7c00);
    }
    return sound;
}

/* As kvprism_encode of cpu.c. */
EXPORT EVERY_CPU int32_t kvprism_encode_affine(const Block *block, int64_t first, int64_t last,
                                               const int64_t before[KINDS]) {
    Cursor at = cursor_at(block, before);
#define ENCODE(group, dtype, rotate) encode_rows(block, first, last, at, group, dtype, rotate)
    return block->group == 1 ? BY_CHANNEL(encode_by_channel) : BY_DTYPE(ENCODE);
}

/* As kvprism_decode of cpu.c. */
EXPORT EVERY_CPU int32_t kvprism_decode_affine(const Block *block, int64_t first, int64_t last,
                                               const int64_t before[KINDS]) {
    Cursor at = cursor_at(block, before);
#define DECODE(group, dtype, rotate) decode_rows(block, first, last, at, group, dtype, rotate)
    return block->group == 1 ? BY_CHANNEL(decode_by_channel) : BY_DTYPE(DECODE);
}
