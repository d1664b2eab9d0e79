// Integer-only operations on packed rows (I-BERT, arXiv 2101.01321), equal bit for bit to minilpt/kernels/integer.py, whose
// docstrings state the ranges, the widths of the accumulators and why nothing overflows; the arithmetic here is the same,
// in 64 bits wherever it is there.
//
// Legend: N rows, D width, M outputs, B sequences. Activations are 8 bits, sums 32. A dyadic factor is a multiplier and a
// shift, one or one for each channel. One warp computes one row of a LayerNorm; its row of 32-bit integers is in shared
// memory (4 * D bytes for each warp). Geometry changes no bit.
//
// Traffic and limits on a T4 (320 GB/s; Turing has no 64-bit integer multiplier: an IMAD.WIDE product takes 4 steps):
//   requantize_*   4 M read, M written per row; about 30 integer instructions a value, which is the limit: 4.1 T a second
//   i_gelu         4 M read, M written per row; about 60
//   add_norm       5 D read, D written per row; about 90
//   embed_norm     3 D read, D written per row; about 110
// So a lane takes one value at a time, neighbouring lanes neighbouring ones: wider reads would save what is not short.
//
// On a T4, for RoBERTa-base and texts of 32, 128 and 512 tokens (benchmarks/cuda_compile.py): registers, no spill;
// threads of a block; kilobytes of its shared memory; resident threads in percent of 1,024.
//   add_norm_i8, embed_norm_i8: 64; 128; 12.3; 62.5
//   gather_rows_i8: 42; 128; 0.0; 100
//   i_gelu: 30; 128; 0.0; 100
//   i_relu: 28; 128; 0.0; 100
//   i_tanh: 30; 128; 0.0; 100
//   requantize_i32: 36; 128; 0.0; 100
//   requantize_i8: 32; 128; 0.0; 100

