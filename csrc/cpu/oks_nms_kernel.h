// Compiled once per instruction set level; see cpu/foreach_isa.h.
#include <limits>

#include "cpu/vec.h"

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

// Sorts `order` (ascending on entry) by descending score, ties by position, NaN last: every pose's rank is the number
// of those before it. `work` holds 2 * padded numbers.
template <class A>
void rank_sort(int64_t* order, int64_t padded, int64_t count, const A* scores, A* work) {
  constexpr int L = kLanes<A>;
  A *key = work, *missing = work + padded;  // NaN scores have missing 1 and key 0
  for (int64_t i = 0; i < padded; ++i) {
    const A s = i < count ? scores[order[i]] : A(0);
    missing[i] = s == s ? A(0) : A(1);
    key[i] = s == s ? s : A(0);
  }
  int64_t sorted[kRankSortLimit];
  for (int64_t i = 0; i < count; i += L) {
    const Vec<A> mine = load(key + i), lost = load(missing + i);
    IntVec<A> rank{}, position;
    for (int l = 0; l < L; ++l) position[l] = static_cast<int>(i) + l;
    for (int64_t j = 0; j < count; ++j) {
      const A other = key[j], other_lost = missing[j];
      const auto earlier = position > static_cast<std::decay_t<decltype(position[0])>>(j);
      const IntVec<A> same = reinterpret_cast<IntVec<A>>(lost == other_lost);
      rank -= reinterpret_cast<IntVec<A>>(other_lost < lost) |
              (same & (reinterpret_cast<IntVec<A>>(other > mine) |
                       (reinterpret_cast<IntVec<A>>(other == mine) & reinterpret_cast<IntVec<A>>(earlier))));
    }
    for (int l = 0; l < L && i + l < count; ++l) sorted[rank[l]] = order[i + l];
  }
  for (int64_t i = 0; i < count; ++i) order[i] = sorted[i];
}

// Transposes the group's keypoints to [keypoint][pose], scaled so that the exponent of the similarity is a plain
// distance.
template <class A>
void pack(const PoseGroup<A>& g, const PoseArrays<A>& in, A threshold) {
  const int64_t P = g.padded, K = g.keypoints;
  for (int64_t j = 0; j < g.count; ++j) {
    const A* points = in.keypoints + g.index[j] * K * 2;
    const A* confidence = in.keypoint_scores + g.index[j] * K;
    A *to_x = g.x + j, *to_y = g.y + j, *to_visible = g.visible + j;
    for (int64_t k = 0; k < K; ++k) {
      const A x = points[2 * k], y = points[2 * k + 1];
      // x - x is 0 unless x is infinite or NaN; comparing with NaN is false. Visibility is hard to predict: choosing
      // between two numbers in memory takes no branch
      const bool visible = (confidence[k] > threshold) & ((x - x) + (y - y) == A(0));
      const A choice_x[2] = {kFarAway<A>, x * in.root_scale[k]}, choice_y[2] = {kFarAway<A>, y * in.root_scale[k]};
      to_x[k * P] = choice_x[visible];
      to_y[k * P] = choice_y[visible];
      to_visible[k * P] = static_cast<A>(visible);
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t j = g.count; j < P; ++j) {
      g.x[k * P + j] = g.y[k * P + j] = kFarAway<A>;
      g.visible[k * P + j] = A(0);
    }
  }
}

// Object keypoint similarity of pose i with poses j >= from (rounded down to a whole vector), into row[]:
//   O_ij = sum_k v exp(-d^2 / (2 (2 sigma_k)^2 (a_i + a_j) / 2)) / sum_k v,   v = visible in both; 0 without common v.
// Poses lie across the vector, so the loop has no reductions. Keypoints that pose i lacks are skipped; those that pose
// j lacks lie so far away (see FarAway) that their exponential vanishes.
template <class A>
void oks_row(const PoseGroup<A>& g, int64_t i, int64_t from, A* row) {
  constexpr int L = kLanes<A>;
  const int64_t P = g.padded;
  const Vec<A> zero{}, one = splat(A(1)), tiny = splat(A(1e-30));
  for (int64_t j = from / L * L; j < g.count; j += L) {
    const Vec<A> mean = (load(g.area + j) + g.area[i]) * A(0.5);
    const Vec<A> inverse = A(-1) / (mean > tiny ? mean : tiny);  // zero area: 1 for coinciding keypoints, 0 for others
    Vec<A> sum{}, common{};
    for (int64_t k = 0; k < g.keypoints; ++k) {
      if (g.visible[k * P + i] == A(0)) continue;
      const Vec<A> dx = load(g.x + k * P + j) - g.x[k * P + i], dy = load(g.y + k * P + j) - g.y[k * P + i];
      sum += exp2_nonpositive((dx * dx + dy * dy) * inverse);
      common += load(g.visible + k * P + j);
    }
    store(row + j, common > zero ? sum / (common > zero ? common : one) : zero);
  }
}

