// The derivative of the per-token policy objective with respect to the logits, written in the forward pass.
#pragma once

#include "common.h"

namespace saferlhf {

struct LogitRows;       // logit_rows.h
struct PolicySettings;  // policy_terms.h

// logp, entropy, old_logp, advantage, weight: [rows.count] float; ref_logp likewise or null. A row of weight 0 is masked:
// it is not read, and its gradient, logp and entropy are 0. out may be the logits (see token_logprob.h).
const char* ppo_rows_cpu(float* logp, float* entropy, void* out, int64_t out_stride, int out_dtype, const float* old_logp,
                         const float* advantage, const float* ref_logp, const float* weight, const LogitRows& rows,
                         const PolicySettings& settings, int threads);

}  // namespace saferlhf
