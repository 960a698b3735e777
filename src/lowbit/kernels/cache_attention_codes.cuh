// Codes of keys and values out of a cache into registers, as fp16, in the order in which the tensor cores take them.
//
// A lane is g = lane / 4 and c = lane % 4. A row (one position) of keys belongs to four lanes, one of values to eight;
// each reads neighbouring bytes, and which channel is which k of a product is free: queries, and at the end outputs,
// are put into that order instead. A register that is cut up holds two halves of 16 bits whose codes are taken two at
// once, one of each half: a word of a key's codes as it is, or the same half of two positions' words of values.
//
// An integer is put into the mantissa of 1024 and brought down to its value, exactly, by one multiply-add; an E4M3
// number has its exponent and mantissa side by side, as fp16 has. Numbers of 16 bits go the same way and stay what they
// are: a "code" is then one of them, half a word.
//
// The host writes these constants in front: WIDTH (channels of a head); for keys (K) and values (V) bits KB, kind of
// scales KK (one for a token: 0, for a group of its channels: 1, for a channel of some tokens: 2, none: 3), group KG,
// rule KR.

constexpr u32 BOTH = 0x00010001;
constexpr u32 POWER = 0x6400 * BOTH;  // 1024
constexpr int MINIMUM = 0, ZERO_POINT = 1, SYMMETRIC = 2, E4M3 = 3;
constexpr int OF_TOKEN = 0, OF_GROUP = 1, OF_CHANNEL = 2, PLAIN = 3;
constexpr u32 LOW_HALVES = 0x5410, HIGH_HALVES = 0x7632;  // of two words, for __byte_perm

constexpr int LINE = 128;  // bytes of a cache

__device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__device__ constexpr int most(int a, int b) { return a < b ? b : a; }

// Codes that are to be multiplied as they are lie around zero: sums of large numbers, then taken back, would cost bits.
template <int BITS, int KIND, int RULE>
constexpr u32 MIDDLE = RULE != E4M3 && (KIND == OF_TOKEN || RULE == SYMMETRIC) ? 1u << (BITS - 1) : 0;

// Code number i (of 16 / BITS) of both halves, less the middle.
template <int BITS, int KIND, int RULE>
__device__ __forceinline__ u32 level(u32 halves, int i) {
    if constexpr (KIND == PLAIN) {
        return halves;
    } else if constexpr (RULE == E4M3) {
        const u32 word = i ? halves : halves << 8;
        return times(with_power(word, 0x8000 * BOTH, word >> 1 & 0x3f80 * BOTH), 0x5c00 * BOTH);  // 256
    } else {
        constexpr int ROOM = BITS == 8 ? 8 : 10 / BITS * BITS;  // of ten bits of mantissa
        const u32 word = i * BITS < ROOM ? halves : halves >> ROOM, bit = i * BITS % ROOM;
        const u32 number = BITS == 8 ? __byte_perm(halves, 0x64646464, i ? 0x4341 : 0x4240)
                                     : with_power(word, ((1u << BITS) - 1 << bit) * BOTH, POWER);
        const u32 middle = MIDDLE<BITS, KIND, RULE>;
        return fuse(number, (15 - bit << 10) * BOTH, (0x8000 | 25 - bit << 10 | middle << bit) * BOTH);
    }
}

// The values of two codes as the definition has them: one product, one sum, rounded once.
template <int RULE>
__device__ __forceinline__ u32 value(u32 code, u32 scale, u32 offset) {
    if (RULE == MINIMUM) return fuse(code, scale, offset);
    return times(RULE == ZERO_POINT ? minus(code, minus(offset | POWER, POWER)) : code, scale);
}

// What a code around zero times the scale of a token lacks.
template <int BITS, int RULE>
__device__ __forceinline__ float lacking(float scale, u32 offset) {
    constexpr float middle = 1 << (BITS - 1);
    if (RULE == MINIMUM) return scale * middle + floats(offset).x;
    return RULE == ZERO_POINT ? scale * (middle - (float)offset) : 0.0f;
}

