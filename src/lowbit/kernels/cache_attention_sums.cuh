// What a warp finds of attention, score by score, and how warps and blocks add theirs up: see `cache_attention.cu`.

constexpr int EIGHTS = (HEADS + 7) / 8;  // tiles of heads
constexpr int PAIRS = (HEADS + 1) / 2;  // of heads
constexpr int ENTRIES = STEPS * 8 * PAIRS, THREADS = WARPS * 32;
constexpr int TEAMS = most(1, THREADS / ENTRIES);  // of threads, each for all entries
constexpr int AT_ONCE = 8;  // loads of one thread
constexpr u32 ALL = 0xffffffff;
constexpr float NOTHING = -1e30f;
constexpr float ROOM = 6.0f;  // how far above the largest score (log2) others may be
constexpr float LARGER = 8.0f;  // and how many times the largest scale

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000); }

__device__ __forceinline__ float inverse(float power) { return __uint_as_float(0x7f000000 - __float_as_uint(power)); }

// Of a pair of heads 2c and 2c + 1 in all lanes of the same c.
__device__ __forceinline__ float largest(float x) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}
__device__ __forceinline__ float sum_of(float x) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

__device__ __forceinline__ float2 wide(u32 pair) {  // of queries' format
    return QUERY_BFLOAT ? make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)) : floats(pair);
}
__device__ __forceinline__ u32 of_queries(float low, float high) {
    return QUERY_BFLOAT ? packed_bfloat(low, high) : packed(low, high);
}
__device__ __forceinline__ u32 as_half(u32 pair) {
    if (!QUERY_BFLOAT) return pair;
    const float2 v = wide(pair);
    return packed(v.x, v.y);
}

template <int SUBS>
using Scores = float[SUBS][EIGHTS][4];  // rows g (first two) and g + 8 of 16 positions, heads 2c and 2c + 1

// What a warp has found so far; all sums but `total` are over the values' scales over `size`.
struct Found {
    float sums[EIGHTS][STEPS][4];  // channels 2j (first two) and 2j + 1 of lane g's, heads 2c and 2c + 1
    float top[EIGHTS][2], total[EIGHTS][2], lack[EIGHTS][2];  // total and lack: of this lane's positions
    float size;

    __device__ __forceinline__ void scale_by(int t, int e, float of_sums, float of_totals) {
        total[t][e] *= of_totals, lack[t][e] *= of_totals;
#pragma unroll
        for (int j = 0; j < STEPS; j++) sums[t][j][e] *= of_sums, sums[t][j][2 + e] *= of_sums;
    }

    template <int SUBS>
    __device__ __forceinline__ void raise(const Scores<SUBS>& scores, float scale) {
        float shrunk = 1.0f;
        if (VK == OF_TOKEN) {
            const float larger = __uint_as_float(__float_as_uint(fmaxf(largest(scale), size)) & 0x7f800000);
            shrunk = size * inverse(larger);
            size = larger;
        }
#pragma unroll
        for (int t = 0; t < EIGHTS; t++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float new_top = NOTHING;
#pragma unroll
                for (int u = 0; u < SUBS; u++) new_top = fmaxf(new_top, fmaxf(scores[u][t][e], scores[u][t][2 + e]));
                new_top = fmaxf(largest(new_top), top[t][e]);
                const float before = two_to(top[t][e] - new_top);
                top[t][e] = new_top;
                scale_by(t, e, before * shrunk, before);
            }
        }
    }

    // Scores become probabilities: operand B of the product with values.
    template <int SUBS, bool SCALED>
    __device__ __forceinline__ void weigh(
        Scores<SUBS>& scores, const u32* scale, const u32* offset, u32 (&share)[SUBS][EIGHTS][2]) {
        float of[2 * SUBS], most_of = size;
        bool far = false;
#pragma unroll
        for (int r = 0; r < 2 * SUBS && SCALED; r++) of[r] = floats(scale[r]).x, most_of = fmaxf(most_of, of[r]);
#pragma unroll
        for (int i = 0; i < SUBS * EIGHTS * 4; i++) {
            const int t = i / 4 % EIGHTS;
            far |= scores[i / 4 / EIGHTS][t][i % 4] > top[t][i % 2] + ROOM;
        }
        if (__any_sync(ALL, far || most_of > size * LARGER)) raise<SUBS>(scores, most_of);
        const float by = inverse(size);
#pragma unroll
        for (int u = 0; u < SUBS; u++) {
#pragma unroll
            for (int t = 0; t < EIGHTS; t++) {
                float p[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int r = 2 * u + i / 2;
                    p[i] = two_to(scores[u][t][i] - top[t][i % 2]);
                    total[t][i % 2] += p[i];
                    if (!SCALED) continue;
                    lack[t][i % 2] += p[i] * lacking<VB, VR>(of[r], offset[r]);
                    p[i] *= of[r] * by;
                }
                share[u][t][0] = transposed(packed(p[0], p[1])), share[u][t][1] = transposed(packed(p[2], p[3]));
            }
        }
    }

    __device__ __forceinline__ void add(int step, const u32 (&a)[4], const u32 (&share)[EIGHTS][2]) {
#pragma unroll
        for (int t = 0; t < EIGHTS; t++) multiply(sums[t][step], a, share[t][0], share[t][1]);
    }

    template <int SUBS>
    __device__ __forceinline__ void add(const Values<SUBS>& values, const u32 (&share)[SUBS][EIGHTS][2]) {
#pragma unroll
        for (int u = 0; u < SUBS; u++) {
#pragma unroll
            for (int n = 0; n < 2 * STEPS; n += 2) {
                u32 a[4];
#pragma unroll
                for (int i = 0; i < 4; i++) a[i] = values.pair(4 * u + i / 2 * 2, n + i % 2);
                add(n / 2, a, share[u]);
            }
        }
    }

    // Sums of all lanes, and what codes around zero lack.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int t = 0; t < EIGHTS; t++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                total[t][e] = sum_of(total[t][e]);
                const float all = VK == OF_TOKEN ? sum_of(lack[t][e]) : 0.0f;
