// Generalised advantage estimation, one backward pass per row.
#pragma once

#include "common.h"

namespace saferlhf {

// advantages, returns, rewards, values: [rows.tokens] of dtype. carry: masked tokens are skipped (verl); otherwise their reward
// and value count as 0 (safe-rlhf). Masked outputs are 0.
const char* gae_cpu(void* advantages, void* returns, const void* rewards, const void* values, const Rows& rows, int dtype,
                    double gamma, double lam, bool carry, int threads);

// The same with device memory (also for offsets and mask), in gae.cu. The host does not wait; offsets are not checked.
const char* gae_cuda(void* advantages, void* returns, const void* rewards, const void* values, const Rows& rows, int dtype,
                     double gamma, double lam, bool carry, void* stream);

}  // namespace saferlhf
