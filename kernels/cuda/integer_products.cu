// The product of 8-bit rows and 8-bit weights, exact in 32 bits, by dp4a: four products and their sum in one instruction.
//
// Legend: N rows, K inputs, M outputs. A block of 256 threads computes a tile of 64 x 64 sums, a thread 4 x 4 of them,
// 16 apart in both directions; 32 inputs of 64 rows and of 64 outputs lie in shared memory at a time, as words of four.
//
// Traffic: K (N ceil(M / 64) + M ceil(N / 64)) bytes read, mostly from the second-level cache, 4 N M written. Operations
// 2 N M K; a T4's limit is some 32 T a second by dp4a (8 operations per lane and clock), 36 us for 1,000 rows of 768 x 768.
// Tensor cores (IMMA) have four times dp4a's rate there; they are not used.
//
// On a T4, for RoBERTa-base and texts of 32, 128 and 512 tokens (benchmarks/cuda_compile.py): registers, no spill;
// threads of a block; kilobytes of its shared memory; resident threads in percent of 1,024.
//   linear_i8: 55; 256; 4.4; 100

namespace {

constexpr int TILE = 64, STEP = 8;        // rows and outputs of a block; words of four inputs at a time
constexpr int SIDE = 16, EACH = 4;        // threads along each side, sums of each along that side
constexpr int PITCH = TILE + 4;           // words: a warp writes words j and j + 4 of 16 rows, and meets no bank twice

// Four inputs from `k` on of a row of K, as one word; zeros behind its end.
__device__ __forceinline__ int word(const signed char* row, int k, int K) {
    if (K % 4 == 0) return k < K ? *reinterpret_cast<const int*>(row + k) : 0;
    unsigned packed = 0;
    for (int i = 0; i < 4; ++i)
        if (k + i < K) packed |= static_cast<unsigned>(static_cast<unsigned char>(row[k + i])) << (8 * i);
    return static_cast<int>(packed);
}

// 16 inputs from `k` on, as four words.
__device__ __forceinline__ int4 four_words(const signed char* row, int k, int K) {
    if (K % 16 == 0 && k < K) return *reinterpret_cast<const int4*>(row + k);
    return make_int4(word(row, k, K), word(row, k + 4, K), word(row, k + 8, K), word(row, k + 12, K));
}

__device__ __forceinline__ void load_tile(const signed char* rows, int first, int count, int k0, int K,
                                          int (*tile)[PITCH]) {
    for (int i = threadIdx.x; i < TILE * STEP / 4; i += SIDE * SIDE) {
        const int row = i / (STEP / 4), step = 4 * (i % (STEP / 4));
        int4 x = make_int4(0, 0, 0, 0);
        if (first + row < count) x = four_words(rows + static_cast<long long>(first + row) * K, k0 + 4 * step, K);
        tile[step][row] = x.x, tile[step + 1][row] = x.y, tile[step + 2][row] = x.z, tile[step + 3][row] = x.w;
    }
}

}  // namespace

// x: (N, K), weight: (M, K), bias: (M,). sums: (N, M). Grid (ceil(M / 64), ceil(N / 64)), 256 threads.
extern "C" __global__ void __launch_bounds__(256, 2) linear_i8(const signed char* x, const signed char* weight,
                                                            const int* bias, int N, int K, int M, int* sums) {
    __shared__ int xs[STEP][PITCH], ws[STEP][PITCH];
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE, m0 = blockIdx.x * TILE;
    for (int n0 = blockIdx.y * TILE; n0 < N; n0 += gridDim.y * TILE) {
        int total[EACH][EACH] = {};
        for (int k0 = 0; k0 < K; k0 += 4 * STEP) {
            load_tile(x, n0, N, k0, K, xs);
            load_tile(weight, m0, M, k0, K, ws);
            __syncthreads();  // both tiles are there
#pragma unroll
            for (int step = 0; step < STEP; ++step) {
                int a[EACH], b[EACH];
#pragma unroll
                for (int i = 0; i < EACH; ++i) a[i] = xs[step][ty + SIDE * i], b[i] = ws[step][tx + SIDE * i];
#pragma unroll
                for (int i = 0; i < EACH; ++i)
#pragma unroll
                    for (int j = 0; j < EACH; ++j) total[i][j] = __dp4a(a[i], b[j], total[i][j]);
            }
            __syncthreads();  // before the next tiles take their place
        }
        for (int i = 0; i < EACH; ++i)
            for (int j = 0; j < EACH; ++j) {
                const int n = n0 + ty + SIDE * i, m = m0 + tx + SIDE * j;
                if (n < N && m < M) sums[static_cast<long long>(n) * M + m] = total[i][j] + bias[m];
            }
    }
}
