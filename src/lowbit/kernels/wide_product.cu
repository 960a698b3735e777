// y = x Ŵᵀ for many tokens: codes come from memory, become 16-bit values in registers and are multiplied there.
//
// A block has 128 rows of Ŵ, 16 to a warp, and TOKENS tokens. Weights are operand A of wgmma, which takes it from
// registers; inputs are operand B, which it reads out of shared memory by itself, once for the four warps that work
// together. So shared memory is read half as much as with mma.sync, and the tensor cores work while the next 32 columns
// are unpacked.
//
// A thread of its own has inputs brought by the copy engine, in the order that wgmma wants them (TMA). Nothing that
// other warps write is read by wgmma, so no fence between them is needed. Codes come by way of shared memory too, where
// lanes that share a row trade words: a lane fetches eight neighbours of a row (layout.py), of which wgmma wants two in
// each of four lanes. `ldmatrix` does exactly that.
//
// Where rows do not fill the processors, SPLITS blocks share columns. Each leaves its sums in memory, and the last one
// to come adds them up, always in the same order, so the result does not depend on timing.
//
// Integers are multiplied by their scales and rounded, as in a copy in 16 bits, since a group's own sums would take as
// many registers as all sums.
//
// More constants from the host: BIAS; TOKENS (of a block: a multiple of 64, up to 256); SPLITS; SUMS (32: of an
// operation, in a lane).

static_assert(SUMS == 32, "64 tokens to an operation");
static_assert(E2M1 || !WIDE, "scales are in the values, and in fp16");

constexpr int SETS = TOKENS / 64;  // of tokens that one operation takes
constexpr bool MANY = SETS > 1;    // so many sums that the warps that do not multiply have to give up their registers
constexpr int WARPS = 8, THREADS = 32 * (WARPS + (MANY ? 4 : 1));  // the first warp behind the eight fetches inputs
constexpr int STAGES = 4, HALVES = SETS > 2 ? 4 : 8;  // units of codes in shared memory, halves of units of inputs
constexpr int HALF = TOKENS * 8;                      // 16-byte vectors of 64 columns of inputs
constexpr int LOW_VECTORS = VECTORS * 32, HIGH_VECTORS = BITS == 3 ? 16 : 0;  // of 16 rows and a unit of columns
constexpr int SCALE_VECTORS = E2M1 ? 1 : ZERO ? 4 : 2;  // of a group
constexpr int UNIT_VECTORS = LOW_VECTORS + HIGH_VECTORS + GROUPS * SCALE_VECTORS;
constexpr int SUM_ROW = WARPS * 16 + 4;  // floats of a token's sums: no bank meets twice
static_assert(TOKENS * SUM_ROW <= 4 * (HALVES * HALF + WARPS * STAGES * UNIT_VECTORS), "sums do not reach the barriers");

typedef float Sums[SETS][SUMS];

// --- inputs ---------------------------------------------------------------------------------------------------------

// Half a unit of columns in every slot.
struct Inputs {
    uint4* memory;  // [HALVES][TOKENS][8], vectors of a token where the tensor core looks for them
    u64* full;      // [HALVES]
    u64* empty;     // [HALVES]

    __device__ __forceinline__ u64 at(int slot) const { return operand(memory + slot * HALF); }
    __device__ __forceinline__ void release(int slot, int lane) const {
        if (lane == 0) arrive_at(empty + slot);
    }

    // What one thread does all the time.
    __device__ __forceinline__ void fill(const TensorMap& x, int begin, int end, int token) const {
        for (int half = 2 * begin, slot = 0, turn = 1; half < 2 * end; half++) {
            await_phase(empty + slot, turn);
            announce(full + slot, 16 * HALF);
            bring_tile(memory + slot * HALF, x, half * 64, token, full + slot);
            if (++slot == HALVES) slot = 0, turn ^= 1;
        }
    }
};

// --- codes ----------------------------------------------------------------------------------------------------------

// Where a lane's vector is: the eight that a row of 8 x 8 words is read from lie in different banks, as do neighbours.
__device__ __forceinline__ int spread(int lane) { return lane ^ lane / 8; }

// What a warp fetches of its 16 rows, a unit to a stage.
struct Ring {
    uint4* slots;      // [STAGES][UNIT_VECTORS]
    const uint4* low;  // what this lane fetches of the first unit
    const uint4* high;
    const uint4* scale;
    int lane, shift;

    __device__ __forceinline__ Ring(const Weight& weight, uint4* slots, int tile, int lane)
        : slots(slots), low(weight.low + tile * weight.units * LOW_VECTORS + lane),
          high(reinterpret_cast<const uint4*>(weight.high) + tile * weight.units * HIGH_VECTORS + lane),
          lane(lane), shift(weight.shift) {
        const int group = tile * (E2M1 ? weight.units * GROUPS : weight.groups);
        scale = reinterpret_cast<const uint4*>(weight.scale) + group * SCALE_VECTORS + lane;
    }

