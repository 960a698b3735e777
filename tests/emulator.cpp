// A GPU as its documentation allows it to be, at its most inconvenient.
//
// Every thread is a fibre. They take turns in any order, some warps far more often than others, and some sleep while
// others get on; clusters come in any order too, eight at a time. A copy in the background happens when it is asked
// for, or as late as it may, and only who waited for it, and whom that thread has met since, may look at it. Shared
// memory starts as NaN, and nothing may be written behind it or over a barrier of the copy engine. What is chosen at
// random is the same in every run of a test.

#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

typedef std::function<void()> Action;
struct Meeting { int here = 0, generation = 0; bool said = false, any = false; };  // so far, and the last time
struct Copy { uint4* to; uint4 what; };
struct Warp { Meeting meeting; Exchange exchange; u32 sloth; };
struct alignas(1024) Line { float4 vectors[64]; };
struct Barrier {
    int arrivals, missing, announced = 0, asked = 0, phase = 0;
    std::vector<Action> copies;
};
struct Block {
    std::vector<Line> memory, shown;  // the latter is what wgmma sees
    Meeting meetings[16], of_cluster;  // the latter where the first block of a cluster has it
    std::deque<Warp> warps;
    std::map<const u64*, Barrier> barriers;
};
struct Fibre : Thread {
    ucontext_t start;
    jmp_buf place;
    bool begun = false;
    std::unique_ptr<char[]> stack;
    int home, leader;  // places of its block in `blocks`, and of the first one of its cluster
    bool done = false;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> ended;
    std::set<const void*> untold;  // where copies are that this thread waited for, and has met nobody since
    std::vector<Action> products;
    std::deque<std::vector<Action>> sets;
    bool ordered = false;  // products after what was done with their registers
};

Thread* current;
Place gridDim;
static std::vector<std::unique_ptr<Fibre>> fibres;
static std::deque<Block> blocks;
static int block_threads, cluster_blocks;
static size_t block_bytes;
static jmp_buf turns;
static long progress;
static std::mt19937 chance;
static constexpr int AT_ONCE = 8;  // clusters
static constexpr u64 UNTOUCHED = 0xbadc0de5bad5eedull;  // what a barrier holds

static Fibre& fibre_here() { return *static_cast<Fibre*>(current); }
static Block& block_here() { return blocks[fibre_here().home]; }
static Warp& warp_of(const Fibre& fibre) { return blocks[fibre.home].warps[fibre.thread.x / 32]; }
static float4* memory_of(Block& block) { return block.memory.data()->vectors; }
static void show(Block& block, const void* from, size_t bytes) {
    const size_t place = static_cast<const char*>(from) - reinterpret_cast<const char*>(memory_of(block));
    std::memcpy(reinterpret_cast<char*>(block.shown.data()) + place, from, bytes);
}
[[noreturn]] static void die(const char* why) { std::fprintf(stderr, "%s\n", why), std::abort(); }

// A context is only what a fibre starts with, since to change from one to another is a call of the system each time.
static void yield() {
    if (!_setjmp(fibre_here().place)) _longjmp(turns, 1);
}
static void give_turn(Fibre& fibre) {
    current = &fibre;
    if (_setjmp(turns)) return;
    if (fibre.begun) _longjmp(fibre.place, 1);
    fibre.begun = true;
    setcontext(&fibre.start);
}

// --- threads and where they meet ------------------------------------------------------------------------------------

static bool meet_at(Meeting& meeting, int threads, bool mine = false) {
    const int generation = meeting.generation;
    meeting.said |= mine;
    if (++meeting.here == threads) {
        meeting.any = meeting.said, meeting.said = false;
        meeting.here = 0, meeting.generation++, progress++;
    } else {
        while (meeting.generation == generation) yield();
    }
    return meeting.any;
}
static u32 any_sloth() { return chance() % (1 + chance() % 5); }
bool meet_block(int barrier, int threads, bool mine) {
    fibre_here().untold.clear();
    const bool any = meet_at(block_here().meetings[barrier], threads ? threads : block_threads, mine);
    if (threadIdx.x % 32 == 0) warp_of(fibre_here()).sloth = any_sloth();  // who came first may go last
    return any;
}
void leave_cluster() { meet_at(blocks[fibre_here().leader].of_cluster, cluster_blocks * block_threads); }
void meet_cluster() { fibre_here().untold.clear(), leave_cluster(); }
void __syncwarp() { fibre_here().untold.clear(), meet_lanes(); }
void meet_lanes() { meet_at(warp_of(fibre_here()).meeting, 32); }
Exchange& exchange() { return warp_of(fibre_here()).exchange; }
float4* block_memory() { return memory_of(block_here()); }
float4 peek(const float4* at, int rank) {
    return memory_of(blocks[fibre_here().leader + rank])[at - block_memory()];
}

