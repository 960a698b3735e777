// Tokens to codes behind a map X -> gain · leftᵀ X right, of inputs in bf16: see `reference` in
// `encoder.py` for what is meant, and `dynamic_triton.py`, which does the same for all other shapes.
//
// Everything is computed transposed, so that what one product finds is operand A of the next without leaving its
// registers: Yᵀ = rightᵀ Xᵀ has the sums of two neighbouring rows of X in one lane, which is where Zᵀ = Yᵀ left wants
// them. A warp holds 16 columns of the result, or 32 as two tiles: then every operand B that it reads feeds both, and
// reading shared memory would bound it otherwise. Operands lie there row by row, an odd number of 16-byte vectors
// apart, so that ldmatrix meets no bank twice. The columns of A are mixed such that a lane ends up with neighbours of
// the result, two of each tile, and writes their codes at once.
//
// A group of warps takes one token after the other; groups of a block share the factors and nothing else. Thus one
// multiplies while another rounds, and none waits for loads: a token comes by background copies into one of two buffers
// while the one before it is worked on. Values become fp16 in place, by a power of two, and codes are gathered there
// when nobody needs the token any longer.
//
// Constants from the host: N1, N2 (multiples of 16), P1, P2 (columns of the factors' rows in memory), LEFT, RIGHT
// (which of them there are), GAIN (whether it is not 1), TILES (of a warp: 1 or 2), GROUPS (of a block), RESIDENT
// (blocks of a processor), FORM, LOWEST, HIGHEST, TWICE_LEVELS (how many halves of a scale make up the largest value),
// CLIP. BFLOAT is 0: operands are fp16.

static_assert(N1 % 16 == 0 && N2 % (16 * TILES) == 0 && (LEFT || RIGHT), "whole tiles");

enum { BYTES, NIBBLES, MINIFLOATS };

constexpr int TOLD = 6;  // vectors
constexpr u32 ALL = 0xffffffff;
constexpr u32 LOW_HALVES = 0x5410, HIGH_HALVES = 0x7632;  // of two words, for __byte_perm
constexpr int WARPS = N2 / 16 / TILES, THREADS = 32 * WARPS;  // of a group
constexpr int VECTORS = N2 / 8;  // of 16 bytes in a token's row
constexpr int APART = THREADS / VECTORS, OWN = N1 / APART;  // rows between a thread's vectors, and how many these are
constexpr int EIGHTS = N1 / 8;  // of rows
constexpr int ROW = VECTORS | 1, LEFT_ROW = N1 / 8 | 1;  // vectors from one row to the next in shared memory
constexpr int CODE_BYTES = FORM == NIBBLES ? N2 / 2 : N2, CODE_ROW = CODE_BYTES + 16;  // likewise; no bank meets twice
constexpr int LANE_BYTES = 2 * TILES / (FORM == NIBBLES ? 2 : 1);  // of codes, in a row
constexpr float NEAREST = 12582912.0f;  // 1.5 · 2^23: the lowest bits of its sum with y are y's nearest integer

// Tile, eight rows of the result: rows 2c and 2c + 1 of lane g's column 2u of tile u (first two) and of the next one.
using Sums = float[TILES][EIGHTS][4];
using Rounded = u32[EIGHTS][2][TILES];  // eight rows, row of two, tile: two columns each

__device__ __forceinline__ float power(u32 exponent) { return __uint_as_float(exponent); }

// --- shared memory --------------------------------------------------------------------------------------------------

// A vector of a row in the order of operand A: of a warp's columns, 2 TILES g + k comes to 8k + g.
__device__ __forceinline__ void mix(uint4* row, int vector, uint4 v) {
    constexpr int EACH = 2 * TILES;  // vectors of a warp
    u32* at = reinterpret_cast<u32*>(row + vector / EACH * EACH) + vector % EACH * (2 / TILES);
    if (TILES == 2) {
        at[0] = __byte_perm(v.x, v.z, LOW_HALVES), at[4] = __byte_perm(v.x, v.z, HIGH_HALVES);
        at[8] = __byte_perm(v.y, v.w, LOW_HALVES), at[12] = __byte_perm(v.y, v.w, HIGH_HALVES);
    } else {
        at[0] = __byte_perm(v.x, v.y, LOW_HALVES), at[1] = __byte_perm(v.z, v.w, LOW_HALVES);
        at[4] = __byte_perm(v.x, v.y, HIGH_HALVES), at[5] = __byte_perm(v.z, v.w, HIGH_HALVES);
    }
}