// Greedy: a pose that overlaps a kept pose of higher score by more than the threshold is dropped.
template <class A>
void hard_nms(const PoseGroup<A>& g, const NmsOptions& o, A* row) {
  for (int64_t j = 0; j < g.count; ++j) g.decay[j] = A(1);
  const A threshold = static_cast<A>(o.threshold);
  for (int64_t i = 0; i < g.valid; ++i) {
    if (g.decay[i] == A(0) || i + 1 >= g.valid) continue;
    oks_row(g, i, i + 1, row);
    for (int64_t j = i + 1; j < g.valid; ++j) g.decay[j] = row[j] > threshold ? A(0) : g.decay[j];
  }
}

// Matrix decay, independent of the others' fate: decay_j = min over i above j of f(O_ij) / f(c_i), at most 1, where
// c_i = max over l above i of O_li is how much i is itself a duplicate. Row i is the last that c_i depends on, so one
// sweep in score order suffices.
template <class A>
void parallel_nms(const PoseGroup<A>& g, const NmsOptions& o, A* row, A* cover) {
  constexpr int L = kLanes<A>;
  const Vec<A> one = splat(A(1));
  for (int64_t j = 0; j < g.padded; ++j) {
    g.decay[j] = A(1);
    cover[j] = A(0);
  }
  const A per_sigma = static_cast<A>(-1.0 / o.gaussian_sigma);
  for (int64_t i = 0; i + 1 < g.valid; ++i) {
    oks_row(g, i, i + 1, row);
    for (int64_t j = (i + 1) / L * L; j <= i; ++j) row[j] = A(0);  // not above these: no effect
    const A c = cover[i];
    const A rest = A(1) - c, inverse = A(1) / (rest > A(1e-12) ? rest : A(1e-12));
    for (int64_t j = (i + 1) / L * L; j < g.count; j += L) {
      const Vec<A> overlap = load(row + j);
      Vec<A> decay = o.gaussian ? exp((overlap * overlap - c * c) * per_sigma) : (one - overlap) * inverse;
      const Vec<A> old = load(g.decay + j), most = load(cover + j);
      // lanes at or before i hold overlap 0; linear gives them >= 1, gaussian exp(c^2 / sigma) >= 1: min leaves them
      store(g.decay + j, decay < old ? decay : old);
      store(cover + j, overlap > most ? overlap : most);
    }
  }
}

// Sequential Soft-NMS: take the best remaining pose, decay the others by their overlap with it, repeat.
template <class A>
void soft_nms(const PoseGroup<A>& g, const NmsOptions& o, A* row, A* current) {
  constexpr int L = kLanes<A>;
  const Vec<A> one = splat(A(1)), overlap_threshold = splat(static_cast<A>(o.overlap_threshold));
  for (int64_t j = 0; j < g.padded; ++j) {
    g.decay[j] = j < g.valid ? A(0) : A(1);  // 0: not taken yet
    current[j] = j < g.valid ? g.score[j] : A(0);
  }
  const A per_sigma = static_cast<A>(-1.0 / o.gaussian_sigma);
  for (int64_t round = 0; round < g.valid; ++round) {
    int64_t best = -1;
    A top = 0;
    for (int64_t j = 0; j < g.valid; ++j) {
      if (g.decay[j] != A(0)) continue;
      // an infinite score times 0 comes last
      const A score = current[j] == current[j] ? current[j] : -std::numeric_limits<A>::infinity();
      if (best < 0 || score > top || (score == top && g.index[j] < g.index[best])) {
        best = j;
        top = score;
      }
    }
    g.decay[best] = A(1);
    g.result[best] = current[best];
    if (round + 1 == g.valid) break;
    oks_row(g, best, 0, row);
    for (int64_t j = 0; j < g.count; j += L) {
      const Vec<A> overlap = load(row + j);
      const Vec<A> linear = overlap > overlap_threshold ? one - overlap : one;
      store(current + j, load(current + j) * (o.gaussian ? exp(overlap * overlap * per_sigma) : linear));
    }
  }
}

}  // namespace

// What the host code may call at this level. `run` fills g.result (new scores in the group's order).
template <class A>
struct OksNmsLevel {
  static void sort(int64_t* order, int64_t padded, int64_t count, const A* scores, A* work) {
    rank_sort(order, padded, count, scores, work);
  }
  static void run(const PoseGroup<A>& g, const PoseArrays<A>& in, const NmsOptions& o, A* row, A* extra) {
    pack(g, in, static_cast<A>(o.keypoint_threshold));
    if (o.method == NmsMethod::kSoft) return soft_nms(g, o, row, extra);
    if (o.method == NmsMethod::kHard) {
      hard_nms(g, o, row);
    } else {
      parallel_nms(g, o, row, extra);
    }
    // an infinite score times 0 would be NaN
    const bool hard = o.method == NmsMethod::kHard;
    for (int64_t j = 0; j < g.valid; ++j) g.result[j] = hard && g.decay[j] == A(0) ? A(0) : g.score[j] * g.decay[j];
  }
};

}  // namespace FASTPOSE_ISA
}  // namespace fastpose
