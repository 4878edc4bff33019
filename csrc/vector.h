// Float vectors of a width chosen at compile time, in GCC's vector extension: one source for AVX-512 (16 lanes), AVX2 (8) and
// plain x86-64 or any other CPU (4). Everything here is inlined into functions with a target attribute; see SAFERLHF_WIDTHS.
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace saferlhf {

template <int W>
struct Vector {
  typedef float Float __attribute__((vector_size(W * 4)));
  typedef int32_t Int __attribute__((vector_size(W * 4)));
  typedef uint32_t Word __attribute__((vector_size(W * 4)));
  typedef uint16_t Half __attribute__((vector_size(W * 2)));
};

template <class To, class From>
SAFERLHF_INLINE To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  std::memcpy(&y, &x, sizeof(x));
  return y;
}

template <class V, class T>
SAFERLHF_INLINE V load(const T* from) {
  V x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <class V, class T>
SAFERLHF_INLINE void store(T* to, V x) {
  std::memcpy(to, &x, sizeof(x));
}

// Storage types of logits. Conversions use bit operations and no conversion instruction, so they work on any CPU.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline int64_t size_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

template <int W>
SAFERLHF_INLINE typename Vector<W>::Float load_float(const float* from) {
  return load<typename Vector<W>::Float>(from);
}

template <int W>
SAFERLHF_INLINE typename Vector<W>::Float load_float(const BFloat16* from) {
  using V = Vector<W>;
  return bits_of<typename V::Float>(__builtin_convertvector(load<typename V::Half>(from), typename V::Word) << 16);
}

template <int W>
SAFERLHF_INLINE typename Vector<W>::Float load_float(const Float16* from) {
  using V = Vector<W>;
  const typename V::Word h = __builtin_convertvector(load<typename V::Half>(from), typename V::Word);
  const typename V::Word shifted = (h & 0x7fffu) << 13, exponent = shifted & (0x7c00u << 13);
  const typename V::Word normal = shifted + (112u << 23);
  const typename V::Word special = shifted + (224u << 23);  // infinity and NaN
  const typename V::Float tiny = bits_of<typename V::Float>(shifted + (113u << 23)) - 6.103515625e-05f;  // 2^-14: subnormal
  typename V::Word x = exponent == (0x7c00u << 13) ? special : normal;
  x = exponent == 0u ? bits_of<typename V::Word>(tiny) : x;
  return bits_of<typename V::Float>(x | ((h & 0x8000u) << 16));
}

template <int W>
SAFERLHF_INLINE void store_float(float* to, typename Vector<W>::Float x) {
  store(to, x);
}

// Round to nearest, ties to even; NaN stays NaN.
template <int W>
SAFERLHF_INLINE void store_float(BFloat16* to, typename Vector<W>::Float x) {
  using V = Vector<W>;
  const typename V::Word w = bits_of<typename V::Word>(x);
  const typename V::Word rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  const typename V::Word kept = x == x ? rounded : (w >> 16) | 0x40u;
  store(to, __builtin_convertvector(kept, typename V::Half));
}

template <int W>
SAFERLHF_INLINE void store_float(Float16* to, typename Vector<W>::Float x) {
  using V = Vector<W>;
  const typename V::Word w = bits_of<typename V::Word>(x), a = w & 0x7fffffffu;
  const typename V::Word normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const typename V::Word tiny = bits_of<typename V::Word>(bits_of<typename V::Float>(a) + 0.5f) - 0x3f000000u;  // subnormal
  typename V::Word h = a < (113u << 23) ? tiny : normal;
  h = a >= (143u << 23) ? h * 0u + 0x7c00u : h;  // above the largest value, and infinity
  h = a > 0x7f800000u ? h * 0u + 0x7e00u : h;    // NaN
  store(to, __builtin_convertvector(h | ((w >> 16) & 0x8000u), typename V::Half));
}

// e^x for x <= 0 (and up to 80): 0 below -87.3, the limit of float32; NaN for NaN. Within 2 ulp.
template <int W>
SAFERLHF_INLINE typename Vector<W>::Float exp_of(typename Vector<W>::Float x) {
  using V = Vector<W>;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const typename V::Float shifted = x * 1.44269504088896341f + magic;
  const typename V::Float n = shifted - magic;
  const typename V::Float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  typename V::Float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const typename V::Int power = (bits_of<typename V::Int>(shifted) + (127 - 0x4b400000)) << 23;
  const typename V::Float scaled = p * bits_of<typename V::Float>(power);
  return x < -87.3f ? typename V::Float{} : scaled;
}

// tanh with an absolute error of 1e-7: from e^-2|y|, and from its series near 0.
template <int W>
SAFERLHF_INLINE typename Vector<W>::Float tanh_of(typename Vector<W>::Float y) {
  using V = Vector<W>;
  const typename V::Float a = y < 0.0f ? -y : y;
  const typename V::Float e = exp_of<W>(a * -2.0f);
  const typename V::Float far = (1.0f - e) / (1.0f + e);
  const typename V::Float s = a * a;
  const typename V::Float near = a * (1.0f + s * (-0.33333333f + s * (0.13333333f + s * (-0.053968254f + s * 0.021869488f))));
  const typename V::Float t = a < 0.25f ? near : far;
  return y < 0.0f ? -t : t;
}

template <int W>
SAFERLHF_INLINE double sum_lanes(typename Vector<W>::Float x) {
  double sum = 0;
  for (int lane = 0; lane < W; ++lane) sum += double(x[lane]);
  return sum;
}

// The highest lane. NaN is ignored here; callers detect it in a sum.
template <int W>
SAFERLHF_INLINE float highest_lane(typename Vector<W>::Float x) {
  float highest = x[0];
  for (int lane = 1; lane < W; ++lane) highest = x[lane] > highest ? x[lane] : highest;
  return highest;
}

// The widest vectors of this CPU: 16, 8 or 4 lanes.
inline int vector_width() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  static const int width = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
                               ? 16
                               : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 4;
  return width;
#else
  return 4;
#endif
}

}  // namespace saferlhf

// SAFERLHF_WIDTHS(name, (parameters), (arguments)): name(parameters) calls name##_body<W>(arguments), compiled for each width.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SAFERLHF_WIDTHS(name, parameters, arguments)                                                            \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))) void name##_16 parameters {            \
    name##_body<16> arguments;                                                                                  \
  }                                                                                                             \
  __attribute__((target("avx2,fma"))) void name##_8 parameters { name##_body<8> arguments; }                    \
  void name##_4 parameters { name##_body<4> arguments; }                                                        \
  void name parameters {                                                                                        \
    const int width = saferlhf::vector_width();                                                                 \
    if (width == 16) return name##_16 arguments;                                                                \
    if (width == 8) return name##_8 arguments;                                                                  \
    name##_4 arguments;                                                                                         \
  }
#else
#define SAFERLHF_WIDTHS(name, parameters, arguments) \
  void name parameters { name##_body<4> arguments; }
#endif