    __device__ __forceinline__ void fetch(int stage, int unit, int end) const {
        if (unit < end) {
            uint4* to = slots + stage * UNIT_VECTORS;
#pragma unroll
            for (int v = 0; v < VECTORS; v++)
                copy(to + v * 32 + spread(lane), low + unit * LOW_VECTORS + v * 32, true);
            to += LOW_VECTORS + lane;
            if (HIGH_VECTORS && lane < HIGH_VECTORS) copy(to, high + unit * HIGH_VECTORS, true);
            const int group = GROUPS == 1 ? unit >> shift : unit * GROUPS;
            if (lane < GROUPS * SCALE_VECTORS) copy(to + HIGH_VECTORS, scale + group * SCALE_VECTORS, true);
        }
        end_copies();
    }

    // The oldest one; pair p of lane t of a row (columns 8t + 2p and the next one) is pair t of lane p here.
    __device__ __forceinline__ void read(Codes& codes, int stage) const {
        await_copies<STAGES - 2>();
        __syncwarp();
        const uint4* at = slots + stage * UNIT_VECTORS;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            u32 words[4];
            matrices(words, at + v * 32 + spread(lane % 8 * 4 + lane / 8));
            codes.low[v] = make_uint4(words[0], words[1], words[2], words[3]);
        }
        at += LOW_VECTORS;
#if BITS == 3
        const u32* words = reinterpret_cast<const u32*>(at) + lane / 4 * 8 + lane % 4 / 2;  // two pairs of every lane
        const u32 halves = lane % 2 ? 0x7632 : 0x5410;
        codes.high = {__byte_perm(words[0], words[2], halves), __byte_perm(words[4], words[6], halves)};
        at += HIGH_VECTORS;
#endif
        const Scales* scales = reinterpret_cast<const Scales*>(at);
#if E2M1
#pragma unroll
        for (int part = 0; part < GROUPS / 4; part++) codes.scale[part] = scales[lane / 4 * (GROUPS / 4) + part];
#else
#pragma unroll
        for (int i = 0; i < GROUPS; i++) codes.scale[i] = scales[i * 8 + lane / 4];
#endif
    }
};

// Operand A of 32 columns: two steps of four registers.
__device__ __forceinline__ void unpack(u32 (&a)[2][4], const Codes& codes, int block) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#if !E2M1
        const u32 scale = factor(codes, block / SPAN, half);
#endif
#pragma unroll
        for (int p = 0; p < 4; p++) {
#if E2M1
            const u32 taken = constant(codes, block, half, GROUPS == 8 ? p / 2 : 0);
            a[p / 2][p % 2 * 2 + half] = levels(codes, block, p, half, taken);
#else
            a[p / 2][p % 2 * 2 + half] = times(levels(codes, block, p, half), scale);
#endif
        }
    }
}

// --- products -------------------------------------------------------------------------------------------------------

// 32 columns, whose operand B begins there.
__device__ __forceinline__ void multiply_block(Sums& sums, const u32 (&a)[2][4], u64 inputs) {
    begin_products();
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
        for (int set = 0; set < SETS; set++) multiply_tile(sums[set], a[step], inputs + set * 512 + step * 2, true);
    end_products();
    await_products<1>();
}

// A warp's sums of its 16 rows. Weights of one block are unpacked while those of the block before are multiplied.
__device__ __forceinline__ void multiply_all(Sums& sums, const Inputs& inputs, const Ring& ring, int begin, int end) {
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) ring.fetch(i, begin + i, end);
    Codes codes[2];
    ring.read(codes[0], 0);
    for (int unit = begin, turn = 0; unit < end; unit += STAGES, turn ^= 1) {
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) {
            const int here = unit + stage, before = (stage + STAGES - 1) % STAGES;
            if (here >= end) break;
            u32 a[2][2][4];
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                const int half = stage * 2 + block / 2, slot = half % HALVES, other = (half + HALVES - 1) % HALVES;
                if (block % 2 == 0) await_phase(inputs.full + slot, HALVES == 2 * STAGES ? turn : half / HALVES % 2);
                unpack(a[block % 2], codes[stage % 2], block);
                multiply_block(sums, a[block % 2], inputs.at(slot) + block % 2 * 4);
#pragma unroll
                for (int v = 0; v < VECTORS; v++) pin(codes[stage % 2].low[v]);
                if (block == 2 || (block == 0 && here > begin)) inputs.release(other, ring.lane);
                if (block == 2) {
                    ring.fetch(before, here + STAGES - 1, end);
                    ring.read(codes[(stage + 1) % 2], (stage + 1) % STAGES);
                }
            }
        }
    }
    await_products<0>();
}

// --- results --------------------------------------------------------------------------------------------------------

