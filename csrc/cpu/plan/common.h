// What the kernels of all instructions share: activations, the part of a map that is a tile's, stores at the end of a
// pixel. Included once per instruction set level, as everything in this folder.
//
// Percentages of a bound, here and in the other files, are of benchmarks/README.md ("How near the bound"): one core of
// an AMD EPYC (Zen 4), whose fastest matrix product runs at 115 GFLOP/s.

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
FASTPOSE_INLINE V widen(Half h) { return reinterpret_cast<V>(_mm512_zextps256_ps512(reinterpret_cast<__m256>(h))); }
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
  const int64_t begin = tile * t.units / t.tiles * t.unit, end = (tile + 1) * t.units / t.tiles * t.unit;
  return {begin, end < all ? end : all};
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

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
