// A few tokens times a packed matrix, without unpacking it: the packed bits are themselves operands of tensor cores.
//
// In 16-bit floats bit q alone, for q below 10, is the subnormal number 2^(q - 24). So of a packed word w
//
//     w & (0x00010001 << q)            is the pair of numbers (b_q, b_(q+16)) * 2^(q - 24)
//
// one instruction for two weights, and tensor cores multiply such pairs exactly. Activations of column c are kept times
// 2^-q, with the q at which the column's bit will be found, so that all products carry the same factor 2^-24, and one
// sum takes them all. Fields of 2, 4 and 8 bits are masked in the same way: a field is a number, too.
//
//     sum_c field_c x_c       is what tensor cores make, for each field plane and each group of columns ("plane sums")
//     sum_c x_c               is added up once, while activations are prepared
//     y                       is both, times the coefficients of the row and the group: `fold`, of each layout
//
// Activations are scaled by a power of two to at most 2^15, and are then exact in 16 bits if they have 8 significant
// bits (bfloat16) or are float16 already; what has more is split into two (PARTS), which are columns of their own. Sums
// are float32. Tensor cores take eight columns, so up to eight tokens cost what one does.
//
// A block of WARPS warps makes 16 * ROW_TILES rows: each warp takes every WARPS-th step of columns, and their sums meet
// in shared memory at the end, in the order of warps: the result does not depend on timing. While the kernel before it
// on the stream still runs, a block asks for its weights to be brought into the L2 cache, for these do not depend on it
// (programmatic dependent launch).
//
// Names in capitals are given when it is compiled (gemv.py). hardware.cuh, numbers.cuh and the layout's own file stand
// before this one; the last says what is read (`Tensors`, FIELD bits, STREAMS packed planes), which plane sums are made of
// them (TERMS, `term`), in how many SETS the columns are divided, and what sums are worth (`fold`).

constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 16 * ROW_TILES;
constexpr int PER_WORD = 32 / FIELD;            // columns of a word
constexpr int PAIRS = 8 / FIELD;                // products that use up a word, and the same word shifted by 8
constexpr int TOGETHER = PAIRS > 1 ? 2 : 1;     // pairs whose operands are loaded at once
constexpr int COLUMNS = TOKENS * SETS * PARTS;  // of B: tokens, in their sets, in their parts
constexpr int STEP = 4 * WORDS;                 // words of a row that a warp takes at a time
constexpr float PART = 2048.0f;                 // what a second part is multiplied by
static_assert(COLUMNS <= 8, "tensor cores take eight columns");
static_assert(GROUP_WORDS % STEP == 0, "a step has coefficients of one group");

// The activations of one word's columns, zero behind the last; times column scales if there are any.
__device__ inline void load_columns(float (&values)[PER_WORD], const number* x, const Tensors& tensors, int j, int m) {
  const int first = j * PER_WORD;
#if ALIGNED
  // m is a multiple of a word's columns, and rows of x begin at multiples of 16 bytes.
  constexpr int BYTES = PER_WORD * sizeof(number), PIECE = BYTES < 16 ? BYTES : 16, EACH = PIECE / sizeof(number);
  struct alignas(PIECE) Piece { number of[EACH]; };
#pragma unroll
  for (int i = 0; i < BYTES / PIECE; ++i) {
    const Piece piece = reinterpret_cast<const Piece*>(x + first)[i];
#pragma unroll
    for (int k = 0; k < EACH; ++k) values[i * EACH + k] = value_of(piece.of[k]);
  }
#else
#pragma unroll
  for (int i = 0; i < PER_WORD; ++i) values[i] = first + i < m ? value_of(x[first + i]) : 0.0f;
#endif
#if COLUMN_SCALES
#pragma unroll
  for (int i = 0; i < PER_WORD; ++i) values[i] *= first + i < m ? value_of(tensors.column_scales[first + i]) : 0.0f;
#endif
}

// Operands B of TOGETHER pairs.
struct alignas(8 * TOGETHER) Operand { uint2 of[TOGETHER]; };

// Those of all words of the activations, [pair / TOGETHER][column][word].
struct Operands {
  Operand* at;
  int words;  // of a row, in whole steps, and a few more so that lanes meet different banks