// --- what happens in the background ---------------------------------------------------------------------------------

void copy(uint4* to, const uint4* from, bool there) {
    fibre_here().open.push_back({to, there ? *from : uint4{0, 0, 0, 0}});
    if (chance() % 2) *to = fibre_here().open.back().what;
}
void end_copies() {
    Fibre& fibre = fibre_here();
    fibre.ended.push_back(std::move(fibre.open)), fibre.open.clear();
}
void finish_copies(int younger) {
    Fibre& fibre = fibre_here();
    for (; (int)fibre.ended.size() > younger; fibre.ended.pop_front())
        for (const Copy& one : fibre.ended.front()) *one.to = one.what, fibre.untold.insert(one.to);
}
void look_at(const void* place) {
    for (const auto& other : fibres) {
        const bool near = &warp_of(*other) == &warp_of(fibre_here()) && other.get() != current;
        if (near && other->untold.count(place)) die("a copy is read that another has not told of");
    }
}

// A phase ends when all have arrived and all bytes that were announced are asked for, and somebody waits for it.
static void end_phase(Barrier& barrier) {
    if (barrier.missing || barrier.asked != barrier.announced) return;
    for (const Action& one : barrier.copies) one();
    barrier = {barrier.arrivals, barrier.arrivals, 0, 0, barrier.phase + 1}, progress++;
}
void begin_barrier(u64* at, int arrivals) { block_here().barriers[at] = {arrivals, arrivals}, *at = UNTOUCHED; }
void arrive_at(u64* at) { block_here().barriers.at(at).missing--, progress++; }
void announce(u64* at, int bytes) { block_here().barriers.at(at).announced += bytes, arrive_at(at); }
void await_phase(u64* at, int parity) {
    Barrier& barrier = block_here().barriers.at(at);
    for (; barrier.phase % 2 == parity; end_phase(barrier)) yield();
}
void bring_tile(uint4* to, const TensorMap& from, int column, int row, u64* at) {
    Block& block = block_here();
    const Action bring = [=, map = from, &block] {
        u16* numbers = reinterpret_cast<u16*>(to);
        for (int i = 0; i < map.box; i++)
            for (int j = 0; j < 64; j++) {
                const bool there = row + i < map.rows && column + j < map.columns;
                const long long place = (row + i) * map.columns + column + j;
                numbers[i * 64 + (j / 8 ^ i % 8) * 8 + j % 8] = there ? map.numbers[place] : 0;
            }
        show(block, to, map.box * 128);
    };
    Barrier& barrier = block_here().barriers.at(at);
    barrier.asked += from.box * 128, progress++;
    if (chance() % 2) bring();
    else barrier.copies.push_back(bring);
}

// What threads wrote is seen after this; what the copy engine brought is seen at once.
void show_writes() {
    Block& block = block_here();
    show(block, block_memory(), block.memory.size() * sizeof(Line));
}

// A number of a tile 64 columns wide, whose vectors trade places by their address; none where somebody wrote since.
static u32 number_of(u64 tile, int row, int column) {
    const u16* numbers = reinterpret_cast<const u16*>(tile / 64 * 1024);
    const u16* number = numbers + row * 64 + ((tile % 8 + column / 8) ^ row % 8) * 8 + column % 8;
    const u16* shown = reinterpret_cast<const u16*>(block_here().shown.data());
    return *number == shown[number - reinterpret_cast<const u16*>(block_memory())] ? *number : 0x7fff;
}

