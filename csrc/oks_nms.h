// Settings of OKS-NMS, shared by the CPU and the CUDA kernels.
#pragma once

#include <string_view>

namespace fastpose {

enum class NmsMethod { kHard, kSoft, kParallel };

// `method` and `decay` were checked by check_oks_nms.
struct NmsOptions {
  NmsMethod method;
  bool gaussian;
  double threshold, keypoint_threshold, overlap_threshold, gaussian_sigma;

  NmsOptions(std::string_view method_, std::string_view decay, double threshold_, double keypoint_threshold_,
             double overlap_threshold_, double gaussian_sigma_)
      : method(method_ == "hard"   ? NmsMethod::kHard
               : method_ == "soft" ? NmsMethod::kSoft
                                   : NmsMethod::kParallel),
        gaussian(decay == "gaussian"),
        threshold(threshold_),
        keypoint_threshold(keypoint_threshold_),
        overlap_threshold(overlap_threshold_),
        gaussian_sigma(gaussian_sigma_) {}
};

// Where keypoints go that are not visible: so far that any similarity vanishes, while squares stay finite. That needs
// areas to have a bound, too.
template <class A>
constexpr A kFarAway = sizeof(A) == 4 ? A(1e19) : A(1e150);
template <class A>
constexpr A kLargestArea = sizeof(A) == 4 ? A(1e24) : A(1e200);

// sqrt(log2(e) / 2) / 2: keypoint positions times this over sigma make the exponent of 2 a plain squared distance.
constexpr double kScaleTimesSigma = 0.42466090014400953;

}  // namespace fastpose
