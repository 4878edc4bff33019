// KL shaping, two scans, combination and statistics on the CPU: each token is read once. The sums of each row are
// stored separately and added in row order, in double, so the number of threads changes no bit.
#include "ppo_lag_advantage.h"

#include <algorithm>
#include <vector>

#include "scan.h"

namespace saferlhf {
namespace {

enum Sum { kKl, kShapedReward, kShapedCost, kRewardAdvantage, kCostAdvantage, kRewardReturn, kCostReturn, kSquare, kSums };

struct RowSums {
  int64_t count = 0;
  double of[kSums] = {};
};

struct Call {
  AdvantageOutputs out;
  AdvantageInputs in;
  double kl_coeff, clip_score, multiplier, weight;  // weight = 1 / (1 + multiplier)
  Decay decay;
};

// NaN must stay NaN, which std::clamp does not guarantee for any argument order.
template <class V>
SAFERLHF_INLINE V bounded(V x, V limit) {
  const V below = x > limit ? limit : x;
  return below < -limit ? -limit : below;
}

// Computes one row of T; kCost: there is a cost stream.
template <int W, bool kCost, class T>
SAFERLHF_INLINE void shape_row(RowSums& sums, const Call& call, const uint8_t* mask, int64_t index, int64_t at,
                               int64_t length) {
  using L = Lanes<W, T>;
  using V = typename L::Type;
  const AdvantageOutputs& out = call.out;
  const AdvantageInputs& in = call.in;
  T *advantages = static_cast<T*>(out.advantages) + at, *reward_returns = static_cast<T*>(out.reward_returns) + at;
  T* cost_returns = kCost ? static_cast<T*>(out.cost_returns) + at : nullptr;
  const T *logp = static_cast<const T*>(in.logp) + at, *ref_logp = static_cast<const T*>(in.ref_logp) + at;
  const T* reward_values = static_cast<const T*>(in.reward_values) + at;
  const T* cost_values = kCost ? static_cast<const T*>(in.cost_values) + at : nullptr;
  const double reward = static_cast<const T*>(in.reward)[index];
  const double cost = kCost ? double(static_cast<const T*>(in.cost)[index]) : 0.0;
  const double kl_coeff = call.kl_coeff, limit = call.clip_score, multiplier = call.multiplier, weight = call.weight;
  Handed<W, T> handed_reward(call.decay), handed_cost(call.decay);
  V lanes[kSums] = {};
  int added = 0;  // tokens in `lanes`

  const auto token = [&](int64_t t, bool last) SAFERLHF_INLINED {
    const double kl = double(logp[t]) - double(ref_logp[t]), v = reward_values[t];
    const double r = bounded(-kl_coeff * kl + (last ? reward : 0.0), limit);
    const double reward_return = r + handed_reward.step(r, v), reward_advantage = reward_return - v;
    double advantage = reward_advantage;
    if (kCost) {
      const double w = cost_values[t], c = bounded(kl_coeff * kl + (last ? cost : 0.0), limit);
      const double cost_return = c + handed_cost.step(c, w), cost_advantage = cost_return - w;
      advantage = (reward_advantage - multiplier * cost_advantage) * weight;
      cost_returns[t] = T(cost_return);
      sums.of[kShapedCost] += c;
      sums.of[kCostAdvantage] += cost_advantage;
      sums.of[kCostReturn] += cost_return;
    }
    advantages[t] = T(advantage);
    reward_returns[t] = T(reward_return);
    sums.of[kKl] += kl;
    sums.of[kShapedReward] += r;
    sums.of[kRewardAdvantage] += reward_advantage;
    sums.of[kRewardReturn] += reward_return;
    sums.of[kSquare] += advantage * advantage;
  };

  const auto vector = [&](int64_t t) SAFERLHF_INLINED {
    const V kl = L::read(logp + t) - L::read(ref_logp + t);
    const V c = bounded(T(kl_coeff) * kl, L::all(T(limit))), r = -c;  // the bound is symmetric
    V v = L::read(reward_values + t);
    const V reward_return = handed_reward.step(r, v) + r, reward_advantage = reward_return - v;
    V advantage = reward_advantage;
    if (kCost) {
      v = L::read(cost_values + t);
      const V cost_return = handed_cost.step(c, v) + c, cost_advantage = cost_return - v;
      advantage = (reward_advantage - T(multiplier) * cost_advantage) * T(weight);
      store(cost_returns + t, cost_return);
      lanes[kCostAdvantage] += cost_advantage;
      lanes[kCostReturn] += cost_return;
    }
    store(advantages + t, advantage);
    store(reward_returns + t, reward_return);
    lanes[kKl] += kl;
    lanes[kShapedCost] += c;
    lanes[kRewardAdvantage] += reward_advantage;
    lanes[kRewardReturn] += reward_return;
    lanes[kSquare] += advantage * advantage;
  };

  // Lanes are summed in T for a limited number of tokens, then in double.
  const auto flush = [&]() {
    lanes[kShapedReward] = -lanes[kShapedCost];
    for (int i = 0; i < kSums; ++i) {
      sums.of[i] += L::sum(lanes[i]);
      lanes[i] = V{};
    }
    added = 0;
  };

  for_runs(mask, length, [&](int64_t begin, int64_t end) SAFERLHF_INLINED {
    int64_t t = end;
    // The loop goes backwards, so the first valid token is the row's last one: the scores belong to it.
    if (sums.count == 0) token(--t, true);
    // Single tokens first, full vectors after them: a row that begins on a cache line then writes full lines.
    for (int rest = (t - begin) % L::count; rest > 0; --rest) token(--t, false);
    while (t > begin) {
      const int64_t stop = std::max(begin, t - 64 * L::count);
      added += int(t - stop);
      while (t > stop) vector(t -= L::count);
      if (added >= 64 * L::count) flush();
    }
    sums.count += end - begin;
  }, [&](int64_t begin, int64_t end) SAFERLHF_INLINED {
    handed_reward.hole(end - begin, call.decay);
    handed_cost.hole(end - begin, call.decay);
    fill_zero(advantages, begin, end);
    fill_zero(reward_returns, begin, end);
    if (kCost) fill_zero(cost_returns, begin, end);
  });
  flush();
}

template <int W>
SAFERLHF_INLINE void row_body(RowSums& sums, const Call& call, const uint8_t* mask, int64_t index, int64_t at, int64_t length,
                              int dtype) {
  if (dtype == kFloat64) {
    if (call.in.cost) shape_row<W, true, double>(sums, call, mask, index, at, length);
    else shape_row<W, false, double>(sums, call, mask, index, at, length);
  } else {
    if (call.in.cost) shape_row<W, true, float>(sums, call, mask, index, at, length);
    else shape_row<W, false, float>(sums, call, mask, index, at, length);
  }
}

SAFERLHF_WIDTHS(row, (RowSums& sums, const Call& call, const uint8_t* mask, int64_t index, int64_t at, int64_t length,
                      int dtype),
                (sums, call, mask, index, at, length, dtype))

template <class T>
void write_statistics(T* statistics, const std::vector<RowSums>& sums_B, const Call& call) {
  double total[kStatistics] = {};
  for (const RowSums& row : sums_B) {
    if (row.count == 0) continue;
    const double share = 1.0 / double(row.count), *of = row.of;
    const double advantage = (of[kRewardAdvantage] - call.multiplier * of[kCostAdvantage]) * call.weight;
    const double values[kStatistics] = {double(row.count), advantage, of[kSquare], 1.0, of[kKl] * share, of[kKl],
                               of[kShapedReward], of[kShapedCost], of[kRewardAdvantage] * share,
                               of[kCostAdvantage] * share, of[kRewardReturn] * share, of[kCostReturn] * share};
    for (int i = 0; i < kStatistics; ++i) total[i] += values[i];
  }
  const double sequences = std::max(total[3], 1.0);
  for (int i = 0; i < kStatistics; ++i) statistics[i] = T(i < 4 ? total[i] : total[i] / sequences);
}

}  // namespace

const char* ppo_lag_advantage_cpu(const AdvantageOutputs& outputs, const AdvantageInputs& inputs, const Rows& rows, int dtype,
                                  const AdvantageSettings& s, int threads) {
  if (const char* error = check_rows(rows)) return error;
  const void* multiplier = inputs.multiplier;
  const double lambda = multiplier == nullptr ? 0.0
      : dtype == kFloat64 ? *static_cast<const double*>(multiplier) : double(*static_cast<const float*>(multiplier));
  const Call call = {outputs, inputs, s.kl_coeff, s.clip_score, lambda, 1.0 / (1.0 + lambda), Decay(s.gamma, s.lam, s.carry)};
  std::vector<RowSums> sums_B(rows.count);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t index = 0; index < rows.count; ++index) {
    const int64_t at = rows.begin(index);
    row(sums_B[index], call, rows.mask ? rows.mask + at : nullptr, index, at, rows.end(index) - at, dtype);
  }
  const int64_t size = dtype == kFloat64 ? 8 : 4;
  for (void* out : {outputs.advantages, outputs.reward_returns, outputs.cost_returns}) {
    if (out) fill_zero(static_cast<char*>(out), rows.covered() * size, rows.tokens * size);
  }
  if (dtype == kFloat64) write_statistics(static_cast<double*>(outputs.statistics), sums_B, call);
  else write_statistics(static_cast<float*>(outputs.statistics), sums_B, call);
  return nullptr;
}

}  // namespace saferlhf
