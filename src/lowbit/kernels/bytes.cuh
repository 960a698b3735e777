// A weight of 8-bit codes whose inputs are 8-bit codes too: nothing is unpacked, and it lies row by row as it does for
// many tokens, so that no second copy is held.
//
// The host writes BYTES (this file counts, not codes.cuh), INTEGER (int8 with int32 sums, else E4M3 with fp32 sums) and
// WHOLE (no columns are missing in the last unit) in front. Which columns a step of 32 takes is free as long as both
// operands agree: a lane takes 16 neighbours of a row, which feed two steps, four lanes 64 of them, and a warp's load
// touches whole sectors of eight rows.

#if BYTES
constexpr int BLOCKS = 2;  // of 64 columns in a unit: what 16 bytes of inputs to a lane are
typedef u32 Scales;
#if INTEGER
typedef int Sum;
#else
typedef float Sum;
#endif

// What a lane holds of 16 rows and one unit of columns: its rows are g and g + 8.
struct Codes {
    uint4 row[2][BLOCKS];
};

// What a lane loads next of a tile.
struct Next {
    u32 row[2], column;  // 16-byte vectors: of all rows, of one row

    __device__ __forceinline__ void advance(int units) {
        row[0] += units * BLOCKS * 4, row[1] += units * BLOCKS * 4, column += units * BLOCKS * 4;
    }
};

struct Weight {
    const uint4* rows;
    int outputs, vectors;  // 16-byte vectors of a row

    __device__ __forceinline__ Next first(int tile, int unit, int lane) const {
        const u32 upper = tile * 16 + lane / 4, last = outputs - 1, column = unit * BLOCKS * 4 + lane % 4;
        return {{min(upper, last) * vectors + column, min(upper + 8, last) * vectors + column}, column};
    }
    __device__ __forceinline__ void load(Codes& codes, const Next& next, int) const {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                const bool there = WHOLE || next.column + block * 4 < vectors;
                codes.row[half][block] =
                    there ? stream(rows + next.row[half] + block * 4) : make_uint4(0, 0, 0, 0);
            }
    }
};
#endif
