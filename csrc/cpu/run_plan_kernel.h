// Compiled once per instruction set level; see cpu/foreach_isa.h. The instructions of cpu/run_plan.h.
#include "cpu/vec.h"

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

using V = Vec<float>;
constexpr int kL = kLanes<float>;
// Registers decide the tile of the matrix product: rows x 2 vectors of sums, 2 of weights and 1 broadcast number fit 32
// registers (AVX-512: 12 x 32 sums) or 16 (6 x 16, 6 x 8). 12 rows read 14 numbers for 24 multiplications.
constexpr int kRows = FASTPOSE_VECTOR_BYTES == 64 ? kMostRows : 6;
constexpr bool kUseHalf = FASTPOSE_VECTOR_BYTES == 64;

FASTPOSE_INLINE V apply(V x, PlanAct act) {
  const V zero{}, one = splat(1.0f);
  switch (act) {
    case PlanAct::kRelu: return activate<Activation::kRelu, float>(x);
    case PlanAct::kHardswish: return activate<Activation::kHardswish, float>(x);
    case PlanAct::kSilu: return activate<Activation::kSilu, float>(x);
    case PlanAct::kHardsigmoid: {
      const V y = x * (1.0f / 6) + 0.5f;
      return y < zero ? zero : y > one ? one : y;
    }
    case PlanAct::kRelu6: {
      const V six = splat(6.0f);
      return x < zero ? zero : x > six ? six : x;
    }
    case PlanAct::kSigmoid: return one / (one + exp(-x));
    default: return x;
  }
}

// The same for several, which stay in registers: one decision for all.
template <PlanAct kAct, int kN>
FASTPOSE_INLINE void apply_each(V (&x)[kN]) {
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) x[i] = apply(x[i], kAct);
}
template <int kN>
FASTPOSE_INLINE void apply_all(V (&x)[kN], PlanAct act) {
  switch (act) {
    case PlanAct::kRelu: return apply_each<PlanAct::kRelu>(x);
    case PlanAct::kHardswish: return apply_each<PlanAct::kHardswish>(x);
    case PlanAct::kSilu: return apply_each<PlanAct::kSilu>(x);
    case PlanAct::kHardsigmoid: return apply_each<PlanAct::kHardsigmoid>(x);
    case PlanAct::kRelu6: return apply_each<PlanAct::kRelu6>(x);
    case PlanAct::kSigmoid: return apply_each<PlanAct::kSigmoid>(x);
    default: return;
  }
}

#if FASTPOSE_VECTOR_BYTES == 64
// Half a vector, for the last channels: 24 channels are a vector and a half, not two.
typedef float Half __attribute__((vector_size(32)));
typedef float HalfUnaligned __attribute__((vector_size(32), aligned(4), may_alias));
FASTPOSE_INLINE Half load_half(const float* p) { return *reinterpret_cast<const HalfUnaligned*>(p); }
FASTPOSE_INLINE V widen(Half h) {
  const Half zero{};
  return __builtin_shufflevector(h, zero, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else
typedef V Half;  // never used: smaller vectors leave little unused
FASTPOSE_INLINE Half load_half(const float* p) { return load(p); }
FASTPOSE_INLINE V widen(Half h) { return h; }
#endif

// What a tile does of `all` rows, pixels, channels or squares.
struct Range {
  int64_t begin, end;
};
FASTPOSE_INLINE Range range_of(const PlanTask& t, int64_t tile, int64_t all) {
  const int64_t begin = tile * t.tile_rows;
  return {begin, begin + t.tile_rows < all ? begin + t.tile_rows : all};
}

FASTPOSE_INLINE IntVec<float> lane_numbers() {
  IntVec<float> lane{};
  for (int i = 0; i < kL; ++i) lane[i] = i;
  return lane;
}

FASTPOSE_INLINE int64_t pad(int64_t channels) { return (channels + kPad - 1) / kPad * kPad; }

// Writes a vector, or its first `room` numbers where the next ones belong to another map.
FASTPOSE_INLINE void put(float* p, V v, int64_t room) {
  if (room >= kL) return store(p, v);
  store_first(p, v, room);
}

// The same for one vector of each of several pixels, `stride` apart.
template <int kN>
FASTPOSE_INLINE void put_all(float* p, int64_t stride, const V (&v)[kN], int64_t room) {
  if (room >= kL) {
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) store(p + i * stride, v[i]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) store_first(p + i * stride, v[i], room);
  }
}

// The larger of two; NaN if either is.
FASTPOSE_INLINE V larger(V a, V b) { return a != a ? a : a > b ? a : b; }

FASTPOSE_INLINE uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof(bits));
  return bits;
}
FASTPOSE_INLINE float float_of(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof(a));
  return a;
}

// What the bits of a float hold: itself, two bfloat16, or four bytes, the first one lowest; bytes of the map are
// unsigned, of weights signed, their sums integers in the bits of floats.
enum class Factors { kFloat, kPairs, kBytes };

template <class X>
struct IntegersOf {
  typedef int32_t type __attribute__((vector_size(sizeof(X))));
};
template <Factors kFactors, class X>
using SumOf = std::conditional_t<kFactors == Factors::kBytes, typename IntegersOf<X>::type, X>;

// sum + a * weight; of pairs and bytes, all their products.
template <Factors kFactors, class X>
FASTPOSE_INLINE SumOf<kFactors, X> multiply_add(SumOf<kFactors, X> sum, float a, X weight) {
  if constexpr (kFactors == Factors::kFloat) {
    return sum + a * weight;
#if FASTPOSE_BF16
  } else if constexpr (kFactors == Factors::kBytes && sizeof(X) == 64) {
    const __m512i bytes = _mm512_castps_si512(_mm512_set1_ps(a)), filter = reinterpret_cast<__m512i>(weight);
    return reinterpret_cast<SumOf<kFactors, X>>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), bytes, filter));
  } else if constexpr (kFactors == Factors::kBytes) {
    const __m256i bytes = _mm256_castps_si256(_mm256_set1_ps(a)), filter = reinterpret_cast<__m256i>(weight);
    return reinterpret_cast<SumOf<kFactors, X>>(_mm256_dpbusd_epi32(reinterpret_cast<__m256i>(sum), bytes, filter));
  } else if constexpr (sizeof(X) == 64) {
    const __m512bh pair = (__m512bh)_mm512_set1_ps(a), filter = (__m512bh) reinterpret_cast<__m512>(weight);
    return reinterpret_cast<X>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), pair, filter));
  } else {
    const __m256bh pair = (__m256bh)_mm256_set1_ps(a), filter = (__m256bh) reinterpret_cast<__m256>(weight);
    return reinterpret_cast<X>(_mm256_dpbf16_ps(reinterpret_cast<__m256>(sum), pair, filter));
  }
#else
  } else {
    const auto bits = reinterpret_cast<typename IntegersOf<X>::type>(weight);
    const uint32_t factor = bits_of(a);
    if constexpr (kFactors == Factors::kPairs) {
      sum += float_of(factor & 0xffff0000u) * reinterpret_cast<X>(bits & ~0xffff);
      sum += float_of(factor << 16) * reinterpret_cast<X>(bits << 16);
    } else {
      for (int i = 0; i < 4; ++i) {
        sum += (bits << (24 - 8 * i) >> 24) * static_cast<int32_t>(factor >> 8 * i & 255);
      }
    }
    return sum;
  }
#endif
}

// Maps of more floats than this come from and go to beyond the second-level cache.
constexpr int64_t kFar = 128 << 10;

// What a tile works on: rows r of `a`, a column of the packed weights, and the same columns of bias, other and out.
struct ConvTile {
  const float* a;
  int64_t a_stride, depth, pieces, piece_step;
  const float* weight;
  int64_t weight_stride;
  const float *bias, *other;
  int64_t other_stride;
  float* out;
  int64_t out_stride, room;  // numbers of a pixel that may be written from `out` on
  PlanAct act;
  bool far;  // the result's map does not fit the second-level cache
  // of bytes: each row's scale, the rows' zeros kPad on; each column's scale, the sums of the weights `packed` on
  const float *row_scale, *scale;
  int64_t packed;
};