  __device__ Operand& of(int column, int pair, int j) const {
    return at[(pair / TOGETHER * COLUMNS + column) * words + j];
  }
};

__device__ inline float largest_of_block(float value, float* shared) {
  const unsigned largest = __reduce_max_sync(~0u, __float_as_uint(value));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = __uint_as_float(largest);
  __syncthreads();
  float found = shared[0];
#pragma unroll
  for (int i = 1; i < WARPS; ++i) found = fmaxf(found, shared[i]);
  __syncthreads();
  return found;
}

// One word's activations, of one set, as operands in one part or two.
__device__ inline void write_operands(const Operands& operands, const float (&values)[PER_WORD], int column, int j) {
  constexpr int QUARTER = PER_WORD / 4;
#pragma unroll
  for (int first = 0; first < PAIRS; first += TOGETHER) {
    Operand parts[PARTS];
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
      const int pair = first + k;
      const float shift = 1.0f / (1 << (pair * FIELD));
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = values[pair + i * QUARTER] * shift;
      const word low = half_pair(v[0], v[2]), high = half_pair(v[1], v[3]);
      parts[0].of[k] = make_uint2(low, high);
#if PARTS == 2
      parts[1].of[k] = make_uint2(
          half_pair((v[0] - half_of(low & 0xffff)) * PART, (v[2] - half_of(low >> 16)) * PART),
          half_pair((v[1] - half_of(high & 0xffff)) * PART, (v[3] - half_of(high >> 16)) * PART));
#endif
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) operands.of(column + part, first, j) = parts[part];
  }
}

// All of one token: operands, and for each step and set what its activations add up to.
__device__ inline void prepare_token(
    const Operands& operands, float* sums, const number* x, const Tensors& tensors, float scale, bool known, int token,
    int steps, int width, int m) {
  for (int base = 0; base < steps * STEP; base += THREADS) {
    const int j = base + threadIdx.x;
    float values[PER_WORD] = {};
    if (known && j < width) load_columns(values, x, tensors, j, m);
    const word marked = SETS > 1 && j < width ? second_set(tensors, j) : 0;
#pragma unroll
    for (int set = 0; set < SETS; ++set) {
      float own[PER_WORD], sum = 0.0f;
#pragma unroll
      for (int i = 0; i < PER_WORD; ++i) {
        own[i] = SETS == 1 || (marked >> i & 1) == set ? values[i] * scale : 0.0f;
        sum += own[i];
      }
      if (j < steps * STEP) write_operands(operands, own, (token * SETS + set) * PARTS, j);
#pragma unroll
      for (int lanes = 1; lanes < STEP; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (j < steps * STEP && j % STEP == 0) sums[(token * SETS + set) * steps + j / STEP] = sum;
    }
  }
}

struct alignas(4 * WORDS) Words { word of[WORDS]; };

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_THREADS / THREADS)
gemv(const number* x, result* y, Tensors tensors, int tokens, int n, int m, int width, int groups) {
  extern __shared__ uint4 shared[];
  __shared__ float found[WARPS];
  __shared__ float inverse[TOKENS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
  const int steps = (width + STEP - 1) / STEP;
  const Operands operands = {reinterpret_cast<Operand*>(shared), steps * STEP + 4};
  float* sums = reinterpret_cast<float*>(operands.at + PAIRS / TOGETHER * COLUMNS * operands.words);  // [token][set][step]
  float* totals = sums + TOKENS * SETS * steps;                                                   // [warp][column][row]

  prefetch_rows(tensors, first_row, min(ROWS, n - first_row), n, width, groups);
  wait_for_kernels_before();

  for (int token = 0; token < TOKENS; ++token) {
    const bool known = first_token + token < tokens;
    const number* own = x + (long long)(first_token + token) * m;
    float largest = 0.0f;
    for (int j = threadIdx.x; known && j < width; j += THREADS) {
      float values[PER_WORD];
      load_columns(values, own, tensors, j, m);
#pragma unroll
      for (int i = 0; i < PER_WORD; ++i) largest = fmaxf(largest, fabsf(values[i]));
    }
    // The power of two that brings the largest to between 2^14 and 2^15, by its exponent's bits; and its inverse.
    const int exponent = max(1, min(268 - (int)(__float_as_uint(largest_of_block(largest, found)) >> 23), 253));
    if (threadIdx.x == 0) inverse[token] = __uint_as_float((254 - exponent) << 23);
    prepare_token(operands, sums, own, tensors, __uint_as_float(exponent << 23), known, token, steps, width, m);
  }
  __syncthreads();

  int rows[ROW_TILES][2];
#pragma unroll
  for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i) rows[tile][i] = min(first_row + tile * 16 + i * 8 + g, n - 1);

  Words held[STREAMS][ROW_TILES][2], next[STREAMS][ROW_TILES][2];
  auto fetch = [&](int step) {
    const int j = step * STEP + t * WORDS;
#pragma unroll
    for (int stream = 0; stream < STREAMS; ++stream)
#pragma unroll
      for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          next[stream][tile][i] = Words{};
          if (j < width) {
            const word* row = row_of(tensors, stream, rows[tile][i], n, width);
            next[stream][tile][i] = *reinterpret_cast<const Words*>(row + j);
          }
        }
  };

  float planes[TERMS][ROW_TILES][4] = {}, total[ROW_TILES][4] = {}, of_x[2] = {};
  fetch(warp);
  for (int step = warp; step < steps; step += WARPS) {
#pragma unroll
    for (int stream = 0; stream < STREAMS; ++stream)
#pragma unroll
      for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) held[stream][tile][i] = next[stream][tile][i];
    fetch(step + WARPS);
