// Attention with a bias on a run of keys, for Hopper: softmax(q k^T scale + bias) v, online, heads of 128.
//
// The structure is FlashAttention-3's (Shah et al. 2024, arXiv:2407.08608): two warps of the third warpgroup fetch, the
// first two have 64 queries each and take turns, so that one multiplies while the other is at its softmax; within one, the
// products of the next block of keys with the queries run beside those of the last block's weights with the values.
//
// What is different: attention does not care for the order of keys, so a bias on a run of them is one number a block,
// and goes into the maximum that each row subtracts anyway; only a block that the run does not fill, or the last one,
// looks at keys one by one. And the tiles of queries that are left over when all multiprocessors have had the same number
// are shared among all of them, each taking an equal run of blocks of keys: otherwise 40 heads of 2160 queries take 6
// rounds of tiles where there are 5.2. Whoever comes last to such a tile adds its parts, in the order of keys: the
// same bits every time.
//
// Given by the host: KEYS (of a block), COUNTED (whether a number on the device says how many keys there are), PACK, SCALE
// (log2(e) / sqrt(128)), `score` and `gather`, the products.

constexpr int D = 128, QUERIES = 128;       // numbers of a head, queries of a tile
constexpr int STAGES = 2;                   // in shared memory: tiles of queries, blocks of keys and of values
constexpr int ROW = 128;                    // bytes that the copy engine's swizzle spans: half of a head
constexpr int Q_HALF = QUERIES * ROW, Q_BYTES = 2 * Q_HALF;
constexpr int BLOCK_HALF = KEYS * ROW, BLOCK_BYTES = 2 * BLOCK_HALF;
static_assert(STAGES * (Q_BYTES + 2 * BLOCK_BYTES) + 2048 <= 232448, "what a block may have of shared memory");
constexpr int GROUP_THREADS = 128, WORKERS = 2 * GROUP_THREADS, WORKER_WARPS = 8;
constexpr int SUMS = D / 2, SCORES = KEYS / 2;  // of 64 queries, a thread's
constexpr int PART = (SUMS + 4) * WORKERS;       // floats of a part of a tile: sums, numbers subtracted, weights
constexpr float SLACK = 8.0f;  // how far, to base 2, an exponent may rise above the number subtracted from all
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ void fetch(u32 to, const TensorMap* map, u32 bar, int half, int head, int token, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(to), "l"(map), "r"(bar), "r"(half * 64), "r"(head), "r"(token), "r"(batch) : "memory");
}

// The low word of a matrix descriptor in the copy engine's swizzle of 128 bytes (PTX ISA, "Matrix Descriptor Format"); the
// high word, which all have alike, is with the products: groups of 8 rows follow each other.
// Rows of queries or keys, the inner axis of the product contiguous.
__device__ __forceinline__ u32 rows_descriptor(u32 address) { return ((address & 0x3FFFF) >> 4) | (1u << 16); }

// Rows of values, the outer axis contiguous, read transposed: its halves are a block's half apart.
__device__ __forceinline__ u32 columns_descriptor(u32 address) {
    return ((address & 0x3FFFF) >> 4) | (u32)(BLOCK_HALF >> 4 << 16);
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most `Running` groups of products run. Nothing that reads what they write is moved to before that.
template <int Running, int N>
__device__ __forceinline__ void wait_products(float (&written)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Running) : "memory");
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(written[i])::"memory");
}

__device__ __forceinline__ void turn_wait(int group) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(WORKERS) : "memory");
}
__device__ __forceinline__ void turn_pass(int group) {
    asm volatile("bar.arrive %0, %1;" ::"r"(2 - group), "n"(WORKERS) : "memory");
}
__device__ __forceinline__ void group_sync(int group) {
    asm volatile("bar.sync %0, %1;" ::"r"(3 + group), "n"(GROUP_THREADS) : "memory");
}

__device__ __forceinline__ float power(float exponent) {  // of 2
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
    return result;
}

__device__ __forceinline__ float over_four_lanes_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}

__device__ __forceinline__ float over_four_lanes_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

