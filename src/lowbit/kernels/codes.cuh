// Codes to 16-bit floats in registers, for the layout that layout.py makes and describes.
//
// The host writes these constants in front: BITS (2, 3, 4, 8), E2M1 (codes are floats of 4 bits, else integers), BFLOAT
// (bf16, else fp16), ZERO (zero-points are stored), WIDE (scales are fp32, else fp16), GROUPS (scales of a row in a
// unit of 128 columns: 4, 2 or 1; 8 or 4 of E2M1).
//
// An integer q becomes a float without a conversion: put into the low mantissa bits of a power of two whose last place
// counts ones, it is that power plus q. A mantissa has room for several fields of few bits, and a field k places up is
// the power plus 2^k q: so shifts, which the tensor cores wait for, are needed for every second field only (of three
// bits, in bf16; of two bits for every third). One operation takes 2^k, the power and the zero-point away and leaves
// q - z, which both 16-bit formats hold exactly.
//
// An E2M1 number has its exponent and mantissa side by side, as a 16-bit float has: moved there it is its value times a
// power of two, subnormal numbers included. The multiplication that takes the power back multiplies by the group's
// scale for nothing. The product has six significant bits, four of an E4M3 scale and two of the code, so both 16-bit
// formats hold it and no weight is rounded here either; groups of 16, half a step of the tensor cores, then need no
// sums of their own.

__device__ __forceinline__ float exact(u16 bits) { return BFLOAT ? __uint_as_float((u32)bits << 16) : floats(bits).x; }

#if !BYTES
constexpr int BLOCKS = 4;  // of 32 columns in a unit: what 16 bytes of inputs to a lane are
constexpr int SPAN = GROUPS < BLOCKS ? BLOCKS / GROUPS : 1;  // blocks under one scale of a lane
constexpr int VECTORS = BITS == 3 ? 1 : BITS / 2;            // 16-byte vectors of a lane in a unit
constexpr int FIELDS = 16 / BITS;                  // of a word: a pair each, even columns below, odd columns above
constexpr int MANTISSA = BFLOAT ? 7 : 10;          // bits
constexpr bool SPLIT = BFLOAT && BITS == 8;        // a code has one bit more than a mantissa
constexpr int FREE = SPLIT ? 1 : MANTISSA / BITS;  // fields side by side that fit into one
constexpr u32 BOTH = 0x00010001;
constexpr u32 SIGN = 0x8000 * BOTH;
constexpr u32 POWER = (BFLOAT ? 0x4300 : 0x6400) * BOTH;  // 128 and 1024
constexpr u32 UNIT = (BFLOAT ? 0x3f80 : 0x3c00) * BOTH;   // 1
constexpr u32 MINUS_TWO = 0xc000 * BOTH;
constexpr u32 MIDDLE = 1u << (BITS - 1);
constexpr u32 ONE = (BFLOAT ? 0x7e80 : 0x7400) * BOTH;  // 2^126 and 2^14: what makes E2M1's bits its value
constexpr float FOLDED = 128.0f;                        // what scales in the values are too small by

#if E2M1
typedef uint2 Scales;  // of the lane's columns: a byte for row g and for g + 8, block by block
#elif ZERO && WIDE
typedef uint4 Scales;  // of rows g and g + 8, then the two zero-points, a byte each: one load brings both
__device__ __forceinline__ float2 floats(const Scales& pair) {
    return make_float2(__uint_as_float(pair.x), __uint_as_float(pair.y));
}
__device__ __forceinline__ u32 zeros(const Scales& pair) { return pair.z; }
#elif ZERO
typedef uint2 Scales;
__device__ __forceinline__ float2 floats(const Scales& pair) { return floats(pair.x); }
__device__ __forceinline__ u32 zeros(const Scales& pair) { return pair.y; }
#elif WIDE
typedef float2 Scales;
__device__ __forceinline__ float2 floats(const Scales& pair) { return pair; }
#else
typedef u32 Scales;
#endif

