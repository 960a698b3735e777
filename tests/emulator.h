// CUDA's words on a CPU, and what `emulator.cpp` does for a kernel: this is read, and that compiled, once for all.

#ifndef EMULATOR_H
#define EMULATOR_H

#include <cmath>
#include <cstring>
#include <utility>

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
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }

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

// --- threads and where they meet ------------------------------------------------------------------------------------

struct Place { u32 x, y; };
struct Thread { Place thread, block; };
extern Thread* current;
extern Place gridDim;
#define threadIdx (current->thread)
#define blockIdx (current->block)

bool meet_block(int barrier, int threads, bool mine = false);  // every thread of the block for 0 of them; any of theirs
void meet_cluster();
void leave_cluster();
void __syncwarp();
float4* block_memory();
float4 peek(const float4* at, int rank);

// What lanes hand in for all of their warp to look at, between two meetings that order no memory.
struct Exchange { u32 a[32][4], b[32][2]; };
Exchange& exchange();
void meet_lanes();

// --- what happens in the background ---------------------------------------------------------------------------------

void copy(uint4* to, const uint4* from, bool there);
void end_copies();
void finish_copies(int younger);
void look_at(const void* place);  // of a copy, perhaps another thread's of the warp

struct alignas(64) TensorMap { const u16* numbers; long long columns, rows, box; char rest[96]; };
void begin_barrier(u64* barrier, int arrivals);
void arrive_at(u64* at);
void announce(u64* at, int bytes);
void await_phase(u64* at, int parity);
void bring_tile(uint4* to, const TensorMap& from, int column, int row, u64* at);

void show_writes();
void begin_tile(float* sums, int count, const u32* a, u64 across, u64 tile, bool add, float (*value)(u32));
void begin_products();
void end_products();
void finish_products(int younger);

// --- starting a kernel ----------------------------------------------------------------------------------------------

void run(void (*kernel)(void**), void** arguments, const u32* grid, int threads, int cluster, size_t bytes);

template <class... P, size_t... I>
inline void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(arguments[I])...);
}
template <class... P>
inline void call(void (*kernel)(P...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<P...>{});
}

#endif
