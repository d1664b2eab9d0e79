// From what keys receive to who stays: masses, the keep rules, and the row that stands for removed ones.
//
// Legend: N packed tokens, B sequences, H heads, D width, n live tokens of one sequence, Z blocks of queries. One block of
// whole warps works on one sequence; which block size is chosen changes no bit, but for the total that shares are divided
// by (share_removed). The first token of a sequence always stays.
//
// Traffic: keep_* 4 H Z + 6 bytes a token, merge_rows s D a removed token. At MNLI lengths RoBERTa-base has 12 masses a
// token: 0.2 us for 1,000 tokens on a T4 (320 GB/s). Launches take longer than that.
//
// On a T4, for RoBERTa-base and texts of 32, 128 and 512 tokens (benchmarks/cuda_compile.py): registers, no spill;
// threads of a block; kilobytes of its shared memory; resident threads in percent of 1,024.
//   keep_absolute, keep_all: 26; 128; 0.1; 100
//   keep_count: 27; 128; 0.1; 100
//   keep_relative: 26; 128; 0.3; 100
//   merge_rows_f16: 37; 128; 0.0; 100
//   merge_rows_f32: 38; 128; 0.0; 100
//   share_removed: 29; 128; 0.3; 100

#include <cuda_fp16.h>

namespace {

constexpr int WARP = 32;
constexpr int MOST_WARPS = 32;
constexpr int QUERIES = 64;  // of one block of `attention_mass`
constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ float load(const float* at) { return *at; }
__device__ __forceinline__ float load(const __half* at) { return __half2float(*at); }
__device__ __forceinline__ void store(float* at, float x) { *at = x; }
__device__ __forceinline__ void store(__half* at, float x) { *at = __float2half_rn(x); }

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

// Whether each key stays, by `decide(k, mass)`, and how many do.
template <typename Decide>
__device__ void decide_all(const float* mass_n, int begin, int n, unsigned char* kept, int* kept_count, int* words,
                           Decide decide) {
    int count = 0;
    for (int k = threadIdx.x; k < n; k += blockDim.x) {
        const bool stays = k == 0 || decide(k, mass_n[begin + k]);
        kept[begin + k] = stays;
        count += stays;
    }
    count = block_reduce(count, 0, Sum(), words);
    if (threadIdx.x == 0) *kept_count = count;
}

// What each key receives, the mean over heads: partial sums are added head after head, block after block.
__device__ void gather_masses(const float* mass_zhn, int tokens, int heads, int begin, int n, float* mass_n) {
    for (int k = threadIdx.x; k < n; k += blockDim.x) {
        float total = 0;
        for (int h = 0; h < heads; ++h)
            for (int z = 0; z * QUERIES < n; ++z)
                total += mass_zhn[(static_cast<long long>(z) * heads + h) * tokens + begin + k];
        mass_n[begin + k] = total / heads;
    }
}

// The order of masses: larger first, then the lower index, NaN last. A total one, so that exactly as many stay as the host
// counts on, whatever the masses are.
__device__ __forceinline__ bool is_ahead(float other, int j, float mass, int k) {
    const bool both_nan = other != other && mass != mass;
    return other > mass || (other == other && mass != mass) || ((other == mass || both_nan) && j < k);
}

template <typename T>
__device__ void merge_rows(T* x, const float* share_n, const int* stand_in, const int* cu_seqlens, int width) {
    const int b = blockIdx.y, begin = cu_seqlens[b], end = cu_seqlens[b + 1], c = blockIdx.x * blockDim.x + threadIdx.x;
    if (stand_in[b] < 0 || c >= width) return;
    float total = 0;
    for (int k = begin; k < end; ++k)
        if (share_n[k] != 0) total = __fmaf_rn(share_n[k], load(x + static_cast<long long>(k) * width + c), total);
    store(x + static_cast<long long>(stand_in[b]) * width + c, total);
}

}  // namespace

// Block b of B. mass_zhn: of `attention_mass`. Writes mass_n, kept: (N,), and kept_b[b], the number that stays.

// Every key: for the trace of a layer that has no rule.
extern "C" __global__ void __launch_bounds__(1024) keep_all(
    const float* mass_zhn, const int* cu_seqlens, int tokens, int heads, float* mass_n, unsigned char* kept,
    int* kept_b) {
    __shared__ int words[MOST_WARPS];
    const int b = blockIdx.x, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    gather_masses(mass_zhn, tokens, heads, begin, n, mass_n);
    decide_all(mass_n, begin, n, kept, kept_b + b, words, [](int, float) { return true; });
}