#pragma unroll
                for (int j = 0; j < STEPS; j++) {
                    sums[t][j][e] = sums[t][j][e] * size + all, sums[t][j][2 + e] = sums[t][j][2 + e] * size + all;
                }
            }
        }
    }
};

// What a warp, a block or a head has found: ENTRIES times four sums, of channels 2j and 2j + 1 of one lane g and of two
// heads, and for each such pair of heads the largest scores and totals.
struct Entry {
    int number;

    __device__ __forceinline__ int pair() const { return number % PAIRS; }
    __device__ __forceinline__ int channel() const {
        return ValueRow::channel(number / PAIRS / 8 * 2, number / PAIRS % 8);
    }
};

template <bool SHARED>
__device__ __forceinline__ float4 part_of(const float4* at) { return SHARED ? *at : fresh(at); }

struct Gathered {
    float4 sum = make_float4(0, 0, 0, 0);
    float top[2] = {NOTHING, NOTHING}, total[2] = {0, 0};

    // Parts number `part` and every so-manyth behind it. Those of a round are asked for together.
    template <bool SHARED>
    __device__ __forceinline__ void add(
        const Entry& entry, const float4* sums, const float4* sizes, int part, int step, int end) {
        for (; part < end; part += AT_ONCE * step) {
            float4 more[AT_ONCE], size[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int one = part + i * step;
                size[i] = make_float4(NOTHING, 0, NOTHING, 0), more[i] = make_float4(0, 0, 0, 0);
                if (one >= end) continue;
                size[i] = part_of<SHARED>(sizes + one * PAIRS + entry.pair());
                more[i] = part_of<SHARED>(sums + one * ENTRIES + entry.number);
            }
            const float before[2] = {top[0], top[1]};
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                top[0] = fmaxf(top[0], size[i].x), top[1] = fmaxf(top[1], size[i].z);
            scale_by(two_to(before[0] - top[0]), two_to(before[1] - top[1]));
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const float first = two_to(size[i].x - top[0]), second = two_to(size[i].z - top[1]);
                total[0] += size[i].y * first, total[1] += size[i].w * second;
                sum.x += more[i].x * first, sum.y += more[i].y * second;
                sum.z += more[i].z * first, sum.w += more[i].w * second;
            }
        }
    }
    __device__ __forceinline__ void scale_by(float first, float second) {
        total[0] *= first, total[1] *= second;
        sum.x *= first, sum.y *= second, sum.z *= first, sum.w *= second;
    }
    __device__ __forceinline__ void publish(const Entry& entry, float4* sums, float4* sizes) const {
        sums[entry.number] = sum;
        if (entry.number < PAIRS) sizes[entry.number] = make_float4(top[0], total[0], top[1], total[1]);
    }
    __device__ __forceinline__ void write(const Entry& entry, u32* out, int group) const {
        const int head = entry.pair() * 2;
        u32* at = out + ((group * HEADS + head) * WIDTH + entry.channel()) / 2;
        const float by = 1.0f / total[0], other = 1.0f / total[1];
        at[0] = of_queries(sum.x * by, sum.z * by);
        if (head + 1 < HEADS) at[WIDTH / 2] = of_queries(sum.y * other, sum.w * other);
    }
};

__device__ __forceinline__ void publish(const Found& found, float4* sums, float4* sizes, int lane) {
#pragma unroll
    for (int t = 0; t < EIGHTS; t++) {
        const int pair = t * 4 + lane % 4;
        if (pair >= PAIRS) continue;
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            const float(&sum)[4] = found.sums[t][j];
            sums[(j * 8 + lane / 4) * PAIRS + pair] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        }
        if (lane < 4)
            sizes[pair] = make_float4(found.top[t][0], found.total[t][0], found.top[t][1], found.total[t][1]);
    }
}

// A block's warps together: into the outcome, if no other block has a part of it, else to where they meet.
__device__ __forceinline__ void add_warps(
    const float4* sums, const float4* sizes, float4* to_sums, float4* to_sizes, u32* out, int group, bool alone) {
    for (Entry entry{(int)threadIdx.x}; entry.number < ENTRIES; entry.number += THREADS) {
        Gathered whole;
        whole.add<true>(entry, sums, sizes, 0, 1, WARPS);
        if (alone) whole.write(entry, out, group);
        else whole.publish(entry, to_sums, to_sizes);
    }
}

// A head's blocks together, by way of shared memory: every team of threads has some of them.
__device__ __forceinline__ void add_blocks(
    const float4* all_sums, const float4* all_sizes, int blocks, float4* sums, float4* sizes, u32* out, int group) {
    for (int i = threadIdx.x; i < TEAMS * ENTRIES; i += THREADS) {
        const Entry entry{i % ENTRIES};
        const int team = i / ENTRIES;
        Gathered some;
        some.add<false>(entry, all_sums, all_sizes, team, TEAMS, blocks);
        some.publish(entry, sums + team * ENTRIES, sizes + team * PAIRS);
    }
    __syncthreads();
    for (Entry entry{(int)threadIdx.x}; entry.number < ENTRIES; entry.number += THREADS) {
        Gathered whole;
        whole.add<true>(entry, sums, sizes, 0, 1, TEAMS);
        whole.write(entry, out, group);
    }
}
