// Ragged attention in float, without a mask: what keys receive (the LTP score), and the queries that go on times V.
//
// Legend: N packed tokens, B sequences, H heads, D width, d = D / H head width, n live tokens of one sequence, Z blocks
// of QUERIES queries. Storage is float or half, arithmetic is float. Query, key and value rows come from the product
// without its bias, which is added as they are read; bias: (3 D,), query's, key's, value's. cu_seqlens: (B + 1,) bounds.
//
// The scores are computed twice, once for the masses and once for the context: 2 n d more operations per query and head
// instead of H n^2 probabilities written and read. Traffic per head and sequence: s d (n (1 + n / 64) + ...) from the
// second-level cache, s d (2 n + n') written and read from memory. On a T4 (8.1 TFLOPS float): masses 2 n^2 d operations
// per head, context 4 n n' d; at MNLI's lengths some 0.4 and 0.7 us a sequence of RoBERTa-base and layer, beside 8.4 us of
// products (benchmarks/t4_model.py).
//
// Registers on sm_75: 61 to 64, no spill; dynamic shared memory aside, 100 % of a T4's threads or more are resident.

#include <cuda_fp16.h>

namespace {

constexpr int WARP = 32, TILE = 32;   // keys that lie in shared memory at a time, one for each lane
constexpr int ROWS = 4;               // queries of one warp
constexpr int QUERIES = 64;           // queries of one block's partial masses; the edges depend on the sequence alone
constexpr unsigned ALL = 0xffffffffu;
constexpr float LOWEST = -3.402823466e38f;  // the first maximum; exp of it less any score is 0

__device__ __forceinline__ float load(const float* at) { return *at; }
__device__ __forceinline__ float load(const __half* at) { return __half2float(*at); }
__device__ __forceinline__ void store(float* at, float x) { *at = x; }
__device__ __forceinline__ void store(__half* at, float x) { *at = __float2half_rn(x); }

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

// Rows in shared memory lie an odd number of words apart: 32 lanes that read one column each of 32 rows meet no bank twice.
__device__ __forceinline__ int pitch(int head_width) { return head_width | 1; }

// `count` rows of one head, with their bias, by all threads of the block. rows: the first one's head.
template <typename T>
__device__ void load_rows(const T* rows, int stride, int count, const float* bias, int head_width, float* tile) {
    for (int i = threadIdx.x; i < count * head_width; i += blockDim.x) {
        const int row = i / head_width, c = i % head_width;
        tile[row * pitch(head_width) + c] = load(rows + static_cast<long long>(row) * stride + c) + bias[c];
    }
}

__device__ __forceinline__ float dot(const float* a, const float* b, int width) {
    float total = 0;
    for (int c = 0; c < width; ++c) total = __fmaf_rn(a[c], b[c], total);
    return total;
}

struct One {
    __device__ float operator()(int) const { return 1.0f; }
};
struct Share {
    const float* share_n;
    __device__ float operator()(int query) const { return share_n[query]; }
};

// Probabilities times what their query weighs, added by key.
// Shared memory: queries (rows, pitch), keys (TILE, pitch), scores (rows, longest), columns (longest), in floats.
template <typename T, typename Weigh>
__device__ void sum_columns(const T* qkv, const float* bias, const int* cu_seqlens, int tokens, int width, int heads,
                            int longest, float scale, Weigh weigh, float* out_zhn) {
    extern __shared__ float shared[];
    const int d = width / heads, h = blockIdx.y, b = blockIdx.z, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, rows = warps * ROWS;
    const int first = blockIdx.x * QUERIES, last = min(first + QUERIES, n);
    if (first >= n) return;
    float* query = shared;
    float* key = query + rows * pitch(d);
    float* scores = key + TILE * pitch(d);
    float* columns = scores + rows * longest;
    const T* head = qkv + static_cast<long long>(begin) * 3 * width + h * d;
    for (int k = threadIdx.x; k < n; k += blockDim.x) columns[k] = 0;
    for (int q0 = first; q0 < last; q0 += rows) {
        const int count = min(rows, last - q0);
        load_rows(head + static_cast<long long>(q0) * 3 * width, 3 * width, count, bias + h * d, d, query);
        for (int k0 = 0; k0 < n; k0 += TILE) {
            const int keys = min(TILE, n - k0);
            load_rows(head + static_cast<long long>(k0) * 3 * width + width, 3 * width, keys, bias + width + h * d, d, key);
            __syncthreads();  // queries and keys are there; whoever added up the scores before is done
            for (int r = warp * ROWS; r < min(warp * ROWS + ROWS, count); ++r)
                if (lane < keys)
                    scores[r * longest + k0 + lane] = scale * dot(query + r * pitch(d), key + lane * pitch(d), d);
            __syncthreads();  // before the next keys take their place; and the scores are there
        }
        for (int r = warp * ROWS; r < min(warp * ROWS + ROWS, count); ++r) {
            float* row = scores + r * longest;
            float most = LOWEST, total = 0;
            for (int k = lane; k < n; k += WARP) most = fmaxf(most, row[k]);
            most = warp_max(most);
            for (int k = lane; k < n; k += WARP) {
                row[k] = expf(row[k] - most);
                total += row[k];
            }
            const float factor = weigh(begin + q0 + r) / warp_sum(total);
            for (int k = lane; k < n; k += WARP) row[k] *= factor;
        }
        __syncthreads();  // all rows of probabilities are there
        for (int k = threadIdx.x; k < n; k += blockDim.x) {
            float total = columns[k];
            for (int r = 0; r < count; ++r) total += scores[r * longest + k];  // query after query, whatever `rows` is
            columns[k] = total;
        }
    }
    float* out = out_zhn + (static_cast<long long>(blockIdx.x) * heads + h) * tokens + begin;
    for (int k = threadIdx.x; k < n; k += blockDim.x) out[k] = columns[k];
}

// Softmax with a running maximum. A lane holds every 32nd of up to 32 * COLUMNS columns of the context.
// Shared memory: queries (rows, pitch), keys (TILE, pitch), values (TILE, pitch), in floats.
template <typename T, int COLUMNS>
__device__ void attention_context(const T* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const T* kv,
                                  int kv_stride, int k_offset, int v_offset, const int* cu_seqlens, const float* bias,
                                  int width, int heads, float scale, T* context) {
    extern __shared__ float shared[];
    const int d = width / heads, h = blockIdx.y, b = blockIdx.z, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, rows = warps * ROWS;
    const int first = q_cu_seqlens[b] + blockIdx.x * rows, last = min(first + rows, q_cu_seqlens[b + 1]);
    if (first >= last) return;
    float* query = shared;
    float* key = query + rows * pitch(d);
    float* value = key + TILE * pitch(d);
    for (int i = threadIdx.x; i < (last - first) * d; i += blockDim.x) {
        const int row = i / d, c = i % d;
        const T* from = q + static_cast<long long>(q_rows[first + row]) * q_stride + h * d;
        query[row * pitch(d) + c] = scale * (load(from + c) + bias[h * d + c]);
    }
    float most[ROWS], total[ROWS], sums[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r) {
        most[r] = LOWEST, total[r] = 0;
        for (int i = 0; i < COLUMNS; ++i) sums[r][i] = 0;
    }
    const int mine = min(ROWS, last - first - warp * ROWS);  // queries of this warp; none if negative
    const T* head = kv + static_cast<long long>(begin) * kv_stride + h * d;
    for (int k0 = 0; k0 < n; k0 += TILE) {
        const int keys = min(TILE, n - k0);
        const T* tile = head + static_cast<long long>(k0) * kv_stride;
        load_rows(tile + k_offset, kv_stride, keys, bias + width + h * d, d, key);
        load_rows(tile + v_offset, kv_stride, keys, bias + 2 * width + h * d, d, value);
        __syncthreads();  // queries, keys and values are there
        float probs[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            probs[r] = 0;
            if (r >= mine) continue;
            const float* row = query + (warp * ROWS + r) * pitch(d);
            const float score = lane < keys ? dot(row, key + lane * pitch(d), d) : LOWEST;
            const float higher = fmaxf(most[r], warp_max(score));
            const float shrink = expf(most[r] - higher);
            probs[r] = expf(score - higher);
            most[r] = higher;
            total[r] = total[r] * shrink + warp_sum(probs[r]);
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) sums[r][i] *= shrink;
        }
        for (int k = 0; k < keys; ++k) {
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) {
                const int c = i * WARP + lane;
                const float v = c < d ? value[k * pitch(d) + c] : 0;
#pragma unroll
                for (int r = 0; r < ROWS; ++r) sums[r][i] = __fmaf_rn(__shfl_sync(ALL, probs[r], k), v, sums[r][i]);
            }
        }
        __syncthreads();  // before the next keys and values take their place
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (r >= mine) continue;
        T* out = context + static_cast<long long>(first + warp * ROWS + r) * width + h * d;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i)
            if (i * WARP + lane < d) store(out + i * WARP + lane, sums[r][i] / total[r]);
    }
}

