// Suppression of duplicate poses by object keypoint similarity, all images of a batch, without a look from the host:
// the sizes of results and launches depend on N only, so that the operator can be captured in a CUDA graph.
//
// Poses are sorted by image. A warp owns 32 positions of that order and does the images that begin there, if they have
// at most kWarpPoses poses; larger images are found and done by whole blocks. A team (warp or block) sorts the poses of
// its image by score, packs their keypoints as [keypoint][pose] and then goes down the list as the CPU does: pose by
// pose, with one later pose per thread.
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "checks.h"
#include "cuda/runtime.h"
#include "oks_nms.h"

namespace fastpose {
namespace {

constexpr int kWarp = 32, kWarpsPerBlock = 4, kWarpPoses = 40, kBlockThreads = 256;

// N poses of K keypoints; contiguous arrays.
template <class A>
struct PoseBatch {
  const A *keypoints, *keypoint_scores, *scores, *areas, *sigmas;  // [N, K, 2], [N, K], [N], [N], [K]
  const int64_t *order, *image;  // [N] positions by image, and their images; null: all in one image
  A* new_scores;                 // [N], written
  bool* keep;                    // [N], written
  int poses, num_keypoints;
};

// The poses of one image by descending score (ties: lower index first), NaN scores last.
template <class A>
struct PoseGroup {
  int64_t* index;    // [count] position in the input
  A *x, *y;          // [keypoint][pose], times the scale of the keypoint; kFarAway: not visible
  A *area, *score;   // [count]
  A *decay, *cover;  // [count], what the methods work on
  int count, valid;  // poses; those whose score is not NaN
  int num_keypoints;

