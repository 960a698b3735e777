// Tokens to codes behind a map X -> gain · leftᵀ X right, of inputs in bf16: see `reference` in
// `encoder.py` for what is meant, and `dynamic_triton.py`, which does the same for all other shapes.
//
// Everything is computed transposed, so that what one product finds is operand A of the next without leaving its
// registers: Yᵀ = rightᵀ Xᵀ has the sums of two neighbouring rows of X in one lane, which is where Zᵀ = Yᵀ left wants
// them. wgmma reads all other operands out of shared memory by itself, which lets the tensor cores work at their full
// rate, twice that of mma.sync with ldmatrix, and costs no warp any instructions. Operand A of the first product comes
// across: its rows are columns in memory. They are mixed such that a lane ends up with neighbours of the result, two of
// each tile, and writes their codes at once.
//
// A group of warps takes one token after the other; groups of a block share the factors and nothing else. Thus one
// multiplies while another rounds. The next token comes by background copies while the one before it is rounded. Values
// become fp16 in place, by a power of two.
//
// Constants from the host: N1, N2 (multiples of 16), P1, P2 (columns of the factors' rows in memory), LEFT, RIGHT
// (which of them there are), GAIN (whether it is not 1), TILES (of 16 columns, of a warp: 1 or 2), GROUPS (of a block),
// FORM, LOWEST, HIGHEST, TWICE_LEVELS (how many halves of a scale make up the largest value), CLIP, SUMS (of a tile, in
// a lane: N1 / 2). BFLOAT is 0: operands are fp16.

static_assert(N1 % 16 == 0 && N2 % 16 == 0 && SUMS == N1 / 2 && (LEFT || RIGHT), "whole steps");

enum { BYTES, NIBBLES, MINIFLOATS };

constexpr u32 ALL = 0xffffffff;
constexpr u32 LOW_HALVES = 0x5410, HIGH_HALVES = 0x7632;  // of two words, for __byte_perm
constexpr int TEAMS = (N2 + 64 * TILES - 1) / (64 * TILES);  // of four warps, whose rows make up an operand
constexpr int WARPS = 4 * TEAMS, THREADS = 32 * WARPS;  // of a group
constexpr int VECTORS = N2 / 8, COUNT = N1 * VECTORS;  // of 16 bytes, in a token's row and in a token
constexpr int OWN = (COUNT + THREADS - 1) / THREADS;  // of a thread
constexpr int EIGHTS = N1 / 8;  // of rows
constexpr int CHUNKS = TEAMS * TILES;  // of 64 columns
constexpr int LEFT_VECTORS = LEFT ? (N1 + 63) / 64 * N1 * 8 : 0, RIGHT_VECTORS = RIGHT ? CHUNKS * N2 * 8 : 0;
constexpr int BUFFER = CHUNKS * N1 * 8;  // vectors of a token
constexpr int CODE_BYTES = FORM == NIBBLES ? N2 / 2 : N2;  // of a row
constexpr int LANE_BYTES = 2 * TILES / (FORM == NIBBLES ? 2 : 1);  // of codes, in a row
constexpr float NEAREST = 12582912.0f;  // 1.5 · 2^23: the lowest bits of its sum with y are y's nearest integer

// Of a tile, by eight rows of the result: rows 2c and 2c + 1 of lane g's column 2u of tile u (first two) and of the
// next one.
using Sums = float[SUMS];
using Rounded = u32[EIGHTS][2][TILES];  // eight rows, row of two, tile: two columns each

__device__ __forceinline__ float power(u32 exponent) { return __uint_as_float(exponent); }

// --- shared memory --------------------------------------------------------------------------------------------------

// Where a row's vector is in a matrix of so many rows: in chunks of 64 columns, of which vectors trade places as wgmma
// wants them to.
template <int ROWS>
__device__ __forceinline__ int at(int row, int vector) {
    return (vector / 8 * ROWS + row) * 8 + ((vector ^ row) & 7);
}

// A vector of a row in the order of operand A: column 2 TILES (8w + g) + 2u + h of a team comes to column 16w + 8h + g
// of tile u.
template <int ROWS>
__device__ __forceinline__ void mix(uint4* matrix, int row, int vector, uint4 v) {
    constexpr int EACH = 8 * TILES;  // vectors of a team
    const int chunk = vector / EACH * EACH, warp = vector % EACH / (2 * TILES);
    const auto words = [&](int tile, int half) {
        return reinterpret_cast<u32*>(matrix + at<ROWS>(row, chunk + 8 * tile + 2 * warp + half));
    };
    if (TILES == 2) {
        const int g = vector % 4;
        words(0, 0)[g] = __byte_perm(v.x, v.z, LOW_HALVES), words(0, 1)[g] = __byte_perm(v.x, v.z, HIGH_HALVES);
        words(1, 0)[g] = __byte_perm(v.y, v.w, LOW_HALVES), words(1, 1)[g] = __byte_perm(v.y, v.w, HIGH_HALVES);
    } else {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 order = half ? HIGH_HALVES : LOW_HALVES;
            u32* two = words(0, half) + vector % 2 * 2;
            two[0] = __byte_perm(v.x, v.y, order), two[1] = __byte_perm(v.z, v.w, order);
        }
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
        if (MIXED) mix<COLUMNS>(to, row, vector, *source);
        else copy(to + at<COLUMNS>(row, vector), source, true);
    }
}

