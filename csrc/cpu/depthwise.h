// Shared by ghost_cheap.cpp and dw_upsample.cpp: arguments, tasks, per-thread scratch.
//
// How both kernels work. A task is one image, one block of as many channels as a vector has lanes, and a band of rows.
// The compute loops see rows of vectors in compute type (float; double for double), one vector per pixel, and write
// such rows. Float channels-last tensors already are that and are read and written in place; anything else (half,
// bfloat16, contiguous, strided, a last block of too few channels) is gathered into and scattered from scratch rows. So
// one compute loop serves every dtype and layout, and a band's scratch stays in the first-level cache.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "cpu/isa.h"
#include "stable.h"

#if defined(__x86_64__)
#include <immintrin.h>
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
  T* at(int64_t in, int64_t ic, int64_t ih = 0, int64_t iw = 0) const {
    return static_cast<T*>(data) + in * n + ic * c + ih * h + iw * w;
  }
};

// Scratch of the calling thread, 64-byte aligned, kept between calls: no allocation in steady state.
void* scratch_bytes(int slot, size_t bytes);
template <class A>
A* scratch(int slot, int64_t count) {
  return static_cast<A*>(scratch_bytes(slot, static_cast<size_t>(count) * sizeof(A)));
}

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

// Channels per block: the lanes of a vector at the level in use.
inline int64_t lanes(ScalarType type) {
  const int64_t bytes = isa() == Isa::kAvx512 ? 64 : isa() == Isa::kAvx2 ? 32 : 16;
  return type == ScalarType::Double ? bytes / 8 : bytes / 4;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows per band: as many as fit `kBandBytes` of scratch, fewer if that leaves threads without work.
inline int64_t band_rows(int64_t rows, int64_t halo, int64_t row_bytes, int64_t blocks) {
  constexpr int64_t kBandBytes = 32 << 10;
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  int64_t band = std::max<int64_t>(kBandBytes / std::max<int64_t>(row_bytes, 1) - halo, 4);
  const int64_t bands_wanted = ceil_div(static_cast<int64_t>(threads), std::max<int64_t>(blocks, 1));
  band = std::min(band, std::max<int64_t>(ceil_div(rows, bands_wanted), 1));
  return std::min(band, std::max<int64_t>(rows, 1));
}

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