// A row that stands for removed ones has no query of its own: its probabilities are their weighted sum, from
// `weighted_probs`. Shared memory: probabilities (longest,) in floats.
template <typename T>
__device__ void merged_context(const float* probs_zhn, const T* qkv, const float* bias, const int* cu_seqlens,
                               const int* stand_in, const int* rank, int tokens, int width, int heads, T* context) {
    extern __shared__ float shared[];
    const int d = width / heads, h = blockIdx.x, b = blockIdx.y, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    if (stand_in[b] < 0) return;
    for (int k = threadIdx.x; k < n; k += blockDim.x) {
        float total = 0;
        for (int z = 0; z * QUERIES < n; ++z)
            total += probs_zhn[(static_cast<long long>(z) * heads + h) * tokens + begin + k];
        shared[k] = total;
    }
    __syncthreads();  // all probabilities are there
    const T* value = qkv + static_cast<long long>(begin) * 3 * width + 2 * width + h * d;
    T* out = context + static_cast<long long>(rank[stand_in[b]]) * width + h * d;
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        float total = 0;
        for (int k = 0; k < n; ++k) {
            const float v = load(value + static_cast<long long>(k) * 3 * width + c) + bias[2 * width + h * d + c];
            total = __fmaf_rn(shared[k], v, total);
        }
        store(out + c, total);
    }
}

}  // namespace

