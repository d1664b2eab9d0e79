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
// On a T4, for RoBERTa-base and texts of 32, 128 and 512 tokens (benchmarks/cuda_compile.py): registers, no spill;
// threads of a block; kilobytes of its shared memory; resident threads in percent of 1,024.
//   attention_context_f16_d128: 72; 128; 42.2; 12.5
//   attention_context_f16_d32: 59; 128; 11.5; 62.5
//   attention_context_f16_d64: 64; 128; 21.8; 37.5
//   attention_context_f32_d128: 72; 128; 42.2; 12.5
//   attention_context_f32_d32: 62; 128; 11.5; 62.5
//   attention_context_f32_d64: 64; 128; 21.8; 37.5
//   attention_mass_f16, attention_mass_f32: 56; 128; 15.2, 21.8, 47.9; 50, 37.5, 12.5
//   merged_context_f16, merged_context_f32: 64; 64; 0.1, 0.5, 2.0; 100
//   weighted_probs_f16, weighted_probs_f32: 58; 128; 15.2, 21.8, 47.9; 50, 37.5, 12.5

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

__device__ __forceinline__ float4 load4(const float* at) { return *reinterpret_cast<const float4*>(at); }
__device__ __forceinline__ float4 load4(const __half* at) {
    const int2 bits = *reinterpret_cast<const int2*>(at);  // in one reading
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&bits.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&bits.y));
    return make_float4(low.x, low.y, high.x, high.y);
}

// Rows in shared memory are fours of words, an odd number of them apart: eight lanes, as many as are served at once, that
// read four columns each of eight rows meet no bank twice.
__device__ __forceinline__ int fours(int head_width) { return (head_width + 3) / 4; }
__device__ __forceinline__ int pitch(int head_width) { return 4 * (fours(head_width) | 1); }

template <typename T>
struct Following {  // rows that lie one after another
    const T* first;
    int stride;
    __device__ const T* operator()(int row) const { return first + static_cast<long long>(row) * stride; }
};
template <typename T>
struct Listed {  // rows by their numbers
    const T* first;
    int stride;
    const int* numbers;
    __device__ const T* operator()(int row) const { return first + static_cast<long long>(numbers[row]) * stride; }
};

// scale * (x + bias) of `count` rows of one head, zeros behind their ends and in the rows from there to `room`, by all
// threads of the block. at(row): its head. Where a head is whole fours, so are all before it: each begins at a multiple of
// four values.
template <typename At>
__device__ void load_rows(const At& at, int count, int room, const float* bias, float scale, int head_width, float* tile) {
    for (int i = threadIdx.x; i < room * fours(head_width); i += blockDim.x) {
        const int row = i / fours(head_width), c = 4 * (i % fours(head_width));
        float4 x = make_float4(0, 0, 0, 0);
        if (row < count && head_width % 4 == 0) {
            const float4 y = load4(at(row) + c), b = load4(bias + c);
            x = make_float4(scale * (y.x + b.x), scale * (y.y + b.y), scale * (y.z + b.z), scale * (y.w + b.w));
        } else if (row < count) {
            const auto from = at(row);
            const auto one = [&](int k) { return k < head_width ? scale * (load(from + k) + bias[k]) : 0.0f; };
            x = make_float4(one(c), one(c + 1), one(c + 2), one(c + 3));
        }
        *reinterpret_cast<float4*>(tile + row * pitch(head_width) + c) = x;
    }
}

// Of ROWS rows with one, column after column; zeros behind a row's end add nothing.
__device__ __forceinline__ void dots(const float* rows, const float* with, int head_width, float (&total)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) total[r] = 0;
#pragma unroll 1  // more cost registers, and blocks that are there at once
    for (int c = 0; c < head_width; c += 4) {
        const float4 y = load4(with + c);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float4 x = load4(rows + r * pitch(head_width) + c);
            total[r] = __fmaf_rn(x.x, y.x, total[r]);
            total[r] = __fmaf_rn(x.y, y.y, total[r]);
            total[r] = __fmaf_rn(x.z, y.z, total[r]);
            total[r] = __fmaf_rn(x.w, y.w, total[r]);
        }
    }
}

// A lane's neighbouring columns of the context: one value, two or four.
__device__ __forceinline__ void load_columns(const float* at, float (&x)[1]) { x[0] = *at; }
__device__ __forceinline__ void load_columns(const float* at, float (&x)[2]) {
    const float2 two = *reinterpret_cast<const float2*>(at);
    x[0] = two.x, x[1] = two.y;
}
__device__ __forceinline__ void load_columns(const float* at, float (&x)[4]) {
    const float4 four = load4(at);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}