// What the host says of a call. Whole tiles are 0 to whole - 1; the others are cut into `sharers` equal runs of blocks.
struct Call {
    const float* bias;     // null: none
    const int* count;      // COUNTED: how many keys to attend to, of each batch entry. The last of them is the biased one
    float* parts;          // [sharers][2][PART]: a sharer begins in one tile and may end in the next
    u32* arrived;          // [tiles - whole][2], zero: parts that are in `parts`, of either half of a tile
    char* out;             // [B, queries, heads, D]; or there is one for each rank
    const u64* addresses;  // of those; null: `out` it is
    // Of each frame's `frame_tokens` tokens the first `out_tokens` belong to the first rank, as many more to the second and
    // so on, frame after frame. A rank has `out_heads`, of which these begin at `out_head`. A batch of 1.
    int frame_tokens, out_tokens, out_heads, out_head;
    int heads, queries, keys, biased;
    int down, whole, tiles, sharers;  // tiles down a head; tiles that one block has whole; all; who share the others
};

__device__ __forceinline__ int keys_of(const Call& call, int batch) {
    return COUNTED ? call.count[batch] : call.keys;
}

// Blocks of keys [first, last) of a tile.
struct Segment {
    int tile, first, last;
};

// The segments of a block of threads: whole tiles in turn with the others, then its run of the blocks of keys ("units") of
// the shared ones.
struct Walk {
    int turn, unit, end, blocks;  // blocks: of keys, a tile

    __device__ __forceinline__ Walk(const Call& call) : turn(blockIdx.x), unit(0), end(0) {
        blocks = (call.keys + KEYS - 1) / KEYS;
        if (blockIdx.x < call.sharers) {
            const int units = (call.tiles - call.whole) * blocks;
            unit = begin(units, blockIdx.x, call.sharers);
            end = begin(units, blockIdx.x + 1, call.sharers);
        }
    }

    static __device__ __forceinline__ int begin(int units, int sharer, int sharers) {
        return (int)((long long)units * sharer / sharers);
    }

    // The sharer that has a unit: the last one that begins at or before it.
    static __device__ __forceinline__ int sharer_of(int units, int unit, int sharers) {
        return (int)((((long long)unit + 1) * sharers - 1) / units);
    }

    __device__ __forceinline__ bool next(const Call& call, Segment& segment) {
        if (turn < call.whole) {
            segment = {turn, 0, blocks};
            if constexpr (COUNTED) segment.last = (keys_of(call, turn / (call.down * call.heads)) + KEYS - 1) / KEYS;
            turn += gridDim.x;
            return true;
        }
        if (unit >= end) return false;
        const int first = unit % blocks;
        segment = {call.whole + unit / blocks, first, min(blocks, first + end - unit)};
        unit += segment.last - first;
        return true;
    }
};

// What the workers are to do next: blocks of keys [first, last) of a tile of queries.
struct Order {
    int query, head, batch, keys;  // the tile's first token; how many keys there are
    int first, last, shared;       // shared: the number of the tile among the shared ones, if this is a part of it; or -1
    int unused;

    // The workers' last order.
    static __device__ __forceinline__ Order end() { return {0, 0, 0, 0, 0, 0, -1, 0}; }

    __device__ __forceinline__ bool is_end() const { return last == 0; }

    static __device__ __forceinline__ Order of(const Call& call, const Segment& segment, int blocks) {
        const int index = segment.tile / call.down, batch = index / call.heads;
        const bool part = segment.tile >= call.whole && segment.last - segment.first < blocks;
        return {segment.tile % call.down * QUERIES, index % call.heads, batch, keys_of(call, batch),
                segment.first, segment.last, part ? segment.tile - call.whole : -1, 0};
    }

    __device__ __forceinline__ void post(u32 at) const {
        asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(query), "r"(head), "r"(batch), "r"(keys));
        asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(at + 16), "r"(first), "r"(last), "r"(shared), "r"(0)
                     : "memory");
    }

    static __device__ __forceinline__ Order read(u32 at) {
        Order o;
        asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(o.query), "=r"(o.head), "=r"(o.batch), "=r"(o.keys) : "r"(at) : "memory");
        asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(o.first), "=r"(o.last), "=r"(o.shared), "=r"(o.unused) : "r"(at + 16) : "memory");
        return o;
    }
};

