// KL shaping, two scans, combination and statistics on a GPU, in one launch: each token is read and written once. Every block
// leaves its share of the statistics in `partials`; the block that finishes last adds the shares up, in the blocks' order.
#include "ppo_lag_advantage.h"

#include "scan.cuh"

namespace saferlhf {
namespace cuda {
namespace {

static_assert(kPartials == kStatistics * kMaxBlocks, "one share a block");

enum Sum { kKl, kShapedReward, kShapedCost, kRewardAdvantage, kCostAdvantage, kRewardReturn, kCostReturn, kSquare, kSums };

template <typename T>
struct Vectors {
  T *advantages, *reward_returns, *cost_returns;
  const T *logp, *ref_logp, *reward_values, *cost_values;  // [tokens]
  const T *reward, *cost;                                  // [count]
};

template <typename T>
struct Scalars {
  T kl_coeff, clip_score;
  Decay<T> decay;
  bool aligned;
};

template <typename T>
struct Mix {  // A = (A_r - multiplier * A_c) * weight
  T multiplier, weight;
};

template <bool kCost>
struct Shared {
  Chain<kCost ? 2 : 1> chain;
  int last[kMaxWarps];
  int counts[kMaxWarps];
  double sums[kMaxWarps][kSums];
  double statistics[kMaxWarps][kStatistics];
  bool final;
};

// NaN must stay NaN, which min and max promise for no argument order.
template <typename T>
__device__ T bounded(T x, T limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}

// The place, counted from the tile's first token, of the last valid token in a team's tile; -1 when there is none.
template <bool kBlock>
__device__ int last_of_tile(int valid, int* shared) {
  const unsigned some = __ballot_sync(kAll, valid != 0);
  const int lane = some ? 31 - __clz(int(some)) : 0;
  const int bits = __shfl_sync(kAll, valid, lane);
  const int warp = kBlock ? threadIdx.x / 32 : 0;
  int last = some ? (warp * 32 + lane) * kQuad + 31 - __clz(bits) : -1;
  if (kBlock) {
    if (threadIdx.x % 32 == 0) shared[warp] = last;
    __syncthreads();
    for (int w = 0; w < int(blockDim.x) / 32; ++w) last = max(last, shared[w]);
  }
  return last;
}

// The sums of a warp's 32 threads: lane comes back with sum number lane / 4.
template <typename T>
__device__ T sum_of_warp(T (&x)[kSums]) {
  static_assert(kSums == 8, "three halvings");
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = kSums / 2, bit = 16; half > 0; half /= 2, bit /= 2) {
    const bool upper = lane & bit;  // a lane keeps one half and gives the other to its partner
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T given = __shfl_xor_sync(kAll, upper ? x[i] : x[i + half], bit);
      x[i] = (upper ? x[i + half] : x[i]) + given;
    }
  }
  x[0] += __shfl_xor_sync(kAll, x[0], 2);
  return x[0] + __shfl_xor_sync(kAll, x[0], 1);
}

// One tile of one row; returns sum number lane / 4 over the warp's tokens. `last`: which of this thread's tokens is the row's
// last valid one; out of 0..3 when none is.
template <bool kBlock, bool kCost, typename T>
__device__ T shape_tile(double (&state)[kCost ? 2 : 1], const Quad& quad, int last, T reward, T cost, int turn,
                        const Vectors<T>& at, const Scalars<T>& s, const Mix<T>& mix, Shared<kCost>& shared) {
  constexpr int kStreams = kCost ? 2 : 1;
  const Decay<T>& k = s.decay;
  T r[kQuad], c[kQuad], v[kQuad], w[kQuad], handed[kStreams], sums[kSums] = {};
  quad.read(c, at.logp);
  quad.read(r, at.ref_logp);
  quad.read(v, at.reward_values);
  if (kCost) quad.read(w, at.cost_values);
  for (int j = 0; j < kQuad; ++j) {
    const T kl = c[j] - r[j], term = s.kl_coeff * kl;  // 0 where masked
    r[j] = bounded(j == last ? reward - term : -term, s.clip_score);
    sums[kKl] += kl;
    sums[kShapedReward] += r[j];
    if (kCost) {
      c[j] = bounded(j == last ? cost + term : term, s.clip_score);
      sums[kShapedCost] += c[j];
    }
  }
  Map<T, kStreams> map;
  multiply(map, 0, quad, r, v, k);
  if constexpr (kCost) multiply(map, 1, quad, c, w, k);
  scan_tile<kBlock>(handed, state, map, quad.valid, turn, k, shared.chain);
  for (int j = kQuad - 1; j >= 0; --j) {
    const bool on = quad.valid >> j & 1;
    const T reward_return = r[j] + handed[0];
    T advantage = reward_return - v[j];
    sums[kRewardAdvantage] += on ? advantage : T(0);
    sums[kRewardReturn] += on ? reward_return : T(0);
    handed[0] = quad.decay_of(j, k) * handed[0] + k.add(r[j], v[j]);
    r[j] = reward_return;
    if constexpr (kCost) {
      const T cost_return = c[j] + handed[1], cost_advantage = cost_return - w[j];
      sums[kCostAdvantage] += on ? cost_advantage : T(0);
      sums[kCostReturn] += on ? cost_return : T(0);
      handed[1] = quad.decay_of(j, k) * handed[1] + k.add(c[j], w[j]);
      c[j] = cost_return;
      advantage = (advantage - mix.multiplier * cost_advantage) * mix.weight;
    }
    sums[kSquare] += on ? advantage * advantage : T(0);
    v[j] = advantage;
  }
  quad.write(at.advantages, v);
  quad.write(at.reward_returns, r);
  if constexpr (kCost) quad.write(at.cost_returns, c);
  return sum_of_warp(sums);
}

// Statistic `rank` (order: reference.py) of a row, from the sums of its team's warps. The other threads get nothing.
template <bool kBlock, bool kCost, typename T>
__device__ double statistic_of_row(double mine, int count, const Team<kBlock>& team, const Mix<T>& mix,
                                   Shared<kCost>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(kAll, count, step);
  if (lane % 4 == 0) shared.sums[warp][lane / 4] = mine;
  if (lane == 0) shared.counts[warp] = count;
  team.sync();
  if (team.rank >= kStatistics) return 0.0;
  const int warps = team.size / 32;
  double total[kSums] = {}, tokens = 0;
  for (int w = warp; w < warp + warps; ++w) {
    tokens += shared.counts[w];
    for (int i = 0; i < kSums; ++i) total[i] += shared.sums[w][i];
  }
  if (tokens == 0) return 0.0;
  switch (team.rank) {
    case 0: return tokens;
    case 1: return (total[kRewardAdvantage] - mix.multiplier * total[kCostAdvantage]) * mix.weight;
    case 2: return total[kSquare];
    case 3: return 1.0;
    case 4: return total[kKl] / tokens;
    case 5: return total[kKl];
    case 6: return total[kShapedReward];
    case 7: return total[kShapedCost];
    case 8: return total[kRewardAdvantage] / tokens;
    case 9: return total[kCostAdvantage] / tokens;
    case 10: return total[kRewardReturn] / tokens;
    default: return total[kCostReturn] / tokens;
  }
}

// total: statistic `rank` of the rows of this team. The last block to come writes the statistics of all of them.
template <bool kBlock, bool kCost, typename T>
__device__ void add_up(T* statistics, double total, const Team<kBlock>& team, double* partials, int* counter,
                       Shared<kCost>& shared) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (team.rank < kStatistics) shared.statistics[threadIdx.x / 32][team.rank] = total;
  __syncthreads();
  if (threadIdx.x < kStatistics) {
    double sum = 0;
    for (int w = 0; w < (kBlock ? 1 : warps); ++w) sum += shared.statistics[w][threadIdx.x];
    partials[threadIdx.x * gridDim.x + blockIdx.x] = sum;
    __threadfence();  // seen by every block that sees this block's arrival
  }
  __syncthreads();
  if (threadIdx.x == 0) shared.final = atomicAdd(counter, 1) == int(gridDim.x) - 1;
  __syncthreads();
  if (!shared.final) return;
  __threadfence();
  for (int i = threadIdx.x / 32; i < kStatistics; i += warps) {
    double sum = 0;
    for (int block = lane; block < int(gridDim.x); block += 32) sum += __ldcg(partials + i * gridDim.x + block);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    if (lane == 0) shared.statistics[0][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kStatistics) {
    const double sequences = max(shared.statistics[0][3], 1.0), sum = shared.statistics[0][threadIdx.x];
    statistics[threadIdx.x] = T(threadIdx.x < 4 ? sum : sum / sequences);
  }
  if (threadIdx.x == 0) *counter = 0;
}

template <typename T, bool kBlock, bool kCost>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 4 ? (kBlock ? 4 : 3) : 1) shape_kernel(T* statistics, const Vectors<T> at, const Rows rows, const Scalars<T> s,
                                                            const T* multiplier, double* partials, int* counter) {
  __shared__ Shared<kCost> shared;
  const Team<kBlock> team;
  const T lambda = kCost ? *multiplier : T(0);
  const Mix<T> mix = {lambda, T(1) / (T(1) + lambda)};
  double total = 0;
  int turn = 0;
  for (int64_t row = team.first; row < rows.count; row += team.apart) {
    const int64_t begin = rows.begin(row), end = rows.end(row);
    if (begin == end) continue;
    const T reward = at.reward[row], cost = kCost ? at.cost[row] : T(0);
    double sum = 0, state[kCost ? 2 : 1] = {};
    bool seen = false;  // a valid token, in the tiles so far
    int count = 0;
    for (int64_t high = (end - 1) / kQuad; high >= begin / kQuad; high -= team.size, turn ^= 1) {
      const Quad quad(high - (team.size - 1) + team.rank, begin, end, rows, s.aligned);
      int last = -1;
      if (rows.mask == nullptr) {
        last = end - 1 - quad.at < kQuad ? int(end - 1 - quad.at) : -1;
      } else if (!seen) {
        const int place = last_of_tile<kBlock>(quad.valid, shared.last);
        seen = place >= 0;
        last = seen ? place - team.rank * kQuad : -1;
      }
      sum += double(shape_tile<kBlock, kCost>(state, quad, last, reward, cost, turn, at, s, mix, shared));
      count += __popc(quad.valid);
    }
    total += statistic_of_row<kBlock, kCost>(sum, count, team, mix, shared);
  }
  zero_tail(at.advantages, rows);
  zero_tail(at.reward_returns, rows);
  if (kCost) zero_tail(at.cost_returns, rows);
  add_up<kBlock, kCost>(statistics, total, team, partials, counter, shared);
}

