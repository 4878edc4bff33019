// The policy objective of one token and its derivative, without branches, so that the compiler can vectorise loops over it. The
// formula is in kernels/ppo_loss/reference.py. Both policy losses use it: from log-probs and from logits.
#pragma once

#include <cmath>
#include <cstring>

#include "losses.h"

namespace saferlhf {

// Settings of the objective. dual_clip: infinity for none. k1: the KL estimator is k1, else k3. kl_coeff is used only with a
// reference policy, entropy_coeff only with an entropy.
struct PolicySettings {
  double clip_ratio, clip_high, dual_clip, kl_coeff;
  bool k1;
  double entropy_coeff;
};

constexpr double kLogRatioLimit = 20.0;
constexpr double kMaxRatio = 4.9e8;  // above exp(20): a dual clip of this size or more has no effect

// exp for |x| <= 20: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients), within 2 ulp, vectorisable.
// NaN gives NaN, through the polynomial.
SAFERLHF_INLINE float exponential(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x / ln2)
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = int32_t(uint32_t(bits) << 23) + 0x3f800000;  // the exponent field of 2^n
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

SAFERLHF_INLINE double exponential(double x) { return std::exp(x); }

// exp(x) - 1 - x without cancellation near 0: the usual case, because the policies are close.
template <typename T>
SAFERLHF_INLINE T k3(T x, T exp_x) {
  const T series = x * x * T(0.5) * (1 + x * T(1.0 / 3) * (1 + x * T(1.0 / 4) * (1 + x * T(1.0 / 5) *
                   (1 + x * T(1.0 / 6) * (1 + x * T(1.0 / 7) * (1 + x * T(1.0 / 8)))))));
  const Bits<T> near = bits_where<T>((x < T(0.25)) & (x > T(-0.25)));
  return keep(series, near) + keep(exp_x - 1 - x, ~near);  // a select would become a branch, see losses.h
}

// Clamps x to low .. high; NaN stays NaN.
template <typename T>
SAFERLHF_INLINE T clamped(T x, T low, T high) {
  const T raised = x < low ? low : x;
  return x > high ? high : raised;
}

template <typename T>
struct PolicyTerms {
  T loss, d_logp, divergence, ratio, log_ratio;
  bool outside;  // the ratio is clipped
  bool clipped;  // the clipped term is the larger loss
  bool bounded;  // the dual clip bounds the loss
};

// The clipped surrogate; advantage is already scaled and shifted. Without Dual, dual_clip is not read.
template <bool Dual, typename T>
SAFERLHF_INLINE PolicyTerms<T> policy_terms(T logp, T old_logp, T advantage, const PolicySettings& s) {
  const T low = 1 - T(s.clip_ratio), high = 1 + T(s.clip_high), dual_clip = T(s.dual_clip);
  const T difference = logp - old_logp, limit = T(kLogRatioLimit);
  const T log_ratio = clamped(difference, -limit, limit);
  const T ratio = exponential(log_ratio);
  const T plain = ratio * advantage, clipped = clamped(ratio, low, high) * advantage;
  const bool worse = plain > clipped, bounded = Dual & (advantage < 0) & (ratio > dual_clip);
  // A NaN must stay visible in the derivative, so the comparisons select the tokens with derivative 0.
  const bool flat = worse | bounded | (difference > limit) | (difference < -limit);
  const T usual = worse ? -clipped : -plain;
  return {bounded ? -dual_clip * advantage : usual, keep(-plain, bits_where<T>(!flat)), k3(log_ratio, ratio), ratio, log_ratio,
          bool((ratio < low) | (ratio > high)), worse, bounded};
}

template <typename T>
struct KlTerms {
  T kl, d_logp;
};

// gap = ref_logp - logp. With k1 the KL is -gap, else k3.
template <typename T>
SAFERLHF_INLINE KlTerms<T> kl_terms(T gap, bool k1) {
  const T limit = T(kLogRatioLimit), bounded = clamped(gap, -limit, limit);
  const T kl = k3(bounded, exponential(bounded));
  // 1 - exp(bounded), computed from kl, which is accurate near 0.
  const T slope = keep(-(kl + bounded), bits_where<T>(!((gap > limit) | (gap < -limit))));
  const Bits<T> first = bits_where<T>(k1);
  return {keep(-gap, first) + keep(kl, ~first), keep(T(1), first) + keep(slope, ~first)};
}

}  // namespace saferlhf
