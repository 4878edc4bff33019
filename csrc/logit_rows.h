// One row of logits: one read for its statistics, another for its gradient. token_logprob and ppo_loss_from_logits use it.
//
// The row is processed in blocks that fit into the first-level cache: a block is converted to floats, capped and scaled, its
// maximum is computed, and its exponentials are summed. Sums within a block use float lanes, sums of blocks use double. The
// target's term is summed separately, so that the log-prob of a confident token loses no digit to a subtraction.
#pragma once

#include <cmath>
#include <limits>

#include "vector.h"

namespace saferlhf {

constexpr int kRowBlock = 2048;  // floats: 8 KiB
constexpr double kLostMost = 32;  // LOST_MOST in kernels/token_logprob/reference.py

// The shape of a call: rows of `vocabulary` logits, row r at logits + r * stride elements.
struct LogitRows {
  const void* logits;
  int64_t stride;
  const int64_t* ids;
  int64_t count, vocabulary;
  const float* temperatures;  // [count], or null: `temperature` for all rows
  float temperature, softcap;  // softcap 0: no softcap
  int dtype;

  float inverse(int64_t row) const { return 1.0f / (temperatures ? temperatures[row] : temperature); }
};

// The log-sum-exp in two parts, base + rest: between logits of 10,000, neighbouring floats differ by 2^-10, so rounding a sum of
// that size to one float would cause an error of this size in each p.
struct RowStatistics {
  double logp, entropy;
  float base;
  double rest;
};

// Writes a block of n logits, z = softcap(x) * inverse, to z, padded with -inf to full vectors; returns its maximum.
template <int W, class T>
SAFERLHF_INLINE float load_block(float* z, const T* x, int n, float inverse, float softcap) {
  using F = typename Vector<W>::Float;
  const float lowest = -std::numeric_limits<float>::infinity();
  F top[4] = {F{} + lowest, F{} + lowest, F{} + lowest, F{} + lowest};
  const int whole = n / W * W;
  const auto one = [&](F v) SAFERLHF_INLINED {
    if (softcap > 0) v = softcap * tanh_of<W>(v * (1.0f / softcap));
    return v * inverse;
  };
  int i = 0;
  for (; i + 4 * W <= whole; i += 4 * W) {
    for (int k = 0; k < 4; ++k) {
      if (k & 1) __builtin_prefetch(x + kRowBlock + i / 2 + k / 2 * W, 0, 2);
      const F v = one(load_float<W>(x + i + k * W));
      store(z + i + k * W, v);
      top[k] = v > top[k] ? v : top[k];
    }
  }
  for (; i < whole; i += W) {
    const F v = one(load_float<W>(x + i));
    store(z + i, v);
    top[0] = v > top[0] ? v : top[0];
  }
  if (i < n) {
    T rest[W] = {};
    std::memcpy(rest, x + i, (n - i) * sizeof(T));
    F v = one(load_float<W>(rest));
    for (int lane = n - i; lane < W; ++lane) v[lane] = lowest;
    store(z + i, v);
    top[0] = v > top[0] ? v : top[0];
  }
  top[0] = top[1] > top[0] ? top[1] : top[0];
  top[2] = top[3] > top[2] ? top[3] : top[2];
  top[0] = top[2] > top[0] ? top[2] : top[0];
  return highest_lane<W>(top[0]);
}

// Log-prob of the target, entropy and log-sum-exp of one row; NaN if the row has a NaN or +inf. A row with only -inf has no
// distribution: base is -inf, the others are NaN.
template <int W, class T>
SAFERLHF_INLINE RowStatistics row_statistics(const T* row, int64_t vocabulary, int64_t id, float inverse, float softcap) {
  using F = typename Vector<W>::Float;
  alignas(64) float z[kRowBlock];
  float highest = -std::numeric_limits<float>::infinity(), target = highest;
  double others = 0, weighted = 0;  // sums of e^(z - highest), and of e^(z - highest) * (z - highest), over all except the target
  for (int64_t start = 0; start < vocabulary; start += kRowBlock) {
    const int n = int(vocabulary - start < kRowBlock ? vocabulary - start : kRowBlock);
    const float top = load_block<W>(z, row + start, n, inverse, softcap);
    if (id >= start && id < start + n) {
      target = z[id - start];
      z[id - start] = -std::numeric_limits<float>::infinity();
    }
    if (top > highest) {
      if (others != 0) {  // also when it is NaN; while all values were -inf there is nothing to scale
        const double down = double(highest) - double(top), scale = std::exp(down);
        weighted = scale * (weighted + down * others);
        others *= scale;
      }
      highest = top;
    }
    const float base = highest == -std::numeric_limits<float>::infinity() ? 0.0f : highest;
    F sum[2] = {F{}, F{}}, product[2] = {F{}, F{}};
    const int padded = (n + W - 1) / W * W;
    // Memory is idle while exponentials are computed from the first-level cache: prefetch the next block (or row) here.
    const T* next = row + start + kRowBlock;
    const auto add = [&](int i, int k) SAFERLHF_INLINED {
      if (i & W) __builtin_prefetch(next + i / 2 + kRowBlock / 2, 0, 2);
      const F t = load_float<W>(z + i) - base, e = exp_of<W>(t);
      sum[k] += e;
      product[k] += e * (t < -200.0f ? F{} - 200.0f : t);  // e is 0 in this case, and 0 times -inf must be 0
    };
    int i = 0;
    for (; i + 2 * W <= padded; i += 2 * W) {
      add(i, 0);
      add(i + W, 1);
    }
    if (i < padded) add(i, 0);
    others += sum_lanes<W>(sum[0] + sum[1]);
    weighted += sum_lanes<W>(product[0] + product[1]);
  }
  const double gap = double(target) - double(highest), mine = std::exp(gap), total = others + mine;
  RowStatistics s;
  s.base = highest;
  s.rest = std::log(total);
  s.logp = gap == 0 ? -std::log1p(others) : gap - std::log(total);  // gap 0: the target is the highest; +inf: NaN
  s.entropy = std::log(total) - (weighted + (mine > 0 ? mine * gap : 0.0)) / total;
  if (highest == -std::numeric_limits<float>::infinity()) s.logp = s.entropy = std::nan("");
  if (s.entropy < 0) s.entropy = 0;
  return s;
}

// The rounding error of a float lse, computed from `logp`: the target's z - lse must equal its log-prob. 0 where logp is less
// accurate, as in the reference.
template <int W, class T>
SAFERLHF_INLINE double lost_of(const T* row, int64_t id, double logp, float lse, float inverse, float softcap) {
  alignas(64) float z[W];
  load_block<W>(z, row + id, 1, inverse, softcap);
  const double lost = double(z[0]) - double(lse) - logp;
  return std::fabs(logp) < std::fabs(lse) && std::fabs(lost) < kLostMost ? lost : 0.0;
}

// d logits of one row: g * (onehot - p) - g_H * p * (log p + H), divided by the temperature and multiplied by the softcap's
// derivative. `out` may be the row itself, or start at its address with narrower elements, because a block is read completely
// before any of it is written.
template <int W, class T, class O>
SAFERLHF_INLINE void row_gradient(O* out, const T* row, int64_t vocabulary, int64_t id, const RowStatistics& s, double grad,
                                  double grad_entropy, float inverse, float softcap) {
  using F = typename Vector<W>::Float;
  alignas(64) float z[kRowBlock];
  const float base = s.base, rest = float(s.rest), entropy = float(s.entropy);
  const float g = float(grad * inverse), h = float(grad_entropy * inverse);
  const float back = softcap > 0 ? 1.0f / (inverse * softcap) : 0.0f;  // factor from z to z_capped / softcap
  const auto one = [&](F v) SAFERLHF_INLINED {
    const F t = v - base - rest, p = exp_of<W>(t);
    F d = p * -g;
    if (h != 0) d -= h * p * ((t < -200.0f ? F{} - 200.0f : t) + entropy);
    if (softcap > 0) d *= 1.0f - (v * back) * (v * back);
    return d;
  };
  for (int64_t start = 0; start < vocabulary; start += kRowBlock) {
    const int n = int(vocabulary - start < kRowBlock ? vocabulary - start : kRowBlock);
    load_block<W>(z, row + start, n, inverse, softcap);
    O* to = out + start;
    if (id >= start && id < start + n) {
      // The target's entry is computed from logp: 1 - p would lose all digits for p near 1.
      const int at = int(id - start);
      const float v = z[at];
      const double p = std::exp(s.logp), slope = softcap > 0 ? 1.0 - double(v * back) * double(v * back) : 1.0;
      const double log_p = p > 0 ? s.logp : 0.0;
      const float mine = float(slope * (double(g) * -std::expm1(s.logp) - double(h) * p * (log_p + s.entropy)));
      int i = 0;
      for (; i + W <= n; i += W) {
        F d = one(load_float<W>(z + i));
        if (at >= i && at < i + W) d[at - i] = mine;
        store_float<W>(to + i, d);
      }
      if (i < n) {
        F d = one(load_float<W>(z + i));
        if (at >= i) d[at - i] = mine;
        O rest[W];
        store_float<W>(rest, d);
        std::memcpy(to + i, rest, (n - i) * sizeof(O));
      }
      continue;
    }
    int i = 0;
    for (; i + W <= n; i += W) store_float<W>(to + i, one(load_float<W>(z + i)));
    if (i < n) {
      O rest[W];
      store_float<W>(rest, one(load_float<W>(z + i)));
      std::memcpy(to + i, rest, (n - i) * sizeof(O));
    }
  }
}

// Calls work(T{}) with the storage type of a dtype tag.
template <class Work>
SAFERLHF_INLINE void with_storage(int dtype, const Work& work) {
  if (dtype == kFloat32) work(float{});
  if (dtype == kBFloat16) work(BFloat16{});
  if (dtype == kFloat16) work(Float16{});
}

// Calls work(T{}, O{}): T for logits of `dtype`, O for a gradient of the same dtype or, for float logits, of a narrower one.
template <class Work>
SAFERLHF_INLINE void with_gradient(int dtype, int out_dtype, const Work& work) {
  if (dtype == kFloat32 && out_dtype == kFloat32) work(float{}, float{});
  if (dtype == kFloat32 && out_dtype == kBFloat16) work(float{}, BFloat16{});
  if (dtype == kFloat32 && out_dtype == kFloat16) work(float{}, Float16{});
  if (dtype == kBFloat16 && out_dtype == kBFloat16) work(BFloat16{}, BFloat16{});
  if (dtype == kFloat16 && out_dtype == kFloat16) work(Float16{}, Float16{});
}

}  // namespace saferlhf