// Grid (Z of the longest sequence, H, B). qkv: (N, 3 D). mass_zhn: (Z, H, N), of which a sequence writes its own columns in
// its own first ceil(n / 64) rows.
extern "C" __global__ void __launch_bounds__(256) attention_mass_f32(
    const float* qkv, const float* bias, const int* cu_seqlens, int tokens, int width, int heads, int longest,
    float scale, float* mass_zhn) {
    sum_columns(qkv, bias, cu_seqlens, tokens, width, heads, longest, scale, One(), mass_zhn);
}
extern "C" __global__ void __launch_bounds__(256) attention_mass_f16(
    const __half* qkv, const float* bias, const int* cu_seqlens, int tokens, int width, int heads, int longest,
    float scale, float* mass_zhn) {
    sum_columns(qkv, bias, cu_seqlens, tokens, width, heads, longest, scale, One(), mass_zhn);
}

// The same, of probabilities times share_n, (N,), of their queries.
extern "C" __global__ void __launch_bounds__(256) weighted_probs_f32(
    const float* qkv, const float* bias, const int* cu_seqlens, const float* share_n, int tokens, int width, int heads,
    int longest, float scale, float* probs_zhn) {
    sum_columns(qkv, bias, cu_seqlens, tokens, width, heads, longest, scale, Share{share_n}, probs_zhn);
}
extern "C" __global__ void __launch_bounds__(256) weighted_probs_f16(
    const __half* qkv, const float* bias, const int* cu_seqlens, const float* share_n, int tokens, int width, int heads,
    int longest, float scale, float* probs_zhn) {
    sum_columns(qkv, bias, cu_seqlens, tokens, width, heads, longest, scale, Share{share_n}, probs_zhn);
}

