// Shared by the CPU and the CUDA kernels: activations, strided views of tensors, dispatch over dtypes.
#pragma once

#include <cstdint>
#include <string_view>

#include "stable.h"

#if defined(__CUDACC__)
#define FASTPOSE_HD __host__ __device__
#else
#define FASTPOSE_HD
#endif

namespace fastpose {

enum class Activation { kNone, kRelu, kHardswish, kSilu };

inline Activation parse_activation(const char* op, std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "hardswish") return Activation::kHardswish;
  if (name == "silu") return Activation::kSilu;
  fail(op, ": activation must be 'none', 'relu', 'hardswish' or 'silu', got '", name, "'");
}

// A [N, C, H, W] tensor: data and strides in elements.
struct View {
  void* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;

  View() = default;
  explicit View(const Tensor& t)
      : data(const_cast<void*>(t.const_data_ptr())), n(t.stride(0)), c(t.stride(1)), h(t.stride(2)), w(t.stride(3)) {}

  template <class T>
  FASTPOSE_HD T* at(int64_t in, int64_t ic, int64_t ih = 0, int64_t iw = 0) const {
    return static_cast<T*>(data) + in * n + ic * c + ih * h + iw * w;
  }
};

// The type that a storage type is computed in.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  if (!t || t->is_contiguous()) return t;
  return torch::stable::contiguous(*t);
}

FASTPOSE_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(T{}) with the storage type of `type`.
template <class F>
void dispatch(const char* op, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: fail(op, ": dtype must be float32, float64, float16 or bfloat16, got ", name(type));
  }
}

}  // namespace fastpose
