// Suppression of duplicate poses by object keypoint similarity, all images of a batch in one call.
//
// Poses are grouped by image and sorted by score; each group is transposed into arrays [keypoint][pose], so that a
// vector holds one keypoint of many poses. Groups are shared out to threads by their cost, count^2.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/depthwise.h"

namespace fastpose {

enum class NmsMethod { kHard, kSoft, kParallel };

struct NmsOptions {
  NmsMethod method = NmsMethod::kParallel;
  bool gaussian = false;
  double threshold = 0, overlap_threshold = 0, gaussian_sigma = 0.5, keypoint_threshold = 0.1;
};

// The poses of one image, by descending score (ties: lower index first), NaN scores last. Arrays are padded to whole
// vectors with poses that have no visible keypoint.
template <class A>
struct PoseGroup {
  int64_t count = 0, valid = 0;  // poses; those whose score is not NaN
  int64_t padded = 0, keypoints = 0;
  A *x = nullptr, *y = nullptr, *visible = nullptr;  // [keypoints][padded]; visible is 0 or 1
  A *area = nullptr, *score = nullptr;               // [padded]
  A *decay = nullptr, *result = nullptr;             // [padded], written
  const A* scale = nullptr;                          // [keypoints], 1 / (2 (2 sigma)^2)
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

template <class A>
void nms_group(int64_t* order, int64_t count, const A* keypoints, const A* keypoint_scores, const A* scores,
               const A* areas, const A* scale, int64_t num_keypoints, const NmsOptions& o, A* new_scores, bool* keep) {
  // stable insertion sort for the usual few poses: std::stable_sort would allocate
  const auto before = [&](int64_t a, int64_t b) {
    return scores[a] > scores[b] || (std::isnan(scores[b]) && !std::isnan(scores[a]));
  };
  if (count <= 48) {
    for (int64_t i = 1; i < count; ++i) {
      const int64_t moved = order[i];
      int64_t j = i;
      for (; j > 0 && before(moved, order[j - 1]); --j) order[j] = order[j - 1];
      order[j] = moved;
    }
  } else {
    std::stable_sort(order, order + count, before);
  }

  const int64_t lane = 64 / static_cast<int64_t>(sizeof(A));  // the widest vector
  PoseGroup<A> g;
  g.count = count;
  g.keypoints = num_keypoints;
  g.padded = ceil_div(count, lane) * lane;
  g.scale = scale;
  g.index = order;
  g.x = scratch<A>(0, (3 * num_keypoints + 6) * g.padded);
  g.y = g.x + num_keypoints * g.padded;
  g.visible = g.y + num_keypoints * g.padded;
  g.area = g.visible + num_keypoints * g.padded;
  g.score = g.area + g.padded;
  g.decay = g.score + g.padded;
  g.result = g.decay + g.padded;
  A *row = g.result + g.padded, *extra = row + g.padded;

  const A threshold = static_cast<A>(o.keypoint_threshold);
  for (int64_t j = 0; j < count; ++j) {
    const A* points = keypoints + order[j] * num_keypoints * 2;
    const A* confidence = keypoint_scores + order[j] * num_keypoints;
    for (int64_t k = 0; k < num_keypoints; ++k) {
      const A x = points[2 * k], y = points[2 * k + 1];
      // a difference is finite only if both are, and is not NaN; comparing with NaN is false
      const bool visible = confidence[k] > threshold && x - x == A(0) && y - y == A(0);
      g.x[k * g.padded + j] = visible ? x : A(0);
      g.y[k * g.padded + j] = visible ? y : A(0);
      g.visible[k * g.padded + j] = visible ? A(1) : A(0);
    }
    g.area[j] = areas[order[j]] > A(0) ? areas[order[j]] : A(0);  // negative and NaN count as 0
    g.score[j] = scores[order[j]];
    g.valid += !std::isnan(g.score[j]);
  }
  for (int64_t k = 0; k < 3 * num_keypoints; ++k) {
    std::fill(g.x + k * g.padded + count, g.x + (k + 1) * g.padded, A(0));
  }
  std::fill(g.area + count, g.area + g.padded, A(0));

  FASTPOSE_CALL(OksNmsLevel<A>::run, g, o, row, extra);

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
  std::vector<A> scale(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) {
    const A twice = 2 * static_cast<const A*>(sigmas.const_data_ptr())[i];
    scale[static_cast<size_t>(i)] = A(1) / (2 * twice * twice);
  }
  std::vector<int64_t> order, offsets;
  group_by_image(image_index ? static_cast<const int64_t*>(image_index->const_data_ptr()) : nullptr, n, order, offsets);

  // contiguous ranges of groups with about equal cost, one per thread
  const int64_t groups = static_cast<int64_t>(offsets.size()) - 1;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  double total = 0;
  for (int64_t i = 0; i < groups; ++i) total += std::pow(offsets[i + 1] - offsets[i], 2);
  const int64_t parts = total * static_cast<double>(k) < 20000 ? 1 : threads;
  std::vector<int64_t> bounds(1, 0);
  double cost = 0;
  for (int64_t i = 0; i < groups; ++i) {
    cost += std::pow(offsets[i + 1] - offsets[i], 2);
    if (cost >= total * static_cast<double>(bounds.size()) / static_cast<double>(parts)) bounds.push_back(i + 1);
  }
  bounds.back() = groups;

  const A* points = static_cast<const A*>(keypoints.const_data_ptr());
  const A* point_scores = static_cast<const A*>(keypoint_scores.const_data_ptr());
  const A* score = static_cast<const A*>(scores.const_data_ptr());
  const A* area = static_cast<const A*>(areas.const_data_ptr());
  A* out = static_cast<A*>(new_scores.mutable_data_ptr());
  bool* kept = static_cast<bool*>(keep.mutable_data_ptr());
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = bounds[begin]; i < bounds[end]; ++i) {
      nms_group<A>(order.data() + offsets[i], offsets[i + 1] - offsets[i], points, point_scores, score, area,
                   scale.data(), k, o, out, kept);
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
  NmsOptions o;
  o.method = method.view() == "hard"   ? NmsMethod::kHard
             : method.view() == "soft" ? NmsMethod::kSoft
                                       : NmsMethod::kParallel;
  o.gaussian = decay.view() == "gaussian";
  o.threshold = threshold;
  o.keypoint_threshold = keypoint_threshold;
  o.overlap_threshold = overlap_threshold;
  o.gaussian_sigma = gaussian_sigma;
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
