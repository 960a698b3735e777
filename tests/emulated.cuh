// The functions of ptx.cuh on a CPU (`emulator.h`), under the same names.
//
// The tensor core's operations are spelled out from their documentation (PTX, "Matrix Fragments for mma.m16n8k16" and
// ".m16n8k32"): all 32 lanes hand in their registers and each computes its own four sums.

#include "emulator.h"

inline float value_of(u32 bits) { return BFLOAT ? __uint_as_float(bits << 16) : half_value(bits & 0xffff); }
inline u32 bits_of(float value) {
    if (!BFLOAT) return same_bits<u16>((_Float16)value);
    const u32 bits = __float_as_uint(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float2 floats(u32 pair) { return {half_value(pair & 0xffff), half_value(pair >> 16)}; }
inline u32 packed(float low, float high) { return bits_of(low) | bits_of(high) << 16; }
inline u32 with_power(u32 bits, u32 mask, u32 power) { return (bits & mask) | power; }
inline u32 minus(u32 a, u32 b) {
    return packed(value_of(a & 0xffff) - value_of(b & 0xffff), value_of(a >> 16) - value_of(b >> 16));
}
inline u32 flipped(u32 bits, u32 mask, u32 power) { return (bits & mask) ^ power; }
inline u32 fused(u32 a, u32 b, u32 c) {  // of small integers and powers of two: fp32 rounds nothing
    const auto one = [&](int shift) {
        return value_of(a >> shift & 0xffff) * value_of(b >> shift & 0xffff) + value_of(c >> shift & 0xffff);
    };
    return packed(one(0), one(16));
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
        const float size = min(std::fabs(value), 448.0f);
        const int exponent = max(size > 0 ? std::ilogb(size) : -6, -6);
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

template <int YOUNGER>
inline void await_copies() { finish_copies(YOUNGER); }
template <int THREADS>
inline void meet(int barrier) { meet_block(barrier, THREADS); }
template <int THREADS>
inline bool meet_any(int barrier, bool mine) { return meet_block(barrier, THREADS, mine); }
inline void __syncthreads() { meet_block(0, 0); }
inline void meet_neighbours() {}

// What each lane hands in, seen by all of its warp.
template <class Look>
inline auto together(u32 mine, const Look& look) {
    Exchange& seen = exchange();
    seen.a[threadIdx.x % 32][0] = mine;
    meet_lanes();
    const auto found = look([&](int lane) { return seen.a[lane][0]; }, threadIdx.x % 32);
    meet_lanes();
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
    Exchange& seen = exchange();
    const int lane = threadIdx.x % 32;
    std::memcpy(seen.a[lane], &row, sizeof row);
    meet_lanes();
    look_at(row);
    const auto at = [&](int matrix, int i, int j) -> u32 {
        const u16* from;
        std::memcpy(&from, seen.a[matrix * 8 + i], sizeof from);
        return from[j];
    };
    for (int m = 0; m < 4; m++) d[m] = find(at, m, lane / 4, lane % 4 * 2);
    meet_lanes();
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
    Exchange& seen = exchange();
    const int lane = threadIdx.x % 32;
    std::memcpy(seen.a[lane], a, sizeof seen.a[lane]);
    seen.b[lane][0] = b0, seen.b[lane][1] = b1;
    meet_lanes();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < STEP; k++) {
            const int thread = k % (STEP / 2) / PER, half = k / (STEP / 2), shift = k % PER * (32 / PER);
            const u32 left = seen.a[row % 8 * 4 + thread][half * 2 + row / 8];
            const u32 right = seen.b[column * 4 + thread][half];
            sum[i] += value(left >> shift) * value(right >> shift);
        }
    }
    meet_lanes();
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
        const float size = std::ldexp(exponent ? 8.0f + fraction : fraction, max(exponent, 1) - 10);
        return bits & 128 ? -size : size;
    });
}

inline void show_barriers() {}
template <int YOUNGER>
inline void await_products() { finish_products(YOUNGER); }
template <class Registers>
inline void pin(Registers&) {}
template <int>
inline void keep_registers() {}
template <int>
inline void take_registers() {}
inline u64 operand(const uint4* tile) { return reinterpret_cast<u64>(tile) / 16; }
template <int COUNT>
inline void await_sums(float (&)[COUNT]) { finish_products(0); }
template <int COUNT>
inline void multiply_tile(float (&sums)[COUNT], const u32 (&a)[4], u64 tile, bool add) {
    begin_tile(sums, COUNT, a, 0, tile, add, value_of);
}
template <int COUNT>
inline void multiply_tiles(float (&sums)[COUNT], u64 across, u64 tile, bool add) {
    begin_tile(sums, COUNT, nullptr, across, tile, add, value_of);
}