// What a lane holds of 16 rows (its own two are g and g + 8) and one unit of columns.
struct Codes {
    uint4 low[VECTORS];
#if BITS == 3
    uint2 high;  // what four words have no room for: two bytes of a pair each
#endif
    Scales scale[E2M1 ? 2 : GROUPS];  // of E2M1, the second one where a lane's columns are of both groups of a block
};

// What a lane loads next of a tile: a unit of codes, and the scales that go with it or, where several units share
// one, the tile's first.
struct Next {
    u32 code, scale;

    __device__ __forceinline__ void advance(int units) {
        code += units * VECTORS * 32;
        if (E2M1 || GROUPS > 1) scale += units * GROUPS * (E2M1 ? 2 : 8);
    }
};

struct Weight {
    const uint4* low;
    const uint2* high;
    const Scales* scale;
    int units, groups, shift;  // units of a tile, scales of a row, log2 of units to a scale where GROUPS is 1

    __device__ __forceinline__ Next first(int tile, int unit, int lane) const {
        const u32 here = tile * units + unit, group = tile * groups + (GROUPS > 1 ? unit * GROUPS : 0);
        return {here * VECTORS * 32 + lane, E2M1 ? here * GROUPS * 2 + lane * GROUPS / 16 : group * 8 + lane / 4};
    }
    __device__ __forceinline__ void load(Codes& codes, const Next& next, int unit) const {
        const uint4* from = low + next.code;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) codes.low[v] = stream(from + v * 32);
#if BITS == 3
        codes.high = high[next.code];
#endif
        const Scales* of = scale + (E2M1 || GROUPS > 1 ? next.scale : next.scale + (unit >> shift) * 8);
#pragma unroll
        for (int i = 0; i < (E2M1 ? 1 : GROUPS); i++) codes.scale[i] = of[i * 8];
    }
};

// Where a pair is: block, pair and half are constants once loops are unrolled. A place is one of the eight pairs of
// codes that a lane has of two columns; of 3 bits five are in a word, and three are two bytes.
__device__ __forceinline__ int place_of(int block, int half) { return block * 2 + half; }
__device__ __forceinline__ u32 word_of(const Codes& codes, int place, int pair) {
#if BITS == 3
    if (place >= FIELDS) return __byte_perm(pair < 2 ? codes.high.x : codes.high.y, 0, pair % 2 ? 0x4342 : 0x4140);
    const uint4 v = codes.low[0];
#else
    const uint4 v = codes.low[place / FIELDS];
#endif
    return pair == 0 ? v.x : pair == 1 ? v.y : pair == 2 ? v.z : v.w;
}

#if E2M1
__device__ __forceinline__ u32 scale_byte(const Codes& codes, int block, int half, int part = 0) {
    return (block < 2 ? codes.scale[part].x : codes.scale[part].y) >> (block % 2 * 16 + half * 8) & 255;
}

// Scales of a block for rows g and g + 8. A byte is 2^7 times the scale as fp16, without its sign and last seven bits.
__device__ __forceinline__ float2 scales(const Codes& codes, int block) {
    const float2 large = floats((scale_byte(codes, block, 0) | scale_byte(codes, block, 1) << 16) << 7);
    return make_float2(large.x / FOLDED, large.y / FOLDED);
}

// What a code of rows g (half 0) and g + 8 (half 1) is multiplied by, twice in a word: ONE times the scale, over 2^7.
__device__ __forceinline__ u32 constant(const Codes& codes, int block, int half, int part = 0) {
    const u32 byte = scale_byte(codes, block, half, part);
    return BFLOAT ? byte * (BOTH << 4) + 0x7000 * BOTH : byte * (BOTH << 7);
}