// The number that a sum of products of bytes stands for.
FASTPOSE_INLINE V number(const ConvTile& t, int r, int64_t c, IntVec<float> sum) {
  const V total = __builtin_convertvector(sum, V) - t.row_scale[kPad + r] * load(t.scale + t.packed + c);
  return total * (t.row_scale[r] * load(t.scale + c)) + load(t.bias + c);
}
FASTPOSE_INLINE V number(const ConvTile&, int, int64_t, V sum) { return sum; }

template <int kR>
FASTPOSE_INLINE void finish(const ConvTile& t, int64_t c, V (&y)[kR]) {
  if (t.other != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) y[r] += load(t.other + r * t.other_stride + c);
  }
  apply_all(y, t.act);
  put_all(t.out + c, t.out_stride, y, t.room - c);
}

// out[r] = act(bias + sum_k a[r][k] weight[k] (+ other[r])) for kR rows and kFull vectors, and half a one if kHalf, of
// channels: the sums stay in registers.
template <int kR, int kFull, bool kHalf, Factors kFactors>
FASTPOSE_INLINE void conv_tile(const ConvTile& t) {
  constexpr bool kBytes = kFactors == Factors::kBytes;
  using Sum = SumOf<kFactors, V>;
  using HalfSum = SumOf<kFactors, Half>;
  Sum sum[kR][kFull > 0 ? kFull : 1];
  HalfSum half[kR];
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kFull; ++v) sum[r][v] = kBytes ? Sum{} : reinterpret_cast<Sum>(load(t.bias + v * kL));
    if (kHalf) half[r] = kBytes ? HalfSum{} : reinterpret_cast<HalfSum>(load_half(t.bias + kFull * kL));
  }
  if (t.far) {  // what the sums will be added to and written to arrives meanwhile
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kFull + kHalf; ++v) {
        if (t.other != nullptr) __builtin_prefetch(t.other + r * t.other_stride + v * kL);
        __builtin_prefetch(t.out + r * t.out_stride + v * kL, 1);
      }
    }
  }
  const float* weight = t.weight;
  for (int64_t piece = 0; piece < t.pieces; ++piece) {
    const float* a = t.a + piece * t.piece_step;
    for (int64_t k = 0; k < t.depth; ++k, ++a, weight += t.weight_stride) {
      V w[kFull > 0 ? kFull : 1];
      Half h{};
#pragma GCC unroll 2
      for (int v = 0; v < kFull; ++v) w[v] = load(weight + v * kL);
      if (kHalf) h = load_half(weight + kFull * kL);
#pragma GCC unroll 16
      for (int r = 0; r < kR; ++r) {
        const float s = a[r * t.a_stride];
#pragma GCC unroll 2
        for (int v = 0; v < kFull; ++v) sum[r][v] = multiply_add<kFactors, V>(sum[r][v], s, w[v]);
        if (kHalf) half[r] = multiply_add<kFactors, Half>(half[r], s, h);
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kFull; ++v) {
    V y[kR];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) y[r] = number(t, r, v * kL, sum[r][v]);
    finish(t, v * kL, y);
  }
  if (kHalf) {
    V y[kR];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      y[r] = number(t, r, kFull * kL, reinterpret_cast<Sum>(widen(reinterpret_cast<Half>(half[r]))));
    }
    finish(t, kFull * kL, y);
  }
}

// Rows of the left matrix, `stride` apart; each consists of `pieces` runs of `depth` numbers, `piece_step` apart.
struct Rows {
  const float* a;
  int64_t stride, depth, pieces = 1, piece_step = 0;
  const float* scale = nullptr;  // of bytes: as in ConvTile
};

// kR rows, all channels.
template <int kR, Factors kFactors>
void conv_row_block(const Rows& rows, int64_t r, const PlanTask& task, int64_t row) {
  const int64_t channels = task.out.channels, packed = pad(channels), stride = task.out.stride;
  const int64_t depth = rows.pieces * rows.depth;
  ConvTile t{};
  t.a = rows.a + r * rows.stride;
  t.a_stride = rows.stride;
  t.depth = rows.depth;
  t.pieces = rows.pieces;
  t.piece_step = rows.piece_step;
  t.other_stride = task.other.stride;
  t.out_stride = stride;
  t.act = task.step->act;
  t.far = task.out.pixels() * stride > kFar;
  t.row_scale = kFactors == Factors::kBytes ? rows.scale + r : nullptr;
  t.packed = packed;
  for (int64_t n = 0; n < packed; n += kPanel) {
    t.weight_stride = packed - n < kPanel ? packed - n : kPanel;
    for (int64_t c = 0; c < t.weight_stride && n + c < channels;) {
      const int64_t left = channels - n - c;  // of all panels
      t.weight = task.weight + n * depth + c;
      t.bias = task.bias + n + c;
      t.scale = kFactors == Factors::kBytes ? t.bias + packed : nullptr;
      t.other = task.other.data ? task.other.data + row * task.other.stride + n + c : nullptr;
      t.out = task.out.data + row * stride + n + c;
      t.room = task.out.room - n - c;
      if (c + 2 * kL <= t.weight_stride && left > (kUseHalf ? kL + kL / 2 : kL)) {
        conv_tile<kR, 2, false, kFactors>(t);
        c += 2 * kL;
      } else if (kUseHalf && left > kL) {
        conv_tile<kR, 1, kUseHalf, kFactors>(t);
        c += 2 * kL;
      } else if (kUseHalf && left <= kL / 2) {
        conv_tile<kR, 0, kUseHalf, kFactors>(t);
        c += kL;
      } else {
        conv_tile<kR, 1, false, kFactors>(t);
        c += kL;
      }
    }
  }
}

// `count` rows of the matrix product, for output pixels from `first` on.
template <Factors kFactors = Factors::kFloat>
void conv_rows(const Rows& rows, int64_t count, const PlanTask& t, int64_t first) {
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows) conv_row_block<kRows, kFactors>(rows, r, t, first + r);
  if constexpr (kFactors == Factors::kFloat) {  // of the others the last few rows do not earn code of their own
    for (; r + 6 <= count; r += 6) conv_row_block<6, kFactors>(rows, r, t, first + r);
    for (; r + 4 <= count; r += 4) conv_row_block<4, kFactors>(rows, r, t, first + r);
  }
  for (; r < count; ++r) conv_row_block<1, kFactors>(rows, r, t, first + r);
}

typedef uint16_t Bf16 __attribute__((may_alias));
typedef uint8_t Bytes __attribute__((may_alias));

