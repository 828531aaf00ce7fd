// LibTorch's stable ABI, and the few helpers its stock layer lacks or does slowly.
//
// Built against any torch from 2.11 on, the library runs on every torch from 2.11 on: only C functions of libtorch are
// imported (tests/test_backend.py checks the symbols).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace fastpose {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::invalid_argument, which Python sees as ValueError. (The stock check macro puts the build's file path and
// line into the text.)
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}
#define FASTPOSE_CHECK(condition, ...)               \
  do {                                               \
    if (!(condition)) ::fastpose::fail(__VA_ARGS__); \
  } while (0)

// Owns an argument of schema type `str`. Taken as std::string it would leak with torch 2.11 and 2.13 headers.
class String {
 public:
  explicit String(StringHandle handle) : handle_(handle) {}
  String(const String&) = delete;
  String& operator=(const String&) = delete;
  ~String() { torch_delete_string(handle_); }
  std::string_view view() const {
    const char* data = "";
    size_t length = 0;
    torch_string_c_str(handle_, &data);
    torch_string_length(handle_, &length);
    return {data, length};
  }

 private:
  StringHandle handle_;
};

// The rule of ATen: strides of dimensions of size 1 do not matter.
inline bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  if (sizes.size() != 4) return false;
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// New tensor on the device of `like`, of its dtype (or bool, float32 or float64), contiguous or channels-last.
// (stable::empty costs five times as much.)
inline Tensor empty(std::initializer_list<int64_t> sizes, bool channels_last, const Tensor& like,
                    std::optional<ScalarType> dtype = std::nullopt) {
  static constexpr int kChannelsLast[4] = {1, 3, 2, 0};
  const int dims = static_cast<int>(sizes.size());
  int64_t strides[8];
  int64_t next = 1;
  for (int i = 0; i < dims; ++i) {
    const int d = channels_last ? kChannelsLast[i] : dims - 1 - i;
    strides[d] = next;
    next *= std::max<int64_t>(1, sizes.begin()[d]);
  }
  int32_t type = 0, device = 0, index = 0;
  aoti_torch_get_dtype(like.get(), &type);
  aoti_torch_get_device_type(like.get(), &device);
  aoti_torch_get_device_index(like.get(), &index);
  if (dtype) {
    type = *dtype == ScalarType::Bool     ? aoti_torch_dtype_bool()
           : *dtype == ScalarType::Double ? aoti_torch_dtype_float64()
           : *dtype == ScalarType::Float  ? aoti_torch_dtype_float32()
                                          : type;
  }
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(dims, sizes.begin(), strides, type, device, index, &handle)) {
    throw std::runtime_error("fastpose: could not allocate the output");
  }
  return Tensor(handle);
}

// Runs f(begin, end) over [0, n) on torch's own threads; at least `grain` items per call. What f throws must not reach
// torch's loop: the first message is thrown again when all are done.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  struct Call {
    const F& f;
    std::atomic<bool> failed{false};
    std::string message;
  } call{f};
  torch_parallel_for(
      0, n, grain,
      [](int64_t begin, int64_t end, void* context) {
        Call& c = *static_cast<Call*>(context);
        try {
          c.f(begin, end);
        } catch (const std::exception& error) {
          if (!c.failed.exchange(true)) c.message = error.what();
        }
      },
      &call);
  if (call.failed) throw std::runtime_error(call.message);
}

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline const char* name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

}  // namespace fastpose
