// CUDA's side of kernels/cuda in plain C++: the threads of a block are fibers that take turns, and whatever a warp does
// together waits until all of its lanes have come there. Slow, exact, and the same on every run.
//
// hardware.cuh's functions are here by the same names; so are the few words of CUDA that the kernels use.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include <ucontext.h>

#define __device__
#define __global__
#define __launch_bounds__(...)

using std::max;
using std::min;

typedef unsigned int word;
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Dimensions { unsigned x, y; };

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }

static Dimensions threadIdx, blockIdx, blockDim;
alignas(16) static uint4 shared[256 * 1024 / 16];

namespace fibers {

constexpr int LARGEST = 1024, STACK = 64 * 1024;
static ucontext_t scheduler, contexts[LARGEST];
static std::vector<char> stacks(std::size_t(LARGEST) * STACK);
static bool ended[LARGEST];
static void (*work)();

inline void take_turns() {
  const unsigned own = threadIdx.x;
  swapcontext(&contexts[own], &scheduler);
}

// Where `count` threads meet.
struct Meeting {
  int arrived = 0;
  long generation = 0;

  void wait(int count) {
    const long own = generation;
    if (++arrived == count) {
      arrived = 0;
      ++generation;
    } else {
      while (generation == own) take_turns();
    }
  }
};

static Meeting of_block, of_warps[LARGEST / 32];
static struct { unsigned words[32][6]; } of_lanes[LARGEST / 32];

inline void enter() {
  work();
  ended[threadIdx.x] = true;
  swapcontext(&contexts[threadIdx.x], &scheduler);
}

inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    ended[i] = false;
    getcontext(&contexts[i]);
    contexts[i].uc_stack.ss_sp = stacks.data() + std::size_t(i) * STACK;
    contexts[i].uc_stack.ss_size = STACK;
    contexts[i].uc_link = nullptr;
    makecontext(&contexts[i], enter, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (ended[i]) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &contexts[i]);
      alive = true;
    }
  }
}

// What all lanes of this warp hand in.
inline const unsigned (&exchange(const unsigned (&own)[6]))[32][6] {
  const unsigned warp = threadIdx.x / 32;
  of_warps[warp].wait(32);  // all have read what was exchanged before
  std::memcpy(of_lanes[warp].words[threadIdx.x % 32], own, sizeof own);
  of_warps[warp].wait(32);
  return of_lanes[warp].words;
}

}  // namespace fibers

inline void __syncthreads() { fibers::of_block.wait(blockDim.x); }

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const auto& all = fibers::exchange({value});
  unsigned found = 0;
  for (int lane = 0; lane < 32; ++lane) found = max(found, all[lane][0]);
  return found;
}

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  const auto& all = fibers::exchange({__float_as_uint(value)});
  return __uint_as_float(all[threadIdx.x % 32 ^ lanes][0]);
}

inline float half_of(unsigned bits) {
  const std::uint16_t narrow = bits;
  _Float16 value;
  std::memcpy(&value, &narrow, 2);
  return float(value);
}

inline word half_bits(float value) {
  const _Float16 half = _Float16(value);
  std::uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

inline word half_pair(float low, float high) { return half_bits(low) | half_bits(high) << 16; }

inline unsigned short bfloat_bits(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return bits >> 16 | 64;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline void multiply(float (&c)[4], word a0, word a1, word a2, word a3, uint2 b) {
  const auto& all = fibers::exchange({a0, a1, a2, a3, b.x, b.y});
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = 2 * t + i % 2;  // the row is g or g + 8
    double sum = 0;
    for (int k = 0; k < 4; ++k)
      for (int late = 0; late < 2; ++late)
        for (int half = 0; half < 2; ++half)
          sum += double(half_of(all[4 * g + k][row + 2 * late] >> (16 * half))) *
                 double(half_of(all[4 * column + k][4 + late] >> (16 * half)));
    c[i] = float(double(c[i]) + sum);
  }
}

inline void prefetch(const void*, long long) {}
inline void wait_for_kernels_before() {}
