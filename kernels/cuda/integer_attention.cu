// Integer-only ragged attention (I-BERT), equal bit for bit to minilpt/kernels/integer.py.
//
// Legend: N packed tokens, B sequences, H heads, D width, d = D / H head width, n live tokens of one sequence, Z blocks of
// QUERIES queries. Queries, keys and values are 8 bits, (N, .), scores 32, a row of probabilities sums to 2^32 before its
// last shift and to 2^8 behind it; masses are 64 bits. cu_seqlens: (B + 1,) bounds. Integer sums have no order, so geometry
// changes no bit.
//
// Traffic per head and sequence: d n (2 + n / 64) from the second-level cache, 3 d n + d n' from and to memory. On a T4
// (some 32 T dp4a operations a second) 2 n^2 d operations for masses and as many for scores of the context; about 60 integer
// instructions for each i-exp, n^2 and n n' of them, are the limit.
//
// On a T4, for RoBERTa-base and texts of 32, 128 and 512 tokens (benchmarks/cuda_compile.py): registers, no spill;
// threads of a block; kilobytes of its shared memory; resident threads in percent of 1,024.
//   attention_context_i8: 70; 128; 5.9, 12.0, 36.6; 87.5, 62.5, 12.5
//   attention_mass_i8: 55; 128; 6.1, 13.1, 40.7; 100, 62.5, 12.5
//   merged_context_i8: 57; 64; 0.1, 0.5, 2.0; 100
//   weighted_probs_i8: 72; 128; 6.1, 13.1, 40.7; 87.5, 62.5, 12.5

