// Matrix products of bfloat16 and of bytes: the pixels of a block are rounded once, for all panels of weights, and the
// product of cpu/plan/product.h takes pairs or fours of them for one float.
//
// Bound: arithmetic at two and four times the products per instruction. Below the level avx512_bf16 the pairs of the
// weights are taken apart, once per block, for products of floats; below avx512_vnni the fours are, which is slow.

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

#if !FASTPOSE_VNNI || (FASTPOSE_BF16 && !FASTPOSE_AMX)
#if FASTPOSE_BF16
typedef uint16_t Bf16 __attribute__((may_alias));

// `from` [channels] rounded to bfloat16, to the nearest and of two as near to the even one.
FASTPOSE_INLINE void round_to_bf16(const float* from, int64_t channels, float* to) {
  for (int64_t c = 0; c < channels; c += 2 * kL) {
    const V low = load(from + c), high = c + kL < channels ? load(from + c + kL) : V{};
    const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
    store(to + c / 2, reinterpret_cast<V>((__m512)both));
  }
  if (channels % 2 != 0) reinterpret_cast<Bf16*>(to)[channels] = 0;
}
#else
typedef uint32_t U32 __attribute__((vector_size(FASTPOSE_VECTOR_BYTES)));

// The same, each number a float.
FASTPOSE_INLINE void round_to_bf16(const float* from, int64_t channels, float* to) {
  for (int64_t c = 0; c < channels; c += kL) {
    const V x = load(from + c);
    const U32 bits = reinterpret_cast<U32>(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
    const U32 quiet_nan = bits | 0x400000, result = x == x ? rounded : quiet_nan;
    store(to + c, reinterpret_cast<V>(result & 0xffff0000u));
  }
  if (channels % 2 != 0) to[channels] = 0;
}
#endif

// kConvBf16: the pixels of a block, times the gate if there is one, are rounded once for all panels of weights.
void conv_bf16(const PlanTask& t, int64_t tile, float* scratch) {
  constexpr bool kPaired = FASTPOSE_BF16;
  const auto [begin, end] = range_of(t, tile, t.out.pixels());
  const int64_t channels = t.in.channels, row = rounded_row(channels, kPaired ? 2 : 1);
  float* const gated = scratch + kRows * row;
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows;
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = t.in.data + (first + r) * t.in.stride;
      if (t.gate.data != nullptr) {
        for (int64_t c = 0; c < channels; c += kL) {
          store(gated + c, load(from + c) * (load(t.gate.data + c) + t.step->constant));
        }
        from = gated;
      }
      round_to_bf16(from, channels, scratch + r * row);
    }
    conv_rows<kPaired ? Factors::kPairs : Factors::kHalfPairs>({scratch, row, (channels + 1) / 2}, rows, t, first);
  }
}
#endif

#if !FASTPOSE_BF16
typedef uint8_t Bytes __attribute__((may_alias));

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
#endif

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
