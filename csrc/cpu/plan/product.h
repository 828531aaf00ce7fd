// The matrix product under every dense convolution: rows are pixels, columns are output channels, and what follows
// (bias, another map, activation) happens before a sum is written.
//
// Blocking: kRows x 2 vectors of sums stay in registers. One step along the depth reads two vectors of weights and
// kRows single numbers for 2 kRows multiply-adds: 14 loads for 24 with AVX-512, 8 for 12 with AVX2. A block of kRows
// pixels (15 KB at a depth of 320) stays in the first-level cache while the panels of 32 channels pass by, read from
// front to back (205 KB for 320 x 160, in the second-level cache). Bound: arithmetic. Reached: 97 to 100 % from 160
// channels on; 81 % at 40, two and a half vectors, where writing weighs.

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

FASTPOSE_INLINE uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof(bits));
  return bits;
}

// What the bits of a float hold: itself, two bfloat16, or four bytes, the first one lowest; bytes of the map are
// unsigned, of weights signed, their sums integers in the bits of floats. kHalfPairs: pairs in the weights only, the
// numbers of the map, rounded, are floats.
enum class Factors { kFloat, kPairs, kHalfPairs, kBytes };

template <class X>
struct IntegersOf {
  typedef int32_t type __attribute__((vector_size(sizeof(X))));
};
template <Factors kFactors, class X>
using SumOf = std::conditional_t<kFactors == Factors::kBytes, typename IntegersOf<X>::type, X>;

// sum + *a * weight; of pairs and bytes, all their products.
template <Factors kFactors, class X>
FASTPOSE_INLINE SumOf<kFactors, X> multiply_add(SumOf<kFactors, X> sum, const float* a, X weight) {
  using Bits = typename IntegersOf<X>::type;
  if constexpr (kFactors == Factors::kFloat) {
    return sum + *a * weight;
  } else if constexpr (kFactors == Factors::kHalfPairs) {
    const Bits pairs = reinterpret_cast<Bits>(weight);
    sum += a[0] * reinterpret_cast<X>(pairs << 16);
    return sum + a[1] * reinterpret_cast<X>(pairs & ~0xffff);
#if FASTPOSE_BF16
  } else if constexpr (kFactors == Factors::kPairs && sizeof(X) == 64) {
    const __m512bh pair = (__m512bh)_mm512_set1_ps(*a), filter = (__m512bh) reinterpret_cast<__m512>(weight);
    return reinterpret_cast<X>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), pair, filter));
  } else if constexpr (kFactors == Factors::kPairs) {
    const __m256bh pair = (__m256bh)_mm256_set1_ps(*a), filter = (__m256bh) reinterpret_cast<__m256>(weight);
    return reinterpret_cast<X>(_mm256_dpbf16_ps(reinterpret_cast<__m256>(sum), pair, filter));
#endif
#if FASTPOSE_VNNI
  } else if constexpr (sizeof(X) == 64) {
    const __m512i bytes = _mm512_castps_si512(_mm512_set1_ps(*a)), filter = reinterpret_cast<__m512i>(weight);
    return reinterpret_cast<Bits>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), bytes, filter));
  } else {
    const __m256i bytes = _mm256_castps_si256(_mm256_set1_ps(*a)), filter = reinterpret_cast<__m256i>(weight);
    return reinterpret_cast<Bits>(_mm256_dpbusd_epi32(reinterpret_cast<__m256i>(sum), bytes, filter));
  }
#else
  } else {
    const Bits filter = reinterpret_cast<Bits>(weight);
    const uint32_t bytes = bits_of(*a);
    for (int i = 0; i < 4; ++i) {
      sum += (filter << (24 - 8 * i) >> 24) * static_cast<int32_t>(bytes >> 8 * i & 255);
    }
    return sum;
  }
#endif
}

// Maps of more floats than this come from and go to beyond the second-level cache.
constexpr int64_t kFar = 128 << 10;
// Weights are asked for so many steps before they are used: beyond the second-level cache, where those of a network
// usually come from, the processor's own guesses come too late (of an Intel Xeon, 3x3 of 256 channels takes a quarter
// less time).
constexpr int64_t kAhead = 32;

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
  constexpr int kThrees = (kR + 2) / 3;  // an address reaches three rows: itself, a stride and two on
  constexpr bool kBytes = kFactors == Factors::kBytes, kHalfPairs = kFactors == Factors::kHalfPairs;
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
    const float* a[kThrees];
#pragma GCC unroll 4
    for (int i = 0; i < kThrees; ++i) a[i] = t.a + piece * t.piece_step + 3 * i * t.a_stride;
    for (int64_t k = 0; k < t.depth; ++k, weight += t.weight_stride) {
      V w[kFull > 0 ? kFull : 1];
      Half h{};
#pragma GCC unroll 2
      for (int v = 0; v < kFull + kHalf; ++v) __builtin_prefetch(weight + kAhead * t.weight_stride + v * kL, 0, 2);
#pragma GCC unroll 2
      for (int v = 0; v < kFull; ++v) w[v] = load(weight + v * kL);
      if (kHalf) h = load_half(weight + kFull * kL);
#pragma GCC unroll 16
      for (int r = 0; r < kR; ++r) {
        const float* s = a[r / 3] + r % 3 * t.a_stride;
#pragma GCC unroll 2
        for (int v = 0; v < kFull; ++v) sum[r][v] = multiply_add<kFactors, V>(sum[r][v], s, w[v]);
        if (kHalf) half[r] = multiply_add<kFactors, Half>(half[r], s, h);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kThrees; ++i) a[i] = unrelated(a[i] + (kHalfPairs ? 2 : 1));
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

// kR rows, the panels of channels [first, last).
template <int kR, Factors kFactors>
void conv_row_block(const Rows& rows, int64_t r, const PlanTask& task, int64_t row, int64_t first, int64_t last) {
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
  for (int64_t n = first; n < last; n += kPanel) {
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

// `count` rows of the matrix product, for output pixels from `first` on. Weights that fit the second-level cache pass
// by for every block of rows; of larger ones each panel is used for all rows before the next arrives.
template <Factors kFactors = Factors::kFloat>
void conv_rows(const Rows& rows, int64_t count, const PlanTask& t, int64_t first) {
  const int64_t packed = pad(t.out.channels);
  const int64_t step = far_weights(rows.pieces * rows.depth, t.out.channels) ? kPanel : packed;
  for (int64_t n = 0; n < packed; n += step) {
    const int64_t end = n + step < packed ? n + step : packed;
    int64_t r = 0;
    for (; r + kRows <= count; r += kRows) conv_row_block<kRows, kFactors>(rows, r, t, first + r, n, end);
    if constexpr (kFactors == Factors::kFloat) {  // of the others the last few rows do not earn code of their own
      for (; r + 6 <= count; r += 6) conv_row_block<6, kFactors>(rows, r, t, first + r, n, end);
      for (; r + 4 <= count; r += 4) conv_row_block<4, kFactors>(rows, r, t, first + r, n, end);
    }
    for (; r < count; ++r) conv_row_block<1, kFactors>(rows, r, t, first + r, n, end);
  }
}

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
