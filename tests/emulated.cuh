// What a kernel's source needs to run on a CPU: CUDA's words, and the functions of ptx.cuh under the same names.
//
// Every thread of a cluster is a fibre, and they take turns. The tensor core's operations are spelled out from their
// documentation (PTX, "Matrix Fragments for mma.m16n8k16" and ".m16n8k32"): all 32 lanes hand in their registers and
// each computes its own four sums. Copies in the background happen as late as they may, so that what is read too early
// is found out, and shared memory starts as NaN.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(x, y, z)
#define __grid_constant__
#define __align__(bytes)

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

template <class To, class From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(u32 bits) { return same_bits<float>(bits); }
inline u32 __float_as_uint(float value) { return same_bits<u32>(value); }

inline float half_value(u32 bits) { return same_bits<_Float16>((u16)bits); }
inline float value_of(u32 bits) { return BFLOAT ? __uint_as_float(bits << 16) : half_value(bits & 0xffff); }
inline u32 bits_of(float value) {
    if (!BFLOAT) return same_bits<u16>((_Float16)value);
    const u32 bits = __float_as_uint(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// --- fibres ---------------------------------------------------------------------------------------------------------

struct Place { u32 x, y; };
struct Meeting { int here = 0, generation = 0; };
struct Copy { uint4* to; uint4 what; };
struct Warp { Meeting meeting; u32 a[32][4], b[32][2]; };
struct alignas(1024) Line { float4 vectors[64]; };
struct Barrier {
    int arrivals, missing, announced = 0, asked = 0, phase = 0;
    std::vector<std::function<void()>> copies;
};
struct Block {
    std::vector<Line> memory;
    Meeting meetings[16];
    std::deque<Warp> warps;
    std::map<const void*, Barrier> barriers;
};
struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Place thread, block;
    int rank;
    bool done = false;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> ended;
    std::vector<std::function<void()>> products;
    std::deque<std::vector<std::function<void()>>> sets;
};

static std::vector<std::unique_ptr<Fibre>> fibres;
static std::deque<Block> blocks;
static Meeting of_cluster;
static ucontext_t turns;
static Fibre* current;
static long progress;
static Place gridDim;

#define threadIdx (current->thread)
#define blockIdx (current->block)

inline void yield() { swapcontext(&current->context, &turns); }
inline void meet_at(Meeting& meeting, int threads) {
    const int generation = meeting.generation;
    if (++meeting.here == threads) {
        meeting.here = 0, meeting.generation++, progress++;
    } else {
        while (meeting.generation == generation) yield();
    }
}
inline Block& block_here() { return blocks[current->rank]; }
inline float4* memory_of(Block& block) { return block.memory.data()->vectors; }
inline float4* block_memory() { return memory_of(block_here()); }
inline int block_threads() { return fibres.size() / blocks.size(); }

// --- the functions of ptx.cuh ---------------------------------------------------------------------------------------

inline float2 floats(u32 pair) { return {half_value(pair & 0xffff), half_value(pair >> 16)}; }
inline u32 packed(float low, float high) { return bits_of(low) | bits_of(high) << 16; }
inline u32 with_power(u32 bits, u32 mask, u32 power) { return (bits & mask) | power; }
inline u32 minus(u32 a, u32 b) {
    return packed(value_of(a & 0xffff) - value_of(b & 0xffff), value_of(a >> 16) - value_of(b >> 16));
}
inline u32 times(u32 a, u32 b) {
    return packed(value_of(a & 0xffff) * value_of(b & 0xffff), value_of(a >> 16) * value_of(b >> 16));
}
inline u32 packed_bfloat(float low, float high) {
    const auto rounded = [](float value) {
        const u32 bits = __float_as_uint(value);
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return rounded(low) | rounded(high) << 16;
}
template <class Choose>
inline u32 chosen_bfloat(u32 a, u32 b, const Choose& choose) {
    const auto one = [&](u32 mask, int shift) {
        return choose(__uint_as_float((a & mask) << shift), __uint_as_float((b & mask) << shift));
    };
    return packed_bfloat(one(0xffff, 16), one(0xffff0000, 0));
}
inline u32 larger_bfloat(u32 a, u32 b) { return chosen_bfloat(a, b, [](float p, float q) { return std::fmax(p, q); }); }
inline u32 smaller_bfloat(u32 a, u32 b) { return chosen_bfloat(a, b, [](float p, float q) { return std::fmin(p, q); }); }
inline u32 packed_e4m3(float low, float high) {
    const auto one = [](float value) -> u32 {
        const u32 sign = __float_as_uint(value) >> 24 & 128;
        if (std::isnan(value)) return 127;
        const float size = std::min(std::fabs(value), 448.0f);
        const int exponent = std::max(size > 0 ? std::ilogb(size) : -6, -6);
        return sign | (u32)((exponent + 6) * 8 + std::nearbyint(std::ldexp(size, 3 - exponent)));
    };
    return one(low) | one(high) << 8;
}
inline u32 fuse(u32 a, u32 b, u32 c) {  // the product of two fp16 is exact in fp64, and so is the sum, nearly always
    const auto one = [&](int shift) {
        const double sum = (double)half_value(a >> shift) * half_value(b >> shift) + half_value(c >> shift);
        return (u32)same_bits<u16>((_Float16)sum);
    };
    return one(0) | one(16) << 16;
}
inline float two_to(float x) { return std::exp2(x); }
template <class Vector>
inline Vector stream(const Vector* at) { return *at; }
inline float4 fresh(const float4* at) { return *at; }
inline void prefetch(const void*) {}
inline long long glimpse(const long long* at) { return *at; }

inline void copy(uint4* to, const uint4* from, bool there) {
    current->open.push_back({to, there ? *from : uint4{0, 0, 0, 0}});
}
inline void end_copies() { current->ended.push_back(std::move(current->open)), current->open.clear(); }
template <int YOUNGER>
inline void await_copies() {
    for (; (int)current->ended.size() > YOUNGER; current->ended.pop_front())
        for (const Copy& one : current->ended.front()) *one.to = one.what;
}

template <int THREADS>
inline void meet(int barrier) { meet_at(block_here().meetings[barrier], THREADS); }
inline void __syncthreads() { meet_at(block_here().meetings[0], block_threads()); }
inline void meet_cluster() { meet_at(of_cluster, fibres.size()); }
inline void meet_neighbours() {}
inline float4 peek(const float4* at, int rank) { return memory_of(blocks[rank])[at - block_memory()]; }

// What each lane hands in, seen by all of its warp.
template <class Look>
inline auto together(u32 mine, const Look& look) {
    Warp& warp = block_here().warps[threadIdx.x / 32];
    warp.a[threadIdx.x % 32][0] = mine;
    meet_at(warp.meeting, 32);
    const auto found = look([&](int lane) { return warp.a[lane][0]; }, threadIdx.x % 32);
    meet_at(warp.meeting, 32);
    return found;
}
inline float __shfl_sync(u32, float mine, int from) {
    return together(__float_as_uint(mine), [&](const auto& of, int) { return __uint_as_float(of(from)); });
}
inline float __shfl_xor_sync(u32, float mine, int step) {
    return together(__float_as_uint(mine), [&](const auto& of, int lane) { return __uint_as_float(of(lane ^ step)); });
}
inline u32 __shfl_xor_sync(u32, u32 mine, int step) {
    return together(mine, [&](const auto& of, int lane) { return of(lane ^ step); });
}
inline int uniform(int x) { return x; }
inline void __syncwarp() { meet_at(block_here().warps[threadIdx.x / 32].meeting, 32); }
inline u32 __funnelshift_l(u32 low, u32 high, u32 by) { return by % 32 ? high << by % 32 | low >> (32 - by % 32) : high; }
inline bool __any_sync(u32, bool mine) {
    return together(mine, [](const auto& of, int) {
        bool any = false;
        for (int lane = 0; lane < 32; lane++) any |= of(lane) != 0;
        return any;
    });
}
inline u32 transposed(u32 pair) {
    return together(pair, [](const auto& of, int lane) {
        const int row = lane % 4 * 2, column = lane / 4;
        const auto at = [&](int i) { return of(i * 4 + column / 2) >> column % 2 * 16 & 0xffff; };
        return at(row) | at(row + 1) << 16;
    });
}
template <class Find>
inline void load_matrices(u32 (&d)[4], const uint4* row, const Find& find) {
    Warp& warp = block_here().warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    std::memcpy(warp.a[lane], &row, sizeof row);
    meet_at(warp.meeting, 32);
    const auto at = [&](int matrix, int i, int j) -> u32 {
        const u16* from;
        std::memcpy(&from, warp.a[matrix * 8 + i], sizeof from);
        return from[j];
    };
    for (int m = 0; m < 4; m++) d[m] = find(at, m, lane / 4, lane % 4 * 2);
    meet_at(warp.meeting, 32);
}
inline void matrices(u32 (&d)[4], const uint4* row) {
    load_matrices(d, row, [](const auto& at, int m, int i, int j) { return at(m, i, j) | at(m, i, j + 1) << 16; });
}
inline void matrices_transposed(u32 (&d)[4], const uint4* row) {
    load_matrices(d, row, [](const auto& at, int m, int i, int j) { return at(m, j, i) | at(m, j + 1, i) << 16; });
}
inline u32 __byte_perm(u32 low, u32 high, u32 selected) {
    u32 found = 0;
    for (int i = 0; i < 4; i++) {
        const u32 byte = selected >> 4 * i & 7;
        found |= ((byte < 4 ? low : high) >> byte % 4 * 8 & 255) << 8 * i;
    }
    return found;
}

inline u32 arrive(u32* at) { return (*at)++; }

// Each lane's four sums of products over `STEP` columns, of which a register holds `PER`.
template <int STEP, int PER, class Sum, class Value>
inline void multiply_as(Sum (&sum)[4], const u32* a, u32 b0, u32 b1, const Value& value) {
    Warp& warp = block_here().warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    std::copy(a, a + 4, warp.a[lane]);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    meet_at(warp.meeting, 32);
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < STEP; k++) {
            const int thread = k % (STEP / 2) / PER, half = k / (STEP / 2), shift = k % PER * (32 / PER);
            const u32 left = warp.a[row % 8 * 4 + thread][half * 2 + row / 8];
            const u32 right = warp.b[column * 4 + thread][half];
            sum[i] += value(left >> shift) * value(right >> shift);
        }
    }
    meet_at(warp.meeting, 32);
}
inline void multiply(float (&sum)[4], const u32* a, u32 b0, u32 b1) {
    multiply_as<16, 2>(sum, a, b0, b1, [](u32 bits) { return value_of(bits & 0xffff); });
}
inline void multiply_bfloat(float (&sum)[4], const u32* a, u32 b0, u32 b1) {
    multiply_as<16, 2>(sum, a, b0, b1, [](u32 bits) { return __uint_as_float(bits << 16); });
}
inline void multiply_bytes(int (&sum)[4], const u32* a, u32 b0, u32 b1) {
    multiply_as<32, 4>(sum, a, b0, b1, [](u32 bits) { return (int)(signed char)bits; });
}
inline void multiply_bytes(float (&sum)[4], const u32* a, u32 b0, u32 b1) {
    multiply_as<32, 4>(sum, a, b0, b1, [](u32 bits) -> float {
        const int exponent = bits >> 3 & 15, fraction = bits & 7;
        if ((bits & 127) == 127) return NAN;
        const float size = std::ldexp(exponent ? 8.0f + fraction : fraction, std::max(exponent, 1) - 10);
        return bits & 128 ? -size : size;
    });
}

