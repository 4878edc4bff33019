// KL shaping, two scans, combination and statistics on a GPU, in one launch: each token is read and written once. Every block
// writes its share of the statistics to `partials`; the block that finishes last adds the shares, in the order of the blocks.
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

// NaN must stay NaN, which min and max do not guarantee for any argument order.
template <typename T>
__device__ T bounded(T x, T limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}

// The position of the last valid token in a team's tile, relative to the tile's first token; -4 if there is none.
template <bool kBlock, int kChunks>
__device__ int last_of_tile(const Quad (&quads)[kChunks], const Team<kBlock>& team, int* shared) {
  int last = -kQuad;
  for (int g = 0; g < kChunks; ++g) {
    const unsigned some = __ballot_sync(kAll, quads[g].valid != 0);
    const int lane = some ? 31 - __clz(int(some)) : 0;
    const int bits = __shfl_sync(kAll, quads[g].valid, lane);
    if (some) last = ((team.warp * kChunks + g) * 32 + lane) * kQuad + 31 - __clz(bits);
  }
  if (kBlock) {
    if (threadIdx.x % 32 == 0) shared[team.warp] = last;
    __syncthreads();
    for (int w = 0; w < team.warps; ++w) last = max(last, shared[w]);
  }
  return last;
}

// Sums over the 32 threads of a warp: each lane returns sum number lane / 4.
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

// Computes the rewards and costs of a thread's tokens from logp (x[0]) and ref_logp (x[1]): costs replace x[0], rewards x[1].
// `last`: the position of the row's last valid token, relative to this thread's first token in the chunk.
template <bool kCost, typename T, int kIn>
__device__ void shape(T (&x)[kIn][kQuad], T (&sums)[kSums], int last, T reward, T cost, const Scalars<T>& s) {
  T edge = T(0);
  for (int j = 0; j < kQuad; ++j) {
    const T kl = x[0][j] - x[1][j], term = s.kl_coeff * kl;  // 0 where masked
    edge = j == last ? term : edge;
    x[0][j] = bounded(term, s.clip_score);
    x[1][j] = -x[0][j];  // the bound is symmetric
    sums[kKl] += kl;
    sums[kShapedCost] += x[0][j];
    sums[kShapedReward] -= x[0][j];
  }
  if (unsigned(last) < unsigned(kQuad)) {  // the scores are added at this token, before the clamp
    const T plain = bounded(edge, s.clip_score), r = bounded(reward - edge, s.clip_score);
    const T c = bounded(cost + edge, s.clip_score);
    for (int j = 0; j < kQuad; ++j) {
      x[0][j] = j == last ? c : x[0][j];
      x[1][j] = j == last ? r : x[1][j];
    }
    sums[kShapedReward] += r + plain;
    sums[kShapedCost] += c - plain;
  }
}

// Computes one tile of one row; x has logp, ref_logp, reward_values and cost_values. Returns sum number lane / 4 over the warp's
// tokens. `last`: the position of the row's last valid token in the tile, or any other number if it is in another tile.
template <bool kBlock, bool kCost, typename T, int kChunks, int kIn>
__device__ T shape_tile(T (&x)[kChunks][kIn][kQuad], double (&state)[kCost ? 2 : 1], const Quad (&quads)[kChunks],
                        int last, T reward, T cost, int turn, const Vectors<T>& at, const Scalars<T>& s,
                        const Mix<T>& mix, const Team<kBlock>& team, Shared<kCost>& shared) {
  constexpr int kStreams = kCost ? 2 : 1;
  const Decay<T>& k = s.decay;
  T handed[kChunks][kStreams], decay[kQuad], sums[kSums] = {};
  Map<T, kStreams> maps[kChunks];
  for (int g = 0; g < kChunks; ++g) {
    quads[g].keep(x[g]);
    shape<kCost>(x[g], sums, last - team.place(g) * kQuad, reward, cost, s);
    quads[g].decays(decay, k);
    multiply(maps[g], 0, decay, x[g][1], x[g][2], k);
    if constexpr (kCost) multiply(maps[g], 1, decay, x[g][0], x[g][3], k);
  }
  scan_tile<kBlock>(handed, state, maps, quads, turn, k, team, shared.chain);
  for (int g = 0; g < kChunks; ++g) {
    quads[g].decays(decay, k);
    for (int j = kQuad - 1; j >= 0; --j) {  // r becomes the return, v the advantage, and both are 0 where masked
      const bool on = quads[g].valid >> j & 1;
      T &r = x[g][1][j], &v = x[g][2][j];
      const T after = handed[g][0];
      handed[g][0] = decay[j] * after + k.add(r, v);
      r = on ? r + after : T(0);
      v = r - v;
      sums[kRewardReturn] += r;
      sums[kRewardAdvantage] += v;
      if constexpr (kCost) {
        T &c = x[g][0][j], &w = x[g][3][j];
        const T cost_after = handed[g][1];
        handed[g][1] = decay[j] * cost_after + k.add(c, w);
        c = on ? c + cost_after : T(0);
        w = c - w;
        sums[kCostReturn] += c;
        sums[kCostAdvantage] += w;
        v = (v - mix.multiplier * w) * mix.weight;
      }
      sums[kSquare] += v * v;
    }
    quads[g].write(at.advantages, x[g][2]);
    quads[g].write(at.reward_returns, x[g][1]);
    if constexpr (kCost) quads[g].write(at.cost_returns, x[g][0]);
  }
  return sum_of_warp(sums);
}