namespace {

typedef long long int64;

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr int SUM_BITS = 16, NORM_INPUT_BITS = 22, ACTIVATION_BITS = 8;
constexpr int ERF_SHIFT = 14, GELU_LOW_BITS = 32, EXP_LOW_BITS = 16, EXP_BITS = 30, TANH_BITS = 30, TANH_LIMIT = 127;

__device__ __forceinline__ int64 clamped(int64 x, int bits) {
    const int64 most = 1LL << (bits - 1);
    return x < -most ? -most : x > most - 1 ? most - 1 : x;
}

// x / 2^shift, halves to even; rest: 1 where x had more, smaller bits.
__device__ __forceinline__ int64 rounded_shift(int64 x, int shift, int64 rest) {
    const int64 odd = (x >> shift) & 1;
    return (x + ((1LL << (shift - 1)) - 1) + (odd | rest)) >> shift;
}

__device__ __forceinline__ int64 scaled(int64 x, int multiplier, int shift) {
    return rounded_shift(x * multiplier, shift, 0);
}

// As `scaled` where the product needs more than 63 bits.
__device__ __forceinline__ int64 scaled_wide(int64 x, int multiplier, int shift, int low_bits) {
    const int64 mask = (1LL << low_bits) - 1;
    const int64 below = (x & mask) * multiplier;
    const int64 total = (x >> low_bits) * multiplier + (below >> low_bits);
    return rounded_shift(total, shift - low_bits, (below & mask) != 0);
}

__device__ __forceinline__ int64 warp_sum(int64 x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

// x / count, halves to even; count > 0.
__device__ __forceinline__ int64 divided(int64 x, int64 count) {
    int64 whole = x / count, rest = x % count;
    if (rest < 0) --whole, rest += count;
    return whole + (2 * rest > count || (2 * rest == count && (whole & 1)));
}

// Floor of the square root of 0 <= x < 2^62, by Newton's iteration from above.
__device__ __forceinline__ int64 i_sqrt(int64 x) {
    if (x == 0) return 0;
    int64 guess = 1LL << ((64 - __clzll(x) + 1) / 2);
    for (;;) {
        const int64 better = (guess + x / guess) / 2;
        if (better >= guess) return guess;
        guess = better;
    }
}

// i-LayerNorm of the warp's row, whose columns each lane wrote itself; again_multiplier: 0 for one requantisation only.
__device__ void norm_row(const int* row, int width, int drop, const int* bias, const int* multiplier, const int* shift,
                         const int* late, int again_multiplier, int again_shift, signed char* out) {
    const int lane = threadIdx.x % WARP;
    int64 total = 0;
    for (int c = lane; c < width; c += WARP) total += row[c];
    const int64 mean = divided(warp_sum(total), width);
    total = 0;
    for (int c = lane; c < width; c += WARP) {
        const int64 y = (row[c] - mean) >> drop;
        total += y * y;
    }
    const int64 root = i_sqrt(warp_sum(total));
    const int64 factor = (1LL << 31) / ((root > 1 ? root : 1) << drop);
    for (int c = lane; c < width; c += WARP) {
        const int64 quotient = (row[c] - mean) * factor >> 1;
        int64 x = clamped(scaled(quotient + bias[c], multiplier[c], shift[c]) + late[c], ACTIVATION_BITS);
        if (again_multiplier != 0) x = clamped(scaled(x, again_multiplier, again_shift), ACTIVATION_BITS);
        out[c] = static_cast<signed char>(x);
    }
}

// One value of each kernel that treats all columns alike.
struct To8Bits {
    const int *multiplier, *shift;
    __device__ int64 operator()(int64 x, int c) const { return clamped(scaled(x, multiplier[c], shift[c]), ACTIVATION_BITS); }
};
struct Relu {
    const int *multiplier, *shift;
    __device__ int64 operator()(int64 x, int c) const {
        return clamped(scaled(x > 0 ? x : 0, multiplier[c], shift[c]), ACTIVATION_BITS);
    }
};
struct Gelu {
    const int* b;
    const int64 *c_, *one;
    const int *multiplier, *shift;
    __device__ int64 operator()(int64 x, int c) const {
        const int64 size = x < 0 ? -x : x, limit = -static_cast<int64>(b[c]);
        const int64 root = (size < limit ? size : limit) + b[c];
        const int64 polynomial = root * root + c_[c];
        const int64 erf = (x > 0 ? polynomial : x < 0 ? -polynomial : 0) >> ERF_SHIFT;
        return clamped(scaled_wide(x * -(erf + one[c]), multiplier[c], shift[c], GELU_LOW_BITS), ACTIVATION_BITS);
    }
};
// To 2^-12 with 32 bits, then 127 tanh of it: (1 - e) / (1 + e) with e = i-exp(-2 |x|), to the nearest.
struct Tanh {
    const int *multiplier, *shift;
    int ln2;
    int64 b, c_;
    int exp_multiplier, exp_shift;
    __device__ int64 operator()(int64 sum, int c) const {
        const int64 x = clamped(scaled(sum, multiplier[c], shift[c]), 32), one = 1LL << TANH_BITS;
        int64 q = -(x < 0 ? -x : x);
        if (q < EXP_BITS * static_cast<int64>(ln2)) q = EXP_BITS * static_cast<int64>(ln2);
        const int64 z = q / ln2, r = q - ln2 * z;
        int64 polynomial = (r + b) * r + c_;
        if (polynomial < 0) polynomial = 0;
        int64 whole = exp_shift + z;
        if (whole > 63 + EXP_LOW_BITS) whole = 63 + EXP_LOW_BITS;
        int64 e = scaled_wide(polynomial, exp_multiplier, static_cast<int>(whole), EXP_LOW_BITS);
        if (e > one) e = one;
        const int64 size = (2 * TANH_LIMIT * (one - e) + one + e) / (2 * (one + e));
        return x < 0 ? -size : x > 0 ? size : 0;
    }
};

template <typename Out, typename Activation>
__device__ void each(const int* sums, int rows, int width, int again_multiplier, int again_shift, Out* out,
                     const Activation& activate) {
    const int64 size = static_cast<int64>(rows) * width, step = static_cast<int64>(gridDim.x) * blockDim.x;
    for (int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
        int64 x = activate(sums[i], static_cast<int>(i % width));
        if (again_multiplier != 0) x = clamped(scaled(x, again_multiplier, again_shift), ACTIVATION_BITS);
        out[i] = static_cast<Out>(x);
    }
}

}  // namespace

// LayerNorm of table rows added in 16 bits. ids, positions, segments: (rows,); tables: (., width) int8, with a multiplier
// and a shift for each of their rows. A model without segments gives a table with one row of zeros.
extern "C" __global__ void __launch_bounds__(256) embed_norm_i8(
    const int* ids, const int* positions, const int* segments, const signed char* word, const int* word_multiplier,
    const int* word_shift, const signed char* position, const int* position_multiplier, const int* position_shift,
    const signed char* segment, const int* segment_multiplier, const int* segment_shift, int drop, const int* bias,
    const int* multiplier, const int* shift, const int* late, int rows, int width, signed char* out) {
    extern __shared__ int shared[];
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int* row = shared + warp * width;
    for (int n = blockIdx.x * warps + warp; n < rows; n += gridDim.x * warps) {
        const int w = ids[n], p = positions[n], s = segments[n];
        for (int c = lane; c < width; c += WARP) {
            int64 total = scaled(word[static_cast<int64>(w) * width + c], word_multiplier[w], word_shift[w]);
            total += scaled(segment[static_cast<int64>(s) * width + c], segment_multiplier[s], segment_shift[s]);
            total = clamped(total, SUM_BITS);
            total += scaled(position[static_cast<int64>(p) * width + c], position_multiplier[p], position_shift[p]);
            row[c] = static_cast<int>(clamped(total, SUM_BITS));
        }
        norm_row(row, width, drop, bias, multiplier, shift, late, 0, 0, out + static_cast<int64>(n) * width);
    }
}

// LayerNorm of sums + residual[places], each in the 22-bit scale by its own factor, (width,). sums: (rows, width);
// residual: (., width) int8; out: (rows, width) int8, requantised once more unless again_multiplier is 0.
extern "C" __global__ void __launch_bounds__(256) add_norm_i8(
    const int* sums, const int* sum_multiplier, const int* sum_shift, const signed char* residual, const int* places,
    const int* residual_multiplier, const int* residual_shift, int drop, const int* bias, const int* multiplier,
    const int* shift, const int* late, int again_multiplier, int again_shift, int rows, int width, signed char* out) {
    extern __shared__ int shared[];
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int* row = shared + warp * width;
    for (int n = blockIdx.x * warps + warp; n < rows; n += gridDim.x * warps) {
        const signed char* before = residual + static_cast<int64>(places[n]) * width;
        for (int c = lane; c < width; c += WARP) {
            const int64 sum = scaled(sums[static_cast<int64>(n) * width + c], sum_multiplier[c], sum_shift[c]);
            const int64 added = sum + scaled(before[c], residual_multiplier[c], residual_shift[c]);
            row[c] = static_cast<int>(clamped(added, NORM_INPUT_BITS));
        }
        norm_row(row, width, drop, bias, multiplier, shift, late, again_multiplier, again_shift,
                 out + static_cast<int64>(n) * width);
    }
}

// sums: (rows, width) int32; factors, b, c, one: (width,). Eight bits, requantised once more unless again_multiplier is 0.
extern "C" __global__ void requantize_i8(const int* sums, const int* multiplier, const int* shift, int rows, int width,
                                         signed char* out) {
    each(sums, rows, width, 0, 0, out, To8Bits{multiplier, shift});
}
extern "C" __global__ void i_relu(const int* sums, const int* multiplier, const int* shift, int again_multiplier,
                                  int again_shift, int rows, int width, signed char* out) {
    each(sums, rows, width, again_multiplier, again_shift, out, Relu{multiplier, shift});
}
extern "C" __global__ void i_gelu(const int* sums, const int* b, const long long* c, const long long* one,
                                  const int* multiplier, const int* shift, int again_multiplier, int again_shift,
                                  int rows, int width, signed char* out) {
    each(sums, rows, width, again_multiplier, again_shift, out, Gelu{b, c, one, multiplier, shift});
}
// The constants of i-exp of -2 |x| for x in units of 2^-12, in units of 2^-30: ln2 and what follows.
extern "C" __global__ void i_tanh(const int* sums, const int* multiplier, const int* shift, int ln2, long long b,
                                  long long c, int exp_multiplier, int exp_shift, int rows, int width,
                                  signed char* out) {
    each(sums, rows, width, 0, 0, out, Tanh{multiplier, shift, ln2, b, c, exp_multiplier, exp_shift});
}

// Logits: 32 bits in one scale. sums, out: (rows, width).
struct To32Bits {
    const int *multiplier, *shift;
    __device__ int64 operator()(int64 x, int c) const { return clamped(scaled(x, multiplier[c], shift[c]), 32); }
};
extern "C" __global__ void requantize_i32(const int* sums, const int* multiplier, const int* shift, int rows, int width,
                                          int* out) {
    each(sums, rows, width, 0, 0, out, To32Bits{multiplier, shift});
}

// out[n] = x[places[n]]. out: (rows, width).
extern "C" __global__ void gather_rows_i8(const signed char* x, const int* places, int rows, int width,
                                          signed char* out) {
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int n = blockIdx.x * warps + warp; n < rows; n += gridDim.x * warps) {
        const signed char* from = x + static_cast<int64>(places[n]) * width;
        signed char* to = out + static_cast<int64>(n) * width;
        if (width % 16 == 0) {
            for (int c = 16 * lane; c < width; c += 16 * WARP)
                *reinterpret_cast<int4*>(to + c) = *reinterpret_cast<const int4*>(from + c);
        } else {
            for (int c = lane; c < width; c += WARP) to[c] = from[c];
        }
    }
}