// A place in a ring of stages, and how often the ring has been gone round.
struct Ring {
    int stage = 0;
    u32 phase = 0;

    __device__ __forceinline__ void step() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// What is fetched, in stages, and a pair of barriers for each.
struct Stages {
    u32 data, full, empty;

    __device__ __forceinline__ u32 is_full(const Ring& ring) const { return full + 8 * ring.stage; }
    __device__ __forceinline__ u32 is_empty(const Ring& ring) const { return empty + 8 * ring.stage; }

    __device__ __forceinline__ void init() const {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, WORKER_WARPS);
        }
    }
};

struct Shared {
    Stages queries, keys, values;
    u32 orders;  // one for each tile of queries
    u32 last;    // a word for each half of a tile

    __device__ __forceinline__ Shared(u32 base) {
        const u32 k = base + STAGES * Q_BYTES, v = k + STAGES * BLOCK_BYTES, barriers = v + STAGES * BLOCK_BYTES;
        constexpr u32 some = 8 * STAGES;
        queries = {base, barriers, barriers + some};
        keys = {k, barriers + 2 * some, barriers + 3 * some};
        values = {v, barriers + 4 * some, barriers + 5 * some};
        orders = barriers + 6 * some;  // 16 bytes at a time: it lies at a multiple
        last = orders + STAGES * sizeof(Order);
    }

    __device__ __forceinline__ u32 order(const Ring& query) const { return orders + query.stage * sizeof(Order); }
};

// The next of queries, keys or values: 128 numbers of `rows` tokens of a head, in halves.
__device__ __forceinline__ void fetch_next(const Stages& to, Ring& ring, const TensorMap* map, int rows, int head,
                                           int token, int batch) {
    const u32 half_bytes = rows * ROW;
    barrier_wait(to.is_empty(ring), ring.phase ^ 1);
    barrier_expect(to.is_full(ring), 2 * half_bytes);
#pragma unroll
    for (int half = 0; half < 2; ++half)
        fetch(to.data + (2 * ring.stage + half) * half_bytes, map, to.is_full(ring), half, head, token, batch);
    ring.step();
}

// Orders, with their queries, and keys, in the order in which they are multiplied.
__device__ __forceinline__ void fetch_keys(const Call& call, const Shared& s, const TensorMap* queries,
                                           const TensorMap* keys) {
    Ring query, key;
    Segment segment;
    Walk walk(call);
    while (walk.next(call, segment)) {
        const Order order = Order::of(call, segment, walk.blocks);
        barrier_wait(s.queries.is_empty(query), query.phase ^ 1);
        order.post(s.order(query));
        fetch_next(s.queries, query, queries, QUERIES, order.head, order.query, order.batch);
        for (int index = order.first; index < order.last; ++index)
            fetch_next(s.keys, key, keys, KEYS, order.head, index * KEYS, order.batch);
    }
    barrier_wait(s.queries.is_empty(query), query.phase ^ 1);
    Order::end().post(s.order(query));
    barrier_arrive(s.queries.is_full(query));
}

// Values. By a warp of their own: they are late enough without waiting for room for the keys after them.
__device__ __forceinline__ void fetch_values(const Call& call, const Shared& s, const TensorMap* values) {
    Ring value;
    Segment segment;
    for (Walk walk(call); walk.next(call, segment);) {
        const Order order = Order::of(call, segment, walk.blocks);
        for (int index = order.first; index < order.last; ++index)
            fetch_next(s.values, value, values, KEYS, order.head, index * KEYS, order.batch);
    }
}

// The bias, to base 2, and the keys that have it.
struct Bias {
    float value;
    int first, last, keys;

    __device__ __forceinline__ Bias(const Call& call, int batch, int keys) : keys(keys) {
        first = COUNTED ? keys - 1 : 0;
        last = COUNTED ? keys : call.biased;
        value = call.bias ? call.bias[COUNTED ? batch : 0] * LOG2_E : 0.0f;
    }

    // Whether the keys of block `index` all have it or all have it not.
    __device__ __forceinline__ bool even(int index) const {
        const int begin = index * KEYS, end = begin + KEYS;
        return end <= keys && (end <= first || last <= begin || inside(begin, end));
    }