// A factor's rows, by all threads of a block.
template <int COLUMNS, int PADDED, bool MIXED>
__device__ __forceinline__ void fill(uint4* to, const uint4* from) {
    constexpr int WIDE = COLUMNS / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < COLUMNS * WIDE; i += GROUPS * THREADS) {
        const int row = i / WIDE, vector = i % WIDE;
        const uint4* source = from + row * (PADDED / 8) + vector;
        if (MIXED) mix(to + row * (WIDE | 1), vector, *source);
        else copy(to + row * (WIDE | 1) + vector, source, true);
    }
}

// Where a lane's row begins of four matrices of 8 x 8: 16 rows, two vectors.
template <int STRIDE>
__device__ __forceinline__ int corner(int lane) {
    return (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2;
}

// --- products -------------------------------------------------------------------------------------------------------

// A step of 16: operand A is in registers, B's columns are rows in shared memory.
template <int STRIDE>
__device__ __forceinline__ void add(Sums& sums, const u32 (&a)[TILES][4], const uint4* b) {
#pragma unroll
    for (int pair = 0; pair < EIGHTS / 2; pair++) {
        u32 part[4];
        matrices(part, b + pair * 16 * STRIDE);
#pragma unroll
        for (int u = 0; u < TILES; u++) {
            multiply(sums[u][2 * pair], a[u], part[0], part[1]);
            multiply(sums[u][2 * pair + 1], a[u], part[2], part[3]);
        }
    }
}

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < 4 * TILES * EIGHTS; i++) sums[i / 4 / EIGHTS][i / 4 % EIGHTS][i % 4] = 0.0f;
}

// Zᵀ of a token, or as much of it as there are factors for.
__device__ __forceinline__ void transformed(
    Sums& sums, const uint4* token, const uint4* left, const uint4* right, int warp, int lane) {
    u32 a[TILES][4], between[TILES][EIGHTS][2];
    const uint4* x = token + corner<ROW>(lane);
    clear(sums);
    if (RIGHT) {
        right += corner<ROW>(lane) + warp * (2 * TILES);
#pragma unroll
        for (int step = 0; step < N2 / 16; step++) {
#pragma unroll
            for (int u = 0; u < TILES; u++) matrices_transposed(a[u], right + step * 16 * ROW + 2 * u);
            add<ROW>(sums, a, x + 2 * step);
        }
    }
    if (!LEFT) return;
    if (RIGHT) {
#pragma unroll
        for (int i = 0; i < 2 * TILES * EIGHTS; i++) {
            const float* pair = sums[i / 2 / EIGHTS][i / 2 % EIGHTS] + i % 2 * 2;
            between[i / 2 / EIGHTS][i / 2 % EIGHTS][i % 2] = packed(pair[0], pair[1]);
        }
        clear(sums);
    }
    left += corner<LEFT_ROW>(lane);
#pragma unroll
    for (int step = 0; step < N1 / 16; step++) {
#pragma unroll
        for (int u = 0; u < TILES; u++) {
            if (RIGHT) {
#pragma unroll
                for (int i = 0; i < 4; i++) a[u][i] = between[u][2 * step + i / 2][i % 2];
            } else {
                matrices_transposed(a[u], x + step * 16 * ROW + warp * (2 * TILES) + 2 * u);
            }
        }
        add<LEFT_ROW>(sums, a, left + 2 * step);
    }
}

// --- levels ---------------------------------------------------------------------------------------------------------

// x / scale: a product with the inverse and one correction is rounded as the quotient is (Markstein 1990).
__device__ __forceinline__ float quotient(float x, float scale, float inverse) {
    const float y = x * inverse;
    return fmaf(fmaf(-y, scale, x), inverse, y);
}

// A format's levels of one scale.
struct Levels {
    float scale, inverse;
    u32 lowest, highest;  // values, two alike

    // Integers saturate before they are divided, two values at once: bf16 is finer there than a scale is, so the number
    // next to a scale times the highest level has this level, and so has all that is larger.
    __device__ __forceinline__ explicit Levels(float scale)
        : scale(scale), inverse(1.0f / scale), lowest(packed_bfloat(scale * LOWEST, scale * LOWEST)),
          highest(packed_bfloat(scale * HIGHEST, scale * HIGHEST)) {}

