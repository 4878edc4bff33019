// Generalised advantage estimation, one backward pass per row.
#pragma once

#include "common.h"

namespace saferlhf {

// advantages, returns, rewards, values: [rows.tokens] of dtype. carry: a masked token is skipped (verl); else its reward
// and value count as 0 (safe-rlhf). Masked outputs are 0.
const char* gae_cpu(void* advantages, void* returns, const void* rewards, const void* values, const Rows& rows, int dtype,
                    double gamma, double lam, bool carry, int threads);

// The same with device memory (offsets and mask too), in gae.cu. The host waits for nothing; offsets are trusted.
const char* gae_cuda(void* advantages, void* returns, const void* rewards, const void* values, const Rows& rows, int dtype,
                     double gamma, double lam, bool carry, void* stream);

}  // namespace saferlhf