// One pair of a block. A word's first three fields need one shift each to have sign, exponent and mantissa where bf16
// has them; the fourth is in what they leave of the 16 bits.
__device__ __forceinline__ u32 levels(const Codes& codes, int block, int pair, int half, u32 constant) {
    constexpr int UP = BFLOAT ? 0 : 3;
    const int place = place_of(block, half), step = place % FIELDS;
    const u32 word = word_of(codes, place, pair);
    if (step == 3) {
        const u32 mantissa = word >> (7 - UP) & (0x0040 << UP) * BOTH;
        const u32 size = with_power(word >> (3 - UP), (0x0180 << UP) * BOTH, mantissa);
        return times(with_power(word << 1, SIGN, size), constant);
    }
    const u32 bits = word << (3 * step);
    return times(BFLOAT ? bits & 0x81c0 * BOTH : with_power(bits, SIGN, bits << UP & (0x01c0 << UP) * BOTH), constant);
}

// The same times the scale of the lane's own columns.
__device__ __forceinline__ u32 levels(const Codes& codes, int block, int pair, int half) {
    return levels(codes, block, pair, half, constant(codes, block, half));
}
#else
__device__ __forceinline__ float2 scales(const Codes& codes, int group) { return floats(codes.scale[group]); }

// The scale of rows g (half 0) and g + 8 (half 1), rounded to the inputs' format, twice in a word.
__device__ __forceinline__ u32 factor(const Codes& codes, int group, int half) {
    const float2 scale = scales(codes, group);
    return half ? packed(scale.y, scale.y) : packed(scale.x, scale.x);
}

// A power of two as a word has it, divided by 2^k.
__device__ __forceinline__ u32 lowered(u32 power, int k) { return power - ((u32)k << MANTISSA) * BOTH; }

// How far up in a mantissa the fields of a place are looked at.
__device__ __forceinline__ int place_up(int place) { return place % FIELDS % FREE * BITS; }

// The place of 3 bits of which two bytes have two; the third is the last one of a word, where signs are.
constexpr int DIVIDED = BITS == 3 ? 7 : 8;

// What goes to a code of a place, twice in a word: it is negative.
__device__ __forceinline__ u32 constant(const Codes& codes, int block, int half) {
    const int place = place_of(block, half), up = place_up(place);
    const u32 power = (lowered(POWER, up) | SIGN) + (place == DIVIDED ? 2u << up : 0) * BOTH;
#if ZERO
    const u32 both = zeros(codes.scale[block / SPAN]);
    if (SPLIT) return (__float_as_uint(128.0f - (float)(both >> 8 * half & 255)) >> 16) * BOTH;
    if (!up && !(power & 255)) return __byte_perm(both, power, half ? 0x5151 : 0x5050);
    return power + (__byte_perm(both, 0, half ? 0x4141 : 0x4040) << up);
#else
    return SPLIT ? 0 : power + (MIDDLE << up) * BOTH;
#endif
}

// q - z of one pair of a block; rows are g for half 0 and g + 8 for half 1.
__device__ __forceinline__ u32 levels(const Codes& codes, int block, int pair, int half) {
    const int place = place_of(block, half), at = place % FIELDS * BITS, up = place_up(place);
    const u32 taken = constant(codes, block, half), word = word_of(codes, place, pair);
    if (SPLIT) {
        // codes from 128 on are 128 too small then, which centres them; from the others 256 is taken instead
        const u32 bits = word >> at;
        const u32 centred =
            fused(with_power(bits, 0x7f * BOTH, POWER), UNIT, flipped(bits, 0x80 * BOTH, 0xc380 * BOTH));
        return ZERO ? fused(centred, UNIT, taken) : centred;
    }
    const u32 bits = word >> (at - up), unit = lowered(UNIT, up);
    if (place == DIVIDED) {
        // four stand above the two bits, of which two are taken; two more go or come with the third bit
        const u32 above = fused(with_power(bits, (3u << up) * BOTH, POWER + (4u << up) * BOTH), unit, taken);
        return fused(above, UNIT, flipped(word_of(codes, 0, pair), SIGN, MINUS_TWO));
    }
    return fused(with_power(bits, (((1u << BITS) - 1) << up) * BOTH, POWER), unit, taken);
}
#endif
#endif
