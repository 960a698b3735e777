// Attention of one token to keys and values in codes, or of 16 bits: every number is read once for all heads of a group
// and goes through the tensor cores straight from its registers.
//
// A warp works alone, on every so-manyth tile of a head's positions. Keys are operand A of mma.m16n8k16, sixteen
// positions, and eight queries are operand B. The scores' transpose is operand B of the second product, whose A is
// sixteen channels of the values; so heads are columns throughout, and what belongs to a head stays in one lane's
// registers. Where a token has one scale no code is multiplied by it: the score is, and the probability before it
// meets the value.
//
// Scores are compared with a largest one that is raised only when a score is far above it: then all sums are brought
// down, which is rare. The scales of values are treated likewise, so that fp16 holds probability times scale.
//
// While the kernel before this one ends, a warp's first tile comes into the cache of all processors. Nothing is read
// before that end.
//
// Warps of a block add up what they found in shared memory, blocks of a head in global memory: the last one that comes
// does, always in the same order, so the result does not depend on timing. The number of positions is on the device.
//
// Both sides are PLAIN, or none: then products are in queries' own format (BFLOAT is QUERY_BFLOAT), and the number of
// positions comes with the start.
//
// More constants from the host: HEADS (queries of a group), QUERY_BFLOAT, MASK, WINDOW (0, or tokens kept as they came;
// see `Held`), TILE (positions: 16 or 32), WARPS (of a block), RESIDENT (blocks of a processor).

static_assert(VK != OF_CHANNEL && (WINDOW == 0 || KK == OF_CHANNEL && VK == OF_GROUP), "KIVI's formats or none");
static_assert(!(KK == OF_CHANNEL && KR == ZERO_POINT), "zero-points of channels are not unpacked");
static_assert((KK == PLAIN) == (VK == PLAIN) && (KK == PLAIN) == (KB == 16), "codes on both sides or on none");

// Queries in fp16, in the order of keys' codes. Those in bf16 are brought to a size from 16 to 32 by a power of two:
// exact, but for what is 2^-24 of the largest or less. To PLAIN keys they come as they are.
struct Queries {
    static constexpr bool MOVED = QUERY_BFLOAT && KK != PLAIN;
    u32 pair[EIGHTS][STEPS][2];
    float factor[EIGHTS][2], sum[EIGHTS][2];  // of scores, in powers of two; the sum of a query, times the factor

    __device__ __forceinline__ void load(const char* from, float scale, int lane) {
#pragma unroll
        for (int t = 0; t < EIGHTS; t++) {
            u32 raw[WIDTH / 8];
            const int head = t * 8 + lane / 4;
#pragma unroll
            for (int v = 0; v < WIDTH / 8; v += 4) {
                raw[v] = raw[v + 1] = raw[v + 2] = raw[v + 3] = 0;
                if (head < HEADS) spread(raw + v, from + (head * WIDTH + KeyRow::channel(2 * v, lane % 4)) * 2);
            }
            const float unit = MOVED ? move(raw) : 1.0f;
            float total = 0.0f;
#pragma unroll
            for (int v = 0; v < WIDTH / 8 && KK == OF_TOKEN; v++) total += floats(raw[v]).x + floats(raw[v]).y;
            total += __shfl_xor_sync(ALL, total, 1);
            total += __shfl_xor_sync(ALL, total, 2);
            constexpr int HALF = KeyRow::HALF;
#pragma unroll
            for (int i = 0; i < WIDTH / 8; i++) pair[t][i / 2][i % 2] = apart<HALF>(raw + i / HALF * HALF, i % HALF);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int of = (lane % 4 * 2 + e) * 4;
                factor[t][e] = MOVED ? __shfl_sync(ALL, unit, of) * scale : scale;
                sum[t][e] = __shfl_sync(ALL, total, of) * factor[t][e];
            }
        }
    }

    static __device__ __forceinline__ float move(u32 (&raw)[WIDTH / 8]) {
        float size = 1e-30f;
#pragma unroll
        for (int v = 0; v < WIDTH / 8; v++) size = fmaxf(size, fmaxf(fabsf(wide(raw[v]).x), fabsf(wide(raw[v]).y)));
        size = fmaxf(size, __shfl_xor_sync(ALL, size, 1));
        size = fmaxf(size, __shfl_xor_sync(ALL, size, 2));
        const u32 exponent = __float_as_uint(size) >> 23;
        const float power = __uint_as_float(258 - exponent << 23);
#pragma unroll
        for (int v = 0; v < WIDTH / 8; v++) raw[v] = packed(wide(raw[v]).x * power, wide(raw[v]).y * power);
        return __uint_as_float(exponent - 4 << 23);
    }
};

