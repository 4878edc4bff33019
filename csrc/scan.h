// Code of both backward scans on the CPU: the recurrence for a vector of tokens, and rows as runs of valid tokens.
//
// Instead of the advantage A_t, the scan passes D_t from token t to the token before it:
//   D_t = gamma * V_t + gamma * lam * A_t,   so that   A_t = r_t - V_t + D_{t+1}   and
//   D_t = decay * D_{t+1} + decay * r_t + value * V_t    with decay = gamma * lam, value = gamma - decay.
// D is the only state: a masked token multiplies it by decay ("zero") or does not change it ("carry"), and no token needs its
// neighbour's value. At lam = 1 the factor `value` is 0, so values and their rounding errors drop out of the sum.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common.h"
#include "vector.h"

namespace saferlhf {

struct Decay {
  double decay, value;
  bool carry;
  Decay(double gamma, double lam, bool carry) : decay(gamma * lam), value(gamma - gamma * lam), carry(carry) {}

  // The state after `length` masked tokens.
  double through_hole(double state, int64_t length) const {
    if (carry || state == 0.0) return state;
    if (length > 16) return state * std::pow(decay, double(length));
    while (length-- > 0) state *= decay;
    return state;
  }
};

// Vectors of T, as wide as the machine's.
template <class T, int L>
struct LanesOf {
  typedef T Type __attribute__((vector_size(L * sizeof(T))));
};
template <int L>
struct PlacesOf {
  typedef int64_t Long __attribute__((vector_size(L * 8)));
  typedef int32_t Int __attribute__((vector_size(L * 4)));
};

template <int W, class T>
struct Lanes {
  static constexpr int count = W * 4 / sizeof(T);
  using Type = typename LanesOf<T, count>::Type;
  using Places = std::conditional_t<sizeof(T) == 8, typename PlacesOf<count>::Long, typename PlacesOf<count>::Int>;

  template <int steps, int... at>
  static SAFERLHF_INLINE Type shift(Type x, Type then, std::integer_sequence<int, at...>) {
#ifdef __clang__
    return __builtin_shufflevector(x, then, (at + steps)...);
#else
    return __builtin_shuffle(x, then, Places{(at + steps)...});
#endif
  }
  // Result lane i is lane i + steps of x; after the end of x follow the first lanes of `then`.
  template <int steps>
  static SAFERLHF_INLINE Type shift(Type x, Type then) {
    return shift<steps>(x, then, std::make_integer_sequence<int, count>());
  }
  static SAFERLHF_INLINE Type all(T x) {
#ifdef __clang__
    return x - Type{};
#else
    return __builtin_shuffle(Type{x}, Places{});  // GCC compiles this to one instruction, and the line above to a dozen
#endif
  }
  static SAFERLHF_INLINE Type read(const T* from) { return load<Type>(from); }
  static SAFERLHF_INLINE double sum(Type x) {
    double total = 0;
    for (int lane = 0; lane < count; ++lane) total += x[lane];
    return total;
  }
};

// D of one stream, computed backwards. Within a vector it is summed in T, from vector to vector in double: the error is a few
// ulp of the sum of the terms' sizes for rows of any length (tests/kernels/test_gae.py tests this).
template <int W, class T>
struct Handed {
  using L = Lanes<W, T>;
  using Type = typename L::Type;
  double state = 0;  // D of the following token
  double decay, value, whole = 1;
  Type powers;  // decay^count .. decay^1

  SAFERLHF_INLINE explicit Handed(const Decay& k) : decay(k.decay), value(k.value) {
    for (int lane = L::count - 1; lane >= 0; --lane) powers[lane] = T(whole *= decay);
  }
  // Returns, for each token of a vector with rewards r and values v, D of its following token.
  SAFERLHF_INLINE Type step(Type r, Type v) {
    constexpr int n = L::count;
    Type sum = T(decay) * r + T(value) * v;  // becomes the sum over this token and the following ones in the vector
    sum += T(decay) * L::template shift<1>(sum, Type{});
    if constexpr (n > 2) sum += powers[n - 2] * L::template shift<2>(sum, Type{});
    if constexpr (n > 4) sum += powers[n - 4] * L::template shift<4>(sum, Type{});
    if constexpr (n > 8) sum += powers[n - 8] * L::template shift<8>(sum, Type{});
    const Type before = L::all(T(state));
    const Type after = L::template shift<1>(sum + powers * before, before);
    state = double(sum[0]) + whole * state;  // the only step that depends on the previous vector: one multiply-add
    return after;
  }
  // The same for one token.
  SAFERLHF_INLINE double step(double r, double v) {
    const double after = state;
    state = decay * after + decay * r + value * v;
    return after;
  }
  SAFERLHF_INLINE void hole(int64_t length, const Decay& k) { state = k.through_hole(state, length); }
};

SAFERLHF_INLINE uint64_t eight_bytes(const uint8_t* from) { return load<uint64_t>(from); }

// One past the last valid token before `end`; 0 if there is none.
SAFERLHF_INLINE int64_t run_end(const uint8_t* mask, int64_t end) {
  if (mask == nullptr) return end;
  while (end >= 8 && eight_bytes(mask + end - 8) == 0) end -= 8;
  while (end > 0 && !mask[end - 1]) --end;
  return end;
}

// The first token of the run of valid tokens that ends before `end`.
SAFERLHF_INLINE int64_t run_begin(const uint8_t* mask, int64_t end) {
  if (mask == nullptr) return 0;
  constexpr uint64_t ones = 0x0101010101010101u;
  // `word - ones` sets the top bit of a byte that is 0 (or whose top bit is already set, which ~word excludes).
  while (end >= 8) {
    const uint64_t word = eight_bytes(mask + end - 8);
    if ((word - ones) & ~word & (ones << 7)) break;
    end -= 8;
  }
  while (end > 0 && mask[end - 1]) --end;
  return end;
}

// Visits a row from its last token to its first: calls run(begin, end) for each run of valid tokens, and hole(begin, end) for the
// masked tokens between, before and after the runs.
template <class Run, class Hole>
SAFERLHF_INLINE void for_runs(const uint8_t* mask, int64_t length, Run run, Hole hole) {
  for (int64_t at = length; at > 0;) {
    const int64_t end = run_end(mask, at);
    if (end < at) hole(end, at);
    if (end == 0) return;
    at = run_begin(mask, end);
    run(at, end);
  }
}

// Writes zeros to begin .. end.
template <class T>
SAFERLHF_INLINE void fill_zero(T* to, int64_t begin, int64_t end) {
  if (begin < end) std::memset(to + begin, 0, size_t(end - begin) * sizeof(T));
}

}  // namespace saferlhf