// --- products -------------------------------------------------------------------------------------------------------

// A step of 16 along rows of so many columns' matrix: operand B.
template <int ROWS>
__device__ __forceinline__ u64 step_of(const uint4* matrix, int step) {
    return operand(matrix + step / 4 * (ROWS * 8) + step % 4 * 2);
}

// A tile of Zᵀ of a token, or as much of it as there are factors for.
__device__ __forceinline__ void transformed(
    Sums& sums, const uint4* token, const uint4* left, const uint4* right, int tile) {
    begin_products();
    if (RIGHT) {
#pragma unroll
        for (int step = 0; step < N2 / 16; step++)
            multiply_tiles(sums, operand(right + tile * (N2 * 8) + step * 128), step_of<N1>(token, step), step > 0);
    } else {
#pragma unroll
        for (int step = 0; step < N1 / 16; step++)
            multiply_tiles(sums, operand(token + tile * (N1 * 8) + step * 128), step_of<N1>(left, step), step > 0);
    }
    end_products();
    await_sums(sums);
    if (!LEFT || !RIGHT) return;
    u32 between[N1 / 16][4];
#pragma unroll
    for (int i = 0; i < N1 / 4; i++) {
        between[i / 4][i % 4] = packed(sums[2 * i], sums[2 * i + 1]);
        pin(between[i / 4][i % 4]);
    }
    begin_products();
#pragma unroll
    for (int step = 0; step < N1 / 16; step++) multiply_tile(sums, between[step], step_of<N1>(left, step), step > 0);
    end_products();
    await_sums(sums);
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
    uint4* buffer;  // a token
    float* told;  // [3][WARPS]: the largest magnitude; mapped, the largest value and the smallest's negative
    int index, thread;

    __device__ __forceinline__ void meet_all() const { meet<THREADS>(1 + index); }

    // What is to be done with every vector of a token that is this thread's.
    template <class Do>
    __device__ __forceinline__ void each(const Do& act) const {
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            const u32 i = thread + k * THREADS;
            if (COUNT % THREADS == 0 || i < COUNT) act(k, i, (int)(i / VECTORS), (int)(i % VECTORS));
        }
    }

    __device__ __forceinline__ void fetch(const uint4* token, bool there) const {
        if (there) each([&](int, u32 i, int row, int vector) { copy(buffer + at<N1>(row, vector), token + i, true); });
        end_copies();
    }

    // Largest magnitude of what this thread has fetched, and that itself.
    __device__ __forceinline__ float look(uint4 (&raw)[OWN]) const {
        u32 found = 0;
        each([&](int k, u32, int row, int vector) {
            raw[k] = buffer[at<N1>(row, vector)];
            const u32 words[4] = {raw[k].x, raw[k].y, raw[k].z, raw[k].w};
#pragma unroll
            for (int i = 0; i < 4; i++) found = larger_bfloat(found, words[i] & 0x7fff7fff);
        });
        return larger_half(found);
    }

    // The same as fp16, times a power of two. Where X itself is operand A its columns are mixed: all have read theirs.
    __device__ __forceinline__ void convert(const uint4 (&raw)[OWN], float by) const {
        const auto halves = [by](u32 pair) {
            return packed(__uint_as_float(pair << 16) * by, __uint_as_float(pair & 0xffff0000) * by);
        };
        each([&](int k, u32, int row, int vector) {
            const uint4 v = make_uint4(halves(raw[k].x), halves(raw[k].y), halves(raw[k].z), halves(raw[k].w));
            if (RIGHT) buffer[at<N1>(row, vector)] = v;
            else mix<N1>(buffer, row, vector, v);
        });
        show_writes();
    }
};

