// The instructions that C++ has no name for, one to a function. Everything else in these kernels is plain C++: tests
// put functions of the same names in this file's place and run the very same sources on a CPU.
//
// BFLOAT from the host says which 16-bit format is meant: bf16, else fp16. No header is needed, so that the run-time
// compiler has nothing to look for.

typedef unsigned int u32;
typedef unsigned short u16;

__device__ __forceinline__ float2 floats(u32 pair) {  // two fp16
    float2 v;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(v.x), "=f"(v.y) : "r"(pair));
    return v;
}

__device__ __forceinline__ u32 minus(u32 a, u32 b) {  // two 16-bit floats at once
    u32 d;
#if BFLOAT
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80), "r"(b ^ 0x80008000));
#else
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
    return d;
}

__device__ __forceinline__ u32 fused(u32 a, u32 b, u32 c) {  // a b + c of two 16-bit floats, rounded once
    u32 d;
#if BFLOAT
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

__device__ __forceinline__ u32 times(u32 a, u32 b) {  // likewise; subnormal numbers count
    u32 d;
#if BFLOAT
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000));
#else
    asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
    return d;
}

// (bits & mask) | power in one instruction, of which the compiler makes two: it has room for one constant only and will
// not keep the other in a register by itself.
__device__ __forceinline__ u32 with_power(u32 bits, u32 mask, u32 power) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(bits), "r"(mask), "r"(power));
    return d;
}

// (bits & mask) ^ power, likewise.
__device__ __forceinline__ u32 flipped(u32 bits, u32 mask, u32 power) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(bits), "r"(mask), "r"(power));
    return d;
}

__device__ __forceinline__ u32 packed(float low, float high) {  // rounded to 16 bits each
    u32 d;
#if BFLOAT
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
    return d;
}

__device__ __forceinline__ u32 packed_bfloat(float low, float high) {  // the same to bf16 in any kernel
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ u32 fuse(u32 a, u32 b, u32 c) {  // a b + c of two fp16 at once, rounded once
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ float two_to(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two bf16 at once.
__device__ __forceinline__ u32 larger_bfloat(u32 a, u32 b) {
    u32 d;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 smaller_bfloat(u32 a, u32 b) {
    u32 d;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 packed_e4m3(float low, float high) {  // rounded to 8 bits each, saturating: 16 bits
    u16 d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
    return d;
}

// A matrix of 8 x 8 numbers of 16 bits, two neighbours of row lane / 4 in every lane, transposed.
__device__ __forceinline__ u32 transposed(u32 pair) {
    u32 d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
    return d;
}

// Four such matrices from shared memory: lane l brings the address of row l % 8 of matrix l / 8, 16 bytes of it.
__device__ __forceinline__ void matrices(u32 (&d)[4], const uint4* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}

__device__ __forceinline__ void matrices_transposed(u32 (&d)[4], const uint4* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"((u32)__cvta_generic_to_shared(row)) : "memory");
}

// sum += A B of mma.m16n8k16: rows of A and columns of B are lane / 4 (and 8 more), four registers and two.
__device__ __forceinline__ void multiply(float (&sum)[4], const u32* a, u32 b0, u32 b1) {
#if BFLOAT
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with bf16 on both sides, whatever the kernel's format is.
__device__ __forceinline__ void multiply_bfloat(float (&sum)[4], const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of mma.m16n8k32 for codes of 8 bits, four to a register: int8 with exact sums, E4M3 with those of fp32.
__device__ __forceinline__ void multiply_bytes(int (&sum)[4], const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_bytes(float (&sum)[4], const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Weights are read once: they must not push the inputs out of L1. Volatile keeps prefetches where they are written, but
// for the assembler, which would move loads that it knows to be of constants (.nc) behind `meet_neighbours`.
__device__ __forceinline__ uint4 stream(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

__device__ __forceinline__ uint2 stream(const uint2* at) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
    return v;
}

__device__ __forceinline__ u32 stream(const u32* at) {
    u32 v;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

// What another block wrote in this kernel, past this processor's own cache.
__device__ __forceinline__ float4 fresh(const float4* at) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(at) : "memory");
    return v;
}

// One more has come: how many had before. What they and those they met had written is there then.
__device__ __forceinline__ u32 arrive(u32* at) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
    return before;
}

// Into the cache that all processors share, where later writes go too: so this is no reading.
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" :: "l"(at)); }

__device__ __forceinline__ long long glimpse(const long long* at) {  // a number that may change just now
    long long v;
    asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(v) : "l"(at) : "memory");
    return v;
}

// 16 bytes to shared memory in the background, zeros where there are none.
__device__ __forceinline__ void copy(uint4* to, const uint4* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int YOUNGER>  // copies that this thread has ended are there, but for so many sets
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(YOUNGER) : "memory");
}

template <int THREADS>
__device__ __forceinline__ void meet(int barrier) {  // of a block's threads, so many; 0 is __syncthreads'
    asm volatile("bar.sync %0, %1;" :: "r"(barrier), "n"(THREADS) : "memory");
}

template <int THREADS>
__device__ __forceinline__ bool meet_any(int barrier, bool mine) {  // and whether one of them says so, to all of them
    int any;
    asm volatile("{.reg .pred mine, any; setp.ne.b32 mine, %1, 0;\n"
                 "bar.red.or.pred any, %2, %3, mine;\nselp.b32 %0, 1, 0, any;}"
                 : "=r"(any) : "r"((int)mine), "r"(barrier), "n"(THREADS) : "memory");
    return any;
}

__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same without telling the others anything: what was written to memory is not waited for.
__device__ __forceinline__ void leave_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ float4 peek(const float4* at, int rank) {  // the same place in another block of the cluster
    float4 v;
    asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"((u32)__cvta_generic_to_shared(at)), "r"(rank) : "memory");
    return v;
}

// Everything that earlier kernels wrote is there from here on, and the next kernel may begin. Before it only weights
// are read: they have been in place since the model was loaded, so they come in while the kernel before this one ends.
// The order matters: a kernel that knows its neighbour to be done may rely on all that came before.
__device__ __forceinline__ void meet_neighbours() {
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
}

// What is alike in all lanes of a warp, for the compiler to know.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// --- the copy engine and wgmma --------------------------------------------------------------------------------------

typedef unsigned long long u64;
struct alignas(64) TensorMap { char opaque[128]; };  // CUtensorMap

__device__ __forceinline__ u32 shared_place(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// A barrier in shared memory: a phase ends when so many have arrived and all announced bytes are there. Nothing else may
// be written to its place while the block lives, not even when nobody waits for it any more.
__device__ __forceinline__ void begin_barrier(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(shared_place(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void show_barriers() {  // to the copy engine
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive_at(u64* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(shared_place(barrier)) : "memory");
}

__device__ __forceinline__ void announce(u64* barrier, int bytes) {  // and arrive
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                 :: "r"(shared_place(barrier)), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended; of the parity 1 there has been one before the first.
__device__ __forceinline__ void await_phase(u64* barrier, int parity) {
    asm volatile("{.reg .pred done;\n"
                 "AGAIN:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@done bra DONE;\nbra AGAIN;\nDONE:}"
                 :: "r"(shared_place(barrier)), "r"(parity) : "memory");
}

// A box of a matrix, zeros where it has no numbers. A row's eight vectors of 16 bytes trade places: v with v ^ row % 8.
__device__ __forceinline__ void bring_tile(uint4* to, const TensorMap& from, int column, int row, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 :: "r"(shared_place(to)), "l"(&from), "r"(column), "r"(row), "r"(shared_place(barrier)) : "memory");
}

// Registers of a thread, for all warps of four that work together: some keep few, so that others can take more.
template <int COUNT>
__device__ __forceinline__ void keep_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT)); }
template <int COUNT>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT)); }

// Registers are written before, products come between, and are done after waiting for all but so many sets.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int YOUNGER>
__device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(YOUNGER) : "memory");
}

// What is computed from these registers is computed behind this place: products in flight read others, which the
// compiler would else write too early, and wait for them all.
__device__ __forceinline__ void pin(uint4& v) {
    asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) :: "memory");
}
__device__ __forceinline__ void pin(u32& v) { asm volatile("" : "+r"(v) :: "memory"); }