// `from` [channels] rounded to bfloat16, to the nearest and of two as near to the even one.
FASTPOSE_INLINE void round_to_pairs(const float* from, int64_t channels, float* to) {
#if FASTPOSE_BF16
  for (int64_t c = 0; c < channels; c += 2 * kL) {
    const V low = load(from + c), high = c + kL < channels ? load(from + c + kL) : V{};
    const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
    store(to + c / 2, reinterpret_cast<V>((__m512)both));
  }
  Bf16* rounded = reinterpret_cast<Bf16*>(to);
#else
  Bf16* rounded = reinterpret_cast<Bf16*>(to);
  for (int64_t c = 0; c < channels; ++c) {
    const uint32_t bits = bits_of(from[c]);
    const bool nan = from[c] != from[c];
    rounded[c] = static_cast<Bf16>((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
#endif
  if (channels % 2 != 0) rounded[channels] = 0;
}

// In whole vectors: up to kL - 1 numbers more are read and written. Copies go forward, so the next one repairs that,
// and behind every map and scratch there is room.
FASTPOSE_INLINE void copy(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kL) store(to + i, load(from + i));
}

// The k * k input pixels from (y, x) on, one after the other; zeros outside the map.
FASTPOSE_INLINE void gather(const PlanTask& t, int64_t k, int64_t y, int64_t x, float* to) {
  const int64_t channels = t.in.channels, stride = t.in.stride;
  for (int64_t ky = 0; ky < k; ++ky, to += k * channels) {
    const float* row = t.in.data + (y + ky) * t.in.width * stride;
    if (y + ky < 0 || y + ky >= t.in.height) {
      for (int64_t i = 0; i < k * channels; ++i) to[i] = 0;
    } else if (stride == channels && x >= 0 && x + k <= t.in.width) {
      copy(to, row + x * stride, k * channels);
    } else {
      for (int64_t kx = 0; kx < k; ++kx) {
        if (x + kx >= 0 && x + kx < t.in.width) {
          copy(to + kx * channels, row + (x + kx) * stride, channels);
        } else {
          for (int64_t c = 0; c < channels; ++c) to[kx * channels + c] = 0;
        }
      }
    }
  }
}

// Dense convolution: output pixels as rows of a matrix product. A 1x1 convolution reads the map itself; otherwise the
// k * k input pixels under each output pixel are read kernel row by kernel row or, at borders, gathered into `scratch`
// first.
void conv(const PlanTask& t, int64_t tile, float* scratch) {
  const PlanStep& s = *t.step;
  const auto [begin, end] = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.in.channels;
  if (s.kernel == 1 && s.stride == 1) {
    conv_rows({t.in.data + begin * t.in.stride, t.in.stride, channels}, end - begin, t, begin);
    return;
  }
  const int64_t k = s.kernel, depth = k * k * channels;
  const bool dense = t.in.stride == channels;  // a kernel row's pixels are neighbours in memory
  int64_t y = begin / t.out.width, x = begin % t.out.width;
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows;
    const int64_t top = y * s.stride - s.padding, left = x * s.stride - s.padding;
    const bool inside = top >= 0 && left >= 0 && top + k <= t.in.height && x + rows <= t.out.width &&
                        left + (rows - 1) * s.stride + k <= t.in.width;
    if (dense && inside) {
      const float* corner = t.in.data + (top * t.in.width + left) * channels;
      conv_rows({corner, s.stride * channels, k * channels, k, t.in.width * channels}, rows, t, first);
      x += rows;
      if (x == t.out.width) x = 0, ++y;
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      gather(t, k, y * s.stride - s.padding, x * s.stride - s.padding, scratch + r * depth);
      if (++x == t.out.width) x = 0, ++y;
    }
    conv_rows({scratch, depth, depth}, rows, t, first);
  }
}

// kConvBf16: the pixels of a block are rounded once for all panels of weights.
void conv_bf16(const PlanTask& t, int64_t tile, float* scratch) {
  const auto [begin, end] = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.in.channels, row = rounded_row(channels, 2);
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows;
    for (int64_t r = 0; r < rows; ++r) {
      round_to_pairs(t.in.data + (first + r) * t.in.stride, channels, scratch + r * row);
    }
    conv_rows<Factors::kPairs>({scratch, row, (channels + 1) / 2}, rows, t, first);
  }
}

// `from` [channels] scaled to bytes, q = round(x / scale) + zero with 0 exactly at `zero`. Not a number makes `scale`
// so.
FASTPOSE_INLINE void round_to_bytes(const float* from, int64_t channels, float* to, float* scale, float* zero) {
  V low{}, high{}, strange{};  // the last is 0 unless something is infinite or not a number
  int64_t c = 0;
  for (; c < channels; c += kL) {
    V x = load(from + c);
    if (channels - c < kL) x = lane_numbers() < static_cast<int>(channels - c) ? x : V{};
    high = high > x ? high : x;
    low = low < x ? low : x;
    strange += x * 0;
  }
#pragma GCC unroll 4
  for (int half = kL / 2; half > 0; half /= 2) {
    const IntVec<float> turned = (lane_numbers() + half) & (kL - 1);
    const V h = shuffle(high, turned), l = shuffle(low, turned);
    high = high > h ? high : h;
    low = low < l ? low : l;
    strange += shuffle(strange, turned);
  }
  const float least = low[0], most = high[0] + strange[0];
  const float range = most - least, per_unit = range > 0 && range < __builtin_inff() ? 255 / range : 0;
  *scale = range / 255;
  *zero = per_unit > 0 ? static_cast<float>(static_cast<int32_t>(-least * per_unit + 0.5f)) : 0;
  Bytes* bytes = reinterpret_cast<Bytes*>(to);
#if defined(__x86_64__) && FASTPOSE_VECTOR_BYTES == 64
  const __m512 factor = _mm512_set1_ps(per_unit), offset = _mm512_set1_ps(*zero);
  for (c = 0; c < channels; c += kL) {  // behind the last channel anything will do: it is multiplied by 0
    const __m512i q = _mm512_cvtps_epi32(_mm512_fmadd_ps(reinterpret_cast<__m512>(load(from + c)), factor, offset));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + c),
                     _mm512_cvtusepi32_epi8(_mm512_max_epi32(q, _mm512_setzero_si512())));
  }
#else
  for (c = 0; c < channels; ++c) {
    const float q = from[c] * per_unit + *zero + 0.5f;
    bytes[c] = static_cast<Bytes>(q > 255 ? 255 : q > 0 ? static_cast<int32_t>(q) : 0);
  }
  for (; c % 4 != 0; ++c) bytes[c] = 0;
#endif
}

// kConvInt8: likewise.
void conv_int8(const PlanTask& t, int64_t tile, float* scratch) {
  const auto [begin, end] = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.in.channels, row = rounded_row(channels, 4);
  float* bytes = scratch + kScales;
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows;
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = t.in.data + (first + r) * t.in.stride;
      round_to_bytes(from, channels, bytes + r * row, scratch + r, scratch + kPad + r);
    }
    Rows all{bytes, row, (channels + 3) / 4};
    all.scale = scratch;
    conv_rows<Factors::kBytes>(all, rows, t, first);
  }
}

// Winograd's F(4x4, 3x3): 4x4 outputs of a 3x3 convolution from the 6x6 inputs under them with 36 multiplications per
// pair of channels instead of 144 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; points 0,
// 1, -1, 2, -2). The inputs of kSquares squares are transformed, 36 matrix products follow, one for each position, and
// the sums are transformed back. Costs some accuracy: rounding errors are about ten times those of the direct sum.

// Rows of the transforms: d and m are `step` apart.
FASTPOSE_INLINE void winograd_in(const V* d, int step, V* to, int to_step) {
  const V a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step], g = d[5 * step];
  const V p = f - 4 * c, q = e - 4 * b, r = f - c, s = 2 * (e - b);
  to[0] = 4 * a - 5 * c + f;
  to[to_step] = p + q;
  to[2 * to_step] = p - q;
  to[3 * to_step] = r + s;
  to[4 * to_step] = r - s;
  to[5 * to_step] = 4 * b - 5 * e + g;
}
FASTPOSE_INLINE void winograd_out(const V* m, int step, V* to, int to_step) {
  const V p = m[step] + m[2 * step], q = m[step] - m[2 * step];
  const V r = m[3 * step] + m[4 * step], s = m[3 * step] - m[4 * step];
  to[0] = m[0] + p + r;
  to[to_step] = q + 2 * s;
  to[2 * to_step] = p + 4 * r;
  to[3 * to_step] = q + 8 * s + m[5 * step];
}

