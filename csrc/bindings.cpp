// The only file that uses Python's API. Arguments are integer addresses, sizes and scalars; the Python side has checked shapes
// and dtypes and allocated the outputs. The GIL is released while an op runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "gae.h"
#include "logit_rows.h"
#include "policy_terms.h"
#include "ppo_lag_advantage.h"
#include "ppo_loss.h"
#include "ppo_loss_from_logits.h"
#include "token_logprob.h"
#include "value_loss.h"

namespace py = pybind11;
using Address = std::uintptr_t;  // 0 is a null pointer: the argument is not given

namespace {

void* out(Address address) { return reinterpret_cast<void*>(address); }
const void* in(Address address) { return reinterpret_cast<const void*>(address); }

saferlhf::Rows rows_of(Address offsets, Address mask, int64_t tokens, int64_t count, int64_t width) {
  return {static_cast<const int32_t*>(in(offsets)), static_cast<const uint8_t*>(in(mask)), tokens, count, width};
}

// temperatures: [count], or null: `temperature` for all rows.
saferlhf::LogitRows logit_rows_of(Address logits, int64_t stride, Address ids, int64_t count, int64_t vocabulary,
                                  Address temperatures, double temperature, double softcap, int dtype) {
  return {in(logits), stride, static_cast<const int64_t*>(in(ids)), count, vocabulary,
          static_cast<const float*>(in(temperatures)), float(temperature), float(softcap), dtype};
}

const float* floats(Address address) { return static_cast<const float*>(in(address)); }

void raise_if(const char* error) {
  if (error != nullptr) throw py::value_error(error);
}

#ifndef SAFERLHF_WITHOUT_CUDA
void raise_cuda(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

void gae_cuda(Address advantages, Address returns, Address rewards, Address values, Address offsets, Address mask,
              int64_t tokens, int64_t count, int64_t width, int dtype, double gamma, double lam, bool carry,
              Address stream) {
  raise_cuda(saferlhf::gae_cuda(out(advantages), out(returns), in(rewards), in(values),
                                rows_of(offsets, mask, tokens, count, width), dtype, gamma, lam, carry, out(stream)));
}

void ppo_lag_advantage_cuda(Address advantages, Address reward_returns, Address cost_returns, Address statistics,
                            Address logp, Address ref_logp, Address reward, Address cost, Address reward_values,
                            Address cost_values, Address multiplier, Address offsets, Address mask, int64_t tokens,
                            int64_t count, int64_t width, int dtype, double kl_coeff, double gamma, double lam,
                            double clip_score, bool carry, Address partials, Address counter, Address stream) {
  raise_cuda(saferlhf::ppo_lag_advantage_cuda(
      {out(advantages), out(reward_returns), out(cost_returns), out(statistics)},
      {in(logp), in(ref_logp), in(reward), in(cost), in(reward_values), in(cost_values), in(multiplier)},
      rows_of(offsets, mask, tokens, count, width), dtype, {kl_coeff, gamma, lam, clip_score, carry},
      static_cast<double*>(out(partials)), static_cast<int*>(out(counter)), out(stream)));
}
#endif

void gae_cpu(Address advantages, Address returns, Address rewards, Address values, Address offsets, Address mask,
             int64_t tokens, int64_t count, int64_t width, int dtype, double gamma, double lam, bool carry, int threads) {
  raise_if(saferlhf::gae_cpu(out(advantages), out(returns), in(rewards), in(values),
                             rows_of(offsets, mask, tokens, count, width), dtype, gamma, lam, carry, threads));
}

void ppo_lag_advantage_cpu(Address advantages, Address reward_returns, Address cost_returns, Address statistics,
                           Address logp, Address ref_logp, Address reward, Address cost, Address reward_values,
                           Address cost_values, Address multiplier, Address offsets, Address mask, int64_t tokens,
                           int64_t count, int64_t width, int dtype, double kl_coeff, double gamma, double lam,
                           double clip_score, bool carry, int threads) {
  raise_if(saferlhf::ppo_lag_advantage_cpu(
      {out(advantages), out(reward_returns), out(cost_returns), out(statistics)},
      {in(logp), in(ref_logp), in(reward), in(cost), in(reward_values), in(cost_values), in(multiplier)},
      rows_of(offsets, mask, tokens, count, width), dtype, {kl_coeff, gamma, lam, clip_score, carry}, threads));
}

void ppo_loss_cpu(Address loss, Address gradient, Address entropy_gradient, Address inverse, Address statistics, Address logp,
                  Address old_logp, Address advantages, Address ref_logp, Address entropy, Address normalizer, Address scale,
                  Address shift, Address offsets, Address mask, int64_t tokens, int64_t count, int64_t width, int dtype,
                  double clip_ratio, double clip_high, double dual_clip, double kl_coeff, bool k1, double entropy_coeff,
                  bool token_mean, int threads) {
  raise_if(saferlhf::ppo_loss_cpu(
      out(loss), out(gradient), out(entropy_gradient), out(inverse), out(statistics),
      {in(logp), in(old_logp), in(advantages), in(ref_logp), in(entropy), in(normalizer), in(scale), in(shift)},
      rows_of(offsets, mask, tokens, count, width), dtype,
      {clip_ratio, clip_high, dual_clip, kl_coeff, k1, entropy_coeff}, token_mean, threads));
}

void value_loss_cpu(Address loss, Address gradient, Address inverse, Address statistics, Address values, Address old_values,
                    Address returns, Address normalizer, Address offsets, Address mask, int64_t tokens, int64_t count,
                    int64_t width, int64_t critics, int dtype, double clip_value, bool token_mean, int threads) {
  raise_if(saferlhf::value_loss_cpu(out(loss), out(gradient), out(inverse), out(statistics), in(values), in(old_values),
                                    in(returns), in(normalizer), rows_of(offsets, mask, tokens, count, width), critics,
                                    dtype, clip_value, token_mean, threads));
}

void token_logprob_cpu(Address logp, Address entropy, Address lse, Address logits, int64_t stride, Address ids,
                       int64_t count, int64_t vocabulary, Address temperatures, double temperature, double softcap,
                       int dtype, int threads) {
  raise_if(saferlhf::token_logprob_cpu(
      static_cast<float*>(out(logp)), static_cast<float*>(out(entropy)), static_cast<float*>(out(lse)),
      logit_rows_of(logits, stride, ids, count, vocabulary, temperatures, temperature, softcap, dtype), threads));
}

void token_logprob_backward_cpu(Address gradient, int64_t gradient_stride, int gradient_dtype, Address logp, Address entropy,
                                Address lse, Address grad_logp, Address grad_entropy, Address logits, int64_t stride,
                                Address ids, int64_t count, int64_t vocabulary, Address temperatures, double temperature,
                                double softcap, int dtype, int threads) {
  raise_if(saferlhf::token_logprob_backward_cpu(
      out(gradient), gradient_stride, gradient_dtype, floats(logp), floats(entropy), floats(lse), floats(grad_logp),
      floats(grad_entropy),
      logit_rows_of(logits, stride, ids, count, vocabulary, temperatures, temperature, softcap, dtype), threads));
}

void ppo_rows_cpu(Address logp, Address entropy, Address gradient, int64_t gradient_stride, int gradient_dtype,
                  Address old_logp, Address advantage, Address ref_logp, Address weight, Address logits, int64_t stride,
                  Address ids, int64_t count, int64_t vocabulary, Address temperatures, double temperature, double softcap,
                  int dtype, double clip_ratio, double clip_high, double dual_clip, double kl_coeff, bool k1,
                  double entropy_coeff, int threads) {
  raise_if(saferlhf::ppo_rows_cpu(
      static_cast<float*>(out(logp)), static_cast<float*>(out(entropy)), out(gradient), gradient_stride, gradient_dtype,
      floats(old_logp), floats(advantage), floats(ref_logp), floats(weight),
      logit_rows_of(logits, stride, ids, count, vocabulary, temperatures, temperature, softcap, dtype),
      {clip_ratio, clip_high, dual_clip, kl_coeff, k1, entropy_coeff}, threads));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native ops of saferlhf_fast: addresses, sizes and scalars in; called by kernels/<op>/native.py.";
  const py::call_guard<py::gil_scoped_release> released;
  module.def("gae_cpu", &gae_cpu, released);
  module.def("ppo_lag_advantage_cpu", &ppo_lag_advantage_cpu, released);
  module.def("token_logprob_cpu", &token_logprob_cpu, released);
  module.def("token_logprob_backward_cpu", &token_logprob_backward_cpu, released);
  module.def("ppo_rows_cpu", &ppo_rows_cpu, released);
  module.def("ppo_loss_cpu", &ppo_loss_cpu, released);
  module.def("value_loss_cpu", &value_loss_cpu, released);
  // Counts up with every change of an argument or an output; kernels/dispatch.py takes no other than the one it knows.
  module.attr("interface") = 2;
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  // How many doubles ppo_lag_advantage_cuda works in; why there is no CUDA, where there is none.
  module.attr("partials") = saferlhf::kPartials;
#ifdef SAFERLHF_WITHOUT_CUDA
  module.attr("cuda") = false;
  module.attr("cuda_note") = SAFERLHF_WITHOUT_CUDA;
#else
  module.attr("cuda") = true;
  module.attr("cuda_note") = "";
  module.def("gae_cuda", &gae_cuda, released);
  module.def("ppo_lag_advantage_cuda", &ppo_lag_advantage_cuda, released);
#endif
}