namespace {

typedef long long int64;

constexpr int WARP = 32, TILE = 32, ROWS = 4;  // keys in shared memory at a time, one a lane; queries of one warp
constexpr int QUERIES = 64;                    // queries of one block's partial masses
constexpr unsigned ALL = 0xffffffffu;
constexpr int EXP_BITS = 30, EXP_LOW_BITS = 16, EXP_OUTPUT_BITS = 16, SOFTMAX_BITS = 32, PROB_BITS = 8;
constexpr int ACTIVATION_BITS = 8;

struct Exp {
    int ln2;
    int64 b, c;
    int multiplier, shift;
};

__device__ __forceinline__ int64 clamped(int64 x, int bits) {
    const int64 most = 1LL << (bits - 1);
    return x < -most ? -most : x > most - 1 ? most - 1 : x;
}

__device__ __forceinline__ int64 rounded_shift(int64 x, int shift, int64 rest) {
    const int64 odd = (x >> shift) & 1;
    return (x + ((1LL << (shift - 1)) - 1) + (odd | rest)) >> shift;
}

__device__ __forceinline__ int64 scaled_wide(int64 x, int multiplier, int shift, int low_bits) {
    const int64 mask = (1LL << low_bits) - 1;
    const int64 below = (x & mask) * multiplier;
    const int64 total = (x >> low_bits) * multiplier + (below >> low_bits);
    return rounded_shift(total, shift - low_bits, (below & mask) != 0);
}

// exp of q <= 0, 15 bits. q is cut to 30 ln2, which 32 bits hold: |ln2| < 2^23.
__device__ __forceinline__ int i_exp(int64 q, const Exp& exp) {
    const int64 lowest = EXP_BITS * static_cast<int64>(exp.ln2);
    const int cut = static_cast<int>(q < lowest ? lowest : q);
    const int z = cut / exp.ln2, r = cut - exp.ln2 * z;
    int64 polynomial = (r + exp.b) * r + exp.c;
    if (polynomial < 0) polynomial = 0;
    const int shift = min(exp.shift + z, 63 + EXP_LOW_BITS);
    return static_cast<int>(clamped(scaled_wide(polynomial, exp.multiplier, shift, EXP_LOW_BITS), EXP_OUTPUT_BITS));
}

__device__ __forceinline__ int warp_sum(int x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}
__device__ __forceinline__ int warp_max(int x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

// A head's row in shared memory: whole words of four bytes, and of these whole fours, an odd number of them, so that eight
// lanes, as many as are served at once, that read one four each meet no bank twice.
__device__ __forceinline__ int fours(int head_width) { return (head_width + 15) / 16; }
__device__ __forceinline__ int words(int head_width) { return 4 * (fours(head_width) | 1); }

struct Following {  // rows that lie one after another
    const signed char* first;
    int stride;
    __device__ const signed char* operator()(int row) const { return first + static_cast<int64>(row) * stride; }
};
struct Listed {  // rows by their numbers
    const signed char* first;
    int stride;
    const int* numbers;
    __device__ const signed char* operator()(int row) const { return first + static_cast<int64>(numbers[row]) * stride; }
};

// `count` rows of one head, zeros behind their ends and in the rows from there to `room`, by all threads of the block.
// at(row): its head. Where a head is 16 bytes, or a multiple, each begins at one.
template <typename At>
__device__ void load_rows(const At& at, int count, int room, int head_width, int* tile) {
    for (int i = threadIdx.x; i < room * fours(head_width); i += blockDim.x) {
        const int row = i / fours(head_width), c = 16 * (i % fours(head_width));
        int4 x = make_int4(0, 0, 0, 0);
        if (row < count && head_width % 16 == 0) {
            x = *reinterpret_cast<const int4*>(at(row) + c);
        } else if (row < count) {
            const signed char* from = at(row);
            const auto word = [&](int first) {
                unsigned packed = 0;
                for (int k = 0; k < 4; ++k)
                    if (first + k < head_width)
                        packed |= static_cast<unsigned>(static_cast<unsigned char>(from[first + k])) << (8 * k);
                return static_cast<int>(packed);
            };
            x = make_int4(word(c), word(c + 4), word(c + 8), word(c + 12));
        }
        *reinterpret_cast<int4*>(tile + row * words(head_width) + c / 4) = x;
    }
}

// Scores of the warp's queries, those of ROWS rows, with the keys in `key`, one a lane.
__device__ void score(const int* query, const int* key, int count, int keys, int k0, int head_width, int longest,
                      int* scores) {
    const int first = threadIdx.x / WARP * ROWS, lane = threadIdx.x % WARP, pitch = words(head_width);
    if (lane >= keys) return;
    int total[ROWS] = {};
#pragma unroll 1
    for (int c = 0; c < 4 * fours(head_width); c += 4) {
        const int4 y = *reinterpret_cast<const int4*>(key + lane * pitch + c);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int4 x = *reinterpret_cast<const int4*>(query + (first + r) * pitch + c);
            total[r] = __dp4a(x.x, y.x, __dp4a(x.y, y.y, __dp4a(x.z, y.z, __dp4a(x.w, y.w, total[r]))));
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
        if (first + r < count) scores[(first + r) * longest + k0 + lane] = total[r];
}

// In place: a row of scores to probabilities that sum to 2^32 at most, by one warp.
__device__ void i_softmax(int* row, int n, const Exp& exp) {
    const int lane = threadIdx.x % WARP;
    int most = -2147483647 - 1, total = 0;
    for (int k = lane; k < n; k += WARP) most = max(most, row[k]);
    most = warp_max(most);
    for (int k = lane; k < n; k += WARP) {
        row[k] = i_exp(static_cast<int64>(row[k]) - most, exp);
        total += row[k];
    }
    const int64 factor = (1LL << SOFTMAX_BITS) / warp_sum(total), limit = (1LL << SOFTMAX_BITS) - 1;
    for (int k = lane; k < n; k += WARP) {
        const int64 wide = row[k] * factor;
        row[k] = static_cast<int>(static_cast<unsigned>(wide < limit ? wide : limit));
    }
}

struct Wide {  // of a probability, the bits that count as mass
    unsigned mask;
    __device__ int64 operator()(unsigned wide, int) const { return wide & mask; }
};
struct Weighted {  // an 8-bit probability times its query's weight
    const int64* weights;
    __device__ int64 operator()(unsigned wide, int query) const {
        return weights[query] * static_cast<int64>(wide >> (SOFTMAX_BITS - PROB_BITS));
    }
};

// Shared memory: queries (rows, words), keys (TILE, words), columns (longest,) of 64 bits, scores (rows, longest) of 32.
template <typename Value>
__device__ void sum_columns(const signed char* qkv, const int* cu_seqlens, int tokens, int width, int heads, int longest,
                            const Exp& exp, Value value, int64* out_zhn) {
    extern __shared__ int4 shared[];
    const int d = width / heads, h = blockIdx.y, b = blockIdx.z, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    const int rows = blockDim.x / WARP * ROWS, warp = threadIdx.x / WARP;
    const int first = blockIdx.x * QUERIES, last = min(first + QUERIES, n);
    if (first >= n) return;
    int* query = reinterpret_cast<int*>(shared);
    int* key = query + rows * words(d);
    int64* columns = reinterpret_cast<int64*>(key + TILE * words(d));
    int* scores = reinterpret_cast<int*>(columns + longest);
    const signed char* head = qkv + static_cast<int64>(begin) * 3 * width + h * d;
    for (int k = threadIdx.x; k < n; k += blockDim.x) columns[k] = 0;
    for (int q0 = first; q0 < last; q0 += rows) {
        const int count = min(rows, last - q0);
        load_rows(Following{head + static_cast<int64>(q0) * 3 * width, 3 * width}, count, rows, d, query);
        for (int k0 = 0; k0 < n; k0 += TILE) {
            const int keys = min(TILE, n - k0);
            load_rows(Following{head + static_cast<int64>(k0) * 3 * width + width, 3 * width}, keys, keys, d, key);
            __syncthreads();  // queries and keys are there; whoever added up the scores before is done
            score(query, key, count, keys, k0, d, longest, scores);
            __syncthreads();  // before the next keys take their place; and the scores are there
        }
        for (int r = warp * ROWS; r < min(warp * ROWS + ROWS, count); ++r) i_softmax(scores + r * longest, n, exp);
        __syncthreads();  // all rows of probabilities are there
        for (int k = threadIdx.x; k < n; k += blockDim.x) {
            int64 total = columns[k];
            for (int r = 0; r < count; ++r)
                total += value(static_cast<unsigned>(scores[r * longest + k]), begin + q0 + r);
            columns[k] = total;
        }
    }
    int64* out = out_zhn + (static_cast<int64>(blockIdx.x) * heads + h) * tokens + begin;
    for (int k = threadIdx.x; k < n; k += blockDim.x) out[k] = columns[k];
}

__device__ __forceinline__ signed char to_8_bits(int64 sum, int multiplier, int shift) {
    return static_cast<signed char>(clamped(rounded_shift(sum * multiplier, shift, 0), ACTIVATION_BITS));
}

// How much of a value a probability takes: its 8 upper bits.
__device__ __forceinline__ int weight(const int* probs, int k) {
    return static_cast<int>(static_cast<unsigned>(probs[k]) >> (SOFTMAX_BITS - PROB_BITS));
}

// P V of `rows` of the warp's queries, at most ROWS, whose probabilities lie `longest` apart; values `stride` apart from
// `value` on. |probability| < 2^8, summing to 2^8 at most: sums are below 2^15. out: the first row's head.
__device__ void add_values(const int* probs, int longest, int rows, int n, const signed char* value, int stride,
                           int head_width, int width, int multiplier, int shift, signed char* out) {
    const int lane = threadIdx.x % WARP, lanes = head_width / 4;
    if (head_width % 4 == 0 && WARP % lanes == 0) {  // a lane takes four columns of each (32 / lanes)th value
        const int c = 4 * (lane % lanes), apart = WARP / lanes;
        int total[ROWS][4] = {};
        for (int k = lane / lanes; k < n; k += apart) {
            const char4 v = *reinterpret_cast<const char4*>(value + static_cast<int64>(k) * stride + c);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (r >= rows) continue;
                const int p = weight(probs + r * longest, k);
                total[r][0] += p * v.x, total[r][1] += p * v.y, total[r][2] += p * v.z, total[r][3] += p * v.w;
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                for (int step = lanes; step < WARP; step *= 2)
                    total[r][i] += __shfl_xor_sync(ALL, total[r][i], step);
            if (r < rows && lane < lanes)
                *reinterpret_cast<char4*>(out + static_cast<int64>(r) * width + c) =
                    make_char4(to_8_bits(total[r][0], multiplier, shift), to_8_bits(total[r][1], multiplier, shift),
                               to_8_bits(total[r][2], multiplier, shift), to_8_bits(total[r][3], multiplier, shift));
        }
    } else {
        for (int c = lane; c < head_width; c += WARP)
            for (int r = 0; r < rows; ++r) {
                int total = 0;
                for (int k = 0; k < n; ++k)
                    total += weight(probs + r * longest, k) * value[static_cast<int64>(k) * stride + c];
                out[static_cast<int64>(r) * width + c] = to_8_bits(total, multiplier, shift);
            }
    }
}

}  // namespace

// Grid (Z of the longest sequence, H, B). qkv: (N, 3 D). mass_mask: the bits of a probability that count. mass_zhn:
// (Z, H, N), of which a sequence writes its own columns in its own first ceil(n / 64) rows.
extern "C" __global__ void __launch_bounds__(256, 3) attention_mass_i8(
    const signed char* qkv, const int* cu_seqlens, int tokens, int width, int heads, int longest, int ln2, long long b,
    long long c, int exp_multiplier, int exp_shift, unsigned mass_mask, long long* mass_zhn) {
    sum_columns(qkv, cu_seqlens, tokens, width, heads, longest, Exp{ln2, b, c, exp_multiplier, exp_shift},
                Wide{mass_mask}, mass_zhn);
}

// The same, of 8-bit probabilities times weights, (N,), of their queries.
extern "C" __global__ void __launch_bounds__(256, 3) weighted_probs_i8(
    const signed char* qkv, const int* cu_seqlens, const long long* weights, int tokens, int width, int heads,
    int longest, int ln2, long long b, long long c, int exp_multiplier, int exp_shift, long long* probs_zhn) {
    sum_columns(qkv, cu_seqlens, tokens, width, heads, longest, Exp{ln2, b, c, exp_multiplier, exp_shift},
                Weighted{weights}, probs_zhn);
}

// Grid (ceil(most queries of a sequence / rows), H, B), rows = 4 for each warp. Query i of q_cu_seqlens' N' is row
// q_rows[i] of q; keys and values lie k_offset and v_offset behind the start of kv's rows. context: (N', D) int8, by one
// factor. Shared memory: queries (rows, words), keys (TILE, words), probabilities (rows, longest).
extern "C" __global__ void __launch_bounds__(256, 3) attention_context_i8(
    const signed char* q, int q_stride, const int* q_rows, const int* q_cu_seqlens, const signed char* kv,
    int kv_stride, int k_offset, int v_offset, const int* cu_seqlens, int width, int heads, int longest, int ln2,
    long long b, long long c, int exp_multiplier, int exp_shift, int multiplier, int shift, signed char* context) {
    extern __shared__ int4 shared[];
    const Exp exp{ln2, b, c, exp_multiplier, exp_shift};
    const int d = width / heads, h = blockIdx.y, sequence = blockIdx.z;
    const int begin = cu_seqlens[sequence], n = cu_seqlens[sequence + 1] - begin;
    const int warp = threadIdx.x / WARP, rows = blockDim.x / WARP * ROWS, pitch = words(d);
    const int first = q_cu_seqlens[sequence] + blockIdx.x * rows, last = min(first + rows, q_cu_seqlens[sequence + 1]);
    if (first >= last) return;
    int* query = reinterpret_cast<int*>(shared);
    int* key = query + rows * pitch;
    int* probs = key + TILE * pitch;
    load_rows(Listed{q + h * d, q_stride, q_rows + first}, last - first, rows, d, query);
    const signed char* head = kv + static_cast<int64>(begin) * kv_stride + h * d;
    for (int k0 = 0; k0 < n; k0 += TILE) {
        const int keys = min(TILE, n - k0);
        load_rows(Following{head + static_cast<int64>(k0) * kv_stride + k_offset, kv_stride}, keys, keys, d, key);
        __syncthreads();  // queries and keys are there
        score(query, key, last - first, keys, k0, d, longest, probs);
        __syncthreads();  // before the next keys take their place
    }
    const int mine = min(ROWS, last - first - warp * ROWS);  // queries of this warp; none if negative
    int* row = probs + warp * ROWS * longest;
    for (int r = 0; r < mine; ++r) i_softmax(row + r * longest, n, exp);
    __syncwarp();  // the rows are there
    add_values(row, longest, mine, n, head + v_offset, kv_stride, d, width, multiplier, shift,
               context + static_cast<int64>(first + warp * ROWS) * width + h * d);
}

// The context of the row that stands for removed ones: its probabilities are their weighted mean, halves up. Grid (H, B).
// probs_zhn: of `weighted_probs_i8`; total_weight: (B,); stand_in: (B,), the packed row of the sequence's, or -1; rank:
// (N,), where a packed row goes. Writes row rank[stand_in[b]] of context. Shared memory: probabilities (longest,).
extern "C" __global__ void __launch_bounds__(256, 3) merged_context_i8(
    const long long* probs_zhn, const signed char* qkv, const int* cu_seqlens, const long long* total_weight,
    const int* stand_in, const int* rank, int tokens, int width, int heads, int multiplier, int shift,
    signed char* context) {
    extern __shared__ int shared_words[];
    const int d = width / heads, h = blockIdx.x, b = blockIdx.y, begin = cu_seqlens[b], n = cu_seqlens[b + 1] - begin;
    if (stand_in[b] < 0) return;
    for (int k = threadIdx.x; k < n; k += blockDim.x) {
        int64 total = 0;
        for (int z = 0; z * QUERIES < n; ++z)
            total += probs_zhn[(static_cast<int64>(z) * heads + h) * tokens + begin + k];
        shared_words[k] = static_cast<int>((2 * total + total_weight[b]) / (2 * total_weight[b]));
    }
    __syncthreads();  // all probabilities are there
    const signed char* value = qkv + static_cast<int64>(begin) * 3 * width + 2 * width + h * d;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        int total = 0;
        for (int k = 0; k < n; ++k) total += shared_words[k] * value[static_cast<int64>(k) * 3 * width + i];
        context[static_cast<int64>(rank[stand_in[b]]) * width + h * d + i] = to_8_bits(total, multiplier, shift);
    }
}