void winograd(const PlanTask& t, int64_t tile, float* scratch) {
  const int64_t height = t.out.height, width = t.out.width, across = (width + 3) / 4;
  const auto [begin, end] = range_of(t, tile, squares(t.out));
  const int64_t in_channels = t.in.channels, in_packed = pad(in_channels);
  const int64_t channels = t.out.channels, packed = pad(channels);
  float *inputs = scratch, *sums = inputs + 36 * kSquares * in_packed, *zeros = sums + 36 * kSquares * packed;
  for (int64_t c = 0; c < packed; c += kL) store(zeros + c, V{});
  PlanStep plain = *t.step;
  plain.act = PlanAct::kNone;
  PlanTask product = t;
  product.step = &plain;
  product.bias = zeros;
  product.other.data = nullptr;
  product.out.stride = product.out.room = packed;
  product.out.height = 1, product.out.width = kSquares;
  for (int64_t first = begin; first < end; first += kSquares) {
    const int64_t count = end - first < kSquares ? end - first : kSquares;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t top = (first + i) / across * 4 - 1, left = (first + i) % across * 4 - 1;
      const bool inside = top >= 0 && left >= 0 && top + 6 <= height && left + 6 <= width;
      const float* corner = t.in.data + (top * width + left) * t.in.stride;
      for (int64_t c = 0; c < in_channels; c += kL) {
        V d[36], half[36];
        for (int64_t y = 0; y < 6; ++y) {
#pragma GCC unroll 6
          for (int64_t x = 0; x < 6; ++x) {
            const bool there = inside || (top + y >= 0 && top + y < height && left + x >= 0 && left + x < width);
            d[6 * y + x] = there ? load(corner + (y * width + x) * t.in.stride + c) : V{};
          }
        }
#pragma GCC unroll 6
        for (int x = 0; x < 6; ++x) winograd_in(d + x, 6, half + x, 6);
#pragma GCC unroll 6
        for (int y = 0; y < 6; ++y) winograd_in(half + 6 * y, 1, d + 6 * y, 1);
#pragma GCC unroll 36
        for (int k = 0; k < 36; ++k) store(inputs + (k * kSquares + i) * in_packed + c, d[k]);
      }
    }
    for (int64_t k = 0; k < 36; ++k) {
      product.weight = t.weight + k * in_channels * packed;
      product.out.data = sums + k * kSquares * packed;
      conv_rows({inputs + k * kSquares * in_packed, in_packed, in_channels}, count, product, 0);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t top = (first + i) / across * 4, left = (first + i) % across * 4;
      for (int64_t c = 0; c < channels; c += kL) {
        V m[36], half[24], y[16];
#pragma GCC unroll 36
        for (int k = 0; k < 36; ++k) m[k] = load(sums + (k * kSquares + i) * packed + c);
#pragma GCC unroll 6
        for (int x = 0; x < 6; ++x) winograd_out(m + x, 6, half + x, 6);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) winograd_out(half + 6 * r, 1, y + 4 * r, 1);
        const V bias = load(t.bias + c);
        for (int64_t r = 0; r < 4 && top + r < height; ++r) {
          for (int64_t x = 0; x < 4 && left + x < width; ++x) {
            const int64_t p = (top + r) * width + left + x;
            V result = y[4 * r + x] + bias;
            if (t.other.data) result += load(t.other.data + p * t.other.stride + c);
            put(t.out.data + p * t.out.stride + c, apply(result, t.step->act), t.out.room - c);
          }
        }
      }
    }
  }
}

// kDeconv: output (2 y + a, 2 x + b) sees input rows y - 1 + a and y + a, and columns alike. A tile is a band of input
// rows; the outputs of one phase (a, b) lie two pixels apart.
void deconv(const PlanTask& t, int64_t tile, float* scratch) {
  const int64_t width = t.in.width, depth = 4 * t.in.channels;
  const auto [begin, end] = range_of(t, tile, t.in.height);
  PlanTask phase = t;
  phase.out.stride = 2 * t.out.stride;
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t ab = 0; ab < 4; ++ab) {
      const int64_t a = ab / 2, b = ab % 2;
      phase.weight = t.weight + ab * depth * pad(t.out.channels);
      phase.out.data = t.out.data + ((2 * y + a) * t.out.width + b) * t.out.stride;
      for (int64_t x = 0; x < width; x += kRows) {
        const int64_t rows = width - x < kRows ? width - x : kRows;
        for (int64_t r = 0; r < rows; ++r) gather(t, 2, y - 1 + a, x + r - 1 + b, scratch + r * depth);
        conv_rows({scratch, depth, depth}, rows, phase, x);
      }
    }
  }
}

// kB vectors of neighbouring pixels of two rows, of which `count` rows and `left` pixels exist.
template <int kB>
FASTPOSE_INLINE void to_one_tile(const PlanTask& t, const float* in, int64_t line, int64_t plane, float* out,
                                 int64_t left, int64_t count) {
  const int64_t k = t.step->kernel, channels = t.in.channels;
  const V bias = splat(t.bias[0]);
  V sum[2][kB];
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 4
    for (int b = 0; b < kB; ++b) sum[r][b] = bias;
  }
  const float* weight = t.weight;
  for (int64_t ky = 0; ky < k; ++ky) {
    for (int64_t kx = 0; kx < k; ++kx) {
      for (int64_t c = 0; c < channels; ++c, weight += kPad) {
        const V w = splat(weight[0]);
        const float* from = in + c * plane + ky * line + kx;
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 4
          for (int b = 0; b < kB; ++b) sum[r][b] += load(from + r * line + b * kL) * w;
        }
      }
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    alignas(64) float result[kB * kL];
#pragma GCC unroll 4
    for (int b = 0; b < kB; ++b) store(result + b * kL, apply(r == 0 ? sum[0][b] : sum[1][b], t.step->act));
    float* to = out + r * t.out.width * t.out.stride;
    if (t.out.stride == 1 && kB * kL <= left) {
#pragma GCC unroll 4
      for (int b = 0; b < kB; ++b) store(to + b * kL, load(result + b * kL));
      continue;
    }
    for (int64_t i = 0; i < kB * kL && i < left; ++i) to[i * t.out.stride] = result[i];
  }
}

// Dense convolution to one channel (a spatial attention gate): as a matrix product 15 of 16 columns would be padding.
// Input channels become planes with a border of zeros, and a vector holds neighbouring pixels.
void conv_to_one(const PlanTask& t, int64_t tile, float* scratch) {
  const PlanStep& s = *t.step;
  const Range pixels = range_of(t, tile, t.out.pixels());  // whole rows
  const int64_t width = t.out.width, begin = pixels.begin / width, end = pixels.end / width;
  const int64_t k = s.kernel, channels = t.in.channels;
  const int64_t rows = end - begin + k - 1, line = t.in.width + 2 * s.padding + kPad, plane = rows * line;
  for (int64_t i = 0; i < channels * plane; i += kL) store(scratch + i, V{});
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t y = begin + r - s.padding;
    if (y < 0 || y >= t.in.height) continue;
    for (int64_t x = 0; x < t.in.width; ++x) {
      const float* from = t.in.data + (y * t.in.width + x) * t.in.stride;
      for (int64_t c = 0; c < channels; ++c) scratch[c * plane + r * line + s.padding + x] = from[c];
    }
  }
  // two rows at a time: every number of the filter is read for up to six vectors, and no sum waits for itself
  for (int64_t y = begin; y < end; y += 2) {
    const float* in = scratch + (y - begin) * line;
    const int64_t count = end - y < 2 ? 1 : 2;
    for (int64_t x = 0; x < width;) {
      float* out = t.out.data + (y * width + x) * t.out.stride;
      const int64_t left = width - x;
      if (left > 2 * kL) {
        to_one_tile<3>(t, in + x, line, plane, out, left, count);
        x += 3 * kL;
      } else if (left > kL) {
        to_one_tile<2>(t, in + x, line, plane, out, left, count);
        x += 2 * kL;
      } else {
        to_one_tile<1>(t, in + x, line, plane, out, left, count);
        x += kL;
      }
    }
  }
}

// Depthwise convolution, output columns [x, x + kT) of one row, all channels. `rows` are the k input rows, null outside
// the map; kEdge if columns may see beyond it, too.
template <int kT, int kK, int kS, bool kEdge>
void depthwise_tile(const PlanTask& t, const float* weight, const float* const* rows, int64_t x, float* out) {
  const int64_t stride = t.in.stride, left = x * kS - t.step->padding, width = t.in.width;
  const int64_t channels = t.out.channels, packed = pad(channels);
  for (int64_t c = 0; c < channels; c += kL) {
    V sum[kT];
    const V bias = load(t.bias + c);
#pragma GCC unroll 16
    for (int i = 0; i < kT; ++i) sum[i] = bias;
#pragma GCC unroll 8
    for (int ky = 0; ky < kK; ++ky) {
      if (rows[ky] == nullptr) continue;
      const float* in = rows[ky] + left * stride + c;
      V w[kK];
#pragma GCC unroll 8
      for (int kx = 0; kx < kK; ++kx) w[kx] = load(weight + (ky * kK + kx) * packed + c);
      // every input is read once, for all outputs that see it
#pragma GCC unroll 32
      for (int j = 0; j < (kT - 1) * kS + kK; ++j) {
        if (kEdge && (left + j < 0 || left + j >= width)) continue;
        const V v = in_register(load(in + j * stride));
#pragma GCC unroll 8
        for (int kx = 0; kx < kK; ++kx) {
          const int i = (j - kx) / kS;
          if (j >= kx && (j - kx) % kS == 0 && i < kT) sum[i] += v * w[kx];
        }
      }
    }
    apply_all(sum, t.step->act);
    put_all(out + c, t.out.stride, sum, t.out.room - c);
  }
}

