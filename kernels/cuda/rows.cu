// Operations on packed rows in float: embeddings and LayerNorm, bias and activation, residual and LayerNorm, the head.
//
// Legend: N rows, D width, F inner width, E embedding width, B sequences. Storage is float or half, arithmetic is float.
// One warp computes one row; every kernel strides over the rows by its grid, so that any launch geometry is right, and a
// row's bits never depend on it. Shared memory of the two kernels with a LayerNorm: 4 * D bytes for each warp.
//
// Traffic and limits on a T4 (320 GB/s; s bytes a value: 4 or 2). All of them are bound by memory:
//   embed_norm    s * 3 * E read, s * E written, 12 read, per row      RoBERTa-base, fp16: 6.2 KB, 19 ns a row
//   add_norm      s * 2 * D read, s * D written, 4 read, per row       fp16: 4.6 KB, 14 ns a row
//   bias_*        s * F read and written per row                       fp16: 12.3 KB, 38 ns a row
//   gather_rows   s * D read and written per row;  head_out  s * D read per logit, W from the cache
//
// On a T4, for RoBERTa-base and texts of 32, 128 and 512 tokens (benchmarks/cuda_compile.py): registers, no spill;
// threads of a block; kilobytes of its shared memory; resident threads in percent of 1,024.
//   add_norm_f16: 64; 128; 12.3; 62.5
//   add_norm_f32: 92; 128; 12.3; 62.5
//   bias_gelu_f16: 37; 128; 0.0; 100
//   bias_gelu_f32: 38; 128; 0.0; 100
//   bias_gelu_tanh_f16: 36; 128; 0.0; 100
//   bias_gelu_tanh_f32: 35; 128; 0.0; 100
//   bias_none_f16: 34; 128; 0.0; 100
//   bias_none_f32: 38; 128; 0.0; 100
//   bias_relu_f16: 34; 128; 0.0; 100
//   bias_relu_f32: 38; 128; 0.0; 100
//   bias_tanh_f16, bias_tanh_f32: 34; 128; 0.0; 100
//   embed_norm_f16: 47; 128; 12.3; 62.5
//   embed_norm_f32: 93; 128; 12.3; 62.5
//   gather_rows_f16: 34; 128; 0.0; 100
//   gather_rows_f32: 42; 128; 0.0; 100
//   head_out_f16, head_out_f32: 64; 128; 0.0; 100

#include <cuda_fp16.h>

namespace {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ float load(const float* at) { return *at; }
__device__ __forceinline__ float load(const __half* at) { return __half2float(*at); }
__device__ __forceinline__ void store(float* at, float x) { *at = x; }
__device__ __forceinline__ void store(__half* at, float x) { *at = __float2half_rn(x); }

__device__ __forceinline__ float4 load4(const float* at) { return *reinterpret_cast<const float4*>(at); }
__device__ __forceinline__ float4 load4(const __half* at) {
    const int2 bits = *reinterpret_cast<const int2*>(at);  // in one reading
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&bits.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&bits.y));
    return make_float4(low.x, low.y, high.x, high.y);
}
__device__ __forceinline__ void store4(float* at, float4 x) { *reinterpret_cast<float4*>(at) = x; }
__device__ __forceinline__ void store4(__half* at, float4 x) {
    const __half2 low = __floats2half2_rn(x.x, x.y), high = __floats2half2_rn(x.z, x.w);
    *reinterpret_cast<int2*>(at) = make_int2(*reinterpret_cast<const int*>(&low), *reinterpret_cast<const int*>(&high));
}
__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

// One warp's row in shared memory; a lane reads and writes its own columns only, so nothing waits.
template <typename Sum>
__device__ __forceinline__ void fill_row(float* row, int width, const Sum& sum) {
    const int lane = threadIdx.x % WARP;
    if (width % 4 == 0) {
        for (int c = 4 * lane; c < width; c += 4 * WARP) store4(row + c, sum.four(c));
    } else {
        for (int c = lane; c < width; c += WARP) row[c] = sum.one(c);
    }
}

// (row - mean) / sqrt(variance + eps) * weight + bias, the variance of deviations from the mean.
template <typename T>
__device__ void norm_row(float* row, const float* weight, const float* bias, int width, float eps, T* out) {
    const int lane = threadIdx.x % WARP;
    const bool fours = width % 4 == 0;
    const int first = fours ? 4 * lane : lane, step = fours ? 4 * WARP : WARP, group = fours ? 4 : 1;
    float total = 0;
    for (int c = first; c < width; c += step)
        for (int i = 0; i < group; ++i) total += row[c + i];
    const float mean = warp_sum(total) / width;
    total = 0;
    for (int c = first; c < width; c += step)
        for (int i = 0; i < group; ++i) {
            const float deviation = row[c + i] - mean;
            total += deviation * deviation;
        }
    const float factor = 1.0f / sqrtf(warp_sum(total) / width + eps);
    for (int c = first; c < width; c += step) {
        if (fours) {
            const float4 x = load4(row + c), w = load4(weight + c), b = load4(bias + c);
            store4(out + c, make_float4((x.x - mean) * factor * w.x + b.x, (x.y - mean) * factor * w.y + b.y,
                                        (x.z - mean) * factor * w.z + b.z, (x.w - mean) * factor * w.w + b.w));
        } else {
            store(out + c, (row[c] - mean) * factor * weight[c] + bias[c]);
        }
    }
}

