// The clipped value loss on the CPU: blocks of 256 tokens, vectorised elementwise work, sums in double in a fixed order
// (the sums of each row are stored separately and added in row order, so the number of threads changes no bit).
#include "value_loss.h"

#include <cstring>

#include "losses.h"

namespace saferlhf {
namespace {

using Sums = RowSums<6>;  // loss, outside, value, return, error, clipped

template <typename T>
SAFERLHF_INLINE Sums row_body(T* __restrict gradient, const T* __restrict values, const T* __restrict old_values,
                                 const T* __restrict returns, const uint8_t* mask,
                                 int64_t length, double share, double clip_value) {
  const T limit = T(clip_value), w = T(share);
  Sums sums = {};
  for (int64_t start = 0; start < length; start += kBlock) {
    const int n = int(length - start < kBlock ? length - start : kBlock);
    T loss[kBlock], value[kBlock], target[kBlock], error[kBlock];
    Bits<T> outside = 0, flat = 0;
    uint8_t real[kBlock];
    if (mask) std::memcpy(real, mask + start, n); else std::memset(real, 1, n);
    for (int i = 0; i < n; ++i) {
      // keep(), `&` and `|` instead of branches, so that the compiler vectorises this loop.
      const Bits<T> on = bits_where<T>(real[i] != 0);
      const T now = keep(values[start + i], on), old = keep(old_values[start + i], on);
      const T goal = keep(returns[start + i], on);
      const T difference = now - old;
      const bool above = difference > limit, below = difference < -limit, far = above | below;
      const T low_bounded = below ? -limit : difference;
      const T bounded = above ? limit : low_bounded;
      const T plain = now - goal, other = old + bounded - goal;
      const T plain_square = plain * plain, other_square = other * other;
      const bool clipped_wins = other_square > plain_square, tie = other_square == plain_square;
      // A NaN in any input is in other_square, which the select takes if the comparison is false.
      loss[i] = T(0.5) * (plain_square >= other_square ? plain_square : other_square);
      // Equal squares outside the range: autograd of maximum gives half to each, and the clipped term has no gradient.
      const T whole = far & tie ? T(0.5) : T(1);
      gradient[start + i] = keep(w * plain * whole, on & bits_where<T>(!(far & clipped_wins)));
      outside += Bits<T>(far);  // masked tokens are read as 0, so they are not far
      flat += Bits<T>(far & clipped_wins);
      value[i] = now;
      target[i] = goal;
      error[i] = plain_square;
    }
    sums[0] += block_sum(loss, n);
    sums[1] += double(outside);
    sums[2] += block_sum(value, n);
    sums[3] += block_sum(target, n);
    sums[4] += block_sum(error, n);
    sums[5] += double(flat);
  }
  return sums;
}

SAFERLHF_CLONES Sums row_sums(float* gradient, const float* values, const float* old_values, const float* returns,
                                 const uint8_t* mask, int64_t length, double share, double clip_value) {
  return row_body(gradient, values, old_values, returns, mask, length, share, clip_value);
}

SAFERLHF_CLONES Sums row_sums(double* gradient, const double* values, const double* old_values, const double* returns,
                                 const uint8_t* mask, int64_t length, double share, double clip_value) {
  return row_body(gradient, values, old_values, returns, mask, length, share, clip_value);
}

template <typename T>
void launch(void* loss, void* gradient_, void* inverse, void* statistics, const void* values_, const void* old_values_,
            const void* returns_, const void* normalizer, const Rows& rows, int64_t critics, double clip_value,
            bool token_mean, int threads) {
  T* gradient = static_cast<T*>(gradient_);
  const T *values = static_cast<const T*>(values_), *old_values = static_cast<const T*>(old_values_);
  const T* returns = static_cast<const T*>(returns_);
  const double divisor = read_scalar<T>(normalizer, 0.0);
  const Weights weights(rows, token_mean, normalizer ? &divisor : nullptr);
  std::vector<Sums> sums(critics * rows.count);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t job = 0; job < critics * rows.count; ++job) {
    const int64_t row = job % rows.count, at = rows.begin(row), from = (job / rows.count) * rows.tokens + at;
    sums[job] = row_sums(gradient + from, values + from, old_values + from, returns + from,
                         rows.mask ? rows.mask + at : nullptr, rows.end(row) - at, weights.share(row), clip_value);
  }
  for (int64_t critic = 0; critic < critics; ++critic) {
    for (int64_t at = rows.covered(); at < rows.tokens; ++at) gradient[critic * rows.tokens + at] = T(0);
    report(static_cast<T*>(loss) + critic, static_cast<T*>(statistics) + critic * 7, sums.data() + critic * rows.count,
           weights);
  }
  *static_cast<T*>(inverse) = T(weights.inverse);
}

}  // namespace

const char* value_loss_cpu(void* loss, void* gradient, void* inverse, void* statistics, const void* values,
                           const void* old_values, const void* returns, const void* normalizer, const Rows& rows,
                           int64_t critics, int dtype, double clip_value, bool token_mean, int threads) {
  if (const char* error = check_rows(rows)) return error;
  const auto run = dtype == kFloat64 ? launch<double> : launch<float>;
  run(loss, gradient, inverse, statistics, values, old_values, returns, normalizer, rows, critics, clip_value, token_mean,
      threads);
  return nullptr;
}

}  // namespace saferlhf
