#include <cstdlib>
#include <stdexcept>
#include <string>

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
    buffer.bytes = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, rounded);
    if (buffer.data == nullptr) {
      throw std::runtime_error("fastpose: out of memory, " + std::to_string(rounded) + " bytes of scratch were needed");
    }
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace fastpose
