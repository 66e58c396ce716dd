// A causal 3x3x3 convolution over a window of frames, for Hopper: an implicit matrix product on its tensor cores.
//
//   out[t, y, x, o] = sum over dt, dy, dx, c of  frames[t + dt, y + dy - 1, x + dx - 1, c] * weights[o, dt, dy, dx, c]
//                     + bias[o] + residual[t, y, x, o]
//
// dt from 0 to TAPS - 1: 3, or 1 for frames without a past, where the convolution is a plain 3x3. frames
// [T + TAPS - 1, H, W, C], weights [O, TAPS * 9 C], out and residual [T, H, W, O], bias [O] in fp32; bias and residual
// may be null. Sums in fp32, which begin with the bias and end with the residual, rounded once. A block computes BM
// pixels (8 high) of one frame times BN outputs. One thread of the third warpgroup fetches, the first two warpgroups
// multiply half of the pixels each. A step is a (dt, dy) and 32 channels: the copy engine reads a box of pixels shifted
// by dy, two columns wider than the tile, and fills zeros outside the picture, so nothing is padded or unrolled in
// memory. In shared memory a column of 8 pixels is one group of rows of the matrix, so the three dx of a step are the
// same box from another group on: without that, fetching every tap anew asks more of the L2 cache than it has. Blocks
// take tiles in turn, and the fetching runs ahead into the next tile while the last one is stored. No atomics, no split
// sums: the same bits every time, whatever the tile. Clusters of two blocks that fetch their weights together were up
// to 2.4 times slower (H100), and are not here.
//
// The residual is asked for while the products run: it waits in the L2 cache when they are done.
//
// Only rows `first` to `last` - 1 of out are computed, in tiles that begin at `first`; all rows of frames are read.
//
// Given by the host: CHANNELS, OUTPUTS, TAPS, BM, BN, STAGES, UNPACK (PTX that widens one number), and `wgmma`, written
// for BN outputs.

constexpr int KC = 32, ROW = KC * 2;  // channels of a step; bytes of a matrix row
constexpr int TILE_H = 8, TILE_W = BM / TILE_H;
constexpr int COLUMN = TILE_H * ROW;  // bytes of a column of pixels, one group of 8 rows
constexpr int BLOCKS_M = BM / 128;    // 64-row products of a warpgroup
constexpr int ROWS = 2 * BLOCKS_M;    // that a thread stores a part of
constexpr int AHEAD = BM * BN > 256 * 96 ? 0 : ROWS;  // of these, whose residual fits in registers beside the sums
constexpr int A_STAGE = (TILE_W + 2) * COLUMN;
constexpr int B_TAP = BN * ROW, B_STAGE = 3 * B_TAP;
constexpr int CHUNKS = CHANNELS / KC;
constexpr int STEPS = 3 * TAPS * CHUNKS;
constexpr int N_TILES = OUTPUTS / BN;
static_assert(BN % 32 == 0, "four lanes store four groups of 8 outputs");
constexpr int CONSUMER_WARPS = 8;

__device__ __forceinline__ void fetch_frames(u32 to, const TensorMap* map, u32 bar, int c, int y, int x, int t) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(to), "l"(map), "r"(bar), "r"(c), "r"(y), "r"(x), "r"(t) : "memory");
}

__device__ __forceinline__ void fetch_weights(u32 to, const TensorMap* map, u32 bar, int k, int o) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(o) : "memory");
}

// Matrix descriptor of rows of 64 bytes in the copy engine's swizzle (PTX ISA, "Matrix Descriptor Format").
__device__ __forceinline__ u64 descriptor(u32 address) {
    constexpr u64 swizzle_64_bytes = 2, eight_rows = 8 * ROW;
    return ((address & 0x3FFFF) >> 4) | (1ull << 16) | ((eight_rows >> 4) << 32) | (swizzle_64_bytes << 62);
}

__device__ __forceinline__ float2 unpack(u32 both) {
    float2 pair;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        UNPACK " %0, low;\n"
        UNPACK " %1, high;\n"
        "}" : "=f"(pair.x), "=f"(pair.y) : "r"(both));
    return pair;
}

struct Tile {
    int x, y, t, o;

    __device__ __forceinline__ Tile(int turn, int across, int down, int first) {
        o = turn % N_TILES * BN;
        int index = turn / N_TILES;
        x = index % across * TILE_W;
        index /= across;
        y = first + index % down * TILE_H;
        t = index / down;
    }
};

// Where a row of a tile's matrix lies in out and residual. Lane q of the four that store it has outputs 2 q and 2 q + 1
// of every group of 8, and loads and stores every fourth group.
struct Spot {
    bool inside;
    long long at;  // of its first 8 outputs

    __device__ __forceinline__ Spot(const Tile& tile, int row, int height, int width, int last) {
        const int y = tile.y + row % TILE_H, x = tile.x + row / TILE_H;
        inside = y < last && x < width;
        at = ((((long long)tile.t * height + y) * width + x) * OUTPUTS + tile.o) / 8;
    }

