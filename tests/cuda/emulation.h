// A CUDA device made of one CPU thread: compiles and runs the kernels of csrc/cuda as they are, so that the address and
// undefined-behaviour sanitizers see every access.
//
// The threads of a block are fibres that run until a barrier or a shuffle. They take turns in ascending order, in the
// next launch in descending order, and so on: a missing barrier shows as a wrong result in one of them. Shared memory
// is a heap block of exactly the size asked for and starts as NaN. A barrier that not all threads of the block (or
// warp) reach ends the process.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct EmulatedIndex {
  unsigned x = 0, y = 0;
};
inline EmulatedIndex threadIdx, blockIdx, gridDim;

namespace fastpose {
namespace emulation {

constexpr size_t kStackBytes = 256 << 10;
enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

// Lives on after the kernel for the next one: then switching takes no system call.
struct Fibre {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool started = false;
  void* registers[5];  // of __builtin_setjmp
  State state = State::kDone;
  int shuffles = 0;
};

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

class Device {
 public:
  static Device& get() {
    static Device device;
    return device;
  }

  // One kernel at a time, block after block.
  void run(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!fits(grid)) stop("a grid that no device can launch");
    if (threads < 1 || threads > 1024) stop("a block of no thread, or of more than 1024");
    if (shared_bytes > static_cast<size_t>(kSharedBytes)) stop("more shared memory than a block gets");
    descending_ = !descending_;
    kernel_ = &kernel;
    while (fibres_.size() < static_cast<size_t>(threads)) fibres_.emplace_back(new Fibre);
    gridDim.x = static_cast<unsigned>(grid.x);
    gridDim.y = static_cast<unsigned>(grid.y);
    for (int64_t i = 0; i < grid.x * grid.y; ++i) {
      const int64_t block = descending_ ? grid.x * grid.y - 1 - i : i;
      blockIdx.x = static_cast<unsigned>(block % grid.x);
      blockIdx.y = static_cast<unsigned>(block / grid.x);
      run_block(threads, shared_bytes);
    }
  }

  unsigned char* shared() { return shared_; }

  void wait(State barrier) {
    Fibre& me = *fibres_[threadIdx.x];
    me.state = barrier;
    to_scheduler(me);
  }

  // The value of lane `lane ^ mask` of the calling thread's warp.
  template <class T>
  T shuffle(T value, int mask) {
    const int me = static_cast<int>(threadIdx.x), other = me / 32 * 32 + ((me % 32) ^ mask);
    // two slots in turns: a fast thread writes its next value before a slow one has read this one
    const int slot = fibres_[static_cast<size_t>(me)]->shuffles++ % 2;
    std::memcpy(exchange_[slot][me], &value, sizeof(T));
    wait(State::kAtWarpBarrier);
    std::memcpy(&value, exchange_[slot][other], sizeof(T));
    return value;
  }

 private:
  void run_block(int threads, size_t shared_bytes) {
    shared_ = static_cast<unsigned char*>(std::malloc(shared_bytes));
    std::memset(shared_, 0xff, shared_bytes);
    for (int t = 0; t < threads; ++t) {
      fibres_[static_cast<size_t>(t)]->state = State::kReady;
      fibres_[static_cast<size_t>(t)]->shuffles = 0;
    }
    bool running = true;
    while (running) {
      bool progress = false;
      for (int i = 0; i < threads; ++i) {
        const int t = descending_ ? threads - 1 - i : i;
        Fibre& fibre = *fibres_[static_cast<size_t>(t)];
        if (fibre.state != State::kReady) continue;
        progress = true;
        threadIdx.x = static_cast<unsigned>(t);
        to_fibre(fibre);
      }
      for (int warp = 0; warp < threads; warp += 32) {
        release(warp, std::min(warp + 32, threads), State::kAtWarpBarrier);
      }
      release(0, threads, State::kAtBlockBarrier);
      running = false;
      for (int t = 0; t < threads; ++t) running |= fibres_[static_cast<size_t>(t)]->state != State::kDone;
      if (running && !progress) stop("a barrier or shuffle that not all threads reach");
    }
    std::free(shared_);
  }

  // Lets the threads go on if all of them are at the barrier.
  void release(int first, int last, State barrier) {
    for (int t = first; t < last; ++t) {
      if (fibres_[static_cast<size_t>(t)]->state != barrier) return;
    }
    for (int t = first; t < last; ++t) fibres_[static_cast<size_t>(t)]->state = State::kReady;
  }

  static void entry() {
    Device& device = get();
    device.arrived(nullptr);
    while (true) {
      (*device.kernel_)();
      Fibre& me = *device.fibres_[threadIdx.x];
      me.state = State::kDone;
      device.to_scheduler(me);
    }
  }

  // A function of its own: the compiler must not see that nothing comes back from here.
  [[gnu::noinline, gnu::noipa]] static void jump(void** to) { __builtin_longjmp(to, 1); }

  [[gnu::noinline]] void to_fibre(Fibre& fibre) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_, fibre.stack.get(), kStackBytes);
#endif
    if (__builtin_setjmp(scheduler_) == 0) {
      if (fibre.started) jump(fibre.registers);
      fibre.started = true;
      ucontext_t context;
      getcontext(&context);
      context.uc_stack.ss_sp = fibre.stack.get();
      context.uc_stack.ss_size = kStackBytes;
      context.uc_link = nullptr;
      makecontext(&context, &Device::entry, 0);
      setcontext(&context);
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_, nullptr, nullptr);
#endif
  }

  [[gnu::noinline]] void to_scheduler(Fibre& fibre) {
    void* fake = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake, scheduler_stack_, scheduler_stack_bytes_);
#endif
    if (__builtin_setjmp(fibre.registers) == 0) jump(scheduler_);
    arrived(fake);
  }

  void arrived([[maybe_unused]] void* fake) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  const std::function<void()>* kernel_ = nullptr;
  unsigned char* shared_ = nullptr;
  bool descending_ = true;
  char exchange_[2][1024][8];
  void* scheduler_[5];
  void* scheduler_fake_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

}  // namespace emulation

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) {}
};

inline unsigned char* shared_memory() { return emulation::Device::get().shared(); }

template <class... Parameters, class... Arguments>
void launch(const DeviceScope&, const char*, void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes,
            Arguments... arguments) {
  emulation::Device::get().run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace fastpose

inline void __syncthreads() { fastpose::emulation::Device::get().wait(fastpose::emulation::State::kAtBlockBarrier); }
inline void __syncwarp() { fastpose::emulation::Device::get().wait(fastpose::emulation::State::kAtWarpBarrier); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return fastpose::emulation::Device::get().shuffle(value, mask);
}