#pragma unroll
    for (int v = 0; v < WORDS; ++v) {
#pragma unroll
      for (int first = 0; first < PAIRS; first += TOGETHER) {
        Operand b = {};
        if (g < COLUMNS) b = operands.of(g, first, step * STEP + t * WORDS + v);
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
          for (int k = 0; k < TERMS; ++k) {
            const word low = term(k, held, tile, 0, v), high = term(k, held, tile, 1, v);
#pragma unroll
            for (int pair = 0; pair < TOGETHER; ++pair) {
              const word mask = ((1u << FIELD) - 1) * 0x00010001u << ((first + pair) * FIELD);
              multiply(planes[k][tile], low & mask, high & mask, low >> 8 & mask, high >> 8 & mask, b.of[pair]);
            }
          }
      }
    }
    // Columns 2 t and 2 t + 1 of C. Second parts are not added up: sums of activations are those of whole numbers.
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if ((2 * t + k) < COLUMNS && (2 * t + k) % PARTS == 0) of_x[k] += sums[(2 * t + k) / PARTS * steps + step];
    if (GROUP_WORDS == 0 && step + WARPS < steps) continue;
    const int group = GROUP_WORDS == 0 ? 0 : step * STEP / (GROUP_WORDS + !GROUP_WORDS);
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Coefficients own = coefficients(tensors, rows[tile][i], group, n, groups);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float sums_of_planes[TERMS];
#pragma unroll
          for (int term = 0; term < TERMS; ++term) {
            sums_of_planes[term] = planes[term][tile][2 * i + k] * 16777216.0f;
            planes[term][tile][2 * i + k] = 0.0f;
          }
          total[tile][2 * i + k] += fold(own, sums_of_planes, of_x[k], (2 * t + k) / PARTS % SETS);
        }
      }
    of_x[0] = of_x[1] = 0.0f;
  }

#pragma unroll
  for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int column = 2 * t + k % 2, row = tile * 16 + k / 2 * 8 + g;
      if (column < COLUMNS) totals[(warp * COLUMNS + column) * ROWS + row] = total[tile][k];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * TOKENS; i += THREADS) {
    const int row = first_row + i % ROWS, token = i / ROWS;
    if (row >= n || first_token + token >= tokens) continue;
    float sum = 0.0f;
#pragma unroll
    for (int from = 0; from < WARPS; ++from)
#pragma unroll
      for (int column = 0; column < SETS * PARTS; ++column) {
        const float own = totals[(from * COLUMNS + token * SETS * PARTS + column) * ROWS + i % ROWS];
        sum += column % PARTS == 0 ? own : own * (1.0f / PART);
      }
    round_to(y[(long long)(first_token + token) * n + row], sum * inverse[token]);
  }
}
