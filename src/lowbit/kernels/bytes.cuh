// A weight of 8-bit codes whose inputs are 8-bit codes too: nothing is unpacked, and it lies row by row as it does for
// many tokens, so that no second copy is held.
//
// The host writes BYTES (this file counts, not codes.cuh) and INTEGER (int8 with int32 sums, else E4M3 with fp32 sums)
// in front. Which columns a step of 32 takes is free as long as both operands agree: a lane takes 16 neighbours of a
// row, which feed two steps, four lanes 64 of them, and a warp's load touches whole sectors of eight rows.

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

struct Weight {
    const uint4* rows;
    int outputs, vectors;  // 16-byte vectors of a row

    __device__ __forceinline__ void load(Codes& codes, int tile, int unit, int lane) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = min(tile * 16 + half * 8 + lane / 4, outputs - 1);
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                const int vector = (unit * BLOCKS + block) * 4 + lane % 4;
                codes.row[half][block] =
                    vector < vectors ? stream(rows + row * vectors + vector) : make_uint4(0, 0, 0, 0);
            }
        }
    }
};
#endif