    __device__ __forceinline__ bool inside(int begin, int end) const { return first <= begin && end <= last; }

    // What to add to every exponent of block `index`. Of a block that is not even, the scores are changed instead.
    template <bool Even>
    __device__ __forceinline__ float of(int index, float (&scores)[SCORES], int lane) const {
        const int begin = index * KEYS;
        if constexpr (Even) return inside(begin, begin + KEYS) ? value : 0.0f;
#pragma unroll
        for (int i = 0; i < SCORES; ++i) {
            const int key = begin + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (first <= key && key < last) scores[i] += value * (1.0f / SCALE);
            if (key >= keys) scores[i] = -INFINITY;
        }
        return 0.0f;
    }
};

// A thread's share of 64 queries: rows lane / 4 and lane / 4 + 8 of its warp's 16.
struct Online {
    float top[2] = {-INFINITY, -INFINITY};  // what is subtracted from exponents: the largest so far, but for SLACK
    float weight[2] = {0.0f, 0.0f};         // of this thread's keys: the sum of 2^(exponent - top)

    // A block of scores becomes weights. Gives what the sums so far shrink by: by nothing, while exponents rise little.
    __device__ __forceinline__ void take(float (&scores)[SCORES], float bias, float (&shrink)[2]) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float most = scores[2 * row];
#pragma unroll
            for (int i = 0; i < SCORES; i += 4)
                most = fmaxf(most, fmaxf(scores[i + 2 * row], scores[i + 2 * row + 1]));
            const float found = over_four_lanes_max(most) * SCALE + bias;
            const float now = found > top[row] + SLACK ? found : top[row];
            shrink[row] = power(top[row] - now);
            top[row] = now;
            weight[row] *= shrink[row];
            const float offset = now - bias;
#pragma unroll
            for (int i = 0; i < SCORES; i += 4)
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    float& x = scores[i + 2 * row + pair];
                    x = power(x * SCALE - offset);
                    weight[row] += x;
                }
        }
    }
};

__device__ __forceinline__ void round_weights(const float (&scores)[SCORES], u32 (&weights)[SCORES / 2]) {
#pragma unroll
    for (int i = 0; i < SCORES; i += 2) weights[i / 2] = pack(scores[i], scores[i + 1]);
}

// scores = 64 queries times a block of keys.
__device__ __forceinline__ void score_block(float (&scores)[SCORES], u32 queries, u32 keys) {
    const u32 a = uniform(rows_descriptor(queries)), b = uniform(rows_descriptor(keys));
#pragma unroll
    for (int k = 0; k < D / 16; ++k)  // 16 numbers are 32 bytes; a descriptor counts in 16
        score(scores, a + (k / 4 * Q_HALF + k % 4 * 32) / 16, b + (k / 4 * BLOCK_HALF + k % 4 * 32) / 16, k > 0);
}

// sums += weights times a block of values.
__device__ __forceinline__ void gather_block(float (&sums)[SUMS], u32 (&weights)[SCORES / 2], u32 values) {
    const u32 b = uniform(columns_descriptor(values));
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k)
        gather(sums, weights[4 * k], weights[4 * k + 1], weights[4 * k + 2], weights[4 * k + 3], b + k * 16 * ROW / 16);
}

__device__ __forceinline__ void scale_rows(float (&sums)[SUMS], const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sums[i] *= by[i / 2 % 2];
}

// Store what this thread has of a part; true for the half tile's last one to come.
__device__ __forceinline__ bool leave_part(const Call& call, const Shared& s, const float (&sums)[SUMS], const Online& o,
                                           int shared_tile, int slot, int parts, int group) {
    float* to = call.parts + (long long)slot * PART + threadIdx.x;
#pragma unroll
    for (int i = 0; i < SUMS; ++i) __stcg(to + i * WORKERS, sums[i]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        __stcg(to + (SUMS + row) * WORKERS, o.top[row]);
        __stcg(to + (SUMS + 2 + row) * WORKERS, o.weight[row]);
    }
    __threadfence();
    group_sync(group);
    u32 last = 0;
    if (threadIdx.x % GROUP_THREADS == 0) {
        last = atomicAdd(call.arrived + shared_tile * 2 + group, 1) == parts - 1;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(s.last + 4 * group), "r"(last) : "memory");
    }
    group_sync(group);
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(last) : "r"(s.last + 4 * group) : "memory");
    __threadfence();
    return last;
}

