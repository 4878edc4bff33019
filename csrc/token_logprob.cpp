// Log-prob and entropy of given tokens on the CPU: every logit is read once; the gradient reads it once more. A row's result
// depends on no other row, so neither the batch nor the number of threads changes any bit of it.
#include "token_logprob.h"

#include "logit_rows.h"

namespace saferlhf {
namespace {

template <int W>
SAFERLHF_INLINE void forward_body(float* logp, float* entropy, float* lse, const LogitRows& rows, int64_t from, int64_t to) {
  with_storage(rows.dtype, [&](auto storage) SAFERLHF_INLINED {
    const auto* logits = static_cast<const decltype(storage)*>(rows.logits);
    for (int64_t row = from; row < to; ++row) {
      const RowStatistics s = row_statistics<W>(logits + row * rows.stride, rows.vocabulary, rows.ids[row],
                                                rows.inverse(row), rows.softcap);
      logp[row] = float(s.logp);
      lse[row] = float(double(s.base) + s.rest);
      if (entropy) entropy[row] = float(s.entropy);
    }
  });
}

struct Upstream {
  const float *logp, *entropy, *lse, *grad_logp, *grad_entropy;
};

template <int W, class T, class O>
SAFERLHF_INLINE void gradient_rows(O* out, int64_t out_stride, const T* logits, const Upstream& up, const LogitRows& rows,
                                   int64_t from, int64_t to) {
  for (int64_t row = from; row < to; ++row) {
    const T* mine = logits + row * rows.stride;
    const int64_t id = rows.ids[row];
    RowStatistics s = {up.logp[row], up.grad_entropy ? up.entropy[row] : 0.0, up.lse[row], 0};
    if (id >= 0 && id < rows.vocabulary)  // else another rank has the target
      s.rest = lost_of<W>(mine, id, s.logp, s.base, rows.inverse(row), rows.softcap);
    row_gradient<W>(out + row * out_stride, mine, rows.vocabulary, id, s,
                    up.grad_logp ? up.grad_logp[row] : 0.0, up.grad_entropy ? up.grad_entropy[row] : 0.0,
                    rows.inverse(row), rows.softcap);
  }
}

template <int W>
SAFERLHF_INLINE void backward_body(void* out, int64_t out_stride, int out_dtype, const Upstream& up, const LogitRows& rows,
                                   int64_t from, int64_t to) {
  with_gradient(rows.dtype, out_dtype, [&](auto storage, auto made) SAFERLHF_INLINED {
    gradient_rows<W>(static_cast<decltype(made)*>(out), out_stride, static_cast<const decltype(storage)*>(rows.logits), up,
                     rows, from, to);
  });
}

SAFERLHF_WIDTHS(forward, (float* logp, float* entropy, float* lse, const LogitRows& rows, int64_t from, int64_t to),
                (logp, entropy, lse, rows, from, to))
SAFERLHF_WIDTHS(backward, (void* out, int64_t out_stride, int out_dtype, const Upstream& up, const LogitRows& rows,
                           int64_t from, int64_t to),
                (out, out_stride, out_dtype, up, rows, from, to))

}  // namespace

const char* token_logprob_cpu(float* logp, float* entropy, float* lse, const LogitRows& rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows.count; ++row) forward(logp, entropy, lse, rows, row, row + 1);
  return nullptr;
}

const char* token_logprob_backward_cpu(void* out, int64_t out_stride, int out_dtype, const float* logp, const float* entropy,
                                       const float* lse, const float* grad_logp, const float* grad_entropy,
                                       const LogitRows& rows, int threads) {
  const Upstream up = {logp, entropy, lse, grad_logp, grad_entropy};
  if (out != rows.logits) prefer_large_pages(out, rows.count * out_stride * size_of(out_dtype));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows.count; ++row) backward(out, out_stride, out_dtype, up, rows, row, row + 1);
  return nullptr;
}

}  // namespace saferlhf
