// The policy loss on the CPU: blocks of 256 tokens, vectorised elementwise work, sums in double in a fixed order (the sums
// of each row are stored separately and added in row order, so the number of threads changes no bit).
#include "ppo_loss.h"

#include <cstring>

#include "policy_terms.h"

namespace saferlhf {
namespace {

// loss, outside, divergence, ratio, advantage, kl, entropy, clipped, bounded, log ratio
using Sums = RowSums<10>;

// One row: pointers at its first token.
template <typename T>
struct Row {
  T *gradient, *entropy_gradient;
  const T *logp, *old_logp, *advantages, *ref_logp, *entropy;
  const uint8_t* mask;
  int64_t length;
};

template <bool Dual, typename T>
SAFERLHF_INLINE Sums row_body(const Row<T>& row, T share, T scale, T shift, const PolicySettings& s) {
  T* __restrict gradient = row.gradient;
  const T *__restrict logp = row.logp, *__restrict old_logp = row.old_logp, *__restrict advantages = row.advantages;
  const T kl_coeff = T(s.kl_coeff), entropy_coeff = T(s.entropy_coeff);
  Sums sums = {};
  for (int64_t start = 0; start < row.length; start += kBlock) {
    const int n = int(row.length - start < kBlock ? row.length - start : kBlock);
    T loss[kBlock], divergence[kBlock], ratio[kBlock], log_ratio[kBlock], advantage[kBlock], extra[kBlock];
    Bits<T> outside = 0, clipped = 0, bounded = 0;
    uint8_t real[kBlock];
    if (row.mask) std::memcpy(real, row.mask + start, n); else std::memset(real, 1, n);
    for (int i = 0; i < n; ++i) {
      // keep(), `&` and `|` instead of branches, so that the compiler vectorises this loop. Masked tokens are read as 0.
      const Bits<T> on = bits_where<T>(real[i] != 0);
      const T used = keep(advantages[start + i] * scale + shift, on);
      const auto terms = policy_terms<Dual>(keep(logp[start + i], on), keep(old_logp[start + i], on), used, s);
      loss[i] = terms.loss;
      gradient[start + i] = keep(terms.d_logp * share, on);
      outside += Bits<T>(terms.outside) & on;
      // A masked token has a log ratio and an advantage of 0, so these need no mask.
      clipped += Bits<T>(terms.clipped);
      bounded += Bits<T>(terms.bounded);
      divergence[i] = terms.divergence;
      ratio[i] = keep(terms.ratio, on);
      log_ratio[i] = terms.log_ratio;
      advantage[i] = used;
    }
    if (row.ref_logp) {
      const T* __restrict ref_logp = row.ref_logp;
      for (int i = 0; i < n; ++i) {
        const Bits<T> on = bits_where<T>(real[i] != 0);
        const auto terms = kl_terms(keep(ref_logp[start + i] - logp[start + i], on), s.k1);
        loss[i] += kl_coeff * terms.kl;
        gradient[start + i] += keep(kl_coeff * share * terms.d_logp, on);
        extra[i] = terms.kl;
      }
      sums[5] += block_sum(extra, n);
    }
    if (row.entropy) {
      const T* __restrict entropy = row.entropy;
      T* __restrict entropy_gradient = row.entropy_gradient;
      for (int i = 0; i < n; ++i) {
        const Bits<T> on = bits_where<T>(real[i] != 0);
        extra[i] = keep(entropy[start + i], on);
        loss[i] -= entropy_coeff * extra[i];
        entropy_gradient[start + i] = keep(-entropy_coeff * share, on);
      }
      sums[6] += block_sum(extra, n);
    }
    sums[0] += block_sum(loss, n);
    sums[1] += double(outside);
    sums[2] += block_sum(divergence, n);
    sums[3] += block_sum(ratio, n);
    sums[4] += block_sum(advantage, n);
    sums[7] += double(clipped);
    sums[8] += double(bounded);
    sums[9] += block_sum(log_ratio, n);
  }
  return sums;
}

SAFERLHF_CLONES Sums row_sums(const Row<float>& row, float share, float scale, float shift, const PolicySettings& s) {
  return s.dual_clip > kMaxRatio ? row_body<false>(row, share, scale, shift, s) : row_body<true>(row, share, scale, shift, s);
}

SAFERLHF_CLONES Sums row_sums(const Row<double>& row, double share, double scale, double shift, const PolicySettings& s) {
  return s.dual_clip > kMaxRatio ? row_body<false>(row, share, scale, shift, s) : row_body<true>(row, share, scale, shift, s);
}

template <typename T>
void launch(void* loss, void* gradient_, void* entropy_gradient_, void* inverse, void* statistics, const PolicyInputs& in,
            const Rows& rows, const PolicySettings& settings, bool token_mean, int threads) {
  T *gradient = static_cast<T*>(gradient_), *entropy_gradient = static_cast<T*>(entropy_gradient_);
  const double divisor = read_scalar<T>(in.normalizer, 0.0);
  const Weights weights(rows, token_mean, in.normalizer ? &divisor : nullptr);
  const T scale = T(read_scalar<T>(in.scale, 1.0)), shift = T(read_scalar<T>(in.shift, 0.0));
  std::vector<Sums> sums_B(rows.count);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t at = rows.begin(row);
    const auto from = [at](const void* tokens) { return tokens ? static_cast<const T*>(tokens) + at : nullptr; };
    const Row<T> one{gradient + at, entropy_gradient ? entropy_gradient + at : nullptr, from(in.logp), from(in.old_logp),
                     from(in.advantages), from(in.ref_logp), from(in.entropy), rows.mask ? rows.mask + at : nullptr,
                     rows.end(row) - at};
    sums_B[row] = row_sums(one, T(weights.share(row)), scale, shift, settings);
  }
  for (int64_t at = rows.covered(); at < rows.tokens; ++at) {
    gradient[at] = T(0);
    if (entropy_gradient) entropy_gradient[at] = T(0);
  }
  report(static_cast<T*>(loss), static_cast<T*>(statistics), sums_B.data(), weights);
  *static_cast<T*>(inverse) = T(weights.inverse);
}

}  // namespace

const char* ppo_loss_cpu(void* loss, void* gradient, void* entropy_gradient, void* inverse, void* statistics,
                         const PolicyInputs& inputs, const Rows& rows, int dtype, const PolicySettings& settings,
                         bool token_mean, int threads) {
  if (const char* error = check_rows(rows)) return error;
  const auto run = dtype == kFloat64 ? launch<double> : launch<float>;
  run(loss, gradient, entropy_gradient, inverse, statistics, inputs, rows, settings, token_mean, threads);
  return nullptr;
}

}  // namespace saferlhf