// A tile that `bring_tile` brought, 64 columns wide, as wgmma is told of it; vectors of 16 bytes may be added.
__device__ __forceinline__ u64 operand(const uint4* tile) {
    const u64 swizzled = 1ull << 62, eight_rows = 64ull << 32, unused = 1ull << 16;  // 1024 bytes, in vectors
    return swizzled | eight_rows | unused | (shared_place(tile) & 0x3ffff) >> 4;
}

// What generic code wrote to shared memory, to those that read it by themselves.
__device__ __forceinline__ void show_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#ifdef SUMS
#if BFLOAT
#define MULTIPLY_TILE "wgmma.mma_async.sync.aligned.m64n" SUM_COLUMNS "k16.f32.bf16.bf16 {" SUM_NAMES "}, "
#else
#define MULTIPLY_TILE "wgmma.mma_async.sync.aligned.m64n" SUM_COLUMNS "k16.f32.f16.f16 {" SUM_NAMES "}, "
#endif

// sums (+)= A B of wgmma.m64nNk16, N twice as many as a lane has sums: a warp's 16 rows as in `multiply`, times N rows
// of a tile, of which two vectors are taken. Sums of eight columns of the result are four neighbours.
__device__ __forceinline__ void multiply_tile(float (&s)[SUMS], const u32 (&a)[4], u64 tile, bool add) {
    asm volatile("{.reg .pred add; setp.ne.b32 add, " BEHIND_5 ", 0;\n" MULTIPLY_TILE
                 "{" BEHIND_0 "," BEHIND_1 "," BEHIND_2 "," BEHIND_3 "}, " BEHIND_4 ", add, 1, 1, 0;}"
                 : SUM_REGISTERS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "r"((int)add));
}

// The same where A's 64 rows are the columns of a tile, of which 16 rows are taken.
__device__ __forceinline__ void multiply_tiles(float (&s)[SUMS], u64 across, u64 tile, bool add) {
    asm volatile("{.reg .pred add; setp.ne.b32 add, " BEHIND_2 ", 0;\n" MULTIPLY_TILE
                 BEHIND_0 ", " BEHIND_1 ", add, 1, 1, 1, 0;}"
                 : SUM_REGISTERS : "l"(across), "l"(tile), "r"((int)add));
}

// Until these are sums: the compiler takes them for such as soon as a product has begun.
__device__ __forceinline__ void await_sums(float (&s)[SUMS]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : SUM_REGISTERS :: "memory");
}
#endif
