// Shared by ghost_cheap.cpp and dw_upsample.cpp: tasks and per-thread scratch.
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
#include "tensors.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastpose {

// Scratch of the calling thread, 64-byte aligned, kept between calls: no allocation in steady state.
void* scratch_bytes(int slot, size_t bytes);
template <class A>
A* scratch(int slot, int64_t count) {
  return static_cast<A*>(scratch_bytes(slot, static_cast<size_t>(count) * sizeof(A)));
}

// Channels per block: the lanes of a vector at the level in use.
inline int64_t lanes(ScalarType type) {
  const int64_t bytes = isa() >= Isa::kAvx512 ? 64 : isa() == Isa::kAvx2 ? 32 : 16;
  return type == ScalarType::Double ? bytes / 8 : bytes / 4;
}

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

}  // namespace fastpose