// The slot of a sharer's part of a tile: the second if it began with the tile before.
__device__ __forceinline__ int slot_of(int sharer, int units, int blocks, int shared_tile, int sharers) {
    return 2 * sharer + (Walk::begin(units, sharer, sharers) / blocks != shared_tile);
}

// Sums, numbers subtracted and weights of a whole tile from those of its parts.
__device__ __forceinline__ void add_parts(const Call& call, float (&sums)[SUMS], Online& o, int shared_tile, int units,
                                          int blocks, int from, int to) {
    const auto part = [&](int sharer) {
        const int slot = slot_of(sharer, units, blocks, shared_tile, call.sharers);
        return call.parts + (long long)slot * PART + threadIdx.x;
    };
#pragma unroll
    for (int row = 0; row < 2; ++row) o.top[row] = -INFINITY, o.weight[row] = 0.0f;
    for (int sharer = from; sharer <= to; ++sharer)
#pragma unroll
        for (int row = 0; row < 2; ++row) o.top[row] = fmaxf(o.top[row], __ldcg(part(sharer) + (SUMS + row) * WORKERS));
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
    for (int sharer = from; sharer <= to; ++sharer) {
        const float* p = part(sharer);
        float by[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            by[row] = power(__ldcg(p + (SUMS + row) * WORKERS) - o.top[row]);
            o.weight[row] += __ldcg(p + (SUMS + 2 + row) * WORKERS) * by[row];
        }
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[i] += __ldcg(p + i * WORKERS) * by[i / 2 % 2];
    }
}

// Where heads of a token lie in out, in heads.
__device__ __forceinline__ uint4* outputs_of(const Call& call, const Order& at, int token) {
    if (!call.addresses) {
        const long long row = ((long long)at.batch * call.queries + token) * call.heads + at.head;
        return (uint4*)call.out + row * (D / 8);
    }
    const int frame = token / call.frame_tokens, within = token % call.frame_tokens;
    const long long row =
        (long long)(frame * call.out_tokens + within % call.out_tokens) * call.out_heads + call.out_head + at.head;
    return (uint4*)call.addresses[within / call.out_tokens] + row * (D / 8);
}

// sums / weight, rounded, to wherever each token's outputs belong.
__device__ __forceinline__ void store_tile(const Call& call, float (&sums)[SUMS], const Online& o, const Order& at,
                                           int group, int lane) {
    float by[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) by[row] = __fdividef(1.0f, over_four_lanes_sum(o.weight[row]));
    scale_rows(sums, by);
    const int first = at.query + group * 64 + threadIdx.x % GROUP_THREADS / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = first + half * 8;
        const bool inside = token < call.queries;
        // lane q of four has numbers 2 q and 2 q + 1 of every group of 8, and stores every fourth group
        uint4* to = inside ? outputs_of(call, at, token) + lane % 4 : nullptr;
#pragma unroll
        for (int j = 0; j < D / 8; j += 4) {
            u32 v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = pack(sums[(j + i) * 4 + half * 2], sums[(j + i) * 4 + half * 2 + 1]);
            transpose(v, lane);
            if (inside) to[j] = make_uint4(v[0], v[1], v[2], v[3]);
        }
    }
}

// What a group of workers has of a tile, and where it is in the rings.
struct Worker {
    const Shared& s;
    const int group, lane;
    Ring query, key, value;
    Online online;
    float sums[SUMS], scores[SCORES], shrink[2];
    u32 weights[SCORES / 2];

    __device__ __forceinline__ Worker(const Shared& s, int group) : s(s), group(group), lane(threadIdx.x % 32) {}

    __device__ __forceinline__ static void wait(const Stages& from, const Ring& ring) {
        barrier_wait(from.is_full(ring), ring.phase);
    }

    __device__ __forceinline__ void release(const Stages& from, Ring& ring) const {
        if (lane == 0) barrier_arrive(from.is_empty(ring));
        ring.step();
        ring.stage = uniform(ring.stage);
    }

