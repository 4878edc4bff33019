// KL shaping, reward and cost scans, their combination and the statistics, in one backward pass per row.
#pragma once

#include "common.h"

namespace saferlhf {

// All [rows.tokens] of dtype but reward, cost [rows.count], multiplier [1], statistics [12] (order: reference.py).
// cost, cost_values, cost_returns and multiplier are all null for plain PPO.
const char* ppo_lag_advantage_cpu(void* advantages, void* reward_returns, void* cost_returns, void* statistics,
                                  const void* logp, const void* ref_logp, const void* reward, const void* cost,
                                  const void* reward_values, const void* cost_values, const void* multiplier,
                                  const Rows& rows, int dtype, double kl_coeff, double gamma, double lam,
                                  double clip_score, bool carry, int threads);

// The same with device memory, in ppo_lag_advantage.cu: one launch, the host waits for nothing, offsets are trusted.
// partials: kPartials doubles to work in. counter: one integer that is 0 and will be 0 again, not shared with another stream.
constexpr int kStatistics = 12, kPartials = kStatistics * 2048;
const char* ppo_lag_advantage_cuda(void* advantages, void* reward_returns, void* cost_returns, void* statistics,
                                   const void* logp, const void* ref_logp, const void* reward, const void* cost,
                                   const void* reward_values, const void* cost_values, const void* multiplier,
                                   const Rows& rows, int dtype, double kl_coeff, double gamma, double lam,
                                   double clip_score, bool carry, double* partials, int* counter, void* stream);

}  // namespace saferlhf