    __device__ __forceinline__ void prefetch(const uint4* from) const {
        if (inside)
#pragma unroll
            for (int j = 0; j < BN / 32; ++j) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at + 4 * j));
    }

    __device__ __forceinline__ void load(uint4 (&to)[BN / 32], const uint4* from, int lane) const {
#pragma unroll
        for (int j = 0; j < BN / 32; ++j)
            to[j] = inside ? __ldg(from + at + 4 * j + lane % 4) : make_uint4(0, 0, 0, 0);
    }
};

extern "C" __global__ void __launch_bounds__(384, 1) conv_window(
    const __grid_constant__ TensorMap frames, const __grid_constant__ TensorMap weights, uint4* out,
    const float2* bias, const uint4* residual, int turns, int across, int down, int height, int width, int first,
    int last) {
    extern __shared__ char shared[];
    const u32 base = ((u32)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    const u32 a_base = base, b_base = base + STAGES * A_STAGE;
    const u32 full = b_base + STAGES * B_STAGE, empty = full + STAGES * 8;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMER_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    const int group = threadIdx.x / 128;
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 256) {
            int stage = 0;
            u32 phase = 0;
            for (int turn = blockIdx.x; turn < turns; turn += gridDim.x) {
                const Tile tile(turn, across, down, first);
                for (int step = 0; step < STEPS; ++step) {
                    const int row = step / CHUNKS, c = step % CHUNKS * KC;  // row of taps: 3 dt + dy
                    const u32 bar = full + 8 * stage;
                    barrier_wait(empty + 8 * stage, phase ^ 1);
                    barrier_expect(bar, A_STAGE + B_STAGE);
                    fetch_frames(a_base + stage * A_STAGE, &frames, bar, c, tile.y + row % 3 - 1, tile.x - 1,
                                 tile.t + row / 3);
#pragma unroll
                    for (int dx = 0; dx < 3; ++dx)
                        fetch_weights(b_base + stage * B_STAGE + dx * B_TAP, &weights, bar,
                                      (row * 3 + dx) * CHANNELS + c, tile.o);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
        int stage = 0;
        u32 phase = 0;
        for (int turn = blockIdx.x; turn < turns; turn += gridDim.x) {
            if (residual && threadIdx.x < BM)
                Spot(Tile(turn, across, down, first), threadIdx.x, height, width, last).prefetch(residual);
            float sums[BLOCKS_M][BN / 2];
            const float2* start = bias + turn % N_TILES * BN / 2 + lane % 4;
#pragma unroll
            for (int j = 0; j < BN / 8; ++j) {
                const float2 pair = bias ? __ldg(start + 4 * j) : make_float2(0.0f, 0.0f);
#pragma unroll
                for (int i = 0; i < 2 * BLOCKS_M; ++i) {
                    sums[i / 2][4 * j + i % 2 * 2] = pair.x;
                    sums[i / 2][4 * j + i % 2 * 2 + 1] = pair.y;
                }
            }
            int before = -1;  // the stage whose products may still run
            for (int step = 0; step < STEPS; ++step) {
                barrier_wait(full + 8 * stage, phase);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                const u64 a = descriptor(a_base + stage * A_STAGE + group * (BLOCKS_M * 64 * ROW));
                const u64 b = descriptor(b_base + stage * B_STAGE);
#pragma unroll
                for (int dx = 0; dx < 3; ++dx)
#pragma unroll
                    for (int k = 0; k < KC / 16; ++k)  // 16 channels are 32 bytes; a descriptor counts in 16
#pragma unroll
                        for (int m = 0; m < BLOCKS_M; ++m)
                            wgmma(sums[m], a + (dx * COLUMN + m * 64 * ROW + k * 32) / 16,
                                  b + (dx * B_TAP + k * 32) / 16);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
                before = stage;
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            const Tile tile(turn, across, down, first);
            const auto spot = [&](int r) {
                const int row = (group * BLOCKS_M + r / 2) * 64 + warp * 16 + r % 2 * 8 + lane / 4;
                return Spot(tile, row, height, width, last);
            };
            uint4 more[AHEAD ? ROWS : 1][BN / 32];
            if (residual)
#pragma unroll
                for (int r = 0; r < AHEAD; ++r) spot(r).load(more[r], residual, lane);
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (lane == 0) barrier_arrive(empty + 8 * before);

#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float(&row)[BN / 2] = sums[r / 2];
                const int half = r % 2 * 2;
                const Spot to = spot(r);
                if (residual) {
                    if (r >= AHEAD) to.load(more[AHEAD ? r : 0], residual, lane);
#pragma unroll
                    for (int j = 0; j < BN / 32; ++j) {
                        const uint4 four = more[AHEAD ? r : 0][j];
                        u32 v[4] = {four.x, four.y, four.z, four.w};
                        transpose(v, lane);
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const float2 pair = unpack(v[i]);
                            row[(4 * j + i) * 4 + half] += pair.x;
                            row[(4 * j + i) * 4 + half + 1] += pair.y;
                        }
                    }
                }
#pragma unroll
                for (int j = 0; j < BN / 32; ++j) {
                    u32 v[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        v[i] = pack(row[(4 * j + i) * 4 + half], row[(4 * j + i) * 4 + half + 1]);
                    transpose(v, lane);
                    if (to.inside) out[to.at + 4 * j + lane % 4] = make_uint4(v[0], v[1], v[2], v[3]);
                }
            }
        }
    }
}
