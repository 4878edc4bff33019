// Generalised advantage estimation on the CPU: see scan.h.
#include "gae.h"

#include "scan.h"

namespace saferlhf {
namespace {

struct Call {
  void *advantages, *returns;
  const void *rewards, *values;
  Decay decay;
};

template <int W, class T>
SAFERLHF_INLINE void scan_row(const Call& call, const uint8_t* mask, int64_t at, int64_t length) {
  using L = Lanes<W, T>;
  T *advantages = static_cast<T*>(call.advantages) + at, *returns = static_cast<T*>(call.returns) + at;
  const T *rewards = static_cast<const T*>(call.rewards) + at, *values = static_cast<const T*>(call.values) + at;
  Handed<W, T> handed(call.decay);
  for_runs(mask, length, [&](int64_t begin, int64_t end) SAFERLHF_INLINED {
    int64_t t = end;
    // Single tokens first, full vectors after them: a row that begins on a cache line then writes full lines.
    for (int rest = (end - begin) % L::count; rest > 0; --rest) {
      const double r = rewards[--t], v = values[t], after = handed.step(r, v);
      advantages[t] = T(r - v + after);
      returns[t] = T(r + after);
    }
    while (t > begin) {
      t -= L::count;
      const auto r = L::read(rewards + t), v = L::read(values + t), after = handed.step(r, v);
      store(advantages + t, r - v + after);
      store(returns + t, r + after);
    }
  }, [&](int64_t begin, int64_t end) SAFERLHF_INLINED {
    handed.hole(end - begin, call.decay);
    fill_zero(advantages, begin, end);
    fill_zero(returns, begin, end);
  });
}

template <int W>
SAFERLHF_INLINE void row_body(const Call& call, const uint8_t* mask, int64_t at, int64_t length, int dtype) {
  if (dtype == kFloat64) scan_row<W, double>(call, mask, at, length);
  else scan_row<W, float>(call, mask, at, length);
}

SAFERLHF_WIDTHS(row, (const Call& call, const uint8_t* mask, int64_t at, int64_t length, int dtype),
                (call, mask, at, length, dtype))

}  // namespace

const char* gae_cpu(void* advantages, void* returns, const void* rewards, const void* values, const Rows& rows, int dtype,
                    double gamma, double lam, bool carry, int threads) {
  if (const char* error = check_rows(rows)) return error;
  const Call call = {advantages, returns, rewards, values, Decay(gamma, lam, carry)};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t index = 0; index < rows.count; ++index) {
    const int64_t at = rows.begin(index);
    row(call, rows.mask ? rows.mask + at : nullptr, at, rows.end(index) - at, dtype);
  }
  const int64_t size = dtype == kFloat64 ? 8 : 4;
  for (void* out : {advantages, returns}) fill_zero(static_cast<char*>(out), rows.covered() * size, rows.tokens * size);
  return nullptr;
}

}  // namespace saferlhf