// The copy engine brings nothing before all bytes of a phase are announced and asked for and somebody waits for them.
struct alignas(64) TensorMap { const u16* numbers; long long columns, rows, box; char rest[96]; };
inline void begin_barrier(u64* barrier, int arrivals) { block_here().barriers[barrier] = {arrivals, arrivals}; }
inline void show_barriers() {}
inline void end_phase(Barrier& barrier) {
    if (barrier.missing || barrier.asked != barrier.announced) return;
    for (const auto& one : barrier.copies) one();
    barrier = {barrier.arrivals, barrier.arrivals, 0, 0, barrier.phase + 1}, progress++;
}
inline void arrive_at(u64* at) { block_here().barriers.at(at).missing--, progress++; }
inline void announce(u64* at, int bytes) { block_here().barriers.at(at).announced += bytes, arrive_at(at); }
inline void await_phase(u64* at, int parity) {
    Barrier& barrier = block_here().barriers.at(at);
    for (; barrier.phase % 2 == parity; end_phase(barrier)) yield();
}
inline void ask(u64* at, int bytes, std::function<void()> copy) {
    Barrier& barrier = block_here().barriers.at(at);
    barrier.asked += bytes, barrier.copies.push_back(std::move(copy)), progress++;
}
inline void bring_tile(uint4* to, const TensorMap& from, int column, int row, u64* at) {
    const TensorMap map = from;
    ask(at, map.box * 128, [=] {
        u16* numbers = reinterpret_cast<u16*>(to);
        for (int i = 0; i < map.box; i++)
            for (int j = 0; j < 64; j++) {
                const bool there = row + i < map.rows && column + j < map.columns;
                const long long place = (row + i) * map.columns + column + j;
                numbers[i * 64 + (j / 8 ^ i % 8) * 8 + j % 8] = there ? map.numbers[place] : 0;
            }
    });
}

