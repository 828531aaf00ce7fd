// Suppression of duplicate poses by object keypoint similarity, all images of a batch in one call.
//
// Poses are grouped by image and sorted by score; each group is transposed into arrays [keypoint][pose], so that a
// vector holds one keypoint of many poses. Groups are shared out to threads by their cost, count^2.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/depthwise.h"
#include "oks_nms.h"

namespace fastpose {

// Up to this many poses are sorted by counting, for each, how many come before it: without branches to mispredict.
constexpr int64_t kRankSortLimit = 64;

// What was given: contiguous arrays over all N poses.
template <class A>
struct PoseArrays {
  const A *keypoints, *keypoint_scores, *scores, *areas;  // [N, K, 2], [N, K], [N], [N]
  const A* root_scale;                                    // [K], sqrt(log2(e) / 2) / (2 sigma)
  int64_t num_keypoints;
};

// The poses of one image, by descending score (ties: lower index first), NaN scores last. Arrays are padded to whole
// vectors with poses that have no visible keypoint.
template <class A>
struct PoseGroup {
  int64_t count = 0, valid = 0;  // poses; those whose score is not NaN
  int64_t padded = 0, keypoints = 0;
  A *x = nullptr, *y = nullptr, *visible = nullptr;  // [keypoints][padded]; times root_scale; visible is 0 or 1
  A *area = nullptr, *score = nullptr;               // [padded]
  A *decay = nullptr, *result = nullptr;             // [padded], written
  const int64_t* index = nullptr;                    // [count] position in the input
};

}  // namespace fastpose

#define FASTPOSE_KERNEL_FILE "cpu/oks_nms_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastpose {
namespace {

// Positions of the input ordered by image, within an image in input order; offsets[i] is where image i begins.
void group_by_image(const int64_t* image, int64_t n, std::vector<int64_t>& order, std::vector<int64_t>& offsets) {
  order.resize(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  offsets.assign(1, 0);
  if (n == 0) return;
  if (image != nullptr) {
    if (!std::is_sorted(image, image + n)) {
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return image[a] < image[b]; });
    }
    for (int64_t i = 1; i < n; ++i) {
      if (image[order[static_cast<size_t>(i)]] != image[order[static_cast<size_t>(i - 1)]]) offsets.push_back(i);
    }
  }
  offsets.push_back(n);
}

// Asks for an image's poses while the one before is being worked on: many images do not fit the caches.
template <class A>
void prefetch_group(const int64_t* order, int64_t count, const PoseArrays<A>& in) {
  const int64_t bytes = in.num_keypoints * static_cast<int64_t>(sizeof(A));
  for (int64_t i = 0; i < std::min(count, kRankSortLimit); ++i) {
    const char* points = reinterpret_cast<const char*>(in.keypoints + order[i] * in.num_keypoints * 2);
    const char* confidence = reinterpret_cast<const char*>(in.keypoint_scores + order[i] * in.num_keypoints);
    for (int64_t b = 0; b < 2 * bytes; b += 64) __builtin_prefetch(points + b);
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(confidence + b);
  }
}

// Suppression among the `count` poses of one image, whose positions in the input are `order` (sorted in place by
// score).
template <class A>
void nms_group(int64_t* order, int64_t count, const PoseArrays<A>& in, const NmsOptions& o, A* new_scores, bool* keep) {
  const int64_t lane = 64 / static_cast<int64_t>(sizeof(A));  // the widest vector
  const int64_t keypoints = in.num_keypoints;
  PoseGroup<A> g;
  g.count = count;
  g.keypoints = keypoints;
  g.padded = ceil_div(count, lane) * lane;
  g.index = order;
  g.x = scratch<A>(0, (3 * keypoints + 6) * g.padded);
  g.y = g.x + keypoints * g.padded;
  g.visible = g.y + keypoints * g.padded;
  g.area = g.visible + keypoints * g.padded;
  g.score = g.area + g.padded;
  g.decay = g.score + g.padded;
  g.result = g.decay + g.padded;
  A *row = g.result + g.padded, *extra = row + g.padded;

  if (count <= kRankSortLimit) {
    FASTPOSE_CALL(OksNmsLevel<A>::sort, order, g.padded, count, in.scores, g.x);
  } else {
    std::stable_sort(order, order + count, [&](int64_t a, int64_t b) {
      return in.scores[a] > in.scores[b] || (std::isnan(in.scores[b]) && !std::isnan(in.scores[a]));
    });
  }
  for (int64_t j = 0; j < count; ++j) {
    const A area = in.areas[order[j]];
    g.area[j] = area > A(0) ? std::min(area, kLargestArea<A>) : A(0);  // negative and NaN count as 0
    g.score[j] = in.scores[order[j]];
    g.valid += !std::isnan(g.score[j]);
  }
  std::fill(g.area + count, g.area + g.padded, A(0));

  FASTPOSE_CALL(OksNmsLevel<A>::run, g, in, o, row, extra);

  for (int64_t j = 0; j < count; ++j) {
    const bool valid = j < g.valid;
    new_scores[order[j]] = valid ? g.result[j] : A(0);
    keep[order[j]] = valid && (o.method == NmsMethod::kHard ? g.decay[j] != A(0) : g.result[j] > o.threshold);
  }
}