    // Two values in bf16 as codes in the lowest bits of two words.
    __device__ __forceinline__ void level(u32 (&bits)[2], u32 pair) const {
        if (FORM != MINIFLOATS) pair = larger_bfloat(smaller_bfloat(pair, highest), lowest);
        const float low = quotient(__uint_as_float(pair << 16), scale, inverse);
        const float high = quotient(__uint_as_float(pair & 0xffff0000), scale, inverse);
        bits[0] = FORM == MINIFLOATS ? packed_e4m3(low, high) : __float_as_uint(low + NEAREST);
        bits[1] = FORM == MINIFLOATS ? 0 : __float_as_uint(high + NEAREST);
    }

    // Codes of neighbours, two to a tile, the first one lowest.
    __device__ __forceinline__ u32 codes(const u32 (&z)[TILES]) const {
        u32 bits[2], word = 0;
#pragma unroll
        for (int u = 0; u < TILES; u++) {
            level(bits, z[u]);
            const u32 pair = FORM == MINIFLOATS ? bits[0] : __byte_perm(bits[0], bits[1], 0x0040);
            word = u ? __byte_perm(word, pair, LOW_HALVES) : pair;
        }
        if (FORM != NIBBLES) return word;
        const u32 nibbles = word & 0x0f0f0f0f;
        return __byte_perm(nibbles | nibbles >> 4, 0, 0x0020);
    }
};

// --- what a group's threads tell each other -------------------------------------------------------------------------