template <typename T>
struct Embeddings {
    const T *word, *position, *segment;
    __device__ float one(int c) const { return load(word + c) + load(position + c) + load(segment + c); }
    __device__ float4 four(int c) const { return load4(word + c) + load4(position + c) + load4(segment + c); }
};

template <typename T>
struct Residual {
    const T *product, *residual;
    const float* bias;
    __device__ float one(int c) const { return load(product + c) + bias[c] + load(residual + c); }
    __device__ float4 four(int c) const { return load4(product + c) + load4(bias + c) + load4(residual + c); }
};

template <typename T>
__device__ void embed_norm(const int* ids, const int* positions, const int* segments, const T* word, const T* position,
                           const T* segment, const float* weight, const float* bias, int rows, int width, float eps,
                           T* out) {
    extern __shared__ float4 shared_fours[];
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP;
    float* row = reinterpret_cast<float*>(shared_fours) + warp * width;
    for (int n = blockIdx.x * warps + warp; n < rows; n += gridDim.x * warps) {
        const Embeddings<T> sum{word + static_cast<long long>(ids[n]) * width,
                                position + static_cast<long long>(positions[n]) * width,
                                segment + static_cast<long long>(segments[n]) * width};
        fill_row(row, width, sum);
        norm_row(row, weight, bias, width, eps, out + static_cast<long long>(n) * width);
    }
}

template <typename T>
__device__ void add_norm(const T* product, const float* bias, const T* residual, const int* places,
                         const float* weight, const float* norm_bias, int rows, int width, float eps, T* out) {
    extern __shared__ float4 shared_fours[];
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP;
    float* row = reinterpret_cast<float*>(shared_fours) + warp * width;
    for (int n = blockIdx.x * warps + warp; n < rows; n += gridDim.x * warps) {
        const Residual<T> sum{product + static_cast<long long>(n) * width,
                              residual + static_cast<long long>(places[n]) * width, bias};
        fill_row(row, width, sum);
        norm_row(row, weight, norm_bias, width, eps, out + static_cast<long long>(n) * width);
    }
}

struct None {
    __device__ float operator()(float x) const { return x; }
};
// x Phi(x) with the exact erf.
struct Gelu {
    __device__ float operator()(float x) const { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
};
// The tanh form ("gelu_new"; arXiv 1606.08415, section 2); 0.79788 is sqrt(2 / pi).
struct GeluTanh {
    __device__ float operator()(float x) const {
        return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * (x * x * x))));
    }
};
struct Relu {
    __device__ float operator()(float x) const { return x < 0.0f ? 0.0f : x; }  // NaN stays
};
struct Tanh {
    __device__ float operator()(float x) const { return tanhf(x); }
};

template <typename T, typename Activation>
__device__ void bias_activation(T* x, const float* bias, int rows, int width, Activation activate) {
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long size = static_cast<long long>(rows) * width;
    if (width % 4 == 0) {
        for (long long i = 4 * thread; i < size; i += 4 * step) {
            const float4 sum = load4(x + i) + load4(bias + i % width);
            store4(x + i, make_float4(activate(sum.x), activate(sum.y), activate(sum.z), activate(sum.w)));
        }
    } else {
        for (long long i = thread; i < size; i += step) store(x + i, activate(load(x + i) + bias[i % width]));
    }
}

template <typename T>
__device__ void gather_rows(const T* x, const int* places, int rows, int width, T* out) {
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int n = blockIdx.x * warps + warp; n < rows; n += gridDim.x * warps) {
        const T* from = x + static_cast<long long>(places[n]) * width;
        T* to = out + static_cast<long long>(n) * width;
        if (width % 4 == 0) {
            for (int c = 4 * lane; c < width; c += 4 * WARP) store4(to + c, load4(from + c));
        } else {
            for (int c = lane; c < width; c += WARP) to[c] = from[c];
        }
    }
}