template <int WORDS>
__device__ __forceinline__ void take(u32* to, const char* at) {
    if constexpr (WORDS == 4) {
        const uint4 v = stream((const uint4*)at);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if constexpr (WORDS == 2) {
        const uint2 v = stream((const uint2*)at);
        to[0] = v.x, to[1] = v.y;
    } else if constexpr (WORDS == 1) {
        to[0] = stream((const u32*)at);
    } else {
        to[0] = *(const u16*)at;
    }
}

__device__ __forceinline__ void spread(u32* to, const void* at) {  // 16 bytes that are likely to be read again
    const uint4 v = *(const uint4*)at;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// Codes and scales of one text and head; step: from a token, or a group of tokens, to the next one's scale, or to the
// next one's numbers where they have none.
struct Side {
    const char* codes;
    const u16* scale;
    const void* offset;
    int step;
};

template <int RULE>
__device__ __forceinline__ u32 offset_at(const Side& side, int place) {
    if (RULE == MINIMUM) return ((const u16*)side.offset)[place];
    return RULE == ZERO_POINT ? ((const unsigned char*)side.offset)[place] : 0;
}

// Asks for the scales of a tile, and `Row::expect` for its codes, so far as they lie before `end`.
template <int KIND, int GROUP, int RULE>
__device__ __forceinline__ void expect_scales(const Side& side, int first, int end, int lane) {
    const int row = first + lane % TILE, part = lane % (WIDTH * 2 / LINE) * (LINE / 2);
    if (KIND == PLAIN || row >= end) return;
    const int place = KIND == OF_CHANNEL ? row / most(GROUP, 1) * side.step + part : row * side.step;
    prefetch(side.scale + place);
    if (RULE == MINIMUM || RULE == ZERO_POINT) prefetch((const char*)side.offset + place * (RULE == MINIMUM ? 2 : 1));
}

// How the channels of a row are shared out: LANES lanes read CHUNK neighbours each, and go on behind all others.
template <int BITS, int LANES, int GROUP>
struct Row {
    static constexpr int CHANNELS = WIDTH / LANES, CHUNK = least(CHANNELS, 128 / BITS), CHUNKS = CHANNELS / CHUNK;
    static constexpr int WORDS = CHUNK * BITS / 32;  // of a chunk; none where it is half a word
    static constexpr int BYTES = WIDTH * BITS / 8;
    static constexpr int HALF = 16 / BITS;           // codes of half a word
    static constexpr int UNIT = least(most(GROUP, 1), CHUNK), UNITS = CHANNELS / UNIT;  // of channels with one scale

    static __device__ __forceinline__ int channel(int n, int lane) {  // where a lane's n-th channel is
        return (n / CHUNK * LANES + lane) * CHUNK + n % CHUNK;
    }
    static __device__ __forceinline__ const char* at(const Side& side, int row) {
        return side.codes + row * (BITS == 16 ? side.step * 2 : BYTES);
    }
    static __device__ __forceinline__ void load(u32* words, const Side& side, int row, int lane) {
        const char* codes = at(side, row);
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) take<WORDS>(words + i * WORDS, codes + channel(i * CHUNK, lane) * BITS / 8);
    }
    static __device__ __forceinline__ void expect(const Side& side, int first, int end, int lane) {
#pragma unroll
        for (int byte = lane * LINE; byte < TILE * BYTES; byte += 32 * LINE)
            if (first + byte / BYTES < end) prefetch(at(side, first + byte / BYTES) + byte % BYTES);
    }
};

using KeyRow = Row<KB, 4, KG>;
using ValueRow = Row<VB, 8, VG>;
constexpr int KEY_WORDS = WIDTH * KB / 128, VALUE_WORDS = most(WIDTH * VB / 256, 1);  // of a lane and row
constexpr int STEPS = WIDTH / 16;  // of keys' channels, and tiles of values'

// Number i and i + COUNT of 2 COUNT neighbours, which lie two by two.
template <int COUNT>
__device__ __forceinline__ u32 apart(const u32* pairs, int i) {
    if (COUNT == 1) return pairs[0];
    return __byte_perm(pairs[i / 2], pairs[(i + COUNT) / 2], i % 2 ? HIGH_HALVES : LOW_HALVES);
}

// Keys of 16 SUBS positions: a lane holds rows g, g + 8, ...
template <int SUBS>
struct Keys {
    static constexpr int ROWS = 2 * SUBS, HALF = KeyRow::HALF;
    static constexpr int SHARE = KK == OF_CHANNEL ? most(1, least(KG / 8, ROWS)) : 1;  // rows under one scale
    static constexpr int SCALES = KK == OF_GROUP ? KeyRow::UNITS : KK == OF_CHANNEL ? WIDTH / 8 : 1;
    u32 words[ROWS][KEY_WORDS];
    u32 scale[ROWS / SHARE][SCALES], offset[ROWS / SHARE][SCALES];

    // From position `first` on; rows behind the last one, `end` - 1, repeat it.
    __device__ __forceinline__ void load(const Side& side, int first, int end, int lane) {
        if (first + 16 * SUBS <= end) load<true>(side, first + lane / 4, end, lane);
        else load<false>(side, first + lane / 4, end, lane);
    }

    template <bool WHOLE>
    __device__ __forceinline__ void load(const Side& side, int first, int end, int lane) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = WHOLE ? first + r * 8 : min(first + r * 8, end - 1);
            KeyRow::load(words[r], side, row, lane % 4);
            if (KK == OF_TOKEN) {
                scale[r][0] = side.scale[row * side.step], offset[r][0] = offset_at<KR>(side, row * side.step);
            } else if (KK == OF_GROUP) {
#pragma unroll
                for (int u = 0; u < SCALES; u++) {
                    const int place = row * side.step + KeyRow::channel(u * KeyRow::UNIT, lane % 4) / most(KG, 1);
                    scale[r][u] = side.scale[place], offset[r][u] = offset_at<KR>(side, place);
                }
            } else if (KK == OF_CHANNEL && r % SHARE == 0) {
#pragma unroll
                for (int v = 0; v < SCALES; v += 4) {
                    const int place = row / most(KG, 1) * side.step + KeyRow::channel(2 * v, lane % 4);
                    spread(scale[r / SHARE] + v, side.scale + place);
                    if (KR == MINIMUM) spread(offset[r / SHARE] + v, (const u16*)side.offset + place);
                }
            }
        }
    }

    // Codes i and i + HALF of a word, for the n-th pair of a row.
    __device__ __forceinline__ u32 pair(int r, int n) const {
        const int word = n / HALF, i = n % HALF;
        const u32 code = level<KB, KK, KR>(words[r][word], i);
        if (KK == OF_TOKEN || KK == PLAIN) return code;
        const u32 *scales = scale[r / SHARE], *offsets = offset[r / SHARE];
        if (KK == OF_CHANNEL)
            return value<KR>(code, apart<HALF>(scales + word * HALF, i), apart<HALF>(offsets + word * HALF, i));
        const int one = (word * 2 * HALF + i) / KeyRow::UNIT, other = (word * 2 * HALF + i + HALF) / KeyRow::UNIT;
        return value<KR>(
            code, __byte_perm(scales[one], scales[other], LOW_HALVES),
            __byte_perm(offsets[one], offsets[other], LOW_HALVES));
    }
};