// Sums of a tile times gain as bf16 has them; the largest value of a lane, and the smallest one.
__device__ __forceinline__ void store(Rounded& z, u32& high, u32& low, const Sums& sums, int tile, float gain) {
#pragma unroll
    for (int i = 0; i < EIGHTS * 2; i++) {
        const float* four = sums + i / 2 * 4;
        const int row = i % 2;
        u32 pair = GAIN ? packed_bfloat(four[row] * gain, four[row + 2] * gain)
                        : packed_bfloat(four[row], four[row + 2]);
        pin(pair);  // before the next tile takes registers
        z[i / 2][row][tile] = pair;
        high = larger_bfloat(high, pair), low = smaller_bfloat(low, pair);
    }
}

// A lane's codes: `to` is where those of its first row go.
__device__ __forceinline__ void write(char* to, const Rounded& z, const Levels& levels) {
#pragma unroll
    for (int i = 0; i < EIGHTS * 2; i++) {
        const u32 word = levels.codes(z[i / 2][i % 2]);
        char* place = to + (i / 2 * 8 + i % 2) * CODE_BYTES;
        if (LANE_BYTES == 4) *reinterpret_cast<u32*>(place) = word;
        if (LANE_BYTES == 2) *reinterpret_cast<u16*>(place) = word;
        if (LANE_BYTES == 1) *place = word;
    }
}

extern "C" __global__ void __launch_bounds__(GROUPS * THREADS, 1) transform(
    const uint4* __restrict__ x, const uint4* __restrict__ left_at, const uint4* __restrict__ right_at,
    const float* __restrict__ clip, char* __restrict__ codes, float* __restrict__ scales, int tokens, int gain_bits) {
    // left [.][N1][8], right [CHUNKS][N2][8], a token [CHUNKS][N1][8] of every group, what groups tell
    extern __shared__ __align__(1024) float4 shared[];
    uint4* left = reinterpret_cast<uint4*>(shared);
    uint4* right = left + LEFT_VECTORS;
    uint4* buffers = right + RIGHT_VECTORS;
    const int index = uniform(threadIdx.x / THREADS);
    const Group group{buffers + index * BUFFER, reinterpret_cast<float*>(buffers + GROUPS * BUFFER) + index * 3 * WARPS,
                      index, (int)threadIdx.x % THREADS};
    const int warp = uniform(group.thread / 32), lane = group.thread % 32;
    const int column = (warp * 8 + lane / 4) * (2 * TILES), first = warp / 4 * TILES;  // this lane's, this team's tile
    const bool there = N2 % (64 * TILES) == 0 || column < N2;
    const float gain = __uint_as_float(gain_bits);

    if (LEFT) fill<N1, P1, false>(left, left_at);
    if (RIGHT) fill<N2, P2, true>(right, right_at);
    end_copies();
    meet_neighbours();
    const float of_low = CLIP ? clip[0] : 1.0f, of_high = CLIP ? clip[1] : 1.0f;
    const int step = gridDim.x * GROUPS;
    int token = index * gridDim.x + blockIdx.x;
    group.fetch(x + (long long)token * COUNT, token < tokens);
    await_copies<1>();
    show_writes();
    __syncthreads();

    for (; token < tokens; token += step) {
        uint4 raw[OWN];
        await_copies<0>();
        const float here = largest(group.look(raw));
        if (lane == 0) group.told[warp] = here;
        group.meet_all();
        const u32 bits = __float_as_uint(largest_of(group.told)) & 0x7f800000;
        const u32 exponent = min(max(bits, 0x08000000u), 0x77000000u);
        group.convert(raw, power(0x7f000000 - exponent));
        group.meet_all();

        Rounded z;
        u32 most = 0xff80ff80, least = 0x7f807f80;  // infinities
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            Sums sums = {};
            transformed(sums, group.buffer, left, right, first + tile);
            store(z, most, least, sums, tile, gain);
        }
        if (!there) most = 0xff80ff80, least = 0x7f807f80;
        const float2 ends = make_float2(largest(larger_half(most)), largest(larger_half(least ^ 0x80008000)));
        if (lane == 0) group.told[WARPS + warp] = ends.x, group.told[2 * WARPS + warp] = ends.y;
        group.meet_all();
        group.fetch(x + (long long)(token + step) * COUNT, step < tokens - token);

        const float high = largest_of(group.told + WARPS) * of_high, low = largest_of(group.told + 2 * WARPS) * of_low;
        float scale = fmaxf(fabsf(high), fabsf(low)) / (0.5f * TWICE_LEVELS);
        if (group.thread == 0) scales[token] = scale > 0.0f ? scale * power(exponent) : 1.0f;
        if (!(scale > 0.0f)) scale = power(0x7f000000 - exponent);
        char* row = codes + ((long long)token * N1 + lane % 4 * 2) * CODE_BYTES;
        if (there) write(row + column / (2 * TILES) * LANE_BYTES, z, Levels(scale));
    }
}