__device__ __forceinline__ void store_columns(float* at, const float (&x)[1]) { *at = x[0]; }
__device__ __forceinline__ void store_columns(__half* at, const float (&x)[1]) { *at = __float2half_rn(x[0]); }
__device__ __forceinline__ void store_columns(float* at, const float (&x)[2]) {
    *reinterpret_cast<float2*>(at) = make_float2(x[0], x[1]);
}
__device__ __forceinline__ void store_columns(__half* at, const float (&x)[2]) {
    *reinterpret_cast<__half2*>(at) = __floats2half2_rn(x[0], x[1]);
}
__device__ __forceinline__ void store_columns(float* at, const float (&x)[4]) {
    *reinterpret_cast<float4*>(at) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store_columns(__half* at, const float (&x)[4]) {
    const __half2 low = __floats2half2_rn(x[0], x[1]), high = __floats2half2_rn(x[2], x[3]);
    *reinterpret_cast<int2*>(at) = make_int2(*reinterpret_cast<const int*>(&low), *reinterpret_cast<const int*>(&high));
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
    extern __shared__ float4 shared_fours[];
    const int d = width / heads, h = blockIdx.y, b = blockIdx.z, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, rows = warps * ROWS;
    const int first = blockIdx.x * QUERIES, last = min(first + QUERIES, n);
    if (first >= n) return;
    float* query = reinterpret_cast<float*>(shared_fours);
    float* key = query + rows * pitch(d);
    float* scores = key + TILE * pitch(d);
    float* columns = scores + rows * longest;
    const T* head = qkv + static_cast<long long>(begin) * 3 * width + h * d;
    for (int k = threadIdx.x; k < n; k += blockDim.x) columns[k] = 0;
    for (int q0 = first; q0 < last; q0 += rows) {
        const int count = min(rows, last - q0);
        load_rows(Following<T>{head + static_cast<long long>(q0) * 3 * width, 3 * width}, count, rows, bias + h * d, 1, d,
                  query);
        for (int k0 = 0; k0 < n; k0 += TILE) {
            const int keys = min(TILE, n - k0);
            load_rows(Following<T>{head + static_cast<long long>(k0) * 3 * width + width, 3 * width}, keys, keys,
                      bias + width + h * d, 1, d, key);
            __syncthreads();  // queries and keys are there; whoever added up the scores before is done
            if (lane < keys) {
                float score[ROWS];
                dots(query + warp * ROWS * pitch(d), key + lane * pitch(d), d, score);
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
                    if (warp * ROWS + r < count) scores[(warp * ROWS + r) * longest + k0 + lane] = scale * score[r];
            }
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

// Softmax with a running maximum. A lane holds COLUMNS neighbouring ones of up to 32 * COLUMNS columns of the context.
// Shared memory: queries (rows, pitch), keys (TILE, pitch), values (TILE, pitch), in floats.
template <typename T, int COLUMNS>
__device__ void attention_context(const T* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const T* kv,
                                  int kv_stride, int k_offset, int v_offset, const int* cu_seqlens, const float* bias,
                                  int width, int heads, float scale, T* context) {
    extern __shared__ float4 shared_fours[];
    const int d = width / heads, h = blockIdx.y, b = blockIdx.z, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, rows = warps * ROWS;
    const int first = q_cu_seqlens[b] + blockIdx.x * rows, last = min(first + rows, q_cu_seqlens[b + 1]);
    if (first >= last) return;
    float* query = reinterpret_cast<float*>(shared_fours);
    float* key = query + rows * pitch(d);
    float* value = key + TILE * pitch(d);
    load_rows(Listed<T>{q + h * d, q_stride, q_rows + first}, last - first, rows, bias + h * d, scale, d, query);
    float most[ROWS], total[ROWS], sums[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r) {
        most[r] = LOWEST, total[r] = 0;
        for (int i = 0; i < COLUMNS; ++i) sums[r][i] = 0;
    }
    const int column = COLUMNS * lane;
    const T* head = kv + static_cast<long long>(begin) * kv_stride + h * d;
    for (int k0 = 0; k0 < n; k0 += TILE) {
        const int keys = min(TILE, n - k0);
        const T* tile = head + static_cast<long long>(k0) * kv_stride;
        load_rows(Following<T>{tile + k_offset, kv_stride}, keys, keys, bias + width + h * d, 1, d, key);
        load_rows(Following<T>{tile + v_offset, kv_stride}, keys, keys, bias + 2 * width + h * d, 1, d, value);
        __syncthreads();  // queries, keys and values are there
        float probs[ROWS];
        if (lane < keys) dots(query + warp * ROWS * pitch(d), key + lane * pitch(d), d, probs);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float score = lane < keys ? probs[r] : LOWEST;
            const float higher = fmaxf(most[r], warp_max(score));
            const float shrink = expf(most[r] - higher);
            probs[r] = expf(score - higher);
            most[r] = higher;
            total[r] = total[r] * shrink + warp_sum(probs[r]);
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i) sums[r][i] *= shrink;
        }
#pragma unroll 2
        for (int k = 0; k < keys; ++k) {
            float v[COLUMNS] = {};
            if (column < d) load_columns(value + k * pitch(d) + column, v);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const float prob = __shfl_sync(ALL, probs[r], k);
#pragma unroll
                for (int i = 0; i < COLUMNS; ++i) sums[r][i] = __fmaf_rn(prob, v[i], sums[r][i]);
            }
        }
        __syncthreads();  // before the next keys and values take their place
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int row = first + warp * ROWS + r;
        if (row >= last) continue;
        T* out = context + static_cast<long long>(row) * width + h * d;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) sums[r][i] /= total[r];
        if (column < d && d % COLUMNS == 0) {
            store_columns(out + column, sums[r]);
        } else {
#pragma unroll
            for (int i = 0; i < COLUMNS; ++i)
                if (column + i < d) store(out + column + i, sums[r][i]);
        }
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
extern "C" __global__ void __launch_bounds__(256, 3) attention_mass_f32(
    const float* qkv, const float* bias, const int* cu_seqlens, int tokens, int width, int heads, int longest,
    float scale, float* mass_zhn) {
    sum_columns(qkv, bias, cu_seqlens, tokens, width, heads, longest, scale, One(), mass_zhn);
}
extern "C" __global__ void __launch_bounds__(256, 3) attention_mass_f16(
    const __half* qkv, const float* bias, const int* cu_seqlens, int tokens, int width, int heads, int longest,
    float scale, float* mass_zhn) {
    sum_columns(qkv, bias, cu_seqlens, tokens, width, heads, longest, scale, One(), mass_zhn);
}

// The same, of probabilities times share_n, (N,), of their queries.
extern "C" __global__ void __launch_bounds__(256, 3) weighted_probs_f32(
    const float* qkv, const float* bias, const int* cu_seqlens, const float* share_n, int tokens, int width, int heads,
    int longest, float scale, float* probs_zhn) {
    sum_columns(qkv, bias, cu_seqlens, tokens, width, heads, longest, scale, Share{share_n}, probs_zhn);
}
extern "C" __global__ void __launch_bounds__(256, 3) weighted_probs_f16(
    const __half* qkv, const float* bias, const int* cu_seqlens, const float* share_n, int tokens, int width, int heads,
    int longest, float scale, float* probs_zhn) {
    sum_columns(qkv, bias, cu_seqlens, tokens, width, heads, longest, scale, Share{share_n}, probs_zhn);
}

// Grid (ceil(most queries of a sequence / rows), H, B), rows = 4 for each warp. Query i of q_cu_seqlens' N' is row
// q_rows[i] of q; keys and values lie k_offset and v_offset behind the start of kv's rows. context: (N', D).
// The last two letters: d up to 32, 64 or 128.
extern "C" __global__ void __launch_bounds__(256, 3) attention_context_f32_d32(
    const float* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const float* kv, int kv_stride,
    int k_offset, int v_offset, const int* cu_seqlens, const float* bias, int width, int heads, float scale,
    float* context) {
    attention_context<float, 1>(q, q_stride, q_rows, q_cu_seqlens, kv, kv_stride, k_offset, v_offset, cu_seqlens, bias,
                                width, heads, scale, context);
}
extern "C" __global__ void __launch_bounds__(256, 3) attention_context_f32_d64(
    const float* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const float* kv, int kv_stride,
    int k_offset, int v_offset, const int* cu_seqlens, const float* bias, int width, int heads, float scale,
    float* context) {
    attention_context<float, 2>(q, q_stride, q_rows, q_cu_seqlens, kv, kv_stride, k_offset, v_offset, cu_seqlens, bias,
                                width, heads, scale, context);
}
extern "C" __global__ void __launch_bounds__(256, 3) attention_context_f32_d128(
    const float* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const float* kv, int kv_stride,
    int k_offset, int v_offset, const int* cu_seqlens, const float* bias, int width, int heads, float scale,
    float* context) {
    attention_context<float, 4>(q, q_stride, q_rows, q_cu_seqlens, kv, kv_stride, k_offset, v_offset, cu_seqlens, bias,
                                width, heads, scale, context);
}
extern "C" __global__ void __launch_bounds__(256, 3) attention_context_f16_d32(
    const __half* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const __half* kv, int kv_stride,
    int k_offset, int v_offset, const int* cu_seqlens, const float* bias, int width, int heads, float scale,
    __half* context) {
    attention_context<__half, 1>(q, q_stride, q_rows, q_cu_seqlens, kv, kv_stride, k_offset, v_offset, cu_seqlens,
                                 bias, width, heads, scale, context);
}
extern "C" __global__ void __launch_bounds__(256, 3) attention_context_f16_d64(
    const __half* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const __half* kv, int kv_stride,
    int k_offset, int v_offset, const int* cu_seqlens, const float* bias, int width, int heads, float scale,
    __half* context) {
    attention_context<__half, 2>(q, q_stride, q_rows, q_cu_seqlens, kv, kv_stride, k_offset, v_offset, cu_seqlens,
                                 bias, width, heads, scale, context);
}
extern "C" __global__ void __launch_bounds__(256, 3) attention_context_f16_d128(
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
