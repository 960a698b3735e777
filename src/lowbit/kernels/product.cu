// y = x Ŵᵀ for few tokens: every weight is read once and goes through the tensor cores straight from its registers.
//
// A warp owns ROWS tiles of 16 output rows and every so-manyth unit of 128 columns. The rows of Ŵ are operand A of
// mma.m16n8k16, eight tokens are operand B. Which columns a step of 16 takes is free as long as both operands agree, so
// a lane's share is eight neighbours: one 16-byte load of x feeds two steps, and the codes lie in the order in which
// they are used. Scales multiply the fp32 sum of a group, so no weight is ever rounded.
// Warps that share rows add their sums up in shared memory and, where a cluster shares them, in each other's: always in
// the same order, so the result does not depend on timing.
//
// More constants from the host: BIAS; ROWS, TOKENS (tiles of rows and of eight tokens, of a warp); ROW_WARPS, K_WARPS
// (of a block); CLUSTER (blocks that share rows); DEPTH (units in flight); STAGES (units whose inputs are in shared
// memory: 0, or 2 and more); RESIDENT (blocks that a processor has to have registers for, or 0); WHOLE (no columns are
// missing in the last unit).

constexpr int FRAGMENTS = ROWS * TOKENS;

// What a lane reads next of x: 16 bytes of one token of each tile of eight, or its part of what the warps of a unit
// bring to shared memory together, ahead of time. Columns that do not exist are zeros; for a token that does not, any
// numbers will do, since nobody stores its sums.
constexpr int SLOTS = BLOCKS * TOKENS;  // of a unit
constexpr int LOADS = STAGES ? (SLOTS + ROW_WARPS - 1) / ROW_WARPS : TOKENS;
struct Inputs {
    const uint4* x;
    int vectors, column;  // 16-byte vectors of a row; the lane's first one of the unit
    u32 place[LOADS];
    bool token[LOADS];  // exists

    __device__ __forceinline__ Inputs(const uint4* x, int tokens, int vectors, int unit, int row_warp, int lane)
        : x(x), vectors(vectors), column(unit * BLOCKS * 4 + lane % 4) {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int slot = STAGES ? i * ROW_WARPS + row_warp : i;
            const int row = (blockIdx.y * TOKENS + slot % TOKENS) * 8 + lane / 4;
            place[i] = min(row, tokens - 1) * vectors + column + slot / TOKENS * 4;
            token[i] = row < tokens;
        }
    }
    __device__ __forceinline__ void advance(int units) {
        column += units * BLOCKS * 4;
#pragma unroll
        for (int i = 0; i < LOADS; i++) place[i] += units * BLOCKS * 4;
    }
    __device__ __forceinline__ bool there(int block) const { return WHOLE || column + block * 4 < vectors; }
};

// In registers. Lanes without a token read nothing: eight of them beside each other would cost as much as eight tokens.
struct Held {
    uint4 x[BLOCKS][TOKENS];

    __device__ __forceinline__ const uint4& operator()(int block, int n) const { return x[block][n]; }
    __device__ __forceinline__ void fill(const Inputs& inputs) {
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
            const uint4* at = inputs.x + inputs.place[n];
#pragma unroll
            for (int block = 0; block < BLOCKS; block++)
                if (inputs.token[n]) x[block][n] = inputs.there(block) ? at[block * 4] : make_uint4(0, 0, 0, 0);
        }
    }
};

// A stage of shared memory that the warps of one unit fill.
struct Stage {
    uint4* memory;  // [SLOTS][32]
    int lane;

    __device__ __forceinline__ uint4 operator()(int block, int n) const {
        return memory[(block * TOKENS + n) * 32 + lane];
    }
    __device__ __forceinline__ void fill(const Inputs& inputs, int row_warp) const {
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int slot = i * ROW_WARPS + row_warp;
            if (SLOTS % ROW_WARPS && slot >= SLOTS) break;
            const bool there = inputs.there(slot / TOKENS);
            copy(memory + slot * 32 + lane, inputs.x + (there ? inputs.place[i] : 0), there);
        }
    }
};

