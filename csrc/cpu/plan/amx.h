// 1x1 convolutions in the tile registers of Intel's AMX: kConvSplit, kConvBf16 and kConvInt8.
//
// One instruction multiplies 16 pixels x 32 channels of bfloat16 by 32 channels x 16 filters in 16 cycles, sixteen
// times the rate of float32; of bytes it takes 64 channels. kConvSplit has float32's products, nearly, from three of
// those: a number is the sum of two bfloat16, the nearest to it and the nearest to what is left, 16 bits together, and
// of the four products of two sums the least is left out. The relative error of a product is about 1e-5.
//
// Blocking: 32 pixels x 32 filters of sums, four registers, take 12 products and 8 loads for every 32 channels of
// kConvSplit (4 and 4 of the others). kTiledPixels pixels are rounded at a time, 20 KB for 160 channels, split, and
// stay in the first-level cache, while the panels of weights pass by from the second.
//
// Bound: 2800 GFLOP/s of bfloat16 on a Xeon of the fifth generation with a core to itself, a third of that for
// kConvSplit. Reached with maps in the second-level cache: 880 and 400 for 160 to 320 channels at 16x12 pixels (167 in
// float32); 500 of bfloat16 for 80 to 80, where rounding and writing weigh as much as the products. On a core whose
// other hardware thread is busy the registers multiply at less than a third of that rate.
//
// Weights lie as for the other levels: a row of a register of weights is a pair (four) of channels of 16 filters. The
// last channels, if they do not fill a register, are taken together with as many before them as do, the pixels of which
// are set to zero then.