// A product happens when it is waited for, with what shared memory holds then.
inline void begin_products() {}
inline void end_products() { current->sets.push_back(std::move(current->products)), current->products.clear(); }
template <int YOUNGER>
inline void await_products() {
    for (; (int)current->sets.size() > YOUNGER; current->sets.pop_front())
        for (const auto& one : current->sets.front()) one();
}
inline void pin(uint4&) {}
template <int>
inline void keep_registers() {}
template <int>
inline void take_registers() {}
inline u64 operand(const uint4* tile) { return reinterpret_cast<u64>(tile) / 16; }
inline void multiply_tile(float (&sums)[32], const u32 (&a)[4], u64 tile) {
    Warp& warp = block_here().warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    std::copy(a, a + 4, warp.a[lane]);
    meet_at(warp.meeting, 32);
    std::vector<float> rows;  // two of A: lane / 4 and eight more
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 16; k++) {
            const u32 pair = warp.a[lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + half];
            rows.push_back(value_of(pair >> k % 2 * 16 & 0xffff));
        }
    meet_at(warp.meeting, 32);
    current->products.push_back([&sums, rows, tile, lane] {
        const u16* numbers = reinterpret_cast<const u16*>(tile / 64 * 1024);
        for (int i = 0; i < 32; i++) {
            const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, half = i / 2 % 2;
            for (int k = 0; k < 16; k++) {
                const int vector = (tile % 8 + k / 8) ^ token % 8;
                sums[i] += rows[half * 16 + k] * value_of(numbers[token * 64 + vector * 8 + k % 8]);
            }
        }
    });
}

