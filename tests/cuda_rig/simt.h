// What a CUDA source needs to run on a CPU: put before it with `g++ -include simt.h`, and linked with runtime.cpp.
//
// A CUDA thread is a fiber, a block runs its fibers in turn, blocks run one after another. __shared__ variables are
// thread-local ones: that is the only storage class that C++ allows where CUDA allows __shared__, `extern` included.
// Dynamic shared memory is defined behind the source by simt.py, which also adds the trampolines that unpack arguments.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ __constinit thread_local  // or arrays of vectors get a guard, which every access reads

// Bytes that one dynamic shared array can have: what a block of a Tesla T4 can ask for.
#define SIMT_DYNAMIC_BYTES 65536

struct dim3 {
    unsigned x, y, z;
};
extern "C" {
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// Of runtime.cpp. `line` tells one call from another: threads that meet in different lines have diverged.
int simt_block_barrier(int value, int operation, int line);
// all: 32 values, 0xFF bytes from lanes that take no part. orders: memory too, which shuffles and votes do not.
void simt_warp_exchange(unsigned mask, const void* mine, int size, void* all, bool orders, int line);
unsigned simt_active_lane();
void simt_atomic_access(const void* at, int size);
}
enum { SIMT_NONE, SIMT_COUNT, SIMT_AND, SIMT_OR };

// Barriers and warp operations. The line is the caller's: default arguments are evaluated there.

inline void __syncthreads(int line = __builtin_LINE()) { simt_block_barrier(0, SIMT_NONE, line); }
inline int __syncthreads_count(int p, int line = __builtin_LINE()) { return simt_block_barrier(p != 0, SIMT_COUNT, line); }
inline int __syncthreads_and(int p, int line = __builtin_LINE()) { return simt_block_barrier(p != 0, SIMT_AND, line); }
inline int __syncthreads_or(int p, int line = __builtin_LINE()) { return simt_block_barrier(p != 0, SIMT_OR, line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    int nothing = 0, all[32];
    simt_warp_exchange(mask, &nothing, sizeof nothing, all, true, line);
}

template <typename T>
struct SimtLanes {
    T of[32];
    SimtLanes(unsigned mask, T mine, int line) { simt_warp_exchange(mask, &mine, sizeof mine, of, false, line); }
};

template <typename T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32, int line = __builtin_LINE()) {
    const int first = simt_active_lane() / width * width;
    return SimtLanes<T>(mask, x, line).of[first + (source & (width - 1))];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, int line = __builtin_LINE()) {
    const int lane = simt_active_lane(), other = lane ^ bits;
    return SimtLanes<T>(mask, x, line).of[other / width <= lane / width ? other : lane];
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    const int lane = simt_active_lane(), first = lane / width * width;
    return SimtLanes<T>(mask, x, line).of[lane - int(delta) >= first ? lane - delta : lane];
}
template <typename T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    const int lane = simt_active_lane(), end = (lane / width + 1) * width;
    return SimtLanes<T>(mask, x, line).of[lane + int(delta) < end ? lane + delta : lane];
}
inline unsigned __ballot_sync(unsigned mask, int p, int line = __builtin_LINE()) {
    const SimtLanes<int> lanes(mask, p != 0, line);
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) bits |= unsigned(lanes.of[i]) << i;
    return bits;
}
inline int __any_sync(unsigned mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, int line = __builtin_LINE()) { return __ballot_sync(mask, p, line) == mask; }

// Atomics. Fibers change places only where the runtime says, so a plain operation is one.

template <typename T, typename Operation>
__attribute__((no_sanitize("thread"))) T simt_atomic(T* at, Operation operation) {
    simt_atomic_access(at, sizeof(T));
    const T before = *at;
    *at = operation(before);
    return before;
}
template <typename T>
T atomicAdd(T* at, T x) { return simt_atomic(at, [=](T old) { return T(old + x); }); }
template <typename T>
T atomicMax(T* at, T x) { return simt_atomic(at, [=](T old) { return old > x ? old : x; }); }
template <typename T>
T atomicMin(T* at, T x) { return simt_atomic(at, [=](T old) { return old < x ? old : x; }); }
template <typename T>
T atomicExch(T* at, T x) { return simt_atomic(at, [=](T) { return x; }); }
template <typename T>
T atomicCAS(T* at, T expected, T x) { return simt_atomic(at, [=](T old) { return old == expected ? x : old; }); }

// Numbers. -ffp-contract=off gives what nvcc's --fmad=false gives; a source asks for a fused operation by name.

typedef _Float16 __half;
typedef __half half;
// Vector types are read and written whole, as a card does it: the checker then sees one access, and its alignment.
typedef unsigned simt_word4 __attribute__((aligned(1)));
typedef unsigned long long simt_word8 __attribute__((aligned(1)));
typedef int simt_word16 __attribute__((vector_size(16), aligned(1)));
#define SIMT_WHOLE(Type, Word)                                                                  \
    Type() = default;                                                                           \
    Type(const Type& other) { *reinterpret_cast<Word*>(this) = reinterpret_cast<const Word&>(other); } \
    Type& operator=(const Type& other) {                                                        \
        *reinterpret_cast<Word*>(this) = reinterpret_cast<const Word&>(other);                  \
        return *this;                                                                           \
    }
#define SIMT_PAIR(Type, Element, Word)                    \
    struct alignas(2 * sizeof(Element)) Type {            \
        Element x, y;                                     \
        Type(Element x, Element y) : x(x), y(y) {}        \
        SIMT_WHOLE(Type, Word)                            \
    };
#define SIMT_FOUR(Type, Element, Word)                                                         \
    struct alignas(4 * sizeof(Element)) Type {                                                 \
        Element x, y, z, w;                                                                    \
        Type(Element x, Element y, Element z, Element w) : x(x), y(y), z(z), w(w) {}           \
        SIMT_WHOLE(Type, Word)                                                                 \
    };
SIMT_PAIR(__half2, __half, simt_word4)
SIMT_PAIR(float2, float, simt_word8)
SIMT_PAIR(int2, int, simt_word8)
SIMT_FOUR(float4, float, simt_word16)
SIMT_FOUR(int4, int, simt_word16)
SIMT_FOUR(uint4, unsigned, simt_word16)
SIMT_FOUR(char4, signed char, simt_word4)
typedef __half2 half2;
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline char4 make_char4(signed char x, signed char y, signed char z, signed char w) { return {x, y, z, w}; }

inline float __half2float(__half x) { return float(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __float2half(float x) { return __half(x); }
inline float2 __half22float2(__half2 x) { return {float(x.x), float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __int_as_float(int x) {
    float y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __mulhi(int a, int b) { return int(static_cast<long long>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(static_cast<unsigned long long>(a) * b >> 32); }
inline long long __mul64hi(long long a, long long b) { return static_cast<long long>(static_cast<__int128>(a) * b >> 64); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
template <typename T>
T __ldg(const T* at) { return *at; }
using std::max;
using std::min;
inline long long max(long long a, int b) { return std::max<long long>(a, b); }
inline long long min(long long a, int b) { return std::min<long long>(a, b); }
