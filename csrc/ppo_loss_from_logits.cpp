// Processes one row at a time: its statistics, the objective's derivative at its log-prob and entropy, and d logits while the
// row is still in the cache. This takes two passes over the logits; separate log-prob, loss and backward take three.
#include "ppo_loss_from_logits.h"

#include <cstring>

#include "logit_rows.h"
#include "policy_terms.h"

namespace saferlhf {
namespace {

// d objective / d logp of one token.
double slope(double logp, double old_logp, double advantage, const float* ref_logp, const PolicySettings& s) {
  const double d = policy_terms<true>(logp, old_logp, advantage, s).d_logp;
  return ref_logp ? d + s.kl_coeff * kl_terms<double>(double(*ref_logp) - logp, s.k1).d_logp : d;
}

struct PolicyRows {
  const float *old_logp, *advantage, *ref_logp, *weight;
  const PolicySettings& settings;
};

template <int W, class T, class O>
SAFERLHF_INLINE void policy_row(float* logp, float* entropy, O* out, const T* logits, const PolicyRows& p,
                                const LogitRows& rows, int64_t row) {
  const double weight = p.weight[row];
  if (weight == 0) {
    logp[row] = entropy[row] = 0;
    std::memset(out, 0, rows.vocabulary * sizeof(O));
    return;
  }
  RowStatistics s = row_statistics<W>(logits, rows.vocabulary, rows.ids[row], rows.inverse(row), rows.softcap);
  logp[row] = float(s.logp);
  entropy[row] = float(s.entropy);
  // The loss uses the rounded float, as a separate pass would.
  const double grad = slope(logp[row], p.old_logp[row], p.advantage[row], p.ref_logp ? p.ref_logp + row : nullptr,
                            p.settings);
  row_gradient<W>(out, logits, rows.vocabulary, rows.ids[row], s, weight * grad, -weight * p.settings.entropy_coeff,
                  rows.inverse(row), rows.softcap);
}

template <int W>
SAFERLHF_INLINE void policy_body(float* logp, float* entropy, void* out, int64_t out_stride, int out_dtype,
                                 const PolicyRows& p, const LogitRows& rows, int64_t row) {
  with_gradient(rows.dtype, out_dtype, [&](auto storage, auto made) SAFERLHF_INLINED {
    policy_row<W>(logp, entropy, static_cast<decltype(made)*>(out) + row * out_stride,
                  static_cast<const decltype(storage)*>(rows.logits) + row * rows.stride, p, rows, row);
  });
}

SAFERLHF_WIDTHS(policy, (float* logp, float* entropy, void* out, int64_t out_stride, int out_dtype, const PolicyRows& p,
                         const LogitRows& rows, int64_t row),
                (logp, entropy, out, out_stride, out_dtype, p, rows, row))

}  // namespace

const char* ppo_rows_cpu(float* logp, float* entropy, void* out, int64_t out_stride, int out_dtype, const float* old_logp,
                         const float* advantage, const float* ref_logp, const float* weight, const LogitRows& rows,
                         const PolicySettings& settings, int threads) {
  const PolicyRows p = {old_logp, advantage, ref_logp, weight, settings};
  if (out != rows.logits) prefer_large_pages(out, rows.count * out_stride * size_of(out_dtype));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows.count; ++row) policy(logp, entropy, out, out_stride, out_dtype, p, rows, row);
  return nullptr;
}

}  // namespace saferlhf
