// Log-prob, entropy and log-sum-exp of given tokens, and the gradient, one row of logits at a time.
#pragma once

#include "common.h"

namespace saferlhf {

struct LogitRows;  // logit_rows.h

// logp, entropy (or null), lse: [rows.count] float. Every id must be in the vocabulary.
const char* token_logprob_cpu(float* logp, float* entropy, float* lse, const LogitRows& rows, int threads);

// Writes d logits to out (row r at out + r * out_stride elements of out_dtype). out may be the logits; with narrower elements,
// each row may start where the row of logits starts. grad_logp and grad_entropy: [rows.count] float or null. An id of -1 has no
// target entry.
const char* token_logprob_backward_cpu(void* out, int64_t out_stride, int out_dtype, const float* logp, const float* entropy,
                                       const float* lse, const float* grad_logp, const float* grad_entropy,
                                       const LogitRows& rows, int threads);

}  // namespace saferlhf