// A product happens when it is waited for, with what shared memory holds then. A is in registers, or lies across.
void begin_tile(float* sums, int count, const u32* a, u64 across, u64 tile, bool add, float (*value)(u32)) {
    if (!fibre_here().ordered) die("a product takes registers that others may still work with");
    Exchange& seen = exchange();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    std::vector<float> rows;  // two of A: lane / 4 and eight more
    if (a) {
        std::memcpy(seen.a[lane], a, sizeof seen.a[lane]);
        meet_lanes();
        for (int half = 0; half < 2; half++)
            for (int k = 0; k < 16; k++)
                rows.push_back(value(seen.a[lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + half] >> k % 2 * 16 & 0xffff));
        meet_lanes();
    }
    fibre_here().products.push_back([=, rows = std::move(rows)] {
        for (int i = 0; i < count; i++) {
            const int column = i / 4 * 8 + lane % 4 * 2 + i % 2, half = i / 2 % 2;
            if (!add) sums[i] = 0;
            for (int k = 0; k < 16; k++) {
                const float left = a ? rows[half * 16 + k] : value(number_of(across, k, row + half * 8));
                sums[i] += left * value(number_of(tile, column, k));
            }
        }
    });
}
void begin_products() { fibre_here().ordered = true; }
void end_products() {
    Fibre& fibre = fibre_here();
    fibre.ordered = false;
    fibre.sets.push_back(std::move(fibre.products)), fibre.products.clear();
}
void finish_products(int younger) {
    auto& sets = fibre_here().sets;
    for (; (int)sets.size() > younger; sets.pop_front())
        for (const Action& one : sets.front()) one();
    meet_lanes();  // what is here done lane by lane is one operation of a warp
}

// --- starting a kernel ----------------------------------------------------------------------------------------------

static void (*body)(void**);
static void** given;
static void live() {
    body(given);
    for (const auto& [at, barrier] : block_here().barriers)
        if (*at != UNTOUCHED) die("a barrier is written over");
    fibre_here().done = true, progress++;
    yield();
}

static void add_block(Place place, int leader, size_t bytes) {
    Block& block = blocks.emplace_back();
    block.memory.resize(bytes / sizeof(Line) + 1);
    std::fill_n(memory_of(block), bytes / sizeof(float4), float4{NAN, NAN, NAN, NAN});
    block.shown.resize(block.memory.size());
    for (int warp = 0; warp < block_threads / 32; warp++) block.warps.emplace_back().sloth = any_sloth();
    for (u32 thread = 0; thread < (u32)block_threads; thread++) {
        Fibre& fibre = *fibres.emplace_back(std::make_unique<Fibre>());
        const size_t size = 1 << 16;
        fibre.stack.reset(new char[size]);
        fibre.thread = {thread, 0}, fibre.block = place;
        fibre.home = blocks.size() - 1, fibre.leader = leader;
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = fibre.stack.get(), fibre.start.uc_stack.ss_size = size;
        makecontext(&fibre.start, live, 0);
    }
}

static void run_blocks() {
    std::vector<Fibre*> left;
    for (const auto& fibre : fibres) left.push_back(fibre.get());
    for (u32 hurry = 0; !left.empty();) {  // in one only sleepers are left out, then nobody
        const long before = progress;
        const u32 now = hurry ? 2 + hurry : chance() % 4;
        std::shuffle(left.begin(), left.end(), chance);
        for (Fibre* fibre : left)
            if (warp_of(*fibre).sloth <= now) give_turn(*fibre);
        left.erase(std::remove_if(left.begin(), left.end(), [](Fibre* fibre) { return fibre->done; }), left.end());
        if (hurry == 2 && progress == before) die("threads wait for each other for ever");
        hurry = progress == before ? hurry + 1 : 0;
    }
    for (Block& block : blocks) {
        const char* begin = reinterpret_cast<char*>(memory_of(block));
        const char* end = begin + block.memory.size() * sizeof(Line);
        if (std::any_of(begin + block_bytes, end, [](char byte) { return byte != 0; }))
            die("a block writes behind its shared memory");
    }
    fibres.clear(), blocks.clear();
}

void run(void (*kernel)(void**), void** arguments, const u32* grid, int threads, int cluster, size_t bytes) {
    body = kernel, given = arguments, gridDim = {grid[0], grid[1]};
    block_threads = threads, cluster_blocks = cluster, block_bytes = bytes;
    std::vector<Place> clusters;
    for (u32 y = 0; y < grid[1]; y++)
        for (u32 x = 0; x < grid[0]; x += cluster) clusters.push_back({x, y});
    std::shuffle(clusters.begin(), clusters.end(), chance);
    for (size_t i = 0; i < clusters.size(); i++) {
        const int leader = blocks.size();
        for (int rank = 0; rank < cluster; rank++) add_block({clusters[i].x + rank, clusters[i].y}, leader, bytes);
        if (i % AT_ONCE == AT_ONCE - 1 || i == clusters.size() - 1) run_blocks();
    }
}