// Values of 16 SUBS positions: of each 16 a lane holds rows 2c, 2c + 1, 2c + 8 and 2c + 9. The scale of a token is
// wanted where its score is, with rows g and g + 8.
template <int SUBS>
struct Values {
    static constexpr int ROWS = 4 * SUBS, HALF = ValueRow::HALF;
    static constexpr int SCALES = VK == OF_GROUP ? ValueRow::UNITS : 1;
    u32 words[ROWS][VALUE_WORDS];
    u32 scale[ROWS][SCALES], offset[ROWS][SCALES];

    __device__ __forceinline__ void load(const Side& side, int first, int end, int lane) {
        if (first + 16 * SUBS <= end) load<true>(side, first, end, lane);
        else load<false>(side, first, end, lane);
    }

    template <bool WHOLE>
    __device__ __forceinline__ void load(const Side& side, int first, int end, int lane) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int place = first + lane % 4 * 2 + (r / 4 * 16 + r % 4 / 2 * 8 + r % 2);
            const int row = WHOLE ? place : min(place, end - 1);
            ValueRow::load(words[r], side, row, lane / 4);
#pragma unroll
            for (int u = 0; u < SCALES && VK == OF_GROUP; u++) {
                const int at = row * side.step + ValueRow::channel(u * ValueRow::UNIT, lane / 4) / most(VG, 1);
                scale[r][u] = side.scale[at], offset[r][u] = offset_at<VR>(side, at);
            }
        }
#pragma unroll
        for (int r = 0; r < 2 * SUBS && VK == OF_TOKEN; r++) {
            const int row = first + lane / 4 + r * 8, at = (WHOLE ? row : min(row, end - 1)) * side.step;
            scale[r][0] = side.scale[at], offset[r][0] = offset_at<VR>(side, at);
        }
    }

    // The n-th codes of rows r and r + 1: code i of half a word.
    __device__ __forceinline__ u32 pair(int r, int n) const {
        const int half = n / HALF, i = n % HALF;
        const u32 halves = __byte_perm(words[r][half / 2], words[r + 1][half / 2], half % 2 ? HIGH_HALVES : LOW_HALVES);
        const u32 code = level<VB, VK, VR>(halves, i);
        if (VK == OF_TOKEN || VK == PLAIN) return code;
        const int unit = n / ValueRow::UNIT;
        return value<VR>(
            code, __byte_perm(scale[r][unit], scale[r + 1][unit], LOW_HALVES),
            __byte_perm(offset[r][unit], offset[r + 1][unit], LOW_HALVES));
    }
};