template <int kK, int kS>
void depthwise_rows(const PlanTask& t, const float* weight, int64_t begin, int64_t end) {
  constexpr int kT = FASTPOSE_VECTOR_BYTES == 64 ? 8 : 4;
  const int64_t stride = t.in.stride, width = t.in.width, p = t.step->padding, columns = t.out.width;
  for (int64_t y = begin; y < end; ++y) {
    const float* rows[kK];
    for (int ky = 0; ky < kK; ++ky) {
      const int64_t iy = y * kS - p + ky;
      rows[ky] = iy >= 0 && iy < t.in.height ? t.in.data + iy * width * stride : nullptr;
    }
    // channels innermost: memory is read in order, and the weights of all channels fit the second-level cache
    const int64_t to = t.out.stride;
    float* out = t.out.data + y * columns * to;
    const auto inside = [&](int64_t x, int64_t n) { return x * kS >= p && (x + n - 1) * kS - p + kK <= width; };
    int64_t x = 0;
    for (; x + kT <= columns; x += kT) {
      inside(x, kT) ? depthwise_tile<kT, kK, kS, false>(t, weight, rows, x, out + x * to)
                    : depthwise_tile<kT, kK, kS, true>(t, weight, rows, x, out + x * to);
    }
    for (; x + kT / 2 <= columns; x += kT / 2) {
      depthwise_tile<kT / 2, kK, kS, true>(t, weight, rows, x, out + x * to);
    }
    for (; x < columns; ++x) depthwise_tile<1, kK, kS, true>(t, weight, rows, x, out + x * to);
  }
}

// A gate on the input, one number per channel, is multiplied into the weights instead.
void depthwise(const PlanTask& t, int64_t tile, float* scratch) {
  const auto [begin, end] = range_of(t, tile, t.out.height);
  const int64_t k = t.step->kernel, s = t.step->stride;
  const float* w = t.weight;
  if (t.gate.data) {
    const int64_t packed = pad(t.out.channels);
    for (int64_t c = 0; c < t.out.channels; c += kL) {
      const V gate = load(t.gate.data + c) + t.step->constant;
      for (int64_t i = 0; i < k * k; ++i) store(scratch + i * packed + c, load(t.weight + i * packed + c) * gate);
    }
    w = scratch;
  }
  if (k == 3) return s == 1 ? depthwise_rows<3, 1>(t, w, begin, end) : depthwise_rows<3, 2>(t, w, begin, end);
  if (k == 5) return s == 1 ? depthwise_rows<5, 1>(t, w, begin, end) : depthwise_rows<5, 2>(t, w, begin, end);
  return s == 1 ? depthwise_rows<7, 1>(t, w, begin, end) : depthwise_rows<7, 2>(t, w, begin, end);
}

// Depthwise transposed 4x4, stride 2, padding 1: output (2y + a, 2x + b) sees input rows y - 1 + a (with kernel row 3 -
// a) and y + a (kernel row 1 - a), and columns alike: 2x2 taps. A tile is a band of input rows.
void upsample(const PlanTask& t, int64_t tile) {
  const int64_t height = t.in.height, width = t.in.width, stride = t.in.stride;
  const int64_t channels = t.out.channels, packed = pad(channels), to = t.out.stride, room = t.out.room;
  const auto [begin, end] = range_of(t, tile, height);
  const PlanAct act = t.step->act;
  const V zero{};
  for (int64_t y = begin; y < end; ++y) {
    for (int a = 0; a < 2; ++a) {
      const int64_t row0 = y - 1 + a, row1 = y + a;
      const float* in0 = row0 >= 0 ? t.in.data + row0 * width * stride : nullptr;
      const float* in1 = row1 < height ? t.in.data + row1 * width * stride : nullptr;
      const float *w0 = t.weight + (3 - a) * 4 * packed, *w1 = t.weight + (1 - a) * 4 * packed;
      float* out = t.out.data + (2 * y + a) * t.out.width * to;
      for (int64_t x = 0; x < width; ++x, out += 2 * to) {
        const bool left = x > 0, right = x + 1 < width;
        const float *here0 = in0 + x * stride, *here1 = in1 + x * stride;
        for (int64_t c = 0; c < channels; c += kL) {
          V even = load(t.bias + c), odd = even;
          if (in0 != nullptr) {
            const V m = load(here0 + c), l = left ? load(here0 - stride + c) : zero;
            const V r = right ? load(here0 + stride + c) : zero;
            even += l * load(w0 + 3 * packed + c) + m * load(w0 + packed + c);
            odd += m * load(w0 + 2 * packed + c) + r * load(w0 + c);
          }
          if (in1 != nullptr) {
            const V m = load(here1 + c), l = left ? load(here1 - stride + c) : zero;
            const V r = right ? load(here1 + stride + c) : zero;
            even += l * load(w1 + 3 * packed + c) + m * load(w1 + packed + c);
            odd += m * load(w1 + 2 * packed + c) + r * load(w1 + c);
          }
          put(out + c, apply(even, act), room - c);
          put(out + to + c, apply(odd, act), room - c);
        }
      }
    }
  }
}

// Numbers that are summed up before they are added to the total: the rounding of a sum grows with its length.
constexpr int64_t kSummed = 256;

// kMean, kSum, kMax and kMeanMax over all pixels: four running values each, since one would wait for itself.
// With both the sums end where the maxima begin.
template <bool kSum, bool kMaximum>
void reduce(const PlanTask& t, int64_t tile, float factor) {
  const int64_t pixels = t.in.pixels(), stride = t.in.stride, all = t.in.channels;
  const Range channels = range_of(t, tile, all);
  for (int64_t c = channels.begin; c < channels.end; c += kL) {
    V sum[4]{}, most[4]{};
    if (kMaximum) {
      for (int i = 0; i < 4; ++i) most[i] = load(t.in.data + c);
    }
    const auto take = [&](int i, int64_t p) {
      const V x = load(t.in.data + p * stride + c);
      if (kSum) sum[i] += x;
      if (kMaximum) most[i] = larger(most[i], x);
    };
    V total{};
    int64_t p = 0;
    for (int64_t end = 0; end < pixels;) {
      end = std::min(end + kSummed, pixels);
      for (; p + 4 <= end; p += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) take(i, p + i);
      }
      for (; p < end; ++p) take(0, p);
      if (kSum) {
        total += sum[0] + sum[1] + sum[2] + sum[3];
        for (V& part : sum) part = V{};
      }
    }
    const int64_t first = kSum && kMaximum ? all : 0;  // channel of the first maximum
    if (kSum) {
      const V y = total * factor;
      put(t.out.data + c, apply(y, t.step->act), (first > 0 ? all : t.out.room) - c);
    }
    if (kMaximum) {
      const V y = larger(larger(most[0], most[1]), larger(most[2], most[3]));
      put(t.out.data + first + c, apply(y, t.step->act), t.out.room - first - c);
    }
  }
}

