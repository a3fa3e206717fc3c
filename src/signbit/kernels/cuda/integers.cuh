// Integers: W = (code - zero) * scale, with zeros of groups, or the middle of the codes for all.
//     y = scale (sum code x - zero sum x)

constexpr int FIELD = BITS, STREAMS = 1, TERMS = 1, SETS = 1;

struct Tensors {
  const word* codes;              // [row][word]
  const coefficient* scales;      // [row][group]
  const unsigned char* zeros;     // [row][group]
};

__device__ inline const word* row_of(const Tensors& tensors, int stream, int row, int n, int width) {
  return tensors.codes + (long long)row * width;
}

__device__ inline void prefetch_rows(const Tensors& tensors, int row, int rows, int n, int width, int groups) {
  prefetch(row_of(tensors, 0, row, n, width), 4ll * rows * width);
  prefetch(tensors.scales + (long long)row * groups, (long long)sizeof(coefficient) * rows * groups);
  if (ZEROS) prefetch(tensors.zeros + (long long)row * groups, (long long)rows * groups);
}

template <typename Held> __device__ inline word term(int k, const Held& held, int tile, int i, int v) {
  return held[0][tile][i].of[v];
}

struct Coefficients { float scale, zero; };

__device__ inline Coefficients coefficients(const Tensors& tensors, int row, int group, int n, int groups) {
  const long long at = (long long)row * groups + group;
  return {value_of(tensors.scales[at]), ZEROS ? (float)tensors.zeros[at] : MIDDLE};
}

__device__ inline float fold(const Coefficients& own, const float (&planes)[TERMS], float of_x, int set) {
  return own.scale * (planes[0] - own.zero * of_x);
}

__device__ inline word second_set(const Tensors& tensors, int j) { return 0; }