// Returns statistic `rank` (order: reference.py) of a row from the sums of its team's warps; 0 for the other threads.
template <bool kBlock, bool kCost, typename T>
__device__ double statistic_of_row(double mine, int count, const Team<kBlock>& team, const Mix<T>& mix,
                                   Shared<kCost>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;  // warp in the block: a team of one warp writes to its own place
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(kAll, count, step);
  if (!kBlock) __syncwarp();  // the previous row's sums have been read; in a block the scans' barriers ensure this
  if (lane % 4 == 0) shared.sums[warp][lane / 4] = mine;
  if (lane == 0) shared.counts[warp] = count;
  team.sync();
  if (team.rank >= kStatistics) return 0.0;
  double total[kSums] = {}, tokens = 0;
  for (int w = warp; w < warp + team.warps; ++w) {
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
    case 7: return kCost ? total[kShapedCost] : 0.0;
    case 8: return total[kRewardAdvantage] / tokens;
    case 9: return total[kCostAdvantage] / tokens;
    case 10: return total[kRewardReturn] / tokens;
    default: return total[kCostReturn] / tokens;
  }
}

// total: statistic `rank` of the rows of this team. The last block to arrive writes the statistics of all rows.
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
    __threadfence();  // visible to every block that sees this block's arrival
  }
  __syncthreads();
  if (threadIdx.x == 0) shared.final = atomicAdd(counter, 1) == int(gridDim.x) - 1;
  __syncthreads();
  if (!shared.final) return;
  __threadfence();
  double sums[kStatistics] = {};
  for (int block = threadIdx.x; block < int(gridDim.x); block += blockDim.x) {
#pragma unroll
    for (int i = 0; i < kStatistics; ++i) sums[i] += __ldcg(partials + i * gridDim.x + block);
  }
#pragma unroll
  for (int i = 0; i < kStatistics; ++i) {
    for (int step = 16; step > 0; step /= 2) sums[i] += __shfl_xor_sync(kAll, sums[i], step);
    if (lane == 0) shared.statistics[threadIdx.x / 32][i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x < kStatistics) {
    double sum = 0, sequences = 0;
    for (int w = 0; w < warps; ++w) {
      sum += shared.statistics[w][threadIdx.x];
      sequences += shared.statistics[w][3];
    }
    statistics[threadIdx.x] = T(threadIdx.x < 4 ? sum : sum / max(sequences, 1.0));
  }
  if (threadIdx.x == 0) *counter = 0;
}

template <typename T>
constexpr int kPerSM = sizeof(T) == 4 ? 2 : 1;  // blocks per SM that the registers allow without spilling

