// y[:, :C] = x and y[:, C:] = act(depthwise(x, weight) + bias): both halves of a Ghost module in one pass.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/depthwise.h"

namespace fastpose {

// Arguments of the forward and the backward tasks. In backward, `y` is the gradient of x that is written and `grad` the
// incoming gradient of the output.
struct GhostCheap {
  View x, weight, y, grad;
  const void* bias = nullptr;  // [multiplier * channels] or null
  int64_t batch = 0, channels = 0, height = 0, width = 0, multiplier = 1, k = 3, band = 1;
  Activation act = Activation::kNone;
  void* partial = nullptr;
};

}  // namespace fastpose

#define FASTPOSE_KERNEL_FILE "cpu/ghost_cheap_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastpose {
namespace {

GhostCheap arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Activation act) {
  GhostCheap a;
  a.x = View(x);
  a.weight = View(weight);
  a.batch = x.size(0);
  a.channels = x.size(1);
  a.height = x.size(2);
  a.width = x.size(3);
  a.multiplier = weight.size(0) / a.channels;
  a.k = weight.size(2);
  a.act = act;
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  return a;
}

Tensor ghost_cheap(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_, StringHandle activation) {
  const String name(activation);
  check_ghost_cheap(x, weight, bias_);
  const std::optional<Tensor> bias = dense(bias_);
  GhostCheap a = arguments(x, weight, bias, parse_activation("ghost_cheap", name.view()));
  Tensor y = empty({a.batch, (1 + a.multiplier) * a.channels, a.height, a.width},
                   !x.is_contiguous() && is_channels_last(x), x);
  if (y.numel() == 0) return y;
  a.y = View(y);
  const int64_t block = lanes(x.scalar_type()), blocks = ceil_div(a.channels, block), halo = a.k - 1;
  const int64_t row_bytes = (a.width + halo) * block * (x.scalar_type() == ScalarType::Double ? 8 : 4);
  a.band = band_rows(a.height, halo, row_bytes, a.batch * blocks);
  const int64_t tasks = a.batch * blocks * ceil_div(a.height, a.band);
  const int64_t grain = ceil_div(8192, a.band * a.width * a.k * a.k * a.multiplier);  // vector multiply-adds per task
  dispatch("ghost_cheap", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) FASTPOSE_CALL(GhostCheapLevel<T>::task, a, i);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> ghost_cheap_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        const std::optional<Tensor>& bias_, StringHandle activation) {
  const String name(activation);
  check_ghost_cheap(x, weight, bias_);
  const std::optional<Tensor> bias = dense(bias_);
  GhostCheap a = arguments(x, weight, bias, parse_activation("ghost_cheap", name.view()));
  check_gradient("ghost_cheap_backward", grad, x, (1 + a.multiplier) * a.channels, a.height, a.width);
  const bool channels_last = !x.is_contiguous() && is_channels_last(x);
  Tensor dx = empty({a.batch, a.channels, a.height, a.width}, channels_last, x);
  Tensor dweight = empty({weight.size(0), 1, a.k, a.k}, false, x);
  Tensor dbias = empty({weight.size(0)}, false, x);
  a.y = View(dx);
  a.grad = View(grad);
  const int64_t block = lanes(x.scalar_type()), blocks = ceil_div(a.channels, block);
  if (dx.numel() == 0) a.batch = 0;
  const int64_t values = a.batch * blocks * a.multiplier * (a.k * a.k + 1) * block;
  dispatch("ghost_cheap_backward", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    std::vector<typename Compute<T>::type> partial(static_cast<size_t>(std::max<int64_t>(values, 1)));
    a.partial = partial.data();
    parallel_for(a.batch * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) FASTPOSE_CALL(GhostCheapLevel<T>::backward_task, a, i);
    });
    FASTPOSE_CALL(GhostCheapLevel<T>::reduce, a, static_cast<T*>(dweight.mutable_data_ptr()),
                  static_cast<T*>(dbias.mutable_data_ptr()));
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpose, CPU, m) {
  m.impl("ghost_cheap", TORCH_BOX(&ghost_cheap));
  m.impl("ghost_cheap_backward", TORCH_BOX(&ghost_cheap_backward));
}

}  // namespace fastpose