// All but the youngest STAGES - 2 fillings have arrived, for every warp of the unit, and nobody reads an older one.
__device__ __forceinline__ void await_stage(int k_warp) {
    await_copies<STAGES ? STAGES - 2 : 0>();
    if (ROW_WARPS > 1) meet<ROW_WARPS * 32>(k_warp + 1);
}

#if BYTES
typedef Sum Sums[ROWS][TOKENS][4];

template <class Read>
__device__ __forceinline__ void add_unit(Sums& sums, const Codes (&codes)[ROWS], const Read& read) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        uint4 x[TOKENS];
#pragma unroll
        for (int n = 0; n < TOKENS; n++) x[n] = read(block, n);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const uint4 upper = codes[r].row[0][block], lower = codes[r].row[1][block];
            const u32 a[8] = {upper.x, lower.x, upper.y, lower.y, upper.z, lower.z, upper.w, lower.w};
#pragma unroll
            for (int n = 0; n < TOKENS; n++) {
                multiply_bytes(sums[r][n], a, x[n].x, x[n].y);
                multiply_bytes(sums[r][n], a + 4, x[n].z, x[n].w);
            }
        }
    }
}
#else
typedef float Sums[ROWS][TOKENS][4];

// Operand A of 32 columns: two steps of four registers.
__device__ __forceinline__ void unpack(u32 (&a)[8], const Codes& codes, int block) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int p = 0; p < 4; p++) a[p * 2 + half] = levels(codes, block, p, half);
}

template <class Read>
__device__ __forceinline__ void add_unit(Sums& sums, const Codes (&codes)[ROWS], const Read& read) {
    Sums part;  // of a group, where its scale is not in the values, as it is in those of E2M1
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        uint4 x[TOKENS];  // read before codes are unpacked: takes registers, and saves waiting
#pragma unroll
        for (int n = 0; n < TOKENS; n++) x[n] = read(block, n);
        u32 a[ROWS][8];
#pragma unroll
        for (int r = 0; r < ROWS; r++) unpack(a[r], codes[r], block);
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float(&sum)[4] = E2M1 ? sums[r][n] : part[r][n];
                if (!E2M1 && block % SPAN == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
                multiply(sum, a[r], x[n].x, x[n].y);
                multiply(sum, a[r] + 4, x[n].z, x[n].w);
            }
        }
        if (E2M1 || block % SPAN < SPAN - 1) continue;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float2 scale = scales(codes[r], block / SPAN);
#pragma unroll
            for (int n = 0; n < TOKENS; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[r][n][i] += part[r][n][i] * (i < 2 ? scale.x : scale.y);
        }
    }
}
#endif

__device__ __forceinline__ void add(float4& sum, const float4& other) {
    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
}

#if CLUSTER > 1
#define TOGETHER __cluster_dims__(CLUSTER, 1, 1)
#else
#define TOGETHER
#endif

#if RESIDENT
#define BOUNDS __launch_bounds__(ROW_WARPS * K_WARPS * 32, RESIDENT)
#else
#define BOUNDS __launch_bounds__(ROW_WARPS * K_WARPS * 32)
#endif

extern "C" __global__ void BOUNDS TOGETHER product(
    const uint4* __restrict__ low, const uint2* __restrict__ high, const Scales* __restrict__ scale,
    const float* __restrict__ by_row, const float* by_token, const uint4* x, const u16* __restrict__ bias, u16* y,
    int tokens, int outputs, int vectors, int units, int groups, int shift) {
    // inputs [K_WARPS][STAGES][BLOCKS][TOKENS][32], afterwards sums [K_WARPS][FRAGMENTS][ROW_WARPS][32]
    extern __shared__ float4 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS;
    const int rank = blockIdx.x % CLUSTER;
    const int tile = (blockIdx.x / CLUSTER * ROW_WARPS + row_warp) * ROWS, last = (outputs - 1) / 16;
#if BYTES
    const Weight weight{low, outputs, vectors};
#else
    const Weight weight{low, high, scale, units, groups, shift};
#endif

    // what comes next is gone on from, and not worked out anew for every unit
    constexpr int STEP = CLUSTER * K_WARPS;
    const int begin = rank * K_WARPS + k_warp;
    Next next[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) next[r] = weight.first(min(tile + r, last), begin, lane);
    Codes ring[DEPTH][ROWS];
    const auto fetch = [&](Codes(&codes)[ROWS], int unit) {
        if (unit >= units) return;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            weight.load(codes[r], next[r], unit);
            next[r].advance(STEP);
        }
    };
