// Numbers in memory: of activations (KIND_OF_X), results (KIND_OF_Y) and coefficients (KIND_OF_SCALES), each 0 for
// float16, 1 for bfloat16, 2 for float32.

template <int KIND> struct Number { unsigned short bits; };
template <> struct Number<2> { float value; };

typedef Number<KIND_OF_X> number;
typedef Number<KIND_OF_Y> result;
typedef Number<KIND_OF_SCALES> coefficient;

__device__ inline float value_of(Number<0> number) { return half_of(number.bits); }
__device__ inline float value_of(Number<1> number) { return __uint_as_float((unsigned)number.bits << 16); }
__device__ inline float value_of(Number<2> number) { return number.value; }

__device__ inline void round_to(Number<0>& to, float value) { to.bits = (unsigned short)half_pair(value, 0.0f); }
__device__ inline void round_to(Number<1>& to, float value) { to.bits = bfloat_bits(value); }
__device__ inline void round_to(Number<2>& to, float value) { to.value = value; }