    __device__ __forceinline__ void start_scores() {
        begin_products();
        score_block(scores, s.queries.data + query.stage * Q_BYTES + group * 64 * ROW,
                    s.keys.data + key.stage * BLOCK_BYTES);
        end_products();
    }

    __device__ __forceinline__ void start_sums() {
        gather_block(sums, weights, s.values.data + value.stage * BLOCK_BYTES);
        end_products();
    }

    // The first block of a tile: there are no weights yet.
    template <bool Even>
    __device__ __forceinline__ void first_block(int index, const Bias& bias) {
        start_scores();
        wait_products<0>(scores);
        release(s.keys, key);
        online.take(scores, bias.of<Even>(index, scores, lane), shrink);
        round_weights(scores, weights);
    }

    // Scores of a block, and beside them and their softmax the sums of the block before.
    template <bool Even>
    __device__ __forceinline__ void next_block(int index, const Bias& bias) {
        turn_wait(group);
        start_scores();
        wait(s.values, value);
        start_sums();
        turn_pass(group);
        wait_products<1>(scores);
        release(s.keys, key);
        online.take(scores, bias.of<Even>(index, scores, lane), shrink);
        wait_products<0>(sums);
        release(s.values, value);
        round_weights(scores, weights);
        if (__any_sync(0xFFFFFFFF, shrink[0] != 1.0f || shrink[1] != 1.0f)) scale_rows(sums, shrink);
    }

    __device__ __forceinline__ void last_sums() {
        wait(s.values, value);
        begin_products();
        start_sums();
        wait_products<0>(sums);
        release(s.values, value);
    }

    // The next order; its queries are there.
    __device__ __forceinline__ Order next() const {
        wait(s.queries, query);
        return Order::read(s.order(query));
    }

    __device__ __forceinline__ void attend(const Order& order, const Bias& bias) {
        online = Online();
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
        for (int index = order.first; index < order.last; ++index) {
            wait(s.keys, key);
            // no branch may lie between a product's start and the wait for it: the compiler would wait there
            const bool even = bias.even(index);
            if (index == order.first)
                even ? first_block<true>(index, bias) : first_block<false>(index, bias);
            else
                even ? next_block<true>(index, bias) : next_block<false>(index, bias);
        }
        release(s.queries, query);
        last_sums();
    }
};

// Of a tile that others have parts of: whether this one came last, and then the whole of it.
__device__ __forceinline__ bool whole_of(const Call& call, Worker& w, int shared_tile) {
    const int blocks = (call.keys + KEYS - 1) / KEYS, units = (call.tiles - call.whole) * blocks;
    const int from = Walk::sharer_of(units, shared_tile * blocks, call.sharers);
    const int to = Walk::sharer_of(units, (shared_tile + 1) * blocks - 1, call.sharers);
    const int slot = slot_of(blockIdx.x, units, blocks, shared_tile, call.sharers);
    if (!leave_part(call, w.s, w.sums, w.online, shared_tile, slot, to - from + 1, w.group)) return false;
    add_parts(call, w.sums, w.online, shared_tile, units, blocks, from, to);
    return true;
}

__device__ __forceinline__ void attend_all(const Call& call, const Shared& s, int group) {
    if (group == 1) turn_pass(group);  // the first group multiplies first
    Worker w(s, group);
    for (Order order = w.next(); !order.is_end(); order = w.next()) {
        w.attend(order, Bias(call, order.batch, order.keys));
        if (order.shared < 0 || whole_of(call, w, order.shared)) store_tile(call, w.sums, w.online, order, group, w.lane);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) hopper_attention(
    const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
    const __grid_constant__ TensorMap values, const __grid_constant__ Call call) {
    extern __shared__ char shared[];
    const Shared s(((u32)__cvta_generic_to_shared(shared) + 1023) & ~1023u);
    if (threadIdx.x == 0) {
        s.queries.init();
        s.keys.init();
        s.values.init();
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int group = uniform(threadIdx.x / GROUP_THREADS);
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == WORKERS) fetch_keys(call, s, &queries, &keys);
        if (threadIdx.x == WORKERS + 32) fetch_values(call, s, &values);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        attend_all(call, s, group);
    }
}