// Sums of all blocks that share columns, in those of the last one to come; whether this is it. Parts are
// [SPLITS][SETS * 8][threads].
__device__ __forceinline__ bool gather(Sums& sums, float4* parts, u32* arrived, int split) {
    constexpr int FOURS = SETS * 8, EACH = WARPS * 32;
    const int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        const float* four = sums[i / 8] + i % 8 * 4;
        parts[(split * FOURS + i) * EACH + thread] = make_float4(four[0], four[1], four[2], four[3]);
    }
    meet<EACH>(1);
    const bool last = thread == 0 && arrive(arrived) == SPLITS - 1;  // for all threads: it met them
    if (!meet_any<EACH>(1, last)) return false;
    if (thread == 0) *arrived = 0;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        float* four = sums[i / 8] + i % 8 * 4;
        four[0] = four[1] = four[2] = four[3] = 0.0f;
#pragma unroll
        for (int part = 0; part < SPLITS; part++) {
            const float4 v = fresh(parts + (part * FOURS + i) * EACH + thread);
            four[0] += v.x, four[1] += v.y, four[2] += v.z, four[3] += v.w;
        }
    }
    return true;
}

// Sums of a block's tokens [TOKENS][SUM_ROW], where the stages were.
__device__ __forceinline__ void leave(float* to, const Sums& sums, int warp, int lane) {
    to += warp * 16 + lane / 4 + lane % 4 * 2 * SUM_ROW;
#pragma unroll
    for (int i = 0; i < SETS * 32; i++) {
        const int token = i / 4 * 8 + i % 2, row = i / 2 % 2 * 8;
        to[token * SUM_ROW + row] = sums[i / 32][i % 32];
    }
}

// Eight neighbours of a token at a time.
__device__ __forceinline__ void write(
    u16* y, const float* sums, const float* by_row, const u16* bias, int row, int token, int tokens, int outputs) {
    for (int i = threadIdx.x; i < TOKENS * WARPS * 2; i += WARPS * 32) {
        const int here = i / (WARPS * 2), column = i % (WARPS * 2) * 8;
        if (token + here >= tokens || row + column >= outputs) continue;
        u32 pairs[4];
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            float two[2] = {sums[here * SUM_ROW + column + j], sums[here * SUM_ROW + column + j + 1]};
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (E2M1) two[k] *= FOLDED * by_row[row + column + j + k];
                if (BIAS) two[k] += exact(bias[row + column + j + k]);
            }
            pairs[j / 2] = packed(two[0], two[1]);
        }
        *reinterpret_cast<uint4*>(y + (long long)(token + here) * outputs + row + column) =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, SETS == 1 ? 2 : 1) wide_product(
    const __grid_constant__ TensorMap x, const uint4* __restrict__ low, const uint2* __restrict__ high,
    const Scales* __restrict__ scale, const float* __restrict__ by_row, const u16* __restrict__ bias,
    u16* __restrict__ y, float4* parts, u32* arrived, int tokens, int outputs, int units, int groups, int shift) {
    extern __shared__ __align__(1024) float4 shared[];  // inputs, a ring for every warp, barriers
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const int split = blockIdx.x % SPLITS, block = blockIdx.x / SPLITS, token = blockIdx.y * TOKENS;
    const int begin = units * split / SPLITS, end = units * (split + 1) / SPLITS;
    uint4* memory = reinterpret_cast<uint4*>(shared);
    uint4* rings = memory + HALVES * HALF;
    u64* barriers = reinterpret_cast<u64*>(rings + WARPS * STAGES * UNIT_VECTORS);
    const Inputs inputs{memory, barriers, barriers + HALVES};
    if (threadIdx.x < HALVES) {
        begin_barrier(inputs.full + threadIdx.x, 1);
        begin_barrier(inputs.empty + threadIdx.x, WARPS);
        show_barriers();
    }
    __syncthreads();

    if (warp >= WARPS) {
        if (MANY) keep_registers<24>();
        meet_neighbours();
        if (threadIdx.x == WARPS * 32) inputs.fill(x, begin, end, token);
        return;
    }
    if (MANY) take_registers<240>();
    Sums sums = {};
    const Weight weight{low, high, scale, units, groups, shift};
    const int tile = min(block * WARPS + warp, (outputs - 1) / 16);
    multiply_all(sums, inputs, Ring(weight, rings + warp * STAGES * UNIT_VECTORS, tile, lane), begin, end);
    meet_neighbours();
    if (SPLITS > 1) {
        const int place = blockIdx.y * (gridDim.x / SPLITS) + block;
        float4* mine = parts + (long long)place * (SPLITS * SETS * 8 * WARPS * 32);
        if (!gather(sums, mine, arrived + place, split)) return;
    }
    meet<WARPS * 32>(1);
    leave(reinterpret_cast<float*>(shared), sums, warp, lane);
    meet<WARPS * 32>(1);
    write(y, reinterpret_cast<float*>(shared), by_row, bias, block * WARPS * 16, token, tokens, outputs);
}
