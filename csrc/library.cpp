// Every operator of the library. Python adds fake kernels, autograd and autocast (fastpose/ops/<op>.py).
#include "stable.h"

STABLE_TORCH_LIBRARY(fastpose, m) {
  // y[:, :C] = x, y[:, C:] = act(depthwise(x, weight) + bias): both halves of a Ghost module, no concatenation.
  m.def("ghost_cheap(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor");
  m.def(
      "ghost_cheap_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, str activation)"
      " -> (Tensor, Tensor, Tensor)");

  // act(depthwise transposed convolution(x, weight) + bias).
  m.def(
      "dw_upsample(Tensor x, Tensor weight, Tensor? bias, str activation, int stride, int padding,"
      " int output_padding) -> Tensor");
  m.def(
      "dw_upsample_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, str activation, int stride,"
      " int padding, int output_padding) -> (Tensor, Tensor, Tensor)");

  // Suppression of duplicate poses by object keypoint similarity, batched over images: (new_scores, keep).
  m.def(
      "oks_nms(Tensor keypoints, Tensor keypoint_scores, Tensor scores, Tensor areas, Tensor sigmas,"
      " Tensor? image_index, str method, str decay, float threshold, float keypoint_threshold,"
      " float overlap_threshold, float gaussian_sigma) -> (Tensor, Tensor)");

  // An optimised network (fastpose/plan.py) on images x; program and weights as csrc/cpu/run_plan.h describes. Per
  // output: channels, and its size as a fraction of the input's.
  m.def("run_plan(Tensor x, Tensor program, Tensor weights, int[] outputs) -> Tensor[]");
}