namespace fastpose {
namespace amx {
namespace {

// Registers 0 to 3 hold sums, 4 and 5 pixels, 6 and 7 weights. The compilers' own functions are not used: gcc's do not
// say that they read memory.
#define FASTPOSE_TILE_LOAD(tile, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(stride) : "memory")
#define FASTPOSE_TILE_STORE(tile, to, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(stride) : "memory")
#define FASTPOSE_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : : :)
#define FASTPOSE_TILE_DOT(sum, pixels, weights)                                            \
  do {                                                                                     \
    if constexpr (kFactors == Factors::kBytes) {                                           \
      __asm__ volatile("tdpbusd %%tmm" #weights ", %%tmm" #pixels ", %%tmm" #sum : : :);   \
    } else {                                                                               \
      __asm__ volatile("tdpbf16ps %%tmm" #weights ", %%tmm" #pixels ", %%tmm" #sum : : :); \
    }                                                                                      \
  } while (false)

typedef uint16_t Bf16 __attribute__((may_alias));

constexpr int64_t kSide = 16;  // rows of a register, and numbers of four bytes in each
constexpr int64_t kStep = kSide * sizeof(float);

// Groups of two or four channels, as many registers of them as it takes, and how many are in each.
struct Depth {
  int64_t groups, chunks, rows;
  explicit Depth(int64_t all) : groups(all), chunks((all + kSide - 1) / kSide), rows(all < kSide ? all : kSide) {}
  // the first group of a chunk
  int64_t begin(int64_t chunk) const { return chunk + 1 < chunks ? chunk * kSide : groups - rows; }
};

// Sets up the registers for the calling thread; the destructor empties them, after which they cost nothing when the
// thread is interrupted.
struct Registers {
  explicit Registers(const Depth& depth) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } layout;
    for (int i = 0; i < 8; ++i) {
      layout.bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? depth.rows * 4 : kStep);
      layout.rows[i] = static_cast<uint8_t>(i >= 6 ? depth.rows : kSide);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(layout));
  }
  ~Registers() { __asm__ volatile("tilerelease" : : :); }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
};

// Rounds two vectors to bfloat16, the first in the lower half.
FASTPOSE_INLINE __m512i rounded(V low, V high) {
  return (__m512i)_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
}
FASTPOSE_INLINE V exactly(__m256i half) {
  return reinterpret_cast<V>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// 32 channels from c on of a pixel, rounded, as a row of a register; behind it, if kSplit, what is left. `there`: those
// that are not set to zero.
template <bool kSplit>
FASTPOSE_INLINE void round_chunk(const PlanTask& t, const float* from, int64_t c, __mmask32 there, char* to,
                                 char* rest) {
  const bool two = c + kL < t.in.channels;  // behind the last channels there may be nothing to read
  V low = load(from + c), high = two ? load(from + c + kL) : V{};
  if (t.gate.data != nullptr) {
    low *= load(t.gate.data + c) + t.step->constant;
    if (two) high *= load(t.gate.data + c + kL) + t.step->constant;
  }
  const __m512i both = rounded(low, high);
  _mm512_store_si512(to, _mm512_maskz_mov_epi16(there, both));
  if constexpr (kSplit) {
    low -= exactly(_mm512_castsi512_si256(both));
    high -= exactly(_mm512_extracti64x4_epi64(both, 1));
    _mm512_store_si512(rest, _mm512_maskz_mov_epi16(there, rounded(low, high)));
  }
}

// A pixel as the registers take it: [kSplit ? 2 : 1][chunks][64 bytes], see the top of the file.
template <bool kSplit>
FASTPOSE_INLINE void round_pixel(const PlanTask& t, const float* from, const Depth& depth, char* to) {
  constexpr int64_t kChannels = 2 * kSide;
  const int64_t channels = t.in.channels, last = depth.chunks - 1;
  char* rest = to + depth.chunks * kStep;
  for (int64_t i = 0; i < last; ++i) {
    round_chunk<kSplit>(t, from, kChannels * i, ~__mmask32{0}, to + kStep * i, rest + kStep * i);
  }
  const int64_t begin = 2 * depth.begin(last);
  const __mmask32 from_its_own = ~__mmask32{0} << (kChannels * last - begin);
  const __mmask32 to_the_last = ~__mmask32{0} >> (channels - begin < kChannels ? kChannels - (channels - begin) : 0);
  round_chunk<kSplit>(t, from, begin, from_its_own & to_the_last, to + kStep * last, rest + kStep * last);
}

// The same of a pixel of bytes: the last groups, with zeros for those that another chunk has.
FASTPOSE_INLINE void last_chunk(const Depth& depth, char* pixel) {
  const int64_t left = depth.groups % kSide;
  if (depth.chunks == 1 || left == 0) return;
  const __m512i last = _mm512_loadu_si512(pixel + (depth.groups - kSide) * 4);
  const __mmask16 its_own = static_cast<__mmask16>(0xffff << (kSide - left));
  _mm512_store_si512(pixel + (depth.chunks - 1) * kStep, _mm512_maskz_mov_epi32(its_own, last));
}

// Sums of 16 kRows16 pixels x 16 kColumns filters, in `sums` [16 kRows16][kPanel]. Pixels are `row` bytes apart, rows
// of weights `width` floats.
template <Factors kFactors, bool kSplit, int kRows16, int kColumns>
FASTPOSE_INLINE void tile_sums(const char* pixels, int64_t row, const Depth& depth, const float* weight, int64_t width,
                               const float* bias, float* sums) {
  const int64_t across = width * static_cast<int64_t>(sizeof(float)), none = 0;
  if constexpr (kFactors == Factors::kBytes) {
    FASTPOSE_TILE_ZERO(0);
    if (kColumns == 2) FASTPOSE_TILE_ZERO(1);
    if (kRows16 == 2) FASTPOSE_TILE_ZERO(2);
    if (kRows16 == 2 && kColumns == 2) FASTPOSE_TILE_ZERO(3);
  } else {  // every row of sums begins with the bias
    FASTPOSE_TILE_LOAD(0, bias, none);
    if (kRows16 == 2) FASTPOSE_TILE_LOAD(2, bias, none);
    if (kColumns == 2) FASTPOSE_TILE_LOAD(1, bias + kSide, none);
    if (kRows16 == 2 && kColumns == 2) FASTPOSE_TILE_LOAD(3, bias + kSide, none);
  }
  const auto load_pixels = [&](const char* from) {
    FASTPOSE_TILE_LOAD(4, from, row);
    if (kRows16 == 2) FASTPOSE_TILE_LOAD(5, from + kSide * row, row);
  };
  const auto load_weights = [&](const float* from) {
    FASTPOSE_TILE_LOAD(6, from, across);
    if (kColumns == 2) FASTPOSE_TILE_LOAD(7, from + kSide, across);
  };
  const auto multiply = [] {
    FASTPOSE_TILE_DOT(0, 4, 6);
    if constexpr (kColumns == 2) FASTPOSE_TILE_DOT(1, 4, 7);
    if constexpr (kRows16 == 2) FASTPOSE_TILE_DOT(2, 5, 6);
    if constexpr (kRows16 == 2 && kColumns == 2) FASTPOSE_TILE_DOT(3, 5, 7);
  };
  for (int64_t i = 0; i < depth.chunks; ++i) {
    const char* a = pixels + i * kStep;
    const float* b = weight + depth.begin(i) * width;
    load_weights(b);
    if constexpr (kSplit) {
      load_pixels(a + depth.chunks * kStep);
      multiply();
    }
    load_pixels(a);
    multiply();
    if constexpr (kSplit) {
      load_weights(b + depth.groups * width);
      multiply();
    }
  }
  constexpr int64_t kAcross = kPanel * sizeof(float);
  const int64_t apart = kAcross;
  FASTPOSE_TILE_STORE(0, sums, apart);
  if (kColumns == 2) FASTPOSE_TILE_STORE(1, sums + kSide, apart);
  if (kRows16 == 2) FASTPOSE_TILE_STORE(2, sums + kSide * kPanel, apart);
  if (kRows16 == 2 && kColumns == 2) FASTPOSE_TILE_STORE(3, sums + kSide * kPanel + kSide, apart);
}

// What follows a sum, for kR pixels and the vector of filters from c on.
template <Factors kFactors, int kR>
FASTPOSE_INLINE void finish_sums(const ConvTile& t, const float* sums, int64_t c) {
  using Sum = SumOf<kFactors, V>;
  V y[kR];
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) y[r] = number(t, r, c, reinterpret_cast<Sum>(load(sums + r * kPanel + c)));
  finish(t, c, y);
}

// Sums of up to 32 pixels x 32 filters that wait for what follows.
struct Waiting {
  ConvTile t{};
  const float* sums = nullptr;
  int64_t rows = 0, width = 0;
};

template <Factors kFactors>
FASTPOSE_INLINE void finish_block(Waiting& w) {
  constexpr int kAtOnce = 8;
  ConvTile& t = w.t;
  const float* sums = w.sums;
  for (int64_t r = 0; r < w.rows;) {
    const bool several = r + kAtOnce <= w.rows;
    const int64_t step = several ? kAtOnce : 1;
    for (int64_t c = 0; c < w.width; c += kL) {
      several ? finish_sums<kFactors, kAtOnce>(t, sums, c) : finish_sums<kFactors, 1>(t, sums, c);
    }
    r += step;
    sums += step * kPanel;
    t.out += step * t.out_stride;
    if (t.other) t.other += step * t.other_stride;
    if (kFactors == Factors::kBytes) t.row_scale += r % kSide != 0 ? step : step + kPad;  // past the zeros
  }
  w.rows = 0;
}

template <Factors kFactors, bool kSplit>
void conv_tiles(const PlanTask& t, int64_t tile, float* scratch) {
  constexpr bool kBytes = kFactors == Factors::kBytes;
  constexpr int64_t kPer = kBytes ? 4 : 2;
  const auto [begin, end] = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.out.channels, packed = pad(channels);
  const Depth depth((t.in.channels + kPer - 1) / kPer);
  const int64_t row = (kSplit ? 2 : 1) * depth.chunks * kStep;
  float* sums[2] = {scratch, scratch + 4 * kSide * kSide};
  float* scales = sums[1] + 4 * kSide * kSide;  // of 16 pixels each, then their zeros; twice, taken in turn
  char* pixels = reinterpret_cast<char*>(scales + 4 * kTiledPixels);
  const bool far = t.out.pixels() * t.out.stride > kFar;
  const Registers registers(depth);
  Waiting waiting;
  int64_t turn = 0;
  for (int64_t first = begin; first < end; first += kTiledPixels) {
    const int64_t count = end - first < kTiledPixels ? end - first : kTiledPixels;
    float* const scale = scales + (first - begin) / kTiledPixels % 2 * (2 * kTiledPixels);
    for (int64_t p = 0; p < count; ++p) {
      const float* from = t.in.data + (first + p) * t.in.stride;
      char* to = pixels + p * row;
      if constexpr (kBytes) {
        float* its_scale = scale + p / kSide * (2 * kPad) + p % kSide;
        avx512_vnni::round_to_bytes(from, t.in.channels, reinterpret_cast<float*>(to), its_scale, its_scale + kPad);
        last_chunk(depth, to);
      } else {
        round_pixel<kSplit>(t, from, depth, to);
      }
    }
    for (int64_t n = 0; n < packed; n += kPanel) {
      const int64_t width = packed - n < kPanel ? packed - n : kPanel;
      const float *weight = t.weight + n * depth.groups * (kSplit ? 2 : 1), *bias = t.bias + n;
      for (int64_t p = 0; p < count; p += 2 * kSide) {
        Waiting next;
        next.sums = sums[turn ^= 1];
        next.rows = count - p < 2 * kSide ? count - p : 2 * kSide;
        next.width = width;
        next.t.bias = bias;
        next.t.act = t.step->act;
        next.t.packed = packed;
        next.t.scale = kBytes ? bias + packed : nullptr;
        next.t.row_scale = kBytes ? scale + p / kSide * (2 * kPad) : nullptr;
        next.t.room = t.out.room - n;
        next.t.out = t.out.data + (first + p) * t.out.stride + n;
        next.t.out_stride = t.out.stride;
        next.t.other = t.other.data ? t.other.data + (first + p) * t.other.stride + n : nullptr;
        next.t.other_stride = t.other.stride;
        if (far) {
          for (int64_t r = 0; r < next.rows; ++r) {
            for (int64_t c = 0; c < width; c += kL) {
              if (next.t.other) __builtin_prefetch(next.t.other + r * t.other.stride + c);
              __builtin_prefetch(next.t.out + r * t.out.stride + c, 1);
            }
          }
        }
        const char* from = pixels + p * row;
        float* to = sums[turn];
        if (next.rows > kSide && width > kSide) {
          tile_sums<kFactors, kSplit, 2, 2>(from, row, depth, weight, width, bias, to);
        } else if (next.rows > kSide) {
          tile_sums<kFactors, kSplit, 2, 1>(from, row, depth, weight, width, bias, to);
        } else if (width > kSide) {
          tile_sums<kFactors, kSplit, 1, 2>(from, row, depth, weight, width, bias, to);
        } else {
          tile_sums<kFactors, kSplit, 1, 1>(from, row, depth, weight, width, bias, to);
        }
        finish_block<kFactors>(waiting);
        waiting = next;
      }
    }
  }
  finish_block<kFactors>(waiting);
}

#undef FASTPOSE_TILE_LOAD
#undef FASTPOSE_TILE_STORE
#undef FASTPOSE_TILE_ZERO
#undef FASTPOSE_TILE_DOT

}  // namespace
}  // namespace amx
}  // namespace fastpose