template <typename T, bool kBlock, bool kCost>
__global__ void __launch_bounds__(kMaxThreads, kPerSM<T>)
shape_kernel(T* statistics, const Vectors<T> at, const Rows rows, const Scalars<T> s, const T* multiplier, double* partials,
             int* counter) {
  constexpr int kChunks = Team<kBlock>::kChunks, kIn = kCost ? 4 : 3;
  __shared__ Shared<kCost> shared;
  const Team<kBlock> team;
  const T lambda = kCost ? *multiplier : T(0);
  const T* from[kIn] = {at.logp, at.ref_logp, at.reward_values};
  if (kCost) from[kIn - 1] = at.cost_values;
  const Mix<T> mix = {lambda, T(1) / (T(1) + lambda)};
  double total = 0;
  int turn = 0;
  for (int64_t row = team.first; row < rows.count; row += team.apart) {
    const int64_t begin = rows.begin(row), end = rows.end(row);
    if (begin == end) continue;
    const T reward = at.reward[row], cost = kCost ? at.cost[row] : T(0);
    double sum = 0, state[kCost ? 2 : 1] = {};
    bool seen = false;  // whether a previous tile had a valid token
    int count = 0;
    for (int64_t high = (end - 1) / kQuad; high >= begin / kQuad; high -= team.quads(), turn ^= 1) {
      const int64_t first = high - team.quads() + 1;
      Quad quads[kChunks];
      for (int g = 0; g < kChunks; ++g) {
        quads[g] = Quad(first + team.place(g), begin, end, rows, s.aligned);
      }
      T x[kChunks][kIn][kQuad];
      for (int g = 0; g < kChunks; ++g) quads[g].fetch(x[g], from);
      for (int g = 0; g < kChunks; ++g) {
        quads[g].look();
        count += __popc(quads[g].valid);
      }
      int last = -kQuad;
      if (rows.mask == nullptr) {
        if (high == (end - 1) / kQuad) last = int(end - 1 - first * kQuad);
      } else if (!seen) {
        last = last_of_tile<kBlock>(quads, team, shared.last);
        seen = last >= 0;
      }
      sum += double(shape_tile<kBlock, kCost>(x, state, quads, last, reward, cost, turn, at, s, mix, team, shared));
    }
    total += statistic_of_row<kBlock, kCost>(sum, count, team, mix, shared);
  }
  zero_tail(at.advantages, rows);
  zero_tail(at.reward_returns, rows);
  if (kCost) zero_tail(at.cost_returns, rows);
  add_up<kBlock, kCost>(statistics, total, team, partials, counter, shared);
}

template <typename T>
const char* run(const AdvantageOutputs& out, const AdvantageInputs& in, const Rows& rows, const AdvantageSettings& settings,
                double* partials, int* counter, void* stream) {
  const void* vectors[] = {out.advantages, out.reward_returns, out.cost_returns, in.logp, in.ref_logp, in.reward_values,
                           in.cost_values};
  const Vectors<T> at = {static_cast<T*>(out.advantages), static_cast<T*>(out.reward_returns),
                         static_cast<T*>(out.cost_returns), static_cast<const T*>(in.logp),
                         static_cast<const T*>(in.ref_logp), static_cast<const T*>(in.reward_values),
                         static_cast<const T*>(in.cost_values), static_cast<const T*>(in.reward),
                         static_cast<const T*>(in.cost)};
  const Scalars<T> s = {T(settings.kl_coeff), T(settings.clip_score),
                        Decay<T>(settings.gamma, settings.lam, settings.carry), aligned(rows, vectors, 7)};
  const Shape shape(rows, kPerSM<T>);
  const auto kernel = shape.block ? (at.cost ? shape_kernel<T, true, true> : shape_kernel<T, true, false>)
                                  : (at.cost ? shape_kernel<T, false, true> : shape_kernel<T, false, false>);
  return launch(kernel, shape, stream, static_cast<T*>(out.statistics), at, rows, s, static_cast<const T*>(in.multiplier),
                partials, counter);
}

}  // namespace
}  // namespace cuda

const char* ppo_lag_advantage_cuda(const AdvantageOutputs& outputs, const AdvantageInputs& inputs, const Rows& rows, int dtype,
                                   const AdvantageSettings& settings, double* partials, int* counter, void* stream) {
  const auto run = dtype == kFloat64 ? cuda::run<double> : cuda::run<float>;
  return run(outputs, inputs, rows, settings, partials, counter, stream);
}

}  // namespace saferlhf
