#include <cstdio>
#include <cstdlib>

#include "cpu/depthwise.h"

namespace fastpose {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* scratch_bytes(int slot, size_t bytes) {
  thread_local Buffer buffers[8];
  Buffer& buffer = buffers[slot];
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.bytes = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, buffer.bytes);
    if (buffer.data == nullptr) {
      // Tasks run inside torch's parallel loop, where an exception could not be reported.
      std::fputs("fastpose: out of memory\n", stderr);
      std::abort();
    }
  }
  return buffer.data;
}

}  // namespace fastpose
