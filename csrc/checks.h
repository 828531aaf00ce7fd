// Argument checks, one function per op, called first by every backend. Messages say op, argument, expected and given.
#pragma once

#include "stable.h"

namespace fastpose {

inline void check_floating(const char* op, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  FASTPOSE_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                     type == ScalarType::BFloat16,
                 op, ": x must be float32, float64, float16 or bfloat16, got ", name(type));
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_like(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  FASTPOSE_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", argument, " must have the dtype of x, ",
                 name(x.scalar_type()), ", got ", name(t.scalar_type()));
  FASTPOSE_CHECK(same_device(t, x), op, ": ", argument, " must be on the device of x");
}

inline void check_ghost_cheap(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  constexpr const char* op = "ghost_cheap";
  FASTPOSE_CHECK(x.dim() == 4, op, ": x must be [B, C, H, W], got ", shape(x));
  check_floating(op, x);
  const int64_t channels = x.size(1);
  FASTPOSE_CHECK(weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) == weight.size(3), op,
                 ": weight must be [M * C, 1, k, k], got ", shape(weight));
  const int64_t k = weight.size(2);
  FASTPOSE_CHECK(k == 1 || k == 3 || k == 5 || k == 7, op, ": kernel size must be 1, 3, 5 or 7, got ", k);
  FASTPOSE_CHECK(channels > 0 && weight.size(0) > 0 && weight.size(0) % channels == 0, op,
                 ": weight must be [M * C, 1, k, k] with C = x.size(1) = ", channels, ", got ", shape(weight));
  check_like(op, "weight", weight, x);
  if (bias) {
    FASTPOSE_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": bias must be [", weight.size(0),
                   "] like weight, got ", shape(*bias));
    check_like(op, "bias", *bias, x);
  }
}

// Returns the output height and width.
inline std::pair<int64_t, int64_t> check_dw_upsample(const Tensor& x, const Tensor& weight,
                                                     const std::optional<Tensor>& bias, int64_t stride, int64_t padding,
                                                     int64_t output_padding) {
  constexpr const char* op = "dw_upsample";
  FASTPOSE_CHECK(x.dim() == 4, op, ": x must be [B, C, H, W], got ", shape(x));
  check_floating(op, x);
  const int64_t channels = x.size(1);
  FASTPOSE_CHECK(weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == 1 &&
                     weight.size(2) == weight.size(3) && weight.size(2) > 0,
                 op, ": weight must be [C, 1, k, k] with C = x.size(1) = ", channels, ", got ", shape(weight));
  check_like(op, "weight", weight, x);
  if (bias) {
    FASTPOSE_CHECK(bias->dim() == 1 && bias->size(0) == channels, op,
                   ": bias must be [C] with C = x.size(1) = ", channels, ", got ", shape(*bias));
    check_like(op, "bias", *bias, x);
  }
  FASTPOSE_CHECK(stride >= 1, op, ": stride must be at least 1, got ", stride);
  FASTPOSE_CHECK(padding >= 0, op, ": padding must not be negative, got ", padding);
  FASTPOSE_CHECK(output_padding >= 0 && output_padding < stride, op, ": output_padding must be in [0, stride) = [0, ",
                 stride, "), got ", output_padding);
  FASTPOSE_CHECK(x.size(2) > 0 && x.size(3) > 0, op, ": x must have at least one pixel, got ", shape(x));
  const int64_t k = weight.size(2);
  FASTPOSE_CHECK(std::max({stride, padding, k, x.size(2), x.size(3)}) < 1 << 30, op,
                 ": stride, padding, kernel and image must be less than 2^30 large, got ", stride, ", ", padding, ", ",
                 k, " and ", shape(x));
  const int64_t height = (x.size(2) - 1) * stride - 2 * padding + k + output_padding;
  const int64_t width = (x.size(3) - 1) * stride - 2 * padding + k + output_padding;
  FASTPOSE_CHECK(height > 0 && width > 0, op, ": the output would be empty, ", height, " x ", width, ", for x ",
                 shape(x), ", kernel size ", k, ", stride ", stride, ", padding ", padding, ", output_padding ",
                 output_padding);
  return {height, width};
}

inline void check_gradient(const char* op, const Tensor& grad, const Tensor& x, int64_t channels, int64_t height,
                           int64_t width) {
  FASTPOSE_CHECK(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == channels && grad.size(2) == height &&
                     grad.size(3) == width,
                 op, ": the gradient must be [", x.size(0), ", ", channels, ", ", height, ", ", width, "], got ",
                 shape(grad));
  check_like(op, "the gradient", grad, x);
}

inline void check_oks_nms(const Tensor& keypoints, const Tensor& keypoint_scores, const Tensor& scores,
                          const Tensor& areas, const Tensor& sigmas, const std::optional<Tensor>& image_index,
                          std::string_view method, std::string_view decay, double gaussian_sigma) {
  constexpr const char* op = "oks_nms";
  FASTPOSE_CHECK(keypoints.dim() == 3 && keypoints.size(2) == 2, op, ": keypoints must be [N, K, 2], got ",
                 shape(keypoints));
  const int64_t n = keypoints.size(0), k = keypoints.size(1);
  const ScalarType type = keypoints.scalar_type();
  FASTPOSE_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                 ": keypoints must be float32 or float64, got ", name(type));
  FASTPOSE_CHECK(keypoint_scores.dim() == 2 && keypoint_scores.size(0) == n && keypoint_scores.size(1) == k, op,
                 ": keypoint_scores must be [N, K] = [", n, ", ", k, "], got ", shape(keypoint_scores));
  FASTPOSE_CHECK(scores.dim() == 1 && scores.size(0) == n, op, ": scores must be [N] = [", n, "], got ", shape(scores));
  FASTPOSE_CHECK(areas.dim() == 1 && areas.size(0) == n, op, ": areas must be [N] = [", n, "], got ", shape(areas));
  FASTPOSE_CHECK(sigmas.dim() == 1 && sigmas.size(0) == k, op, ": sigmas must be [K] = [", k, "], got ", shape(sigmas));
  const std::pair<const char*, const Tensor*> others[] = {
      {"keypoint_scores", &keypoint_scores}, {"scores", &scores}, {"areas", &areas}, {"sigmas", &sigmas}};
  for (const auto& [argument, tensor] : others) {
    FASTPOSE_CHECK(tensor->scalar_type() == type, op, ": ", argument, " must have the dtype of keypoints, ", name(type),
                   ", got ", name(tensor->scalar_type()));
    FASTPOSE_CHECK(same_device(*tensor, keypoints), op, ": ", argument, " must be on the device of keypoints");
  }
  if (image_index) {
    FASTPOSE_CHECK(image_index->dim() == 1 && image_index->size(0) == n, op, ": image_index must be [N] = [", n,
                   "], got ", shape(*image_index));
    FASTPOSE_CHECK(image_index->scalar_type() == ScalarType::Long, op, ": image_index must be int64, got ",
                   name(image_index->scalar_type()));
    FASTPOSE_CHECK(same_device(*image_index, keypoints), op, ": image_index must be on the device of keypoints");
  }
  FASTPOSE_CHECK(method == "hard" || method == "soft" || method == "parallel", op,
                 ": method must be 'hard', 'soft' or 'parallel', got '", method, "'");
  FASTPOSE_CHECK(decay == "linear" || decay == "gaussian", op, ": decay must be 'linear' or 'gaussian', got '", decay,
                 "'");
  FASTPOSE_CHECK(gaussian_sigma > 0, op, ": gaussian_sigma must be positive, got ", gaussian_sigma);
}

}  // namespace fastpose