template <class A>
void nms_batch(const Tensor& keypoints, const Tensor& keypoint_scores, const Tensor& scores, const Tensor& areas,
               const Tensor& sigmas, const std::optional<Tensor>& image_index, const NmsOptions& o, Tensor& new_scores,
               Tensor& keep) {
  const int64_t n = scores.size(0), k = keypoints.size(1);
  std::vector<A> root_scale(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) {
    const double sigma = static_cast<double>(static_cast<const A*>(sigmas.const_data_ptr())[i]);
    root_scale[static_cast<size_t>(i)] = static_cast<A>(kScaleTimesSigma / sigma);
  }
  std::vector<int64_t> order, offsets;
  group_by_image(image_index ? static_cast<const int64_t*>(image_index->const_data_ptr()) : nullptr, n, order, offsets);

  // contiguous ranges of groups with about equal cost, one per thread
  const int64_t groups = static_cast<int64_t>(offsets.size()) - 1;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  double total = 0;
  const auto pairs = [&](int64_t i) {
    const double count = static_cast<double>(offsets[static_cast<size_t>(i) + 1] - offsets[static_cast<size_t>(i)]);
    return count * count;
  };
  for (int64_t i = 0; i < groups; ++i) total += pairs(i);
  const int64_t parts = total * static_cast<double>(k) < 20000 ? 1 : threads;
  std::vector<int64_t> bounds(1, 0);
  double cost = 0;
  for (int64_t i = 0; i < groups; ++i) {
    cost += pairs(i);
    if (cost >= total * static_cast<double>(bounds.size()) / static_cast<double>(parts)) bounds.push_back(i + 1);
  }
  bounds.back() = groups;

  const PoseArrays<A> in{static_cast<const A*>(keypoints.const_data_ptr()),
                         static_cast<const A*>(keypoint_scores.const_data_ptr()),
                         static_cast<const A*>(scores.const_data_ptr()),
                         static_cast<const A*>(areas.const_data_ptr()),
                         root_scale.data(),
                         k};
  A* out = static_cast<A*>(new_scores.mutable_data_ptr());
  bool* kept = static_cast<bool*>(keep.mutable_data_ptr());
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = bounds[begin]; i < bounds[end]; ++i) {
      if (i + 1 < groups) prefetch_group(order.data() + offsets[i + 1], offsets[i + 2] - offsets[i + 1], in);
      nms_group<A>(order.data() + offsets[i], offsets[i + 1] - offsets[i], in, o, out, kept);
    }
  });
}

std::tuple<Tensor, Tensor> oks_nms(const Tensor& keypoints, const Tensor& keypoint_scores, const Tensor& scores,
                                   const Tensor& areas, const Tensor& sigmas, const std::optional<Tensor>& image_index,
                                   StringHandle method_, StringHandle decay_, double threshold,
                                   double keypoint_threshold, double overlap_threshold, double gaussian_sigma) {
  const String method(method_), decay(decay_);
  check_oks_nms(keypoints, keypoint_scores, scores, areas, sigmas, image_index, method.view(), decay.view(),
                gaussian_sigma);
  const NmsOptions o(method.view(), decay.view(), threshold, keypoint_threshold, overlap_threshold, gaussian_sigma);
  Tensor new_scores = empty({scores.size(0)}, false, scores);
  Tensor keep = empty({scores.size(0)}, false, scores, ScalarType::Bool);
  if (scores.size(0) == 0) return {new_scores, keep};
  const Tensor points = *dense(keypoints), point_scores = *dense(keypoint_scores), score = *dense(scores);
  const Tensor area = *dense(areas), sigma = *dense(sigmas);
  const std::optional<Tensor> image = dense(image_index);
  if (scores.scalar_type() == ScalarType::Double) {
    nms_batch<double>(points, point_scores, score, area, sigma, image, o, new_scores, keep);
  } else {
    nms_batch<float>(points, point_scores, score, area, sigma, image, o, new_scores, keep);
  }
  return {new_scores, keep};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpose, CPU, m) { m.impl("oks_nms", TORCH_BOX(&oks_nms)); }

}  // namespace fastpose