// A warp for each of the B * labels logits. weight: (labels, D).
template <typename T>
__device__ void head_out(const T* hidden, const T* weight, const float* bias, int sequences, int labels, int width,
                         float* logits) {
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int i = blockIdx.x * warps + warp; i < sequences * labels; i += gridDim.x * warps) {
        const T* x = hidden + static_cast<long long>(i / labels) * width;
        const T* w = weight + static_cast<long long>(i % labels) * width;
        float total = 0;
        if (width % 4 == 0) {
            for (int c = 4 * lane; c < width; c += 4 * WARP) {
                const float4 a = load4(x + c), b = load4(w + c);
                total = __fmaf_rn(a.x, b.x, __fmaf_rn(a.y, b.y, __fmaf_rn(a.z, b.z, __fmaf_rn(a.w, b.w, total))));
            }
        } else {
            for (int c = lane; c < width; c += WARP) total = __fmaf_rn(load(x + c), load(w + c), total);
        }
        total = warp_sum(total);
        if (lane == 0) logits[i] = total + bias[i % labels];
    }
}

}  // namespace

// ids, positions, segments: (rows,); word, position, segment: tables of `width` columns. out: (rows, width).
extern "C" __global__ void __launch_bounds__(256, 2) embed_norm_f32(
    const int* ids, const int* positions, const int* segments, const float* word, const float* position,
    const float* segment, const float* weight, const float* bias, int rows, int width, float eps, float* out) {
    embed_norm(ids, positions, segments, word, position, segment, weight, bias, rows, width, eps, out);
}
extern "C" __global__ void __launch_bounds__(256, 2) embed_norm_f16(
    const int* ids, const int* positions, const int* segments, const __half* word, const __half* position,
    const __half* segment, const float* weight, const float* bias, int rows, int width, float eps, __half* out) {
    embed_norm(ids, positions, segments, word, position, segment, weight, bias, rows, width, eps, out);
}

// out[n] = LayerNorm(product[n] + bias + residual[places[n]]). product, out: (rows, width); bias, weight, norm_bias: (width,).
extern "C" __global__ void __launch_bounds__(256, 2) add_norm_f32(
    const float* product, const float* bias, const float* residual, const int* places, const float* weight,
    const float* norm_bias, int rows, int width, float eps, float* out) {
    add_norm(product, bias, residual, places, weight, norm_bias, rows, width, eps, out);
}
extern "C" __global__ void __launch_bounds__(256, 2) add_norm_f16(
    const __half* product, const float* bias, const __half* residual, const int* places, const float* weight,
    const float* norm_bias, int rows, int width, float eps, __half* out) {
    add_norm(product, bias, residual, places, weight, norm_bias, rows, width, eps, out);
}

// x = activation(x + bias) in place. x: (rows, width), bias: (width,).
extern "C" __global__ void bias_none_f32(float* x, const float* bias, int rows, int width) {
    bias_activation(x, bias, rows, width, None());
}
extern "C" __global__ void bias_none_f16(__half* x, const float* bias, int rows, int width) {
    bias_activation(x, bias, rows, width, None());
}
extern "C" __global__ void bias_gelu_f32(float* x, const float* bias, int rows, int width) {
    bias_activation(x, bias, rows, width, Gelu());
}
extern "C" __global__ void bias_gelu_f16(__half* x, const float* bias, int rows, int width) {
    bias_activation(x, bias, rows, width, Gelu());
}
extern "C" __global__ void bias_gelu_tanh_f32(float* x, const float* bias, int rows, int width) {
    bias_activation(x, bias, rows, width, GeluTanh());
}
extern "C" __global__ void bias_gelu_tanh_f16(__half* x, const float* bias, int rows, int width) {
    bias_activation(x, bias, rows, width, GeluTanh());
}
extern "C" __global__ void bias_relu_f32(float* x, const float* bias, int rows, int width) {
    bias_activation(x, bias, rows, width, Relu());
}
extern "C" __global__ void bias_relu_f16(__half* x, const float* bias, int rows, int width) {
    bias_activation(x, bias, rows, width, Relu());
}
extern "C" __global__ void bias_tanh_f32(float* x, const float* bias, int rows, int width) {
    bias_activation(x, bias, rows, width, Tanh());
}
extern "C" __global__ void bias_tanh_f16(__half* x, const float* bias, int rows, int width) {
    bias_activation(x, bias, rows, width, Tanh());
}

// out[n] = x[places[n]]. out: (rows, width).
extern "C" __global__ void gather_rows_f32(const float* x, const int* places, int rows, int width, float* out) {
    gather_rows(x, places, rows, width, out);
}
extern "C" __global__ void gather_rows_f16(const __half* x, const int* places, int rows, int width, __half* out) {
    gather_rows(x, places, rows, width, out);
}

// hidden: (sequences, width), weight: (labels, width), bias: (labels,). logits: (sequences, labels) float.
extern "C" __global__ void head_out_f32(const float* hidden, const float* weight, const float* bias, int sequences,
                                        int labels, int width, float* logits) {
    head_out(hidden, weight, bias, sequences, labels, width, logits);
}
extern "C" __global__ void head_out_f16(const __half* hidden, const __half* weight, const float* bias, int sequences,
                                        int labels, int width, float* logits) {
    head_out(hidden, weight, bias, sequences, labels, width, logits);
}
