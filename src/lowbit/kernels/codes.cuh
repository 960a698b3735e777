// Codes to 16-bit floats in registers, for the layout that layout.py makes and describes.
//
// The host writes these constants in front: BITS (2, 3, 4, 8), E2M1 (codes are floats of 4 bits, else integers), BFLOAT
// (bf16, else fp16), ZERO (zero-points are stored), WIDE (scales are fp32, else fp16), GROUPS (scales of a row in a
// unit of 128 columns: 4, 2 or 1; 8 or 4 of E2M1).
//
// An integer q becomes a float without a conversion: put into the low mantissa bits of a power of two whose last place
// counts ones, it is that power plus q. Taking the power and the zero-point away at once leaves q - z, which both
// 16-bit formats hold exactly.
//
// An E2M1 number has its exponent and mantissa side by side, as a 16-bit float has: moved there it is its value times a
// power of two, subnormal numbers included. The multiplication that takes the power back multiplies by the group's
// scale for nothing. The product has six significant bits, four of an E4M3 scale and two of the code, so both 16-bit
// formats hold it and no weight is rounded here either; groups of 16, half a step of the tensor cores, then need no
// sums of their own.

__device__ __forceinline__ float exact(u16 bits) { return BFLOAT ? __uint_as_float((u32)bits << 16) : floats(bits).x; }

#if !BYTES
constexpr int BLOCKS = 4;                  // of 32 columns in a unit: what 16 bytes of inputs to a lane are
constexpr int LOW = BITS == 3 ? 2 : BITS;  // 3 bits are two planes, of two bits and of one
constexpr int VECTORS = LOW / 2;           // 16-byte vectors of a lane in a unit
constexpr int FIELDS = 16 / LOW;           // of a word: a pair each, even columns below, odd columns above
constexpr int SPAN = GROUPS < BLOCKS ? BLOCKS / GROUPS : 1;  // blocks under one scale of a lane
constexpr u32 BOTH = 0x00010001;
constexpr u32 POWER = (BFLOAT ? 0x4300 : 0x6400) * BOTH;  // 128 and 1024
constexpr u32 MIDDLE = 1u << (BITS - 1);
constexpr u32 SIGN = 0x8000 * BOTH;
constexpr u32 ONE = (BFLOAT ? 0x7e80 : 0x7400) * BOTH;  // 2^126 and 2^14: what makes E2M1's bits its value
constexpr float FOLDED = 128.0f;                        // what scales in the values are too small by

#if E2M1
typedef uint2 Scales;  // of the lane's columns: a byte for row g and for g + 8, block by block
#elif WIDE
typedef float2 Scales;
__device__ __forceinline__ float2 floats(Scales pair) { return pair; }
#else
typedef u32 Scales;
#endif

// What a lane holds of 16 rows (its own two are g and g + 8) and one unit of columns.
struct Codes {
    uint4 low[VECTORS];
#if BITS == 3
    uint2 high;
#endif
    Scales scale[E2M1 ? 2 : GROUPS];  // of E2M1, the second one where a lane's columns are of both groups of a block
#if ZERO
    u16 zero[GROUPS];
#endif
};

struct Weight {
    const uint4* low;
    const uint2* high;
    const Scales* scale;
    const u16* zero;
    int units, groups, shift;  // units of a tile, scales of a row, log2 of units to a scale where GROUPS is 1

    __device__ __forceinline__ void load(Codes& codes, int tile, int unit, int lane) const {
        const int place = tile * units + unit;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) codes.low[v] = stream(low + (place * VECTORS + v) * 32 + lane);
#if BITS == 3
        codes.high = high[place * 32 + lane];
#endif
#if E2M1
        codes.scale[0] = scale[place * GROUPS * 2 + lane * GROUPS / 16];
#else
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            const int group = tile * groups + (GROUPS == 1 ? unit >> shift : unit * GROUPS + i);
            codes.scale[i] = scale[group * 8 + lane / 4];
#if ZERO
            codes.zero[i] = zero[group * 8 + lane / 4];
#endif
        }
#endif
    }
};

// Where a pair is: block, pair and half are constants once loops are unrolled.
__device__ __forceinline__ int field(int block, int half) { return (block * 2 + half) % FIELDS; }
__device__ __forceinline__ u32 word_of(const Codes& codes, int block, int pair, int half) {
    const uint4 v = codes.low[(block * 2 + half) / FIELDS];
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
    const u32 word = word_of(codes, block, pair, half), step = field(block, half);
    if (step == 3) {
        const u32 mantissa = word >> (7 - UP) & (0x0040 << UP) * BOTH;
        const u32 size = with_power(word >> (3 - UP), (0x0180 << UP) * BOTH, mantissa);
        return times(with_power(word << 1, SIGN, size), constant);
    }
    const u32 bits = word << (3 * step);
    return times(BFLOAT ? bits & 0x81c0 * BOTH : with_power(bits, SIGN, bits << UP & (0x01c0 << UP) * BOTH), constant);
}
#else
__device__ __forceinline__ float2 scales(const Codes& codes, int group) { return floats(codes.scale[group]); }

// The scale of rows g (half 0) and g + 8 (half 1), rounded to the inputs' format, twice in a word.
__device__ __forceinline__ u32 factor(const Codes& codes, int group, int half) {
    const float2 scale = scales(codes, group);
    return half ? packed(scale.y, scale.y) : packed(scale.x, scale.x);
}

// What is taken from a code of rows g (half 0) and g + 8 (half 1), twice in a word.
__device__ __forceinline__ u32 constant(const Codes& codes, int group, int half) {
#if ZERO
    const u32 zero = half ? codes.zero[group] >> 8 : codes.zero[group] & 255;
#else
    const u32 zero = MIDDLE;
#endif
#if BFLOAT && BITS == 8
    return (__float_as_uint((float)zero - 128.0f) >> 16) * BOTH;
#else
    return POWER + zero * BOTH;
#endif
}

// q - z of one pair of a block.
__device__ __forceinline__ u32 levels(const Codes& codes, int block, int pair, int half, u32 constant) {
    const u32 bits = word_of(codes, block, pair, half) >> (field(block, half) * LOW);
#if BFLOAT && BITS == 8
    // bf16 has room for seven bits behind 128. Codes from 128 on are then 128 too small, which centres them; what is
    // taken from the others is 256 instead
    const u32 centred = minus(with_power(bits, 0x7f * BOTH, POWER), with_power(~bits, 0x80 * BOTH, POWER));
    return ZERO ? minus(centred, constant) : centred;
#else
    u32 number = with_power(bits, ((1u << LOW) - 1) * BOTH, POWER);
#if BITS == 3
    const u32 plane = half ? codes.high.y : codes.high.x;
    const int place = block * 4 + pair;
    number |= (place < 2 ? plane << (2 - place) : plane >> (place - 2)) & (4 * BOTH);
#endif
    return minus(number, constant);
#endif
}
#endif
#endif
