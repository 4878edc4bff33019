// The policy loss (clipped surrogate, KL to a reference, entropy bonus) and its gradients in one pass.
#pragma once

#include "common.h"

namespace saferlhf {

struct PolicySettings;  // policy_terms.h

// Inputs, all of one dtype: per token [rows.tokens]; normalizer, scale, shift [1]. Null: not given.
struct PolicyInputs {
  const void *logp, *old_logp, *advantages, *ref_logp, *entropy, *normalizer, *scale, *shift;
};

// Outputs: loss [1], gradient [rows.tokens], entropy_gradient likewise (null without entropy), inverse [1], statistics [11] (order:
// reference.py), all of dtype. The gradients do not include the factor `inverse`; masked ones are 0.
const char* ppo_loss_cpu(void* loss, void* gradient, void* entropy_gradient, void* inverse, void* statistics,
                         const PolicyInputs& inputs, const Rows& rows, int dtype, const PolicySettings& settings,
                         bool token_mean, int threads);

}  // namespace saferlhf
