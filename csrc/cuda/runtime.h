// What the CUDA kernels need of the CUDA runtime, and of torch: launching on the current stream of the tensors' device.
//
// Kernels use the few device functions that tests/cuda/emulation.h also has: with FASTPOSE_EMULATE_CUDA the same
// sources are compiled by the C++ compiler and run on the CPU, thread by thread, so that every access can be checked.
#pragma once

#include "tensors.h"

#if defined(FASTPOSE_EMULATE_CUDA)
#define FASTPOSE_CUDA_KEY CPU
#else
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define FASTPOSE_CUDA_KEY CUDA
#endif

namespace fastpose {

// Blocks of a launch.
struct Grid {
  int64_t x = 1, y = 1;
};
inline bool fits(const Grid& grid) { return grid.x > 0 && grid.x <= INT32_MAX && grid.y > 0 && grid.y <= 65535; }

// Dynamic shared memory of a block that needs no permission.
constexpr int64_t kSharedBytes = 48 << 10;

#if !defined(FASTPOSE_EMULATE_CUDA)

// The stream function lives in libtorch_cuda, which a library that must also load with a CPU build of torch cannot
// link.
inline cudaStream_t current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (get == nullptr || get(device, &stream) != 0) {
    throw std::runtime_error("fastpose: this torch has no CUDA stream to run on");
  }
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // so that the next launch does not report it again
  const char* hint = error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion
                         ? " (rebuild fastpose with this GPU in TORCH_CUDA_ARCH_LIST)"
                         : "";
  std::ostringstream text;
  text << "fastpose: " << what << ": " << cudaGetErrorString(error) << hint;
  throw std::runtime_error(text.str());
}

// Makes the device of a tensor current for torch and for the CUDA runtime linked here, until the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) : device_(t.get_device_index()), torch_(device_) {
    check_cuda(cudaGetDevice(&before_), "no CUDA device");
    check_cuda(cudaSetDevice(device_), "could not switch to the tensors' CUDA device");
    stream_ = current_stream(device_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  ~DeviceScope() { (void)cudaSetDevice(before_); }
  cudaStream_t stream() const { return stream_; }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard torch_;
  int before_ = 0;
  cudaStream_t stream_ = nullptr;
};

// Dynamic shared memory of the block.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char fastpose_shared_memory[];
  return fastpose_shared_memory;
}

template <class... Parameters, class... Arguments>
void launch(const DeviceScope& device, const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            size_t shared_bytes, Arguments... arguments) {
  if (!fits(grid)) throw std::runtime_error(std::string("fastpose: ") + name + ": too large for one launch");
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  kernel<<<blocks, static_cast<unsigned>(threads), shared_bytes, device.stream()>>>(arguments...);
  check_cuda(cudaGetLastError(), name);
}

#endif

}  // namespace fastpose

#if defined(FASTPOSE_EMULATE_CUDA)
#include "emulation.h"
#endif
