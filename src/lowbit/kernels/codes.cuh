// Codes to 16-bit floats in registers, for the layout that layout.py makes and describes.
//
// The host writes these constants in front: BITS (2, 3, 4, 8), BFLOAT (bf16, else fp16), ZERO (zero-points are stored),
// WIDE (scales are fp32, else fp16), GROUPS (scales of a row in a unit of 128 columns: 4, 2 or 1).
//
// An integer q becomes a float without a conversion: put into the low mantissa bits of a power of two whose last place
// counts ones, it is that power plus q. Taking the power and the zero-point away at once leaves q - z, which both
// 16-bit formats hold exactly.

constexpr int LOW = BITS == 3 ? 2 : BITS;  // 3 bits are two planes, of two bits and of one
constexpr int VECTORS = LOW / 2;           // 16-byte vectors of a lane in a unit
constexpr int PAIRS = 16 / LOW;            // pairs of codes in a word: even columns below, odd columns above
constexpr u32 BOTH = 0x00010001;
constexpr u32 POWER = (BFLOAT ? 0x4300 : 0x6400) * BOTH;  // 128 and 1024
constexpr u32 MIDDLE = 1u << (BITS - 1);

#if WIDE
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
    Scales scale[GROUPS];
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
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            const int group = tile * groups + (GROUPS == 1 ? unit >> shift : unit * GROUPS + i);
            codes.scale[i] = scale[group * 8 + lane / 4];
#if ZERO
            codes.zero[i] = zero[group * 8 + lane / 4];
#endif
        }
    }
};

// What is taken from a code of rows g (half 0) and g + 8 (half 1), twice in a word.
__device__ __forceinline__ u32 offset(const Codes& codes, int group, int half) {
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

// q - z of one pair (0 to 15) of a row's columns in the unit; pair and half are constants once loops are unrolled.
__device__ __forceinline__ u32 levels(const Codes& codes, int pair, int half, u32 offset) {
    const int index = pair / PAIRS * 2 + half;
    const uint4 v = codes.low[index / 4];
    const u32 word = index % 4 == 0 ? v.x : index % 4 == 1 ? v.y : index % 4 == 2 ? v.z : v.w;
    const u32 bits = word >> (pair % PAIRS * LOW);
#if BFLOAT && BITS == 8
    // bf16 has room for seven bits behind 128. Codes from 128 on are then 128 too small, which centres them; what is
    // taken from the others is 256 instead
    const u32 centred = minus(with_power(bits, 0x7f * BOTH, POWER), with_power(~bits, 0x80 * BOTH, POWER));
    return ZERO ? minus(centred, offset) : centred;
#else
    u32 number = with_power(bits, ((1u << LOW) - 1) * BOTH, POWER);
#if BITS == 3
    const u32 plane = half ? codes.high.y : codes.high.x;
    number |= (pair < 2 ? plane << (2 - pair) : plane >> (pair - 2)) & (4 * BOTH);
#endif
    return minus(number, offset);
#endif
}
