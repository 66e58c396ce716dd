// What kernels for Hopper share: barriers in shared memory, to wait for the copy engine, and the order of a tile's stores.
//
// Given by the host: PACK, PTX that rounds two floats to a pair of halves.

#define INFINITY __int_as_float(0x7f800000)

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    char opaque[128];
};

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra through;\n"
        "bra again;\n"
        "through:\n"
        "}" ::"r"(bar), "r"(parity) : "memory");
}

// A number that all lanes have alike. Told so, the compiler keeps it, and what is made from it, where products look for
// their operands; else it is brought there before each.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xFFFFFFFF, x, 0); }

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm(PACK " %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// One step of a transposition: lanes that differ in `bit` exchange the half that belongs to the other.
__device__ __forceinline__ void exchange(u32& first, u32& second, int lane, int bit) {
    const bool upper = lane & bit;
    const u32 got = __shfl_xor_sync(0xFFFFFFFF, upper ? first : second, bit);
    first = upper ? got : first;
    second = upper ? second : got;
}

// Transpose 4 x 4 among four lanes, every lane of the warp taking part: lane q's v[i] becomes lane i's v[q].
__device__ __forceinline__ void transpose(u32 (&v)[4], int lane) {
    exchange(v[0], v[1], lane, 1);
    exchange(v[2], v[3], lane, 1);
    exchange(v[0], v[2], lane, 2);
    exchange(v[1], v[3], lane, 2);
}