#pragma unroll
    for (int d = 0; d < DEPTH; d++) fetch(ring[d], begin + d * STEP);
    Inputs inputs(x, tokens, vectors, begin, row_warp, lane);
    Sums sums = {};
#if !STAGES
    Held held = {};
#endif
    meet_neighbours();
#if STAGES
    const auto stage = [&](int i) {
        return Stage{reinterpret_cast<uint4*>(shared) + (k_warp * STAGES + i) * SLOTS * 32, lane};
    };
    const auto fill = [&](int i, int unit) {
        if (unit < units) stage(i).fill(inputs, row_warp);
        end_copies();
        inputs.advance(STEP);
    };
    for (int i = 0; i < STAGES - 1; i++) fill(i, begin + i * STEP);
    int now = 0;
#endif
    for (int unit = begin; unit < units; unit += DEPTH * STEP) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int here = unit + d * STEP;
            if (here >= units) break;
#if STAGES
            await_stage(k_warp);
            const int behind = now ? now - 1 : STAGES - 1;
            fill(behind, here + (STAGES - 1) * STEP);
            add_unit(sums, ring[d], stage(now));
            now = now + 1 < STAGES ? now + 1 : 0;
#else
            held.fill(inputs);
            inputs.advance(STEP);
            add_unit(sums, ring[d], held);
#endif
            fetch(ring[d], here + DEPTH * STEP);
        }
    }

    if (STAGES) __syncthreads();  // the sums take the inputs' place
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
        const auto& sum = sums[f / TOKENS][f % TOKENS];
        shared[((k_warp * FRAGMENTS + f) * ROW_WARPS + row_warp) * 32 + lane] =
            make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
    __syncthreads();
    if (CLUSTER > 1) {
        for (int f = k_warp; f < FRAGMENTS; f += K_WARPS) {
            float4* mine = shared + (f * ROW_WARPS + row_warp) * 32 + lane;
            for (int k = 1; k < K_WARPS; k++) add(*mine, mine[k * FRAGMENTS * ROW_WARPS * 32]);
        }
        meet_cluster();
    }
    for (int f = rank + CLUSTER * k_warp; f < FRAGMENTS; f += STEP) {
        const float4* mine = shared + (f * ROW_WARPS + row_warp) * 32 + lane;
        float4 sum = make_float4(0, 0, 0, 0);
// all 16 at once would take more registers than all the work before
#pragma unroll 8
        for (int part = 0; part < (CLUSTER > 1 ? CLUSTER : K_WARPS); part++)
            add(sum, CLUSTER > 1 ? peek(mine, part) : mine[part * FRAGMENTS * ROW_WARPS * 32]);
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = (tile + f / TOKENS) * 16 + lane / 4 + i / 2 * 8;
            const int to = (blockIdx.y * TOKENS + f % TOKENS) * 8 + lane % 4 * 2 + i % 2;
            if (row >= outputs || to >= tokens) continue;
            float value = values[i];
#if BYTES
            value = value * by_token[to] * by_row[row];
#elif E2M1
            value = value * FOLDED * by_row[row];
#endif
            y[to * outputs + row] = (u16)packed(value + (BIAS ? exact(bias[row]) : 0.0f), 0.0f);
        }
    }
    if (CLUSTER > 1) leave_cluster();  // nobody does while its sums are being read
}