// Grid (ceil(most queries of a sequence / rows), H, B), rows = 4 for each warp. Query i of q_cu_seqlens' N' is row
// q_rows[i] of q; keys and values lie k_offset and v_offset behind the start of kv's rows. context: (N', D).
// The last two letters: d up to 32, 64 or 128.
extern "C" __global__ void __launch_bounds__(256) attention_context_f32_d32(
    const float* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const float* kv, int kv_stride,
    int k_offset, int v_offset, const int* cu_seqlens, const float* bias, int width, int heads, float scale,
    float* context) {
    attention_context<float, 1>(q, q_stride, q_rows, q_cu_seqlens, kv, kv_stride, k_offset, v_offset, cu_seqlens, bias,
                                width, heads, scale, context);
}
extern "C" __global__ void __launch_bounds__(256) attention_context_f32_d64(
    const float* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const float* kv, int kv_stride,
    int k_offset, int v_offset, const int* cu_seqlens, const float* bias, int width, int heads, float scale,
    float* context) {
    attention_context<float, 2>(q, q_stride, q_rows, q_cu_seqlens, kv, kv_stride, k_offset, v_offset, cu_seqlens, bias,
                                width, heads, scale, context);
}
extern "C" __global__ void __launch_bounds__(256) attention_context_f32_d128(
    const float* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const float* kv, int kv_stride,
    int k_offset, int v_offset, const int* cu_seqlens, const float* bias, int width, int heads, float scale,
    float* context) {
    attention_context<float, 4>(q, q_stride, q_rows, q_cu_seqlens, kv, kv_stride, k_offset, v_offset, cu_seqlens, bias,
                                width, heads, scale, context);
}
extern "C" __global__ void __launch_bounds__(256) attention_context_f16_d32(
    const __half* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const __half* kv, int kv_stride,
    int k_offset, int v_offset, const int* cu_seqlens, const float* bias, int width, int heads, float scale,
    __half* context) {
    attention_context<__half, 1>(q, q_stride, q_rows, q_cu_seqlens, kv, kv_stride, k_offset, v_offset, cu_seqlens,
                                 bias, width, heads, scale, context);
}
extern "C" __global__ void __launch_bounds__(256) attention_context_f16_d64(
    const __half* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const __half* kv, int kv_stride,
    int k_offset, int v_offset, const int* cu_seqlens, const float* bias, int width, int heads, float scale,
    __half* context) {
    attention_context<__half, 2>(q, q_stride, q_rows, q_cu_seqlens, kv, kv_stride, k_offset, v_offset, cu_seqlens,
                                 bias, width, heads, scale, context);
}
extern "C" __global__ void __launch_bounds__(256) attention_context_f16_d128(
    const __half* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const __half* kv, int kv_stride,
    int k_offset, int v_offset, const int* cu_seqlens, const float* bias, int width, int heads, float scale,
    __half* context) {
    attention_context<__half, 4>(q, q_stride, q_rows, q_cu_seqlens, kv, kv_stride, k_offset, v_offset, cu_seqlens,
                                 bias, width, heads, scale, context);
}

// Grid (H, B). probs_zhn: of `weighted_probs`; stand_in: (B,), the packed row of the sequence's, or -1; rank: (N,), where a packed
// row goes. Writes row rank[stand_in[b]] of context, (N', D).
extern "C" __global__ void merged_context_f32(const float* probs_zhn, const float* qkv, const float* bias,
                                              const int* cu_seqlens, const int* stand_in, const int* rank, int tokens,
                                              int width, int heads, float* context) {
    merged_context(probs_zhn, qkv, bias, cu_seqlens, stand_in, rank, tokens, width, heads, context);
}
extern "C" __global__ void merged_context_f16(const float* probs_zhn, const __half* qkv, const float* bias,
                                              const int* cu_seqlens, const int* stand_in, const int* rank, int tokens,
                                              int width, int heads, __half* context) {
    merged_context(probs_zhn, qkv, bias, cu_seqlens, stand_in, rank, tokens, width, heads, context);
}
