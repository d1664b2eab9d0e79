// The next ragged batch from the rows that go on, counted and placed on the device.
//
// Legend: N packed tokens, B sequences, n live tokens of one sequence, N' rows that go on. One block of whole warps works on
// one sequence and adds up the counts of those before it by itself: B^2 additions in all, B / threads for each thread,
// against a second launch for a scan. Geometry changes no bit.
//
// Traffic: 1 + 8 bytes a token, 4 B a sequence from the cache: 0.03 us for 1,000 tokens on a T4 (320 GB/s).
//
// On a T4, for RoBERTa-base and texts of 32, 128 and 512 tokens (benchmarks/cuda_compile.py): registers, no spill;
// threads of a block; kilobytes of its shared memory; resident threads in percent of 1,024.
//   compact: 41; 128; 0.1; 100

namespace {

constexpr int WARP = 32;
constexpr int MOST_WARPS = 32;
constexpr unsigned ALL = 0xffffffffu;

struct Sum {
    template <typename X>
    __device__ X operator()(X a, X b) const { return a + b; }
};
struct Max {
    template <typename X>
    __device__ X operator()(X a, X b) const { return a > b ? a : b; }
};

// Every thread's x joined into one answer for all of them. `words`: MOST_WARPS of shared memory.
template <typename X, typename Join>
__device__ X block_reduce(X x, X nothing, Join join, X* words) {
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int step = WARP / 2; step > 0; step /= 2) x = join(x, __shfl_xor_sync(ALL, x, step));
    __syncthreads();  // whoever read `words` before is done
    if (lane == 0) words[warp] = x;
    __syncthreads();  // every warp's is there
    x = nothing;
    for (int i = 0; i < warps; ++i) x = join(x, words[i]);
    return x;
}

// `x` added over the threads before this one, and over all of them. words: MOST_WARPS of shared memory.
__device__ int scan_before(int x, int* total, int* words) {
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int sum = x;
    for (int step = 1; step < WARP; step *= 2) {
        const int other = __shfl_up_sync(ALL, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();  // whoever read `words` before is done
    if (lane == WARP - 1) words[warp] = sum;
    __syncthreads();  // every warp's total is there
    int before = sum - x;
    *total = 0;
    for (int i = 0; i < warps; ++i) {
        if (i < warp) before += words[i];
        *total += words[i];
    }
    return before;
}

}  // namespace

// The next batch. places: (N',), the packed rows that go on, in order; rank: (N,), where each of them goes; new_cu_seqlens:
// (B + 1,); totals: N' and the longest sequence's rows. kept_b: (B,), the number of rows that goes_on marks. Block b of B.
extern "C" __global__ void __launch_bounds__(1024) compact(
    const unsigned char* goes_on, const int* kept_b, const int* cu_seqlens, int sequences, int* places, int* rank,
    int* new_cu_seqlens, int* totals) {
    __shared__ int words[MOST_WARPS];
    const int b = blockIdx.x, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    int before = 0, longest = 0;
    for (int other = threadIdx.x; other < sequences; other += blockDim.x) {
        if (other < b) before += kept_b[other];
        longest = max(longest, kept_b[other]);
    }
    before = block_reduce(before, 0, Sum(), words);
    if (b == sequences - 1) {
        longest = block_reduce(longest, 0, Max(), words);
        if (threadIdx.x == 0) totals[0] = before + kept_b[b], totals[1] = longest;
    }
    if (threadIdx.x == 0) {
        if (b == 0) new_cu_seqlens[0] = 0;
        new_cu_seqlens[b + 1] = before + kept_b[b];
    }
    for (int k0 = 0; k0 < n; k0 += blockDim.x) {
        const int k = k0 + threadIdx.x;
        const int mine = k < n && goes_on[begin + k];
        int marked;
        const int place = before + scan_before(mine, &marked, words);
        if (mine) places[place] = begin + k, rank[begin + k] = place;
        before += marked;
    }
}