template <typename T>
const char* run(T* statistics, Vectors<T> at, const Rows& rows, Scalars<T> s, const T* multiplier, double* partials,
                int* counter, void* stream) {
  const Shape shape(rows);
  const auto kernel = shape.block ? (at.cost ? shape_kernel<T, true, true> : shape_kernel<T, true, false>)
                                  : (at.cost ? shape_kernel<T, false, true> : shape_kernel<T, false, false>);
  return launch(kernel, shape, stream, statistics, at, rows, s, multiplier, partials, counter);
}

template <typename T>
const char* typed(void* advantages, void* reward_returns, void* cost_returns, void* statistics, const void* logp,
                  const void* ref_logp, const void* reward, const void* cost, const void* reward_values,
                  const void* cost_values, const void* multiplier, const Rows& rows, double kl_coeff, double gamma,
                  double lam, double clip_score, bool carry, double* partials, int* counter, void* stream) {
  const void* vectors[] = {advantages, reward_returns, cost_returns, logp, ref_logp, reward_values, cost_values};
  const Vectors<T> at = {static_cast<T*>(advantages), static_cast<T*>(reward_returns), static_cast<T*>(cost_returns),
                         static_cast<const T*>(logp), static_cast<const T*>(ref_logp),
                         static_cast<const T*>(reward_values), static_cast<const T*>(cost_values),
                         static_cast<const T*>(reward), static_cast<const T*>(cost)};
  const Scalars<T> s = {T(kl_coeff), T(clip_score), Decay<T>(gamma, lam, carry), aligned(rows, vectors, 7)};
  return run<T>(static_cast<T*>(statistics), at, rows, s, static_cast<const T*>(multiplier), partials, counter, stream);
}

}  // namespace
}  // namespace cuda

const char* ppo_lag_advantage_cuda(void* advantages, void* reward_returns, void* cost_returns, void* statistics,
                                   const void* logp, const void* ref_logp, const void* reward, const void* cost,
                                   const void* reward_values, const void* cost_values, const void* multiplier,
                                   const Rows& rows, int dtype, double kl_coeff, double gamma, double lam,
                                   double clip_score, bool carry, double* partials, int* counter, void* stream) {
  const auto run = dtype == kFloat64 ? cuda::typed<double> : cuda::typed<float>;
  return run(advantages, reward_returns, cost_returns, statistics, logp, ref_logp, reward, cost, reward_values, cost_values,
             multiplier, rows, kl_coeff, gamma, lam, clip_score, carry, partials, counter, stream);
}

}  // namespace saferlhf