__device__ __forceinline__ float largest(float x) {  // of a warp
#pragma unroll
    for (int step = 1; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

__device__ __forceinline__ float larger_half(u32 pair) {  // of two bf16
    return fmaxf(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}

__device__ __forceinline__ float largest_of(const float* of_warps) {
    float found = of_warps[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; warp++) found = fmaxf(found, of_warps[warp]);
    return found;
}

struct Group {
    uint4* buffers;  // two tokens [N1][ROW]
    float* told;  // [3][8], by warps: the largest magnitude; mapped, the largest value and the smallest's negative
    int index, thread;

    __device__ __forceinline__ void meet_all() const { meet<THREADS>(1 + index); }
    __device__ __forceinline__ int place() const { return thread / VECTORS * ROW + thread % VECTORS; }

    // A thread's vectors are so many rows apart, in the token and in the buffer.
    __device__ __forceinline__ void fetch(uint4* to, const uint4* token, bool there) const {
#pragma unroll
        for (int k = 0; k < OWN && there; k++) copy(to + place() + k * APART * ROW, token + thread + k * THREADS, true);
        end_copies();
    }

    // Largest magnitude of what this thread has fetched, and that itself.
    __device__ __forceinline__ float look(uint4 (&raw)[OWN], const uint4* buffer) const {
        u32 found = 0;
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            raw[k] = buffer[place() + k * APART * ROW];
            const u32 words[4] = {raw[k].x, raw[k].y, raw[k].z, raw[k].w};
#pragma unroll
            for (int i = 0; i < 4; i++) found = larger_bfloat(found, words[i] & 0x7fff7fff);
        }
        return larger_half(found);
    }

    // The same as fp16, times a power of two. Where X itself is operand A its columns are mixed, by
    // neighbouring lanes, all of which have read theirs.
    __device__ __forceinline__ void convert(uint4* buffer, const uint4 (&raw)[OWN], float by) const {
        const auto halves = [by](u32 pair) {
            return packed(__uint_as_float(pair << 16) * by, __uint_as_float(pair & 0xffff0000) * by);
        };
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            const uint4 v = make_uint4(halves(raw[k].x), halves(raw[k].y), halves(raw[k].z), halves(raw[k].w));
            if (RIGHT) buffer[place() + k * APART * ROW] = v;
            else mix(buffer + (thread / VECTORS + k * APART) * ROW, thread % VECTORS, v);
        }
    }

    // Codes of a token, in 16-byte vectors.
    __device__ __forceinline__ void write(uint4* codes, const uint4* buffer) const {
        constexpr int WIDE = CODE_BYTES / 16;
#pragma unroll
        for (int i = thread; i < N1 * WIDE; i += THREADS) codes[i] = buffer[i / WIDE * (CODE_ROW / 16) + i % WIDE];
    }
};

// Sums times gain as bf16 has them; the largest value of a warp, and the smallest one's negative.
__device__ __forceinline__ float2 stored(Rounded& z, const Sums& sums, float gain) {
    u32 high = 0xff80ff80, low = 0x7f807f80;  // infinities
#pragma unroll
    for (int i = 0; i < EIGHTS * 2 * TILES; i++) {
        const float* four = sums[i % TILES][i / TILES / 2];
        const int row = i / TILES % 2;
        const u32 pair = GAIN ? packed_bfloat(four[row] * gain, four[row + 2] * gain)
                              : packed_bfloat(four[row], four[row + 2]);
        z[i / TILES / 2][row][i % TILES] = pair;
        high = larger_bfloat(high, pair), low = smaller_bfloat(low, pair);
    }
    return make_float2(largest(larger_half(high)), largest(larger_half(low ^ 0x80008000)));
}

// A warp's codes, where the token was.
__device__ __forceinline__ void gather(uint4* buffer, const Rounded& z, const Levels& levels, int warp, int lane) {
    char* corner = reinterpret_cast<char*>(buffer) + lane % 4 * 2 * CODE_ROW;
    const int place = warp * 8 + lane / 4;
#pragma unroll
    for (int i = 0; i < EIGHTS * 2; i++) {
        const u32 word = levels.codes(z[i / 2][i % 2]);
        char* row = corner + (i / 2 * 8 + i % 2) * CODE_ROW;
        if (LANE_BYTES == 4) reinterpret_cast<u32*>(row)[place] = word;
        if (LANE_BYTES == 2) reinterpret_cast<u16*>(row)[place] = word;
        if (LANE_BYTES == 1) row[place] = word;
    }
}

extern "C" __global__ void __launch_bounds__(GROUPS * THREADS, RESIDENT) transform(
    const uint4* __restrict__ x, const uint4* __restrict__ left_at, const uint4* __restrict__ right_at,
    const float* __restrict__ clip, uint4* __restrict__ codes, float* __restrict__ scales, int tokens, int gain_bits) {
    extern __shared__ float4 shared[];  // what groups tell [TOLD], left [N1][LEFT_ROW], right [N2][ROW], buffers
    uint4* left = reinterpret_cast<uint4*>(shared) + GROUPS * TOLD;
    uint4* right = left + (LEFT ? N1 * LEFT_ROW : 0);
    uint4* buffers = right + (RIGHT ? N2 * ROW : 0);
    const int index = threadIdx.x / THREADS;
    const Group group{buffers + index * (2 * N1 * ROW), reinterpret_cast<float*>(shared + index * TOLD), index,
                      (int)threadIdx.x % THREADS};
    const int warp = group.thread / 32, lane = group.thread % 32;
    const float gain = __uint_as_float(gain_bits);

    if (LEFT) fill<N1, P1, false>(left, left_at);
    if (RIGHT) fill<N2, P2, true>(right, right_at);
    end_copies();
    meet_neighbours();
    const float of_low = CLIP ? clip[0] : 1.0f, of_high = CLIP ? clip[1] : 1.0f;
    const int step = gridDim.x * GROUPS;
    int token = index * gridDim.x + blockIdx.x, turn = 0;
    group.fetch(group.buffers, x + (long long)token * (N1 * VECTORS), token < tokens);
    await_copies<1>();
    __syncthreads();

    for (; token < tokens; token += step, turn ^= 1) {
        uint4* buffer = group.buffers + turn * (N1 * ROW);
        uint4 raw[OWN];
        await_copies<0>();
        const float here = largest(group.look(raw, buffer));
        if (lane == 0) group.told[warp] = here;
        group.meet_all();  // all have also written the codes that the other buffer held
        group.fetch(group.buffers + (turn ^ 1) * (N1 * ROW), x + (long long)(token + step) * (N1 * VECTORS),
                    step < tokens - token);
        const u32 bits = __float_as_uint(largest_of(group.told)) & 0x7f800000;
        const u32 exponent = min(max(bits, 0x08000000u), 0x77000000u);
        group.convert(buffer, raw, power(0x7f000000 - exponent));
        group.meet_all();

        Sums sums;
        Rounded z;
        transformed(sums, buffer, left, right, warp, lane);
        const float2 ends = stored(z, sums, gain);
        if (lane == 0) group.told[8 + warp] = ends.x, group.told[16 + warp] = ends.y;
        group.meet_all();

        const float high = largest_of(group.told + 8) * of_high, low = largest_of(group.told + 16) * of_low;
        float scale = fmaxf(fabsf(high), fabsf(low)) / (0.5f * TWICE_LEVELS);
        if (group.thread == 0) scales[token] = scale > 0.0f ? scale * power(exponent) : 1.0f;
        if (!(scale > 0.0f)) scale = power(0x7f000000 - exponent);
        gather(buffer, z, Levels(scale), warp, lane);
        group.meet_all();
        group.write(codes + (long long)token * (N1 * CODE_BYTES / 16), buffer);
    }
}