// The sum of value(0) ... value(count - 1): four running ones, since one would wait for itself.
template <class F>
FASTPOSE_INLINE V sum_over(int64_t count, const F& value) {
  V total{};
  int64_t i = 0;
  for (int64_t end = 0; end < count;) {
    end = std::min(end + kSummed, count);
    V sum[4]{};
    for (; i + 4 <= end; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[j] += value(i + j);
    }
    for (; i < end; ++i) sum[0] += value(i);
    total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  return total;
}

// kMeanOfRows: a pixel per row.
void mean_of_rows(const PlanTask& t, int64_t tile) {
  const Range rows = range_of(t, tile, t.out.pixels());
  const int64_t width = t.in.width, stride = t.in.stride;
  const float factor = 1.0f / static_cast<float>(width);
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    for (int64_t c = 0; c < t.out.channels; c += kL) {
      const float* in = t.in.data + y * width * stride + c;
      const V sum = sum_over(width, [&](int64_t x) { return load(in + x * stride); });
      put(t.out.data + y * t.out.stride + c, sum * factor, t.out.room - c);
    }
  }
}

// kMeanOfColumns and kCoordinateMean, some of the channels.
void mean_of_columns(const PlanTask& t, int64_t tile) {
  const int64_t height = t.in.height, width = t.in.width, stride = t.in.stride;
  const Range channels = range_of(t, tile, t.out.channels);
  const float factor = 1.0f / static_cast<float>(height);
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t c = channels.begin; c < channels.end; c += kL) {
      const float* in = t.in.data + x * stride + c;
      const V sum = sum_over(height, [&](int64_t y) { return load(in + y * width * stride); });
      put(t.out.data + x * t.out.stride + c, sum * factor, t.out.room - c);
    }
  }
}

void coordinate_mean(const PlanTask& t, int64_t tile) {
  const int64_t height = t.in.height, width = t.in.width, stride = t.in.stride;
  const Range channels = range_of(t, tile, t.out.channels);
  const float factor = 1.0f / static_cast<float>(height * width);
  for (int64_t c = channels.begin; c < channels.end; c += kL) {
    const float* gate = t.gate.data + c;
    const V sum = sum_over(height, [&](int64_t y) {
      const float* in = t.in.data + y * width * stride + c;
      const V row = sum_over(width, [&](int64_t x) { return load(in + x * stride) * load(gate + x * t.gate.stride); });
      return row * load(t.other.data + y * t.other.stride + c);
    });
    put(t.out.data + c, sum * factor, t.out.room - c);
  }
}

void group_softmax(const PlanTask& t) {
  const int64_t size = t.in.channels / t.step->kernel;
  for (int64_t begin = 0; begin < t.in.channels; begin += size) {
    const float* in = t.in.data + begin;
    float* out = t.out.data + begin;
    float most = in[0], sum = 0;
    for (int64_t i = 1; i < size; ++i) most = in[i] > most ? in[i] : most;
    for (int64_t i = 0; i < size; ++i) {
      out[i] = exp(splat(in[i] - most))[0];
      sum += out[i];
    }
    for (int64_t i = 0; i < size; ++i) out[i] /= sum;
  }
}

// kGroupAttention. What follows the filters is linear up to the sigmoid, so it is multiplied into them first, and only
// the sums over the four groups of channels are needed. Groups are mixed so that every kPad channels hold four of each:
// position 16 j + 4 g + i is channel 4 j + i of group g. Then all vectors of a pixel add up lane by lane to four sums
// of four numbers, and the small filters, first in each group, share vectors.

// One vector of channels of kT pixels, filters of 2 * kReach + 1 rows and columns in the middle of 7 x 7. Every input
// is read once per row, for all pixels that see it.
template <int kT, int kReach>
FASTPOSE_INLINE void filter(const float* in, int64_t row, const float* weight, int64_t channels, V* sum) {
  constexpr int kSize = 2 * kReach + 1, kFirst = 3 - kReach;
  for (int ky = kFirst; ky < kFirst + kSize; ++ky) {
    V w[kSize];
#pragma GCC unroll 8
    for (int k = 0; k < kSize; ++k) w[k] = load(weight + (ky * 7 + kFirst + k) * channels);
    const float* from = in + ky * row + kFirst * channels;
#pragma GCC unroll 16
    for (int j = 0; j < kT + kSize - 1; ++j) {
      const V x = in_register(load(from + j * channels));
#pragma GCC unroll 8
      for (int k = 0; k < kSize; ++k) {
        if (j >= k && j - k < kT) sum[j - k] += x * w[k];
      }
    }
  }
}

// Lane 4 g + i is the sum of the four lanes 4 g ... 4 g + 3 of v[i].
FASTPOSE_INLINE V sums_of_four(const V* v) {
  IntVec<float> from[2]{}, turned[2]{};  // by two and by one lane
#pragma GCC unroll 16
  for (int i = 0; i < kL; ++i) {
    from[0][i] = i & 2 ? i + kL : i, turned[0][i] = i & 2 ? (i ^ 2) + kL : i ^ 2;
    from[1][i] = i & 1 ? i + kL : i, turned[1][i] = i & 1 ? (i ^ 1) + kL : i ^ 1;
  }
  const V even = merge(v[0], v[2], from[0]) + merge(v[0], v[2], turned[0]);
  const V odd = merge(v[1], v[3], from[0]) + merge(v[1], v[3], turned[0]);
  return merge(even, odd, from[1]) + merge(even, odd, turned[1]);
}

// Pixels [x, x + kT) of row y; `in` is the corner of their windows in the band.
template <int kT>
void attend(const PlanTask& t, const float* in, int64_t row, const float* weight, int64_t y, int64_t x) {
  constexpr int kFours = (kT + 3) / 4;
  const int64_t channels = t.in.channels, size = channels / 4;
  const bool mixed = size % kL != 0;  // groups in a vector
  // of four pixels each: number 4 g + i is that of group g; the last is room
  alignas(64) float gates[kFours + 1][kPad];
  for (int64_t h = 0; h < kPad; h += kL) {
    V sum[4 * kFours]{}, constant{};
    for (int64_t i = 0; i < kL; ++i) constant[i] = t.gate.data[channels + (h + i) / 4];
    for (int64_t c = h; c < channels; c += kPad) {
      const float reach = t.bias[c / kPad];
      if (reach <= 1) {
        filter<kT, 1>(in + c, row, weight + c, channels, sum);
      } else if (reach <= 2) {
        filter<kT, 2>(in + c, row, weight + c, channels, sum);
      } else {
        filter<kT, 3>(in + c, row, weight + c, channels, sum);
      }
    }
#pragma GCC unroll 2
    for (int f = 0; f < kFours; ++f) {
      store(gates[f] + h, apply(sums_of_four(sum + 4 * f) + constant, PlanAct::kSigmoid));
    }
  }
  for (int64_t c = 0; c < channels; c += kL) {
    const int64_t first = c / size * 4;  // of the numbers for the groups that this vector belongs to
    IntVec<float> lanes{};
    for (int64_t l = 0; mixed && l < kL; ++l) lanes[l] = static_cast<int>((c + l) / size * 4 - first);
    for (int i = 0; i < kT; ++i) {
      const int64_t p = y * t.in.width + x + i;
      const float* numbers = gates[i / 4] + first;
      const V gate = mixed ? shuffle(load(numbers), lanes + i % 4) : splat(numbers[i % 4]);
      V result = load(t.in.data + p * t.in.stride + c) * gate;
      if (t.other.data) result += load(t.other.data + p * t.other.stride + c);
      put(t.out.data + p * t.out.stride + c, apply(result, t.step->act), t.out.room - c);
    }
  }
}

FASTPOSE_INLINE void mix_groups(const float* from, int64_t size, float* to) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  for (int64_t i = 0; i < size; i += 4, to += 16) {
#pragma GCC unroll 4
    for (int64_t g = 0; g < 4; ++g)
      *reinterpret_cast<Four*>(to + 4 * g) = *reinterpret_cast<const Four*>(from + g * size + i);
  }
}

