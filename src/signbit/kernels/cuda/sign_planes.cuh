// Sign planes: W = mean + sum over planes of scale * sign. A sign is 1 - 2 b:
//     y = mean sum x + sum over planes of scale (sum x - 2 sum b x)

constexpr int FIELD = 1, STREAMS = PLANES, TERMS = PLANES, SETS = 1;

struct Tensors {
  const word* signs;               // [plane][row][word]
  const coefficient* scales;       // [plane][row][group]
  const coefficient* means;        // [row][group]
  const coefficient* column_scales;  // [column]
};

__device__ inline const word* row_of(const Tensors& tensors, int plane, int row, int n, int width) {
  return tensors.signs + ((long long)plane * n + row) * width;
}

__device__ inline void prefetch_rows(const Tensors& tensors, int row, int rows, int n, int width, int groups) {
  for (int plane = 0; plane < PLANES; ++plane) {
    prefetch(row_of(tensors, plane, row, n, width), 4ll * rows * width);
    prefetch(tensors.scales + ((long long)plane * n + row) * groups, (long long)sizeof(coefficient) * rows * groups);
  }
  if (MEAN) prefetch(tensors.means + (long long)row * groups, (long long)sizeof(coefficient) * rows * groups);
}

template <typename Held> __device__ inline word term(int k, const Held& held, int tile, int i, int v) {
  return held[k][tile][i].of[v];
}

struct Coefficients { float scales[PLANES], mean; };

__device__ inline Coefficients coefficients(const Tensors& tensors, int row, int group, int n, int groups) {
  Coefficients found;
#pragma unroll
  for (int plane = 0; plane < PLANES; ++plane)
    found.scales[plane] = value_of(tensors.scales[((long long)plane * n + row) * groups + group]);
  found.mean = MEAN ? value_of(tensors.means[(long long)row * groups + group]) : 0.0f;
  return found;
}

__device__ inline float fold(const Coefficients& own, const float (&planes)[TERMS], float of_x, int set) {
  float sum = own.mean * of_x;
#pragma unroll
  for (int plane = 0; plane < PLANES; ++plane) sum += own.scales[plane] * (of_x - 2.0f * planes[plane]);
  return sum;
}

__device__ inline word second_set(const Tensors& tensors, int j) { return 0; }
