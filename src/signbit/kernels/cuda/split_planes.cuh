// Split planes: a bit b for the sign and a bit z for the zone (dense or sparse) of every weight, and columns that are
// salient, whose z is the sign of a correction. Activations go in two sets: those of ordinary columns and those of
// salient ones, each zero where the other is not, so that one set of plane sums serves both:
//
//     ordinary    mean_0 sum x + (mean_1 - mean_0) sum z x + scale_0 (sum x - 2 sum b x)
//                 + (scale_1 - scale_0) (sum z x - 2 sum bz x)
//     salient     mean sum x + scale (sum x - 2 sum b x) + correction (sum x - 2 sum z x)

constexpr int FIELD = 1, STREAMS = 2, TERMS = 3, SETS = 2;

struct Tensors {
  const word* signs;                    // [row][word]
  const word* second;                   // [row][word]
  const word* salient;                  // [word]
  const coefficient* scales;            // [row][group][zone]
  const coefficient* means;             // [row][group][zone]
  const coefficient* salient_scales;    // [row][slot][scale, correction]
  const coefficient* salient_means;     // [row][slot]
  const int* slots;                     // [group], -1 for groups without salient columns
  int salient_groups;
};

__device__ inline const word* row_of(const Tensors& tensors, int stream, int row, int n, int width) {
  return (stream == 0 ? tensors.signs : tensors.second) + (long long)row * width;
}

__device__ inline void prefetch_rows(const Tensors& tensors, int row, int rows, int n, int width, int groups) {
  constexpr long long SIZE = sizeof(coefficient);
  prefetch(tensors.signs + (long long)row * width, 4ll * rows * width);
  prefetch(tensors.second + (long long)row * width, 4ll * rows * width);
  prefetch(tensors.scales + (long long)row * groups * 2, SIZE * rows * groups * 2);
  prefetch(tensors.salient_scales + (long long)row * tensors.salient_groups * 2, SIZE * rows * tensors.salient_groups * 2);
  if (MEAN) {
    prefetch(tensors.means + (long long)row * groups * 2, SIZE * rows * groups * 2);
    prefetch(tensors.salient_means + (long long)row * tensors.salient_groups, SIZE * rows * tensors.salient_groups);
  }
}

template <typename Held> __device__ inline word term(int k, const Held& held, int tile, int i, int v) {
  const word negative = held[0][tile][i].of[v], second = held[1][tile][i].of[v];
  return k == 0 ? negative : k == 1 ? second : negative & second;
}

struct Coefficients { float scales[2], means[2], salient[2], salient_mean; };

__device__ inline Coefficients coefficients(const Tensors& tensors, int row, int group, int n, int groups) {
  const long long at = ((long long)row * groups + group) * 2;
  Coefficients found = {{value_of(tensors.scales[at]), value_of(tensors.scales[at + 1])}};
  if (MEAN) {
    found.means[0] = value_of(tensors.means[at]);
    found.means[1] = value_of(tensors.means[at + 1]);
  }
  const int slot = tensors.slots[group];
  if (slot >= 0) {
    const long long place = (long long)row * tensors.salient_groups + slot;
    found.salient[0] = value_of(tensors.salient_scales[2 * place]);
    found.salient[1] = value_of(tensors.salient_scales[2 * place + 1]);
    if (MEAN) found.salient_mean = value_of(tensors.salient_means[place]);
  }
  return found;
}

__device__ inline float fold(const Coefficients& own, const float (&planes)[TERMS], float of_x, int set) {
  const float negative = planes[0], second = planes[1], both = planes[2];
  if (set == 0)
    return own.means[0] * of_x + (own.means[1] - own.means[0]) * second + own.scales[0] * (of_x - 2.0f * negative) +
           (own.scales[1] - own.scales[0]) * (second - 2.0f * both);
  return own.salient_mean * of_x + own.salient[0] * (of_x - 2.0f * negative) + own.salient[1] * (of_x - 2.0f * second);
}

__device__ inline word second_set(const Tensors& tensors, int j) { return tensors.salient[j]; }