// A band of rows is copied with its surroundings, zeros outside the map, so that no pixel is at a border.
void group_attention(const PlanTask& t, int64_t tile, float* scratch) {
  const int64_t channels = t.in.channels, size = channels / 4, width = t.in.width, row = (width + 6) * channels;
  const auto [begin, end] = range_of(t, tile, t.out.height);
  float *gate = scratch, *weight = gate + channels, *band = weight + 49 * channels;
  mix_groups(t.gate.data, size, gate);
  for (int64_t i = 0; i < 49; ++i) {
    for (int64_t c = 0; c < channels; c += kL) {
      store(weight + i * channels + c, load(t.weight + i * channels + c) * load(gate + c));
    }
  }
  for (int64_t first = begin; first < end; first += kBandRows) {
    const int64_t last = first + kBandRows < end ? first + kBandRows : end;
    float* to = band;
    const auto zeros = [&](int64_t n) {
      for (int64_t i = 0; i < n; i += kL) store(to + i, V{});
      to += n;
    };
    for (int64_t y = first - 3; y < last + 3; ++y) {
      if (y < 0 || y >= t.in.height) {
        zeros(row);
        continue;
      }
      zeros(3 * channels);
      const float* in = t.in.data + y * width * t.in.stride;
      for (int64_t x = 0; x < width; ++x, to += channels) mix_groups(in + x * t.in.stride, size, to);
      zeros(3 * channels);
    }
    for (int64_t y = first; y < last; ++y) {
      const float* in = band + (y - first) * row;
      int64_t x = 0;
      for (; x + 8 <= width; x += 8) attend<8>(t, in + x * channels, row, weight, y, x);
      for (; x + 4 <= width; x += 4) attend<4>(t, in + x * channels, row, weight, y, x);
      for (; x < width; ++x) attend<1>(t, in + x * channels, row, weight, y, x);
    }
  }
}

// Convolution along the channels of one pixel.
void band(const PlanTask& t, float* scratch) {
  const int64_t channels = t.in.channels, k = t.step->kernel, edge = k / 2, packed = pad(channels);
  for (int64_t i = 0; i < packed + k; ++i) scratch[i] = i >= edge && i < channels + edge ? t.in.data[i - edge] : 0;
  for (int64_t c = 0; c < channels; c += kL) {
    V y = splat(t.bias[0]);
    for (int64_t i = 0; i < k; ++i) y += load(scratch + c + i) * splat(t.weight[i]);
    if (t.other.data) y += load(t.other.data + c);
    put(t.out.data + c, apply(y, t.step->act), t.out.room - c);
  }
}

// Pixel after pixel, from `p` on, of a map smaller by `factor` under those of one that is `width` wide.
struct Under {
  int64_t width, factor, stride, row_length;
  int64_t x, y, part;
  const float *row, *pixel;

  FASTPOSE_INLINE Under(const PlanMap& map, int64_t p, int64_t width_, int64_t factor_)
      : width(width_), factor(factor_), stride(map.stride), row_length(map.width * map.stride) {
    x = p % width;
    y = p / width;
    part = x % factor;
    row = map.data + y / factor * row_length;
    pixel = row + x / factor * stride;
  }
  FASTPOSE_INLINE void next() {
    if (factor == 1) {
      pixel += stride;
      return;
    }
    if (++part == factor) part = 0, pixel += stride;
    if (++x < width) return;
    x = part = 0;
    if (++y % factor == 0) row += row_length;
    pixel = row;
  }
};

// kScale, kScalePixels, kAdd, kMultiply, kActivate and kOuter. The usual activations are template arguments: the loop
// is so short that choosing one would take as long as the rest.
template <PlanOp kOp, int kAct>
FASTPOSE_INLINE void pointwise_with(const PlanTask& t, int64_t tile) {
  constexpr bool kOuter = kOp == PlanOp::kOuter, kByPixel = kOuter || kOp == PlanOp::kScalePixels;
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.out.channels, room = t.out.room, width = t.out.width;
  const int64_t whole = channels / kL * kL;
  const PlanAct act = kAct == 0 ? PlanAct::kNone : kAct == 1 ? PlanAct::kRelu : t.step->act;
  const bool summed = kOp != PlanOp::kMultiply && t.other.data != nullptr;
  const float* by_channel = kOp == PlanOp::kScale ? t.gate.data : kOp == PlanOp::kScalePixels ? t.second.data : nullptr;
  const bool third = kOp == PlanOp::kAdd && t.gate.data != nullptr;
  const PlanMap none{};
  Under other(t.other, range.begin, width, kOuter ? 1 : t.step->factor);
  Under gate(kByPixel || third ? t.gate : none, range.begin, width,
             kOuter  ? t.step->factor
             : third ? t.step->kernel
                     : 1);
  const float* in = t.in.data + (kOuter ? 0 : range.begin * t.in.stride);
  float* out = t.out.data + range.begin * t.out.stride;
  for (int64_t p = range.begin; p < range.end; ++p, other.next(), gate.next(), out += t.out.stride) {
    const V by_pixel = kByPixel ? splat(gate.pixel[0]) : V{};
    const auto result = [&](int64_t c) {
      V y = load(in + c);
      if (kByPixel) y *= by_pixel;
      if (by_channel) y *= load(by_channel + c) + t.step->constant;
      if (kOp == PlanOp::kMultiply) y *= load(other.pixel + c);
      if (summed) y += load(other.pixel + c);
      if (third) y += load(gate.pixel + c);
      return apply(y, act);
    };
    for (int64_t c = 0; c < whole; c += kL) store(out + c, result(c));
    if (whole < channels) put(out + whole, result(whole), room - whole);
    if (!kOuter) in += t.in.stride;
  }
}

template <PlanOp kOp>
void pointwise(const PlanTask& t, int64_t tile) {
  switch (t.step->act) {
    case PlanAct::kNone: return pointwise_with<kOp, 0>(t, tile);
    case PlanAct::kRelu: return pointwise_with<kOp, 1>(t, tile);
    default: return pointwise_with<kOp, 2>(t, tile);
  }
}

// kInterleave: channels of map and other in turn, those of other times the gate if there is one.
void interleave(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.in.channels;
  for (int64_t p = range.begin; p < range.end; ++p) {
    const float *a = t.in.data + p * t.in.stride, *b = t.other.data + p * t.other.stride;
    float* out = t.out.data + p * t.out.stride;
    const V by_pixel = t.second.data ? splat(t.second.data[p * t.second.stride]) : V{};
    for (int64_t c = 0; c < channels; c += kL) {
      const V even = load(a + c);
      V odd = load(b + c);
      if (t.gate.data) odd *= load(t.gate.data + c) + t.step->constant;
      if (t.second.data) odd *= by_pixel;
      odd = apply(odd, t.step->act);
      const int64_t room = t.out.room - 2 * c;
      put(out + 2 * c, interleave_low(even, odd), room);
      if (room > kL) put(out + 2 * c + kL, interleave_high(even, odd), room - kL);
    }
  }
}

void average_pool(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t stride = t.in.stride, k = t.step->kernel;
  const float factor = 1.0f / static_cast<float>(k * k);
  for (int64_t p = range.begin; p < range.end; ++p) {
    const float* in = t.in.data + (p / t.out.width * k * t.in.width + p % t.out.width * k) * stride;
    float* out = t.out.data + p * t.out.stride;
    for (int64_t c = 0; c < t.out.channels; c += kL) {
      V sum{};
      for (int64_t y = 0; y < k; ++y) {
        for (int64_t x = 0; x < k; ++x) sum += load(in + (y * t.in.width + x) * stride + c);
      }
      put(out + c, sum * factor, t.out.room - c);
    }
  }
}

void max_pool(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t k = t.step->kernel, s = t.step->stride, width = t.in.width, height = t.in.height;
  for (int64_t p = range.begin; p < range.end; ++p) {
    const int64_t top = p / t.out.width * s - t.step->padding, left = p % t.out.width * s - t.step->padding;
    float* out = t.out.data + p * t.out.stride;
    for (int64_t c = 0; c < t.out.channels; c += kL) {
      V most = splat(-__builtin_inff());
      for (int64_t y = top < 0 ? 0 : top; y < top + k && y < height; ++y) {
        for (int64_t x = left < 0 ? 0 : left; x < left + k && x < width; ++x) {
          most = larger(most, load(t.in.data + (y * width + x) * t.in.stride + c));
        }
      }
      put(out + c, most, t.out.room - c);
    }
  }
}