  __host__ __device__ static int64_t bytes_per_pose(int num_keypoints) {
    return static_cast<int64_t>(sizeof(int64_t)) + (2 * static_cast<int64_t>(num_keypoints) + 4) * sizeof(A);
  }
  __device__ PoseGroup(unsigned char* memory, int count_, int num_keypoints_)
      : index(reinterpret_cast<int64_t*>(memory)), count(count_), valid(0), num_keypoints(num_keypoints_) {
    const int64_t block = static_cast<int64_t>(num_keypoints) * count;
    x = reinterpret_cast<A*>(index + count);
    y = x + block;
    area = y + block;
    score = area + count;
    decay = score + count;
    cover = decay + count;
  }
};

// ---- teams

__device__ inline float shuffle(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ inline double shuffle(double v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ inline int shuffle(int v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// A pose that may be the best of those left; at is -1 for none.
template <class A>
struct Candidate {
  A score;
  int at;
};

// Higher score, then lower index. A total order, so that all threads agree: NaN (infinity times 0) counts as -infinity.
template <class A>
__device__ Candidate<A> better(Candidate<A> a, Candidate<A> b, const int64_t* index) {
  if (a.at < 0) return b;
  if (b.at < 0) return a;
  const A sa = a.score == a.score ? a.score : -INFINITY, sb = b.score == b.score ? b.score : -INFINITY;
  return sb > sa || (sb == sa && index[b.at] < index[a.at]) ? b : a;
}

struct WarpTeam {
  static constexpr int kSize = kWarp;
  __device__ int rank() const { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ void sync() const { __syncwarp(); }
  template <class A>
  __device__ Candidate<A> best(Candidate<A> mine, const int64_t* index) const {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      mine = better(mine, Candidate<A>{shuffle(mine.score, mask), shuffle(mine.at, mask)}, index);
    }
    return mine;
  }
};

struct BlockTeam {
  static constexpr int kSize = kBlockThreads;
  static constexpr int64_t kReservedBytes = kBlockThreads / kWarp * 16;  // one candidate per warp
  unsigned char* reserved;
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ void sync() const { __syncthreads(); }
  template <class A>
  __device__ Candidate<A> best(Candidate<A> mine, const int64_t* index) const {
    Candidate<A>* of_warps = reinterpret_cast<Candidate<A>*>(reserved);
    mine = WarpTeam().best(mine, index);
    __syncthreads();  // the last result has been read
    if (rank() % kWarp == 0) of_warps[rank() / kWarp] = mine;
    __syncthreads();
    for (int i = 0; i < kSize / kWarp; ++i) mine = better(mine, of_warps[i], index);
    return mine;
  }
};

// ---- one image

__device__ inline float exp2_of(float x) { return exp2f(x); }
__device__ inline double exp2_of(double x) { return exp2(x); }
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }

// Sorts poses start ... start + count of the order by their rank, the number of poses before them, and packs them.
template <class A, class Team>
__device__ void load_group(PoseGroup<A>& g, const PoseBatch<A>& in, A keypoint_threshold, int64_t start, Team team) {
  A* unsorted = g.decay;
  for (int j = team.rank(); j < g.count; j += Team::kSize) {
    unsorted[j] = in.scores[in.order ? in.order[start + j] : start + j];
  }
  team.sync();
  for (int j = 0; j < g.count; ++j) g.valid += unsorted[j] == unsorted[j];
  for (int j = team.rank(); j < g.count; j += Team::kSize) {
    const A mine = unsorted[j];
    int rank = 0;
    for (int i = 0; i < g.count; ++i) {
      const A other = unsorted[i];
      const bool same = other == mine || (other != other && mine != mine);
      rank += other > mine || (other == other && mine != mine) || (same && i < j);
    }
    const int64_t index = in.order ? in.order[start + j] : start + j;
    const A area = in.areas[index];
    g.index[rank] = index;
    g.score[rank] = mine;
    g.area[rank] = area > A(0) ? (area < kLargestArea<A> ? area : kLargestArea<A>) : A(0);  // NaN counts as 0
  }
  team.sync();
  const int64_t all = static_cast<int64_t>(g.count) * g.num_keypoints;
  for (int64_t i = team.rank(); i < all; i += Team::kSize) {
    const int64_t j = i / g.num_keypoints, k = i % g.num_keypoints, from = g.index[j] * g.num_keypoints + k;
    const A x = in.keypoints[2 * from], y = in.keypoints[2 * from + 1];
    const A scale = static_cast<A>(kScaleTimesSigma) / in.sigmas[k];
    // x - x is 0 unless x is infinite or NaN; comparing with NaN is false
    const bool visible = in.keypoint_scores[from] > keypoint_threshold && (x - x) + (y - y) == A(0);
    g.x[k * g.count + j] = visible ? x * scale : kFarAway<A>;
    g.y[k * g.count + j] = visible ? y * scale : kFarAway<A>;
  }
  for (int j = team.rank(); j < g.count; j += Team::kSize) {
    g.decay[j] = A(1);
    g.cover[j] = A(0);
  }
}

// Object keypoint similarity of two poses, as on the CPU: keypoints that one of them lacks lie so far from the other's
// that they add nothing.
template <class A>
__device__ A similarity(const PoseGroup<A>& g, int i, int j) {
  const A mean = (g.area[i] + g.area[j]) * A(0.5);
  const A inverse = A(-1) / (mean > A(1e-30) ? mean : A(1e-30));
  const A lowest = sizeof(A) == 4 ? A(-126) : A(-1020);
  A sum = A(0), common = A(0);
  for (int k = 0; k < g.num_keypoints; ++k) {
    const int64_t row = static_cast<int64_t>(k) * g.count;
    const A xi = g.x[row + i], xj = g.x[row + j];
    if (xi == kFarAway<A>) continue;
    const A dx = xj - xi, dy = g.y[row + j] - g.y[row + i];
    const A exponent = (dx * dx + dy * dy) * inverse;
    sum += exp2_of(exponent > lowest ? exponent : lowest);
    common += xj == kFarAway<A> ? A(0) : A(1);
  }
  return common > A(0) ? sum / common : A(0);
}

// Greedy: a pose that overlaps a kept pose of higher score by more than the threshold is dropped.
template <class A, class Team>
__device__ void hard_nms(PoseGroup<A>& g, const NmsOptions& o, Team team) {
  const A threshold = static_cast<A>(o.threshold);
  for (int i = 0; i + 1 < g.valid; ++i) {
    team.sync();
    if (g.decay[i] == A(0)) continue;
    for (int j = i + 1 + team.rank(); j < g.valid; j += Team::kSize) {
      if (similarity(g, i, j) > threshold) g.decay[j] = A(0);
    }
  }
}

// Matrix decay; see parallel_nms in cpu/oks_nms_kernel.h.
template <class A, class Team>
__device__ void parallel_nms(PoseGroup<A>& g, const NmsOptions& o, Team team) {
  const A per_sigma = static_cast<A>(-1.0 / o.gaussian_sigma);
  for (int i = 0; i + 1 < g.valid; ++i) {
    team.sync();
    const A c = g.cover[i], rest = A(1) - c, inverse = A(1) / (rest > A(1e-12) ? rest : A(1e-12));
    for (int j = i + 1 + team.rank(); j < g.valid; j += Team::kSize) {
      const A overlap = similarity(g, i, j);
      const A decay = o.gaussian ? exp_of((overlap * overlap - c * c) * per_sigma) : (A(1) - overlap) * inverse;
      if (decay < g.decay[j]) g.decay[j] = decay;
      if (overlap > g.cover[j]) g.cover[j] = overlap;
    }
  }
}

// Sequential Soft-NMS: take the best remaining pose, decay the others by their overlap with it, repeat. Here `decay` is
// the present score, `cover` is 1 for poses that were taken; every thread has its own poses.
template <class A, class Team>
__device__ void soft_nms(PoseGroup<A>& g, const NmsOptions& o, Team team) {
  const A per_sigma = static_cast<A>(-1.0 / o.gaussian_sigma), limit = static_cast<A>(o.overlap_threshold);
  for (int j = team.rank(); j < g.valid; j += Team::kSize) g.decay[j] = g.score[j];
  team.sync();
  for (int round = 0; round < g.valid; ++round) {
    Candidate<A> mine{A(0), -1};
    for (int j = team.rank(); j < g.valid; j += Team::kSize) {
      if (g.cover[j] == A(0)) mine = better(mine, Candidate<A>{g.decay[j], j}, g.index);
    }
    const int best = team.best(mine, g.index).at;
    for (int j = team.rank(); j < g.valid; j += Team::kSize) {
      if (j == best) g.cover[j] = A(1);
      if (g.cover[j] != A(0)) continue;
      const A overlap = similarity(g, best, j);
      const A linear = overlap > limit ? A(1) - overlap : A(1);
      g.decay[j] *= o.gaussian ? exp_of(overlap * overlap * per_sigma) : linear;
    }
  }
}

template <class A, class Team>
__device__ void nms_group(const PoseBatch<A>& in, const NmsOptions& o, int64_t start, int count, unsigned char* memory,
                          Team team) {
  PoseGroup<A> g(memory, count, in.num_keypoints);
  load_group(g, in, static_cast<A>(o.keypoint_threshold), start, team);
  team.sync();
  if (o.method == NmsMethod::kHard) hard_nms(g, o, team);
  if (o.method == NmsMethod::kParallel) parallel_nms(g, o, team);
  if (o.method == NmsMethod::kSoft) soft_nms(g, o, team);
  team.sync();
  for (int j = team.rank(); j < g.count; j += Team::kSize) {
    const bool valid = j < g.valid, soft = o.method == NmsMethod::kSoft, hard = o.method == NmsMethod::kHard;
    const A decayed = soft ? g.decay[j] : hard && g.decay[j] == A(0) ? A(0) : g.score[j] * g.decay[j];
    in.new_scores[g.index[j]] = valid ? decayed : A(0);
    in.keep[g.index[j]] = valid && (hard ? g.decay[j] != A(0) : decayed > o.threshold);
  }
  team.sync();  // the memory may be used again
}

// ---- finding images

// First position in [low, high) whose image is above `image`, else high; `images` is sorted.
__device__ inline int64_t end_of(const int64_t* images, int64_t low, int64_t high, int64_t image) {
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (images[middle] > image) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Images of at most `limit` poses.
template <class A>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 6)
    nms_small(PoseBatch<A> in, NmsOptions o, int limit, int64_t bytes_per_warp) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  unsigned char* memory = shared_memory() + warp * bytes_per_warp;
  const int64_t n = in.poses, first = (static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp) * kWarp;
  if (in.image == nullptr) {
    if (first == 0 && n <= limit) nms_group(in, o, 0, static_cast<int>(n), memory, WarpTeam());
    return;
  }
  const int64_t last = first + kWarp < n ? first + kWarp : n;
  int64_t at = first;
  if (at < last && at > 0 && in.image[at - 1] == in.image[at]) at = end_of(in.image, at, last, in.image[at]);
  while (at < last) {
    const int64_t most = at + limit + 1 < n ? at + limit + 1 : n;
    int64_t end = end_of(in.image, at + 1, most, in.image[at]);
    if (end - at <= limit) {
      nms_group(in, o, at, static_cast<int>(end - at), memory, WarpTeam());
    } else if (end < last) {
      end = end_of(in.image, end, last, in.image[at]);
    }
    at = end;
  }
}

// Images of more than `limit` poses: each contains a multiple of limit + 1, and the first one's block does it. Images
// that do not fit into shared memory are done in `scratch`.
template <class A>
__global__ void __launch_bounds__(kBlockThreads, 2)
    nms_large(PoseBatch<A> in, NmsOptions o, int limit, int shared_poses, unsigned char* scratch) {
  const int64_t n = in.poses, at = static_cast<int64_t>(blockIdx.x) * (limit + 1);
  int64_t start = 0, end = n;
  if (in.image != nullptr) {
    const int64_t before = at - (limit + 1), image = in.image[at];
    if (before >= 0 && in.image[before] == image) return;
    start = before < 0 ? 0 : before + 1;
    while (in.image[start] != image) ++start;
    end = end_of(in.image, at + 1, n, image);
  } else if (at > 0) {
    return;
  }
  if (end - start <= limit) return;
  const int count = static_cast<int>(end - start);
  const BlockTeam team{shared_memory()};
  unsigned char* memory = count <= shared_poses ? shared_memory() + BlockTeam::kReservedBytes
                                                : scratch + start * PoseGroup<A>::bytes_per_pose(in.num_keypoints);
  nms_group(in, o, start, count, memory, team);
}

template <class A>
void nms_batch(const DeviceScope& device, PoseBatch<A> in, const NmsOptions& o, const Tensor& like) {
  const int64_t n = in.poses, bytes = PoseGroup<A>::bytes_per_pose(in.num_keypoints);
  const int limit = static_cast<int>(std::min<int64_t>(kWarpPoses, kSharedBytes / kWarpsPerBlock / bytes));
  if (limit > 0) {
    const int64_t bytes_per_warp = std::min<int64_t>(limit, n) * bytes;
    const Grid grid{in.image ? ceil_div(n, kWarp * kWarpsPerBlock) : 1};
    launch(device, "oks_nms", nms_small<A>, grid, kWarp * kWarpsPerBlock,
           static_cast<size_t>(bytes_per_warp * kWarpsPerBlock), in, o, limit, bytes_per_warp);
  }
  if (n <= limit) return;
  const int64_t fit = (kSharedBytes - BlockTeam::kReservedBytes) / bytes, shared_poses = std::min(fit, n);
  std::optional<Tensor> scratch;
  if (n > fit) scratch = empty({n * (bytes / 8)}, false, like, ScalarType::Double);
  const Grid grid{in.image ? ceil_div(n, limit + 1) : 1};
  launch(device, "oks_nms", nms_large<A>, grid, kBlockThreads,
         static_cast<size_t>(BlockTeam::kReservedBytes + shared_poses * bytes), in, o, limit,
         static_cast<int>(shared_poses), scratch ? static_cast<unsigned char*>(scratch->mutable_data_ptr()) : nullptr);
}

// (values, positions) of a stable ascending sort.
std::pair<Tensor, Tensor> sort(const Tensor& t) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  // self, stable, dim, descending
  std::array<StableIValue, 4> stack{from(t), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  if (torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION)) {
    throw std::runtime_error("fastpose: oks_nms: could not sort image_index");
  }
  const Tensor values = to<Tensor>(stack[0]), positions = to<Tensor>(stack[1]);
  return {*dense(values), *dense(positions)};
}

std::tuple<Tensor, Tensor> oks_nms(const Tensor& keypoints, const Tensor& keypoint_scores, const Tensor& scores,
                                   const Tensor& areas, const Tensor& sigmas, const std::optional<Tensor>& image_index,
                                   StringHandle method_, StringHandle decay_, double threshold,
                                   double keypoint_threshold, double overlap_threshold, double gaussian_sigma) {
  const String method(method_), decay(decay_);
  check_oks_nms(keypoints, keypoint_scores, scores, areas, sigmas, image_index, method.view(), decay.view(),
                gaussian_sigma);
  const NmsOptions o(method.view(), decay.view(), threshold, keypoint_threshold, overlap_threshold, gaussian_sigma);
  const int64_t n = scores.size(0), k = keypoints.size(1);
  FASTPOSE_CHECK(n < INT32_MAX && k < INT32_MAX, "oks_nms: at most 2^31 - 2 poses and keypoints on CUDA, got ", n,
                 " and ", k);
  const DeviceScope device(keypoints);
  Tensor new_scores = empty({n}, false, scores), keep = empty({n}, false, scores, ScalarType::Bool);
  if (n == 0) return {new_scores, keep};
  const Tensor points = *dense(keypoints), point_scores = *dense(keypoint_scores), score = *dense(scores);
  const Tensor area = *dense(areas), sigma = *dense(sigmas);
  std::optional<std::pair<Tensor, Tensor>> sorted;
  if (image_index) sorted = sort(*image_index);
  const auto run = [&](auto a) {
    using A = decltype(a);
    const auto data = [](const Tensor& t) { return static_cast<const A*>(t.const_data_ptr()); };
    const PoseBatch<A> in{data(points),
                          data(point_scores),
                          data(score),
                          data(area),
                          data(sigma),
                          sorted ? static_cast<const int64_t*>(sorted->second.const_data_ptr()) : nullptr,
                          sorted ? static_cast<const int64_t*>(sorted->first.const_data_ptr()) : nullptr,
                          static_cast<A*>(new_scores.mutable_data_ptr()),
                          static_cast<bool*>(keep.mutable_data_ptr()),
                          static_cast<int>(n),
                          static_cast<int>(k)};
    nms_batch(device, in, o, scores);
  };
  if (scores.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {new_scores, keep};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpose, FASTPOSE_CUDA_KEY, m) { m.impl("oks_nms", TORCH_BOX(&oks_nms)); }

}  // namespace fastpose
