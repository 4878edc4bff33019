// The policy loss (clipped surrogate, KL to a reference, entropy bonus) and its gradients in one pass.
#pragma once

#include "common.h"

namespace saferlhf {

// What comes in, all of one dtype: tokens [rows.tokens]; normalizer, scale, shift [1]. Null: not given.
struct PolicyInputs {
  const void *logp, *old_logp, *advantages, *ref_logp, *entropy, *normalizer, *scale, *shift;
};

// dual_clip: infinity for none. k1: the estimator of the KL, else k3. The coefficients count only where ref_logp and entropy
// are given.
struct PolicySettings {
  double clip_ratio, clip_high, dual_clip, kl_coeff;
  bool k1;
  double entropy_coeff;
  bool token_mean;
};

// loss [1], gradient [rows.tokens], entropy_gradient likewise (null without entropy), inverse [1], statistics [11] (order:
// reference.py), all of dtype. The gradients lack the factor `inverse`; masked ones are 0.
const char* ppo_loss_cpu(void* loss, void* gradient, void* entropy_gradient, void* inverse, void* statistics,
                         const PolicyInputs& inputs, const Rows& rows, int dtype, const PolicySettings& settings,
                         int threads);

}  // namespace saferlhf
