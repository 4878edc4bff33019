// Code of both clipped losses: blocks, sums over lanes, the reduction over rows.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"

namespace saferlhf {

constexpr int kBlock = 256;  // tokens per block: a few arrays of this length stay in the first-level cache
constexpr int kLanes = 8;    // partial sums: they fix the order of additions and fill one vector register of doubles

// An unsigned integer as wide as T.
template <typename T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};
template <typename T>
using Bits = typename BitsOf<T>::type;

// All ones if `on`, else 0.
template <typename T>
SAFERLHF_INLINE Bits<T> bits_where(bool on) {
  return Bits<T>(0) - Bits<T>(on);
}

// x if `where` is all ones, exactly 0 (even if x is NaN) if `where` is 0. With a select, the compiler would move the load of x
// into the branch and could not vectorise the loop.
template <typename T>
SAFERLHF_INLINE T keep(T x, Bits<T> where) {
  Bits<T> bits;
  std::memcpy(&bits, &x, sizeof(T));
  bits &= where;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

// Sum of x[0 .. n) in double. x has room for full groups of lanes; entries of the last group past n are set to 0.
template <typename T>
SAFERLHF_INLINE double block_sum(T* x, int n) {
  double lanes[kLanes] = {};
  const int whole = (n + kLanes - 1) / kLanes * kLanes;
  for (int i = n; i < whole; ++i) x[i] = T(0);
  for (int i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += double(x[i + lane]);
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// How a loss is reduced: the sum over rows of share(row) * (sum over the row's tokens), times `inverse`.
struct Weights {
  std::vector<int64_t> counts_B;
  int64_t sequences = 0, tokens = 0;
  double inverse = 0;
  bool token_mean = false;

  // normalizer: null, or a value that replaces the local count; 0 means no token on any rank; below 0 or NaN gives NaN.
  Weights(const Rows& rows, bool mean_over_tokens, const double* normalizer)
      : counts_B(rows.count), token_mean(mean_over_tokens) {
    count_valid(rows, counts_B.data(), &sequences, &tokens);
    const double divisor = normalizer ? *normalizer : double(token_mean ? tokens : sequences);
    inverse = divisor > 0 ? 1.0 / divisor : divisor == 0 ? 0.0 : std::nan("");
  }
  double share(int64_t row) const { return token_mean || counts_B[row] == 0 ? 1.0 : 1.0 / double(counts_B[row]); }
};

// Sums over the tokens of one row: the loss, then the statistics that are reported as means over tokens.
template <int K>
using RowSums = std::array<double, K>;

// Computes the loss and the statistics [K + 1] (K - 1 means, sequences, tokens) from the sums of all rows, in row order.
template <typename T, size_t K>
void report(T* loss, T* statistics, const std::array<double, K>* sums_B, const Weights& weights) {
  std::array<double, K> total = {};
  for (size_t row = 0; row < weights.counts_B.size(); ++row) {
    total[0] += sums_B[row][0] * weights.share(int64_t(row));
    for (size_t k = 1; k < K; ++k) total[k] += sums_B[row][k];
  }
  const double mean = weights.tokens > 0 ? 1.0 / double(weights.tokens) : 0.0;
  *loss = T(total[0] * weights.inverse);
  for (size_t k = 1; k < K; ++k) statistics[k - 1] = T(total[k] * mean);
  statistics[K - 1] = T(weights.sequences);
  statistics[K] = T(weights.tokens);
}

// Returns a 0-d tensor of T as a double, or `missing` for a null pointer.
template <typename T>
double read_scalar(const void* pointer, double missing) {
  return pointer ? double(*static_cast<const T*>(pointer)) : missing;
}

}  // namespace saferlhf