template <int SUBS>
__device__ __forceinline__ void score(Scores<SUBS>& scores, const Keys<SUBS>& keys, const Queries& queries) {
#pragma unroll
    for (int i = 0; i < SUBS * EIGHTS * 4; i++) scores[i / 4 / EIGHTS][i / 4 % EIGHTS][i % 4] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int u = 0; u < SUBS; u++) {
            const u32 a[4] = {keys.pair(2 * u, 2 * step), keys.pair(2 * u + 1, 2 * step),
                              keys.pair(2 * u, 2 * step + 1), keys.pair(2 * u + 1, 2 * step + 1)};
#pragma unroll
            for (int t = 0; t < EIGHTS; t++)
                multiply(scores[u][t], a, queries.pair[t][step][0], queries.pair[t][step][1]);
        }
    }
#pragma unroll
    for (int u = 0; u < SUBS; u++) {
#pragma unroll
        for (int i = 0; i < EIGHTS * 4; i++) {
            const int t = i / 4, e = i % 2, r = 2 * u + i % 4 / 2;
            float& one = scores[u][t][i % 4];
            one *= queries.factor[t][e];
            if (KK != OF_TOKEN) continue;
            const float scale = floats(keys.scale[r][0]).x;
            one = scale * one + lacking<KB, KR>(scale, keys.offset[r][0]) * queries.sum[t][e];
        }
    }
}

// Which positions of 16 SUBS are seen: rows g, g + 8, ... It comes with the keys, so that no score waits for it.
template <int SUBS>
struct Seen {
    u32 row[2 * SUBS];

    __device__ __forceinline__ void load(const unsigned char* mask, int first, int end, int lane) {
#pragma unroll
        for (int r = 0; r < 2 * SUBS && MASK; r++) row[r] = mask[min(first + r * 8 + lane / 4, end - 1)];
    }

    // Hides the scores of others, and of those outside [begin, end).
    __device__ __forceinline__ void hide(Scores<SUBS>& scores, int first, int begin, int end, int lane) const {
#pragma unroll
        for (int r = 0; r < 2 * SUBS; r++) {
            const int position = first + r * 8 + lane / 4;
            const bool hidden = position < begin || position >= end || MASK && row[r] == 0;
#pragma unroll
            for (int i = 0; i < EIGHTS * 2; i++)
                if (hidden) scores[r / 2][i / 2][r % 2 * 2 + i % 2] = -infinity();
        }
    }
};

#if WINDOW
// The newest tokens: slot t modulo SLOTS of a ring holds token t in queries' format.
template <int SLOTS>
struct Ring {
    const char* at;
    int begin, end;

    __device__ __forceinline__ const char* row(int position) const {
        return at + min(max(position, begin), end - 1) % SLOTS * (WIDTH * 2);
    }
};

