// KL shaping, reward and cost scans, their combination and the statistics, in one backward pass per row.
#pragma once

#include "common.h"

namespace saferlhf {

constexpr int kStatistics = 12;

// Inputs, all of one dtype: logp, ref_logp and the values [rows.tokens]; reward, cost [rows.count]; multiplier [1].
// cost, cost_values and multiplier are all null for plain PPO.
struct AdvantageInputs {
  const void *logp, *ref_logp, *reward, *cost, *reward_values, *cost_values, *multiplier;
};

// Outputs, all of dtype: advantages and returns [rows.tokens], statistics [kStatistics] (order: reference.py). cost_returns is
// null without cost.
struct AdvantageOutputs {
  void *advantages, *reward_returns, *cost_returns, *statistics;
};

// carry: as in gae.h.
struct AdvantageSettings {
  double kl_coeff, gamma, lam, clip_score;
  bool carry;
};

const char* ppo_lag_advantage_cpu(const AdvantageOutputs& outputs, const AdvantageInputs& inputs, const Rows& rows, int dtype,
                                  const AdvantageSettings& settings, int threads);

// The same with device memory, in ppo_lag_advantage.cu: one launch, the host does not wait, offsets are not checked.
// partials: scratch memory of kPartials doubles. counter: one integer that is 0 before and after; no other stream may use it.
constexpr int kPartials = kStatistics * 2048;
const char* ppo_lag_advantage_cuda(const AdvantageOutputs& outputs, const AdvantageInputs& inputs, const Rows& rows, int dtype,
                                   const AdvantageSettings& settings, double* partials, int* counter, void* stream);

}  // namespace saferlhf