// mass / Z >= lowest; Z: the length before layer 0 (denominator 0), the live length (-1) or the number, at most limit.
extern "C" __global__ void __launch_bounds__(1024) keep_absolute(
    const float* mass_zhn, const int* cu_seqlens, const int* initial_b, int tokens, int heads, int denominator,
    int limit, float lowest, float* mass_n, unsigned char* kept, int* kept_b) {
    __shared__ int words[MOST_WARPS];
    const int b = blockIdx.x, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    const float z = min(denominator == 0 ? initial_b[b] : denominator == -1 ? n : denominator, limit);
    gather_masses(mass_zhn, tokens, heads, begin, n, mass_n);
    decide_all(mass_n, begin, n, kept, kept_b + b, words, [=](int, float mass) { return mass / z >= lowest; });
}

// mass / max mass >= lowest.
extern "C" __global__ void __launch_bounds__(1024) keep_relative(
    const float* mass_zhn, const int* cu_seqlens, int tokens, int heads, float lowest, float* mass_n,
    unsigned char* kept, int* kept_b) {
    __shared__ int words[MOST_WARPS];
    __shared__ float most[MOST_WARPS];
    const int b = blockIdx.x, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    gather_masses(mass_zhn, tokens, heads, begin, n, mass_n);
    float largest = 0;
    for (int k = threadIdx.x; k < n; k += blockDim.x) largest = fmaxf(largest, mass_n[begin + k]);
    largest = block_reduce(largest, 0.0f, Max(), most);
    decide_all(mass_n, begin, n, kept, kept_b + b, words, [=](int, float mass) { return mass / largest >= lowest; });
}

// The largest round(initial length * rate) masses, the first token's place among them; ties go to the lower index.
extern "C" __global__ void __launch_bounds__(1024) keep_count(
    const float* mass_zhn, const int* cu_seqlens, const int* initial_b, int tokens, int heads, float rate,
    float* mass_n, unsigned char* kept, int* kept_b) {
    __shared__ int words[MOST_WARPS];
    const int b = blockIdx.x, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    const int others = max(1, static_cast<int>(rintf(initial_b[b] * rate))) - 1;
    gather_masses(mass_zhn, tokens, heads, begin, n, mass_n);
    __syncthreads();  // all masses of this sequence are there
    const float* masses = mass_n + begin;
    decide_all(mass_n, begin, n, kept, kept_b + b, words, [=](int k, float mass) {
        int ahead = 0;
        for (int j = 1; j < n; ++j) ahead += is_ahead(masses[j], j, mass, k);
        return ahead < others;
    });
}

// The removed tokens go on as one, in the place of the first of them. share_n: (N,), each one's share of their mass, equal
// where that is 0, and 0 for the kept. stand_in: (B,), the packed row of that place, or -1; goes_on: kept, and the place;
// kept_b then counts it. Block b of B.
extern "C" __global__ void __launch_bounds__(1024) share_removed(
    const float* mass_n, const unsigned char* kept, const int* cu_seqlens, float* share_n, unsigned char* goes_on,
    int* stand_in, int* kept_b) {
    __shared__ int words[MOST_WARPS];
    __shared__ float sums[MOST_WARPS];
    const int b = blockIdx.x, begin = cu_seqlens[b], end = cu_seqlens[b + 1];
    float total = 0;
    int last = 0;  // packed rows counted from the end, so that the first removed one is the largest
    for (int k = begin + threadIdx.x; k < end; k += blockDim.x) {
        if (!kept[k]) total += mass_n[k], last = max(last, end - k);
    }
    total = block_reduce(total, 0.0f, Sum(), sums);
    last = block_reduce(last, 0, Max(), words);
    const int first = last > 0 ? end - last : -1, removed = end - begin - kept_b[b];
    __syncthreads();  // before kept_b changes
    for (int k = begin + threadIdx.x; k < end; k += blockDim.x) {
        share_n[k] = kept[k] ? 0.0f : total > 0 ? mass_n[k] / total : 1.0f / removed;
        goes_on[k] = kept[k] || k == first;
    }
    if (threadIdx.x == 0) {
        stand_in[b] = first;
        if (first >= 0) ++kept_b[b];
    }
}

// Row stand_in[b] of x becomes the sum of its sequence's rows times their shares. Grid (ceil(D / block), B). x: (N, D).
extern "C" __global__ void merge_rows_f32(float* x, const float* share_n, const int* stand_in, const int* cu_seqlens,
                                          int width) {
    merge_rows(x, share_n, stand_in, cu_seqlens, width);
}
extern "C" __global__ void merge_rows_f16(__half* x, const float* share_n, const int* stand_in, const int* cu_seqlens,
                                          int width) {
    merge_rows(x, share_n, stand_in, cu_seqlens, width);
}
