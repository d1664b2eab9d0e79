// The keep rules on integer masses, equal to minilpt/integer_rules.py, and the merged row of integers.
//
// Legend: N packed tokens, B sequences, H heads, D width, n live tokens of one sequence, Z blocks of queries. A mass is a
// sum of probabilities in units of 2^-32 over heads and queries, 64 bits. One block of whole warps works on one sequence.
// The first token of a sequence always stays. Traffic: as prune.cu's, masses of 8 bytes.
//
// On a T4, for RoBERTa-base and texts of 32, 128 and 512 tokens (benchmarks/cuda_compile.py): registers, no spill;
// threads of a block; kilobytes of its shared memory; resident threads in percent of 1,024.
//   keep_absolute_i8, keep_all_i8, keep_count_i8: 30; 128; 0.1; 100
//   keep_relative_i8: 32; 128; 0.4; 100
//   merge_rows_i8: 64; 128; 0.0; 100
//   weigh_removed_i8: 46; 128; 0.4; 100

namespace {

typedef long long int64;

constexpr int WARP = 32, MOST_WARPS = 32;
constexpr int QUERIES = 64;  // of one block of `attention_mass_i8`
constexpr int MASS_DROP = 14, RELATIVE_BITS = 30;
constexpr int64 MOST_MASS = 1LL << 62;
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

// What each key receives: the sum of its partial masses.
__device__ void gather_masses(const int64* mass_zhn, int tokens, int heads, int begin, int n, int64* mass_n) {
    for (int k = threadIdx.x; k < n; k += blockDim.x) {
        int64 total = 0;
        for (int h = 0; h < heads; ++h)
            for (int z = 0; z * QUERIES < n; ++z)
                total += mass_zhn[(static_cast<int64>(z) * heads + h) * tokens + begin + k];
        mass_n[begin + k] = total;
    }
}

// Whether each key stays, by `decide(k, mass)`, and how many do.
template <typename Decide>
__device__ void decide_all(const int64* mass_n, int begin, int n, unsigned char* kept, int* kept_count, int* words,
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

}  // namespace

// Block b of B. mass_zhn: of `attention_mass_i8`. Writes mass_n, kept: (N,), and kept_b[b], the number that stays.

// Every key: for the trace of a layer that has no rule.
extern "C" __global__ void __launch_bounds__(1024) keep_all_i8(
    const long long* mass_zhn, const int* cu_seqlens, int tokens, int heads, long long* mass_n, unsigned char* kept,
    int* kept_b) {
    __shared__ int words[MOST_WARPS];
    const int b = blockIdx.x, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    gather_masses(mass_zhn, tokens, heads, begin, n, mass_n);
    decide_all(mass_n, begin, n, kept, kept_b + b, words, [](int, int64) { return true; });
}

// mass >= lowest * Z; Z: the length before layer 0 (denominator 0), the live length (-1) or the number, at most limit.
extern "C" __global__ void __launch_bounds__(1024) keep_absolute_i8(
    const long long* mass_zhn, const int* cu_seqlens, const int* initial_b, int tokens, int heads, int denominator,
    int limit, long long lowest, long long* mass_n, unsigned char* kept, int* kept_b) {
    __shared__ int words[MOST_WARPS];
    const int b = blockIdx.x, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    const int64 z = min(denominator == 0 ? initial_b[b] : denominator == -1 ? n : denominator, limit);
    const int64 least = min(lowest, MOST_MASS / z) * z;
    gather_masses(mass_zhn, tokens, heads, begin, n, mass_n);
    decide_all(mass_n, begin, n, kept, kept_b + b, words, [=](int, int64 mass) { return mass >= least; });
}

// mass >= lowest / 2^30 of the largest, both without their low bits.
extern "C" __global__ void __launch_bounds__(1024) keep_relative_i8(
    const long long* mass_zhn, const int* cu_seqlens, int tokens, int heads, long long lowest, long long* mass_n,
    unsigned char* kept, int* kept_b) {
    __shared__ int words[MOST_WARPS];
    __shared__ int64 most[MOST_WARPS];
    const int b = blockIdx.x, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    gather_masses(mass_zhn, tokens, heads, begin, n, mass_n);
    int64 largest = 0;
    for (int k = threadIdx.x; k < n; k += blockDim.x) largest = max(largest, mass_n[begin + k] >> MASS_DROP);
    const int64 least = lowest * block_reduce(largest, static_cast<int64>(0), Max(), most);
    decide_all(mass_n, begin, n, kept, kept_b + b, words,
               [=](int, int64 mass) { return (mass >> MASS_DROP) << RELATIVE_BITS >= least; });
}

// The counts_of[initial length] largest masses, the first token's place among them; ties go to the lower index.
extern "C" __global__ void __launch_bounds__(1024) keep_count_i8(
    const long long* mass_zhn, const int* cu_seqlens, const int* initial_b, const int* counts_of, int tokens, int heads,
    long long* mass_n, unsigned char* kept, int* kept_b) {
    __shared__ int words[MOST_WARPS];
    const int b = blockIdx.x, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    const int others = counts_of[initial_b[b]] - 1;
    gather_masses(mass_zhn, tokens, heads, begin, n, mass_n);
    __syncthreads();  // all masses of this sequence are there
    const int64* masses = mass_n + begin;
    decide_all(mass_n, begin, n, kept, kept_b + b, words, [=](int k, int64 mass) {
        int ahead = 0;
        for (int j = 1; j < n; ++j) ahead += masses[j] > mass || (masses[j] == mass && j < k);
        return ahead < others;
    });
}

// The removed tokens go on as one, in the place of the first of them. weights: (N,), a removed token's mass without its
// low bits, or 1 where all of those are 0; 0 for the kept; total_weight: (B,). stand_in: (B,), the packed row of that
// place, or -1; goes_on: kept, and the place; kept_b then counts it. Block b of B.
extern "C" __global__ void __launch_bounds__(1024) weigh_removed_i8(
    const long long* mass_n, const unsigned char* kept, const int* cu_seqlens, long long* weights,
    long long* total_weight, unsigned char* goes_on, int* stand_in, int* kept_b) {
    __shared__ int words[MOST_WARPS];
    __shared__ int64 sums[MOST_WARPS];
    const int b = blockIdx.x, begin = cu_seqlens[b], end = cu_seqlens[b + 1];
    int64 total = 0;
    int last = 0;  // packed rows counted from the end, so that the first removed one is the largest
    for (int k = begin + threadIdx.x; k < end; k += blockDim.x) {
        if (!kept[k]) total += mass_n[k] >> MASS_DROP, last = max(last, end - k);
    }
    total = block_reduce(total, static_cast<int64>(0), Sum(), sums);
    last = block_reduce(last, 0, Max(), words);
    const int first = last > 0 ? end - last : -1, removed = end - begin - kept_b[b];
    __syncthreads();  // before kept_b changes
    for (int k = begin + threadIdx.x; k < end; k += blockDim.x) {
        weights[k] = kept[k] ? 0 : total > 0 ? mass_n[k] >> MASS_DROP : 1;
        goes_on[k] = kept[k] || k == first;
    }
    if (threadIdx.x == 0) {
        stand_in[b] = first;
        total_weight[b] = total > 0 ? total : removed;
        if (first >= 0) ++kept_b[b];
    }
}

// Row stand_in[b] of x becomes the weighted mean of its sequence's rows, halves up. Grid (ceil(D / block), B). x: (N, D).
extern "C" __global__ void merge_rows_i8(signed char* x, const long long* weights, const long long* total_weight,
                                         const int* stand_in, const int* cu_seqlens, int width) {
    const int b = blockIdx.y, begin = cu_seqlens[b], end = cu_seqlens[b + 1], c = blockIdx.x * blockDim.x + threadIdx.x;
    if (stand_in[b] < 0 || c >= width) return;
    int64 sum = 0;
    for (int k = begin; k < end; ++k) sum += weights[k] * x[static_cast<int64>(k) * width + c];
    const int64 above = 2 * sum + total_weight[b], below = 2 * total_weight[b];
    int64 mean = above / below;
    if (above % below < 0) --mean;
    x[static_cast<int64>(stand_in[b]) * width + c] = static_cast<signed char>(mean);
}