void shuffle(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t groups = t.step->kernel, size = t.in.channels / groups;
  for (int64_t p = range.begin; p < range.end; ++p) {
    const float* in = t.in.data + p * t.in.stride;
    float* out = t.out.data + p * t.out.stride;
    for (int64_t j = 0; j < size; ++j) {
      for (int64_t i = 0; i < groups; ++i) out[j * groups + i] = in[i * size + j];
    }
  }
}

// Where output coordinate `at` lies among `in` inputs if first meets first and last meets last: the input before it and
// the weight of the one after.
struct Between {
  int64_t before, after;
  float weight;
};
FASTPOSE_INLINE Between between(int64_t at, int64_t in, int64_t out) {
  const float position =
      out > 1 ? static_cast<float>(at) * (static_cast<float>(in - 1) / static_cast<float>(out - 1)) : 0;
  int64_t before = static_cast<int64_t>(position);
  before = before < in ? before : in - 1;
  return {before, before + 1 < in ? before + 1 : before, position - static_cast<float>(before)};
}

void bilinear(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t stride = t.in.stride, width = t.in.width;
  for (int64_t p = range.begin; p < range.end; ++p) {
    const Between y = between(p / t.out.width, t.in.height, t.out.height),
                  x = between(p % t.out.width, width, t.out.width);
    const float *a = t.in.data + (y.before * width + x.before) * stride,
                *b = t.in.data + (y.before * width + x.after) * stride;
    const float *c = t.in.data + (y.after * width + x.before) * stride,
                *d = t.in.data + (y.after * width + x.after) * stride;
    for (int64_t i = 0; i < t.out.channels; i += kL) {
      const V top = load(a + i) * (1 - x.weight) + load(b + i) * x.weight;
      const V bottom = load(c + i) * (1 - x.weight) + load(d + i) * x.weight;
      const V result = apply(top * (1 - y.weight) + bottom * y.weight, t.step->act);
      put(t.out.data + p * t.out.stride + i, result, t.out.room - i);
    }
  }
}

void copy_map(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  Under in(t.in, range.begin, t.out.width, t.step->factor);
  for (int64_t p = range.begin; p < range.end; ++p, in.next()) {
    float* out = t.out.data + p * t.out.stride;
    for (int64_t c = 0; c < t.out.channels; c += kL) put(out + c, load(in.pixel + c), t.out.room - c);
  }
}

// Two maps of one pixel become one of two.
void stack(const PlanTask& t) {
  for (int64_t c = 0; c < t.out.channels; c += kL) {
    put(t.out.data + c, load(t.in.data + c), t.out.room - c);
    put(t.out.data + t.out.stride + c, load(t.other.data + c), t.out.room - c);
  }
}

// Lane i of the result is the sum, or the maximum, of all lanes of v[i]: halves of two vectors are put together, so
// that each addition serves both.
template <bool kMaximum>
FASTPOSE_INLINE V across(V (&v)[kL]) {
#pragma GCC unroll 4
  for (int half = kL / 2; half > 0; half /= 2) {
    IntVec<float> from{}, turned{};
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) {
      from[i] = i & half ? i + kL : i;
      turned[i] = i & half ? (i ^ half) + kL : i ^ half;
    }
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const V a = merge(v[i], v[i + half], from), b = merge(v[i], v[i + half], turned);
      v[i] = kMaximum ? larger(a, b) : a + b;
    }
  }
  return v[0];
}

// Mean, and maximum if the result has room for it, over a pixel's channels, times their gates if there are any; as many
// pixels at a time as a vector has lanes.
void channel_stats(const PlanTask& t, int64_t tile) {
  const Range range = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.in.channels, whole = channels / kL * kL;
  const float factor = 1.0f / static_cast<float>(channels);
  const V lowest = splat(-__builtin_inff());
  const IntVec<float> within = lane_numbers() < static_cast<int>(channels - whole);
  for (int64_t p = range.begin; p < range.end; p += kL) {
    const int64_t count = range.end - p < kL ? range.end - p : kL;
    V sum[kL], most[kL];
    for (int64_t i = 0; i < kL; ++i) {
      const float* in = t.in.data + (p + (i < count ? i : 0)) * t.in.stride;
      const auto value = [&](int64_t c) {
        const V x = load(in + c);
        return t.gate.data ? x * (load(t.gate.data + c) + t.step->constant) : x;
      };
      V s{}, m = lowest;
      for (int64_t c = 0; c < whole; c += kL) {
        const V x = value(c);
        s += x;
        m = larger(m, x);
      }
      if (whole < channels) {
        const V x = value(whole);
        s += within ? x : V{};
        m = larger(m, within ? x : lowest);
      }
      sum[i] = s;
      most[i] = m;
    }
    alignas(64) float means[kL], maxima[kL];
    store(means, across<false>(sum) * factor);
    if (t.out.channels > 1) store(maxima, across<true>(most));
    float* out = t.out.data + p * t.out.stride;
    if (count == kL && t.out.stride == 2) {
      store(out, interleave_low(load(means), load(maxima)));
      store(out + kL, interleave_high(load(means), load(maxima)));
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      out[i * t.out.stride] = means[i];
      if (t.out.channels > 1) out[i * t.out.stride + 1] = maxima[i];
    }
  }
}

}  // namespace

struct PlanLevel {
  static void run(const PlanTask& t, int64_t tile, float* scratch) {
    switch (t.step->op) {
      case PlanOp::kConv:
        return to_one(*t.step, t.in.channels, t.out.channels) ? conv_to_one(t, tile, scratch) : conv(t, tile, scratch);
      case PlanOp::kConvBf16: return conv_bf16(t, tile, scratch);
      case PlanOp::kConvInt8: return conv_int8(t, tile, scratch);
      case PlanOp::kDepthwise: return depthwise(t, tile, scratch);
      case PlanOp::kUpsample: return upsample(t, tile);
      case PlanOp::kMean: return reduce<true, false>(t, tile, 1.0f / static_cast<float>(t.in.pixels()));
      case PlanOp::kSum: return reduce<true, false>(t, tile, 1.0f);
      case PlanOp::kMax: return reduce<false, true>(t, tile, 1.0f);
      case PlanOp::kMeanMax: return reduce<true, true>(t, tile, 1.0f / static_cast<float>(t.in.pixels()));
      case PlanOp::kMeanOfRows: return mean_of_rows(t, tile);
      case PlanOp::kMeanOfColumns: return mean_of_columns(t, tile);
      case PlanOp::kCoordinateMean: return coordinate_mean(t, tile);
      case PlanOp::kGroupSoftmax: return group_softmax(t);
      case PlanOp::kGroupAttention: return group_attention(t, tile, scratch);
      case PlanOp::kDeconv: return deconv(t, tile, scratch);
      case PlanOp::kWinograd: return winograd(t, tile, scratch);
      case PlanOp::kMaxPool: return max_pool(t, tile);
      case PlanOp::kShuffle: return shuffle(t, tile);
      case PlanOp::kStack: return stack(t);
      case PlanOp::kCopy: return copy_map(t, tile);
      case PlanOp::kInterleave: return interleave(t, tile);
      case PlanOp::kAveragePool: return average_pool(t, tile);
      case PlanOp::kBilinear: return bilinear(t, tile);
      case PlanOp::kBand: return band(t, scratch);
      case PlanOp::kChannelStats: return channel_stats(t, tile);
      case PlanOp::kScale: return pointwise<PlanOp::kScale>(t, tile);
      case PlanOp::kScalePixels: return pointwise<PlanOp::kScalePixels>(t, tile);
      case PlanOp::kAdd: return pointwise<PlanOp::kAdd>(t, tile);
      case PlanOp::kMultiply: return pointwise<PlanOp::kMultiply>(t, tile);
      case PlanOp::kOuter: return pointwise<PlanOp::kOuter>(t, tile);
      default: return pointwise<PlanOp::kActivate>(t, tile);
    }
  }
};

}  // namespace FASTPOSE_ISA
}  // namespace fastpose
