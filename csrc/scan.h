// What the two backward scans share on the CPU: the recurrence, a vector of tokens at once, and rows as runs of valid tokens.
//
// Instead of the advantage A_t the scan carries what token t hands to the token before it,
//   D_t = gamma * V_t + gamma * lam * A_t,   so that   A_t = r_t - V_t + D_{t+1}   and
//   D_t = decay * D_{t+1} + decay * r_t + value * V_t    with decay = gamma * lam, value = gamma - decay.
// One number of state: a masked token multiplies it by decay ("zero") or leaves it alone ("carry"), and no token needs its
// neighbour's value. At lam = 1 the values drop out of the sum, and their rounding with them. Everything is summed in double.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "common.h"
#include "vector.h"

namespace saferlhf {

struct Decay {
  double decay, value;
  bool carry;
  Decay(double gamma, double lam, bool carry) : decay(gamma * lam), value(gamma - gamma * lam), carry(carry) {}

  // The state behind a hole of `length` masked tokens.
  double through_hole(double state, int64_t length) const {
    if (carry || state == 0.0) return state;
    if (length > 16) return state * std::pow(decay, double(length));
    while (length-- > 0) state *= decay;
    return state;
  }
};

// L doubles in one vector: half as many as the floats of vector.h.
template <int L>
struct DoubleVector {
  typedef double Type __attribute__((vector_size(L * 8)));
  typedef int64_t Places __attribute__((vector_size(L * 8)));
};

template <int L>
struct Doubles {
  using Type = typename DoubleVector<L>::Type;
  using Places = typename DoubleVector<L>::Places;
  using At = std::make_integer_sequence<int, L>;

  template <class T, int... at>
  static SAFERLHF_INLINE Type read(const T* from, std::integer_sequence<int, at...>) {
    return Type{double(from[at])...};  // __builtin_convertvector makes worse code of this
  }
  template <int steps, int... at>
  static SAFERLHF_INLINE Type shift(Type x, Type then, std::integer_sequence<int, at...>) {
#ifdef __clang__
    return __builtin_shufflevector(x, then, (at + steps)...);
#else
    return __builtin_shuffle(x, then, Places{(at + steps)...});
#endif
  }

  static SAFERLHF_INLINE Type all(double x) { return x - Type{}; }
  template <class T>
  static SAFERLHF_INLINE Type read(const T* from) {
    return read(from, At());
  }
  template <class T>
  static SAFERLHF_INLINE void write(T* to, Type x) {
    typedef T Narrow __attribute__((vector_size(L * sizeof(T))));
    store(to, __builtin_convertvector(x, Narrow));
  }
  // The first lane everywhere.
  static SAFERLHF_INLINE Type first(Type x) {
#ifdef __clang__
    return all(x[0]);
#else
    return __builtin_shuffle(x, Places{});
#endif
  }
  // Lane i becomes lane i + steps; what comes in at the end are the first lanes of `then`.
  template <int steps>
  static SAFERLHF_INLINE Type shift(Type x, Type then) {
    return shift<steps>(x, then, At());
  }
  static SAFERLHF_INLINE double sum(Type x) {
    double total = 0;
    for (int lane = 0; lane < L; ++lane) total += x[lane];
    return total;
  }
};

// D of one stream, walking backwards.
template <int L>
struct Handed {
  using D = Doubles<L>;
  using Type = typename D::Type;
  Type state = {};  // D of the token after, in all lanes
  Type powers;      // decay^L .. decay^1
  double decay, value;

  SAFERLHF_INLINE explicit Handed(const Decay& k) : decay(k.decay), value(k.value) {
    double power = 1;
    for (int lane = L - 1; lane >= 0; --lane) powers[lane] = power *= decay;
  }
  // D of the token after each of L tokens with rewards r and values v.
  SAFERLHF_INLINE Type step(Type r, Type v) {
    Type sum = decay * r + value * v;  // becomes the sum over this token and those after it in the vector
    sum += decay * D::template shift<1>(sum, Type{});
    if constexpr (L > 2) sum += powers[L - 2] * D::template shift<2>(sum, Type{});
    if constexpr (L > 4) sum += powers[L - 4] * D::template shift<4>(sum, Type{});
    const Type after = D::template shift<1>(sum + powers * state, state);
    state = D::first(sum) + powers[0] * state;  // all that waits for the vector before: one multiply-add
    return after;
  }
  // The same for one token.
  SAFERLHF_INLINE double step(double r, double v) {
    const double after = state[0];
    state = D::all(decay * after + decay * r + value * v);
    return after;
  }
  SAFERLHF_INLINE void hole(int64_t length, const Decay& k) { state = D::all(k.through_hole(state[0], length)); }
};

SAFERLHF_INLINE uint64_t eight_bytes(const uint8_t* from) { return load<uint64_t>(from); }

// One past the last valid token before `end`; 0 when there is none.
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
  // `word - ones` borrows into the top bit of a byte that is 0 (or has that bit already, which ~word rules out).
  while (end >= 8) {
    const uint64_t word = eight_bytes(mask + end - 8);
    if ((word - ones) & ~word & (ones << 7)) break;
    end -= 8;
  }
  while (end > 0 && mask[end - 1]) --end;
  return end;
}

// A row from its last token to its first: run(begin, end) for each run of valid tokens, hole(begin, end) for the masked ones
// between, before and after.
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

// Zeros at begin .. end.
template <class T>
SAFERLHF_INLINE void fill_zero(T* to, int64_t begin, int64_t end) {
  if (begin < end) std::memset(to + begin, 0, size_t(end - begin) * sizeof(T));
}

}  // namespace saferlhf
