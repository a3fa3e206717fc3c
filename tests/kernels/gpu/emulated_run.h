// Runs the kernel compiled above over its whole grid. Part of a test: see test_cuda.py.

namespace {
const number* of_x;
result* of_y;
Tensors of_tensors;
int of_sizes[5];
}  // namespace

extern "C" void run(
    const number* x, result* y, const Tensors* tensors, int tokens, int n, int m, int width, int groups, int rows,
    int columns) {
  of_x = x, of_y = y, of_tensors = *tensors;
  const int sizes[] = {tokens, n, m, width, groups};
  std::copy(sizes, sizes + 5, of_sizes);
  fibers::work = [] {
    gemv(of_x, of_y, of_tensors, of_sizes[0], of_sizes[1], of_sizes[2], of_sizes[3], of_sizes[4]);
  };
  blockDim.x = THREADS;
  for (blockIdx.x = 0; blockIdx.x < unsigned(rows); ++blockIdx.x)
    for (blockIdx.y = 0; blockIdx.y < unsigned(columns); ++blockIdx.y) {
      std::memset(shared, 0xff, sizeof shared);  // nothing may be taken for written: NaN
      fibers::run_block(THREADS);
    }
}
