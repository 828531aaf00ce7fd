// Vectors of the level being compiled, on the compilers' vector extension: one source for SSE2, AVX2, AVX-512 and NEON.
// Included by kernel files, once per level; no include guard, on purpose.

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

#define FASTPOSE_INLINE inline __attribute__((always_inline))

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(FASTPOSE_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(FASTPOSE_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(FASTPOSE_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(FASTPOSE_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(FASTPOSE_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(FASTPOSE_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
using IntVec = typename VecOf<A>::integer;

// Lanes per vector.
template <class A>
constexpr int kLanes = FASTPOSE_VECTOR_BYTES / static_cast<int>(sizeof(A));

template <class A>
FASTPOSE_INLINE Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VecOf<A>::unaligned*>(p);
}
template <class A>
FASTPOSE_INLINE void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename VecOf<A>::unaligned*>(p) = v;
}
// The first n < lanes numbers.
FASTPOSE_INLINE void store_first(float* p, Vec<float> v, int64_t n) {
#if defined(__x86_64__) && FASTPOSE_VECTOR_BYTES == 64
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}
template <class A>
FASTPOSE_INLINE Vec<A> splat(A a) {
  return a - Vec<A>{};
}

// v, which every use takes from a register: compilers would rather read memory again as an operand of each instruction.
FASTPOSE_INLINE Vec<float> in_register(Vec<float> v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// p, of which the compiler no longer knows how far it is from others: it would rather keep each distance in a register
// than each pointer, and run out of them.
FASTPOSE_INLINE const float* unrelated(const float* p) {
  __asm__("" : "+r"(p));
  return p;
}

// Store that bypasses the caches, for results too large to be found there later. p must be vector-aligned.
FASTPOSE_INLINE void stream(float* p, Vec<float> v) {
#if defined(__x86_64__) && FASTPOSE_VECTOR_BYTES == 64
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__x86_64__) && FASTPOSE_VECTOR_BYTES == 32
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#elif defined(__x86_64__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(v));
#else
  store(p, v);
#endif
}
FASTPOSE_INLINE void stream(double* p, Vec<double> v) { store(p, v); }
FASTPOSE_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Two vectors merged, numbers of both in turn: the first half of the result, and the second.
#if defined(__clang__)
#define FASTPOSE_PICK(A, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has __builtin_shufflevector from version 12 on
#define FASTPOSE_PICK(A, a, b, ...) __builtin_shuffle(a, b, IntVec<A>{__VA_ARGS__})
#endif
#define FASTPOSE_INTERLEAVE(A, N, LOW, HIGH)                                                           \
  typedef A A##x##N __attribute__((vector_size(N * sizeof(A))));                                       \
  FASTPOSE_INLINE A##x##N interleave_low(A##x##N a, A##x##N b) { return FASTPOSE_PICK(A, a, b, LOW); } \
  FASTPOSE_INLINE A##x##N interleave_high(A##x##N a, A##x##N b) { return FASTPOSE_PICK(A, a, b, HIGH); }
#define FASTPOSE_LIST(...) __VA_ARGS__
#if FASTPOSE_VECTOR_BYTES == 64
FASTPOSE_INTERLEAVE(float, 16, FASTPOSE_LIST(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                    FASTPOSE_LIST(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))
FASTPOSE_INTERLEAVE(double, 8, FASTPOSE_LIST(0, 8, 1, 9, 2, 10, 3, 11), FASTPOSE_LIST(4, 12, 5, 13, 6, 14, 7, 15))
#elif FASTPOSE_VECTOR_BYTES == 32
FASTPOSE_INTERLEAVE(float, 8, FASTPOSE_LIST(0, 8, 1, 9, 2, 10, 3, 11), FASTPOSE_LIST(4, 12, 5, 13, 6, 14, 7, 15))
FASTPOSE_INTERLEAVE(double, 4, FASTPOSE_LIST(0, 4, 1, 5), FASTPOSE_LIST(2, 6, 3, 7))
#else
FASTPOSE_INTERLEAVE(float, 4, FASTPOSE_LIST(0, 4, 1, 5), FASTPOSE_LIST(2, 6, 3, 7))
FASTPOSE_INTERLEAVE(double, 2, FASTPOSE_LIST(0, 2), FASTPOSE_LIST(1, 3))
#endif
#undef FASTPOSE_INTERLEAVE
#undef FASTPOSE_PICK
#undef FASTPOSE_LIST

// Lane i of the result is lane from[i] of v.
FASTPOSE_INLINE Vec<float> shuffle(Vec<float> v, IntVec<float> from) {
#if defined(__clang__)
  Vec<float> out{};
#pragma unroll
  for (int i = 0; i < kLanes<float>; ++i) out[i] = v[from[i]];
  return out;
#else
  return __builtin_shuffle(v, from);
#endif
}

// The same of two vectors: lane i is from[i] of both, those of b after those of a.
FASTPOSE_INLINE Vec<float> merge(Vec<float> a, Vec<float> b, IntVec<float> from) {
#if defined(__clang__)
  Vec<float> out{};
#pragma unroll
  for (int i = 0; i < kLanes<float>; ++i) out[i] = from[i] < kLanes<float> ? a[from[i]] : b[from[i] - kLanes<float>];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// exp(x) with a relative error of a few units in the last place. Below the smallest normal result it returns 0, above
// the largest infinity; NaN stays NaN.
FASTPOSE_INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> low = splat(-87.0f), high = splat(88.7f);
  Vec<float> t = x < low ? low : x;  // false for NaN, which passes through
  t = t > high ? high : t;
  // x = n ln2 + r, |r| <= ln2 / 2; adding and subtracting 1.5 * 2^23 rounds to the nearest integer
  const Vec<float> magic = splat(12582912.0f);
  const Vec<float> n = (t * 1.44269504088896341f + magic) - magic;
  const Vec<float> r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two halves: n = 128 has no float of its own
  const IntVec<float> k = __builtin_convertvector(n == n ? n : Vec<float>{}, IntVec<float>);
  const IntVec<float> k1 = k >> 1, k2 = k - k1;
  const Vec<float> result =
      p * reinterpret_cast<Vec<float>>((k1 + 127) << 23) * reinterpret_cast<Vec<float>>((k2 + 127) << 23);
  return x < low ? Vec<float>{} : x > high ? splat(__builtin_inff()) : result;
}
FASTPOSE_INLINE Vec<double> exp(Vec<double> x) {
  const Vec<double> low = splat(-708.0), high = splat(709.7);
  Vec<double> t = x < low ? low : x;
  t = t > high ? high : t;
  const Vec<double> magic = splat(6755399441055744.0);
  const Vec<double> n = (t * 1.4426950408889634074 + magic) - magic;
  const Vec<double> r = (t - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  // Taylor series to degree 13: the remainder is below 1e-17 for |r| <= ln2 / 2
  Vec<double> p = splat(1.0 / 6227020800.0);
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const IntVec<double> k = __builtin_convertvector(n == n ? n : Vec<double>{}, IntVec<double>);
  const IntVec<double> k1 = k >> 1, k2 = k - k1;
  const Vec<double> result =
      p * reinterpret_cast<Vec<double>>((k1 + 1023) << 52) * reinterpret_cast<Vec<double>>((k2 + 1023) << 52);
  return x < low ? Vec<double>{} : x > high ? splat(__builtin_inf()) : result;
}

// 2^x for x <= 0, at half the cost of exp: exact at 0, otherwise a relative error of about 1e-7 (1e-16 for double).
// Results below the smallest normal number are rounded to about that number; NaN counts as -infinity.
FASTPOSE_INLINE Vec<float> exp2_nonpositive(Vec<float> x) {
  const Vec<float> low = splat(-126.0f), magic = splat(12582912.0f);  // 1.5 * 2^23
  const Vec<float> t = x > low ? x : low;
  const Vec<float> shifted = t + magic;  // its low bits are the integer nearest to t
  const Vec<float> f = t - (shifted - magic);
  Vec<float> p = splat(1.5403530e-4f);  // ln(2)^i / i!
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  // multiplying by 2^n is adding n to the exponent; the shift drops the other bits of `shifted`
  return reinterpret_cast<Vec<float>>(reinterpret_cast<IntVec<float>>(p) +
                                      (reinterpret_cast<IntVec<float>>(shifted) << 23));
}
FASTPOSE_INLINE Vec<double> exp2_nonpositive(Vec<double> x) {
  return exp((x > splat(-1020.0) ? x : splat(-1020.0)) * 0.69314718055994530942);
}

// Activations. Comparisons are written so that NaN stays NaN. The activation is a template argument wherever it sits in
// an inner loop: a run-time switch there costs registers for constants that are not used.
template <Activation kAct, class A>
FASTPOSE_INLINE Vec<A> activate(Vec<A> x) {
  switch (kAct) {
    case Activation::kRelu: return x < Vec<A>{} ? Vec<A>{} : x;
    case Activation::kHardswish: {
      const Vec<A> six = splat(A(6));
      Vec<A> gate = x + A(3);
      gate = gate < Vec<A>{} ? Vec<A>{} : gate;
      gate = gate > six ? six : gate;
      return x * gate * (A(1) / A(6));
    }
    case Activation::kSilu: return x / (A(1) + exp(-x));
    default: return x;
  }
}

// Derivative of the activation at x. At the kinks it takes PyTorch's values.
template <class A>
FASTPOSE_INLINE Vec<A> activation_slope(Vec<A> x, Activation act) {
  const Vec<A> zero{}, one = splat(A(1));
  switch (act) {
    case Activation::kRelu: return x > zero ? one : zero;
    case Activation::kHardswish: {
      const Vec<A> slope = x * (A(1) / A(3)) + A(0.5);
      return x <= splat(A(-3)) ? zero : x >= splat(A(3)) ? one : slope;
    }
    case Activation::kSilu: {
      const Vec<A> s = one / (one + exp(-x));
      return s * (one + x * (one - s));
    }
    default: return one;
  }
}

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
