// All that is special to a GPU's hardware. (tests/kernels/gpu/emulated.h has the same in plain C++, for the tests that run
// these kernels where there is no GPU.) No header of CUDA's is needed, so none has to be found at run time.

typedef unsigned int word;

// float16 as float32.
__device__ inline float half_of(unsigned bits) {
  float value;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(bits));
  return value;
}

// Two floats rounded to float16, the first in the low bits.
__device__ inline word half_pair(float low, float high) {
  word pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// A float rounded to bfloat16.
__device__ inline unsigned short bfloat_bits(float value) {
  word pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
  return (unsigned short)pair;
}

// mma.m16n8k16 of halves, c += a b (PTX ISA 9.7.14.5.8). Of lane 4 g + t, a is rows g, g + 8, g, g + 8 at products
// 2 t, 2 t + 1 and (the last two) 2 t + 8, 2 t + 9; b is column g at the same products; c is rows g, g, g + 8, g + 8 in
// columns 2 t, 2 t + 1, 2 t, 2 t + 1.
__device__ inline void multiply(float (&c)[4], word a0, word a1, word a2, word a3, uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}

// Have memory brought into the second-level cache, by all threads of a block together.
__device__ inline void prefetch(const void* from, long long bytes) {
  const char* first = static_cast<const char*>(from);
  for (long long at = threadIdx.x * 128ll; at < bytes; at += blockDim.x * 128ll)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(first + at));
}

// Wait until all kernels before this one have finished, and let the next one come as far as here.
__device__ inline void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