__device__ __forceinline__ void score(
    Scores<1>& scores, const Ring<WINDOW>& keys, const char* query, int first, float scale, int lane) {
    const char *rows[2] = {keys.row(first + lane / 4), keys.row(first + lane / 4 + 8)};
    float found[EIGHTS][4] = {};
#pragma unroll
    for (int v = 0; v < WIDTH / 32; v++) {
        u32 k[2][4];
#pragma unroll
        for (int r = 0; r < 2; r++) spread(k[r], rows[r] + (v * 4 + lane % 4) * 16);
#pragma unroll
        for (int t = 0; t < EIGHTS; t++) {
            u32 q[4] = {};
            const int head = t * 8 + lane / 4;
            if (head < HEADS) spread(q, query + head * WIDTH * 2 + (v * 4 + lane % 4) * 16);
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const u32 a[4] = {k[0][i], k[1][i], k[0][i + 1], k[1][i + 1]};
                if (QUERY_BFLOAT) multiply_bfloat(found[t], a, q[i], q[i + 1]);
                else multiply(found[t], a, q[i], q[i + 1]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < EIGHTS * 4; i++)
        if (first + lane / 4 + i % 4 / 2 * 8 >= keys.begin) scores[0][i / 4][i % 4] = found[i / 4][i % 4] * scale;
}

__device__ __forceinline__ void add(
    Found& found, const Ring<WINDOW + 1>& values, const u32 (&share)[EIGHTS][2], int first, int lane) {
    const char* rows[4];
#pragma unroll
    for (int r = 0; r < 4; r++) rows[r] = values.row(first + r / 2 * 8 + lane % 4 * 2 + r % 2);
#pragma unroll
    for (int v = 0; v < WIDTH / 64; v++) {
        u32 x[4][4];
#pragma unroll
        for (int r = 0; r < 4; r++) spread(x[r], rows[r] + ValueRow::channel(v * 8, lane / 4) * 2);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 a[4];
#pragma unroll
            for (int part = 0; part < 4; part++)
                a[part] = as_half(__byte_perm(
                    x[part / 2 * 2][i], x[part / 2 * 2 + 1][i], part % 2 ? HIGH_HALVES : LOW_HALVES));
            found.add(v * 4 + i, a, share);
        }
    }
}
#endif

// How many tokens, from the first on, are codes when `count` are there.
__device__ __forceinline__ int coded_keys(int count) { return WINDOW ? (count - 1) / most(WINDOW, 1) * WINDOW : count; }
__device__ __forceinline__ int coded_values(int count) { return WINDOW ? max(count - 1 - WINDOW, 0) : count; }

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) cache_attention(
    const char* __restrict__ query, const char* __restrict__ turned, const char* __restrict__ k,
    const u16* __restrict__ k_scale, const void* __restrict__ k_offset, const char* __restrict__ k_ring,
    const char* __restrict__ v, const u16* __restrict__ v_scale, const void* __restrict__ v_offset,
    const char* __restrict__ v_ring, const unsigned char* __restrict__ mask, u32* __restrict__ out, float4* all_sums,
    float4* all_sizes, u32* arrived, const long long* __restrict__ counted, int scale_bits, int heads, int rows,
    int ks_text, int ks_head, int ks_token, int vs_text, int vs_head, int vs_token, int of_mask) {
    extern __shared__ float4 shared[];  // sums [WARPS][ENTRIES], sizes [WARPS][PAIRS]
    constexpr int SUBS = TILE / 16;
    const int group = blockIdx.x, split = blockIdx.y, text = group / heads, head = group % heads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long k_place = (long long)text * ks_text + head * ks_head;
    const long long v_place = (long long)text * vs_text + head * vs_head;
    const long long from = (long long)group * rows * WIDTH / 8;
    const Side k_side{KK == PLAIN ? k + k_place * 2 : k + from * KB, k_scale + k_place,
                      (const char*)k_offset + k_place * (KR == MINIMUM ? 2 : 1), ks_token};
    const Side v_side{VK == PLAIN ? v + v_place * 2 : v + from * VB, v_scale + v_place,
                      (const char*)v_offset + v_place * (VR == MINIMUM ? 2 : 1), vs_token};
    const unsigned char* shown = mask + (long long)text * of_mask;
    const float scale = __uint_as_float(scale_bits) * 1.4426950408889634f;

    int item = split * WARPS + warp;
    const int about = KK == PLAIN ? rows : min((int)glimpse(counted), rows);  // perhaps without the newest
    KeyRow::expect(k_side, item * TILE, coded_keys(about), lane);
    expect_scales<KK, KG, KR>(k_side, item * TILE, coded_keys(about), lane);
    ValueRow::expect(v_side, item * TILE, coded_values(about), lane);
    expect_scales<VK, VG, VR>(v_side, item * TILE, coded_values(about), lane);
    meet_neighbours();
    const int count = KK == PLAIN ? rows : (int)*counted;
    const int coded_k = coded_keys(count), coded_v = coded_values(count);
    const int tiles = (coded_v + TILE - 1) / TILE;
    const int items = tiles + (WINDOW ? (count + 15) / 16 - coded_v / 16 : 0);
    const int active = min((int)gridDim.y, (items + WARPS - 1) / WARPS), step = active * WARPS;
    if (split >= active) return;

    Keys<SUBS> keys;
    Seen<SUBS> seen;
    Values<SUBS> values;
    if (item < tiles) {
        keys.load(k_side, item * TILE, coded_v, lane);
        seen.load(shown, item * TILE, coded_v, lane);
        values.load(v_side, item * TILE, coded_v, lane);
    }
    Queries queries;
    queries.load(turned + group * (HEADS * WIDTH * 2), scale, lane);
    Found found = {};
    found.size = VK == OF_TOKEN ? 0x1p-40f : 1.0f;
#pragma unroll
    for (int i = 0; i < EIGHTS * 2; i++) found.top[i / 2][i % 2] = NOTHING;

    for (; item < tiles; item += step) {
        const int next = item + step;
        Scores<SUBS> scores;
        u32 share[SUBS][EIGHTS][2];
        score<SUBS>(scores, keys, queries);
        if (next < tiles) keys.load(k_side, next * TILE, coded_v, lane);
        if (MASK || (item + 1) * TILE > coded_v) seen.hide(scores, item * TILE, 0, coded_v, lane);
        if (next < tiles) seen.load(shown, next * TILE, coded_v, lane);
        u32 scales[2 * SUBS], offsets[2 * SUBS];
#pragma unroll
        for (int r = 0; r < 2 * SUBS; r++) scales[r] = values.scale[r][0], offsets[r] = values.offset[r][0];
        found.weigh<SUBS, VK == OF_TOKEN>(scores, scales, offsets, share);
        found.add<SUBS>(values, share);
        if (next < tiles) values.load(v_side, next * TILE, coded_v, lane);
    }
#if WINDOW
    const Ring<WINDOW> new_keys{k_ring + (long long)group * (WINDOW * WIDTH * 2), coded_k, count};
    const Ring<WINDOW + 1> new_values{v_ring + (long long)group * ((WINDOW + 1) * WIDTH * 2), coded_v, count};
    for (; item < items; item += step) {
        const int first = (coded_v / 16 + item - tiles) * 16;
        Scores<1> scores = {};
        u32 share[1][EIGHTS][2];
        if (first < coded_k) {
            Keys<1> old;
            old.load(k_side, first, coded_k, lane);
            score<1>(scores, old, queries);
        }
        score(scores, new_keys, query + group * (HEADS * WIDTH * 2), first, scale, lane);
        Seen<1> here;
        here.load(shown, first, count, lane);
        here.hide(scores, first, coded_v, count, lane);
        found.weigh<1, false>(scores, nullptr, nullptr, share);
        add(found, new_values, share[0], first, lane);
    }
#endif

    found.finish();
    float4* sizes = shared + WARPS * ENTRIES;
    publish(found, shared + warp * ENTRIES, sizes + warp * PAIRS, lane);
    __syncthreads();
    all_sums += group * (int)gridDim.y * ENTRIES, all_sizes += group * (int)gridDim.y * PAIRS;
    add_warps(shared, sizes, all_sums + split * ENTRIES, all_sizes + split * PAIRS, out, group, active == 1);
    if (active == 1) return;
    __syncthreads();
    const bool last = threadIdx.x == 0 && arrive(arrived + group) == active - 1;  // for all threads: it met them
    if (!meet_any<THREADS>(0, last)) return;
    add_blocks(all_sums, all_sizes, active, shared, sizes, out, group);
    if (threadIdx.x == 0) arrived[group] = 0;
}