// --- starting a kernel ----------------------------------------------------------------------------------------------

template <class... P, size_t... I>
inline void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(arguments[I])...);
}
template <class... P>
inline void call(void (*kernel)(P...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<P...>{});
}

static void (*body)(void**);
static void** given;
static void live() {
    body(given);
    current->done = true, progress++;
    swapcontext(&current->context, &turns);
}

static void run_cluster(Place first, int cluster, int threads, size_t bytes) {
    fibres.clear(), blocks.clear();
    for (int rank = 0; rank < cluster; rank++) {
        Block& block = blocks.emplace_back();
        block.memory.resize((bytes + sizeof(Line) - 1) / sizeof(Line));
        std::fill_n(memory_of(block), bytes / sizeof(float4), float4{NAN, NAN, NAN, NAN});
        block.warps.resize(threads / 32);
        for (u32 thread = 0; thread < (u32)threads; thread++) {
            Fibre& fibre = *fibres.emplace_back(std::make_unique<Fibre>());
            const size_t size = 1 << 16;
            fibre.stack = std::make_unique<char[]>(size);
            fibre.thread = {thread, 0}, fibre.block = {first.x + rank, first.y}, fibre.rank = rank;
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = fibre.stack.get(), fibre.context.uc_stack.ss_size = size;
            makecontext(&fibre.context, live, 0);
        }
    }
    for (bool left = true; left;) {
        left = false;
        const long before = progress;
        for (auto& fibre : fibres) {
            if (fibre->done) continue;
            current = fibre.get(), left = true;
            swapcontext(&turns, &fibre->context);
        }
        if (left && progress == before) std::fputs("threads wait for each other for ever\n", stderr), std::abort();
    }
}

static void run(void (*kernel)(void**), void** arguments, const u32* grid, int threads, int cluster, size_t bytes) {
    body = kernel, given = arguments, gridDim = {grid[0], grid[1]};
    for (u32 y = 0; y < grid[1]; y++)
        for (u32 x = 0; x < grid[0]; x += cluster) run_cluster({x, y}, cluster, threads, bytes);
}
