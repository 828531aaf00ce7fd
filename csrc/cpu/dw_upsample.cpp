// act(depthwise transposed convolution(x, weight) + bias), by gathering: no output pixel is written twice.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/depthwise.h"

namespace fastpose {

// Arguments of the forward and the backward tasks. In backward, `y` is the gradient of x that is written and `grad` the
// incoming gradient of the output.
struct DwUpsample {
  View x, weight, y, grad;
  const void* bias = nullptr;  // [channels] or null
  int64_t batch = 0, channels = 0, height = 0, width = 0, out_height = 0, out_width = 0;
  int64_t k = 4, stride = 2, padding = 1;
  int64_t line = 0;     // pixels of a full output row before cropping by `padding`
  int64_t band = 1;     // rows per task: of the input if `fast`, else of the output
  bool fast = false;    // kernel 4, stride 2, padding 1, output padding 0
  bool stream = false;  // the output will not fit the caches: write around them
  Activation act = Activation::kNone;
  void* partial = nullptr;
};

}  // namespace fastpose

#define FASTPOSE_KERNEL_FILE "cpu/dw_upsample_kernel.h"
#include "cpu/foreach_isa.h"

namespace fastpose {
namespace {

// Above this size of the output streaming stores win: they save the read of every line that is about to be overwritten.
constexpr int64_t kStreamBytes = 24 << 20;

DwUpsample arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Activation act,
                     std::pair<int64_t, int64_t> out, int64_t stride, int64_t padding) {
  DwUpsample a;
  a.x = View(x);
  a.weight = View(weight);
  a.batch = x.size(0);
  a.channels = x.size(1);
  a.height = x.size(2);
  a.width = x.size(3);
  a.out_height = out.first;
  a.out_width = out.second;
  a.k = weight.size(2);
  a.stride = stride;
  a.padding = padding;
  a.line = std::max((a.width - 1) * stride + a.k, padding + a.out_width);
  a.act = act;
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  return a;
}

Tensor dw_upsample(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_, StringHandle activation,
                   int64_t stride, int64_t padding, int64_t output_padding) {
  const String name(activation);
  const auto out = check_dw_upsample(x, weight, bias_, stride, padding, output_padding);
  const std::optional<Tensor> bias = dense(bias_);
  DwUpsample a = arguments(x, weight, bias, parse_activation("dw_upsample", name.view()), out, stride, padding);
  Tensor y = empty({a.batch, a.channels, a.out_height, a.out_width}, !x.is_contiguous() && is_channels_last(x), x);
  if (y.numel() == 0) return y;
  a.y = View(y);
  a.fast = a.k == 4 && stride == 2 && padding == 1 && output_padding == 0;
  const ScalarType type = x.scalar_type();
  const int64_t block = lanes(type), blocks = ceil_div(a.channels, block), bytes = type == ScalarType::Double ? 8 : 4;
  a.stream = type == ScalarType::Float && a.channels % block == 0 && y.numel() * 4 >= kStreamBytes &&
             reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 64 == 0;
  const int64_t rows = a.fast ? a.height : a.out_height;
  a.band = band_rows(rows, a.fast ? 2 : a.k / stride, (a.width + 2) * block * bytes, a.batch * blocks);
  const int64_t tasks = a.batch * blocks * ceil_div(rows, a.band);
  const int64_t grain = ceil_div(8192, a.band * a.width * (a.fast ? 16 : a.k * a.k));  // vector multiply-adds
  dispatch("dw_upsample", type, [&](auto t) {
    using T = decltype(t);
    parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) FASTPOSE_CALL(DwUpsampleLevel<T>::task, a, i);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> dw_upsample_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        const std::optional<Tensor>& bias_, StringHandle activation,
                                                        int64_t stride, int64_t padding, int64_t output_padding) {
  const String name(activation);
  const auto out = check_dw_upsample(x, weight, bias_, stride, padding, output_padding);
  const std::optional<Tensor> bias = dense(bias_);
  DwUpsample a = arguments(x, weight, bias, parse_activation("dw_upsample", name.view()), out, stride, padding);
  check_gradient("dw_upsample_backward", grad, x, a.channels, a.out_height, a.out_width);
  Tensor dx = empty({a.batch, a.channels, a.height, a.width}, !x.is_contiguous() && is_channels_last(x), x);
  Tensor dweight = empty({a.channels, 1, a.k, a.k}, false, x);
  Tensor dbias = empty({a.channels}, false, x);
  a.y = View(dx);
  a.grad = View(grad);
  const int64_t block = lanes(x.scalar_type()), blocks = ceil_div(a.channels, block);
  if (dx.numel() == 0) a.batch = 0;
  const int64_t values = a.batch * blocks * (a.k * a.k + 1) * block;
  dispatch("dw_upsample_backward", x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    std::vector<typename Compute<T>::type> partial(static_cast<size_t>(std::max<int64_t>(values, 1)));
    a.partial = partial.data();
    parallel_for(a.batch * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) FASTPOSE_CALL(DwUpsampleLevel<T>::backward_task, a, i);
    });
    FASTPOSE_CALL(DwUpsampleLevel<T>::reduce, a, static_cast<T*>(dweight.mutable_data_ptr()),
                  static_cast<T*>(dbias.mutable_data_ptr()));
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpose, CPU, m) {
  m.impl("dw_upsample", TORCH_BOX(&dw_upsample));
  m.impl("dw_upsample_backward", TORCH_BOX(&dw_upsample_backward));
}

}  // namespace fastpose
