// Ŵ [N, K] in 16 bits, row by row: for so many tokens that the library's own product on a scratch copy is fastest.
//
// A warp takes a tile of 16 rows and one unit of 128 columns. A value is rounded once, from fp32, as the definition has
// it.

__device__ __forceinline__ u32 scaled(u32 pair, float scale) {
    const u32 odd = pair & 0xffff0000;
    const float2 wide = BFLOAT ? make_float2(__uint_as_float(pair << 16), __uint_as_float(odd)) : floats(pair);
    return packed(wide.x * scale, wide.y * scale);
}

extern "C" __global__ void __launch_bounds__(256) dequantize(
    const uint4* __restrict__ low, const uint2* __restrict__ high, const Scales* __restrict__ scale,
    const float* __restrict__ by_row, uint4* __restrict__ out, int outputs, int vectors, int units, int groups,
    int shift) {
    const int lane = threadIdx.x % 32, place = blockIdx.x * 8 + threadIdx.x / 32;
    const int tile = place / units, unit = place % units;
    if (tile * 16 >= outputs) return;
    const Weight weight{low, high, scale, units, groups, shift};
    Codes codes;
    weight.load(codes, weight.first(tile, unit, lane), unit);
    meet_neighbours();
#pragma unroll
    for (int block = 0; block < 4; block++) {
        const int vector = unit * 16 + block * 4 + lane % 4;
        const float2 both = scales(codes, block / SPAN);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = tile * 16 + half * 8 + lane / 4;
            if (row >= outputs || vector >= vectors) continue;
            const float by = (half ? both.y : both.x) * (E2M1 ? by_row[row] : 1.0f);
            u32 values[4];
#pragma unroll
            for (int p = 0; p < 4; p++) {
#if E2M1
                values[p] = scaled(levels(codes, block, p, half, ONE), by);
#else
                values[p] = scaled(levels(codes, block, p, half), by);
#endif
            }
            out[row * vectors + vector] = make_uint4(values[0], values[1], values[2], values[3]);
        }
    }
}
