// Moving rows between tensors of any dtype and layout and scratch blocks [pixel][lane]. Included once per level.

namespace fastpose {
namespace FASTPOSE_ISA {
namespace {

// ---- one vector from or to storage of type T

template <class A>
FASTPOSE_INLINE Vec<A> load_as(const A* p) {
  return load(p);
}
template <class A>
FASTPOSE_INLINE void store_as(A* p, Vec<A> v) {
  store(p, v);
}

typedef uint16_t U16 __attribute__((vector_size(FASTPOSE_VECTOR_BYTES / 2)));
typedef uint16_t U16Unaligned __attribute__((vector_size(FASTPOSE_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t U32 __attribute__((vector_size(FASTPOSE_VECTOR_BYTES)));

template <class A>
FASTPOSE_INLINE Vec<float> load_as(const BFloat16* p) {
  const U16 bits = *reinterpret_cast<const U16Unaligned*>(p);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, U32) << 16);
}
FASTPOSE_INLINE void store_as(BFloat16* p, Vec<float> v) {
  const U32 bits = reinterpret_cast<U32>(v);
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const U32 quiet_nan = (bits >> 16) | 0x40;
  const U32 result = v == v ? rounded : quiet_nan;
  *reinterpret_cast<U16Unaligned*>(p) = __builtin_convertvector(result, U16);
}

template <class A>
FASTPOSE_INLINE Vec<float> load_as(const Half* p) {
#if defined(__x86_64__) && FASTPOSE_VECTOR_BYTES == 64
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__x86_64__) && FASTPOSE_VECTOR_BYTES == 32
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}
FASTPOSE_INLINE void store_as(Half* p, Vec<float> v) {
#if defined(__x86_64__) && FASTPOSE_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__x86_64__) && FASTPOSE_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = Half(v[i]);
#endif
}

// ---- transposing a square of vectors: log2(lanes) perfect shuffles of its rows

template <class A>
FASTPOSE_INLINE void transpose(Vec<A>* rows) {
  constexpr int L = kLanes<A>;
  Vec<A> other[L];
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      other[2 * i] = interleave_low(rows[i], rows[i + L / 2]);
      other[2 * i + 1] = interleave_high(rows[i], rows[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = other[i];
  }
}

// ---- rows

// dst[w][lane] = p[lane * sc + w * sw] for lane < channels, 0 for the other lanes.
template <class T, class A>
void gather_row(const T* p, int64_t sc, int64_t sw, int64_t channels, int64_t width, A* dst) {
  constexpr int L = kLanes<A>;
  int64_t w = 0;
  if (sc == 1 && channels == L) {
    for (; w < width; ++w) store(dst + w * L, load_as<A>(p + w * sw));
    return;
  }
  if (sw == 1 && channels == L) {
    for (; w + L <= width; w += L) {
      Vec<A> rows[L];
      for (int i = 0; i < L; ++i) rows[i] = load_as<A>(p + i * sc + w);
      transpose<A>(rows);
      for (int i = 0; i < L; ++i) store(dst + (w + i) * L, rows[i]);
    }
  }
  for (; w < width; ++w) {
    A* to = dst + w * L;
    for (int64_t i = 0; i < channels; ++i) to[i] = static_cast<A>(p[i * sc + w * sw]);
    for (int64_t i = channels; i < L; ++i) to[i] = A(0);
  }
}

// p[lane * sc + w * sw] = src[w][lane] for lane < channels.
template <class T, class A>
void scatter_row(const A* src, T* p, int64_t sc, int64_t sw, int64_t channels, int64_t width) {
  constexpr int L = kLanes<A>;
  int64_t w = 0;
  if (sc == 1 && channels == L) {
    for (; w < width; ++w) store_as(p + w * sw, load(src + w * L));
    return;
  }
  if (sw == 1 && channels == L) {
    for (; w + L <= width; w += L) {
      Vec<A> rows[L];
      for (int i = 0; i < L; ++i) rows[i] = load(src + (w + i) * L);
      transpose<A>(rows);
      for (int i = 0; i < L; ++i) store_as(p + i * sc + w, rows[i]);
    }
  }
  for (; w < width; ++w) {
    for (int64_t i = 0; i < channels; ++i) p[i * sc + w * sw] = static_cast<T>(src[w * L + i]);
  }
}

template <class A>
FASTPOSE_INLINE void zero(A* p, int64_t pixels) {
  std::memset(p, 0, static_cast<size_t>(pixels) * FASTPOSE_VECTOR_BYTES);
}

// Rows [first, last) of one image and channel block into dst [rows][left + width + right][lane], zero outside the
// image.
template <class T, class A>
void gather_block(const View& x, int64_t n, int64_t c, int64_t channels, int64_t height, int64_t width, int64_t first,
                  int64_t last, int64_t left, int64_t right, A* dst) {
  constexpr int L = kLanes<A>;
  const int64_t columns = left + width + right;
  for (int64_t h = first; h < last; ++h, dst += columns * L) {
    if (h < 0 || h >= height) {
      zero(dst, columns);
      continue;
    }
    zero(dst, left);
    gather_row<T, A>(x.at<const T>(n, c, h), x.c, x.w, channels, width, dst + left * L);
    zero(dst + (left + width) * L, right);
  }
}

// A row of one channel block as the compute loops read it: pixel w at data + w * pixel, zero outside [0, width).
template <class A>
struct Row {
  const A* data;
  int64_t pixel;
};

alignas(64) constexpr char kZeros[FASTPOSE_VECTOR_BYTES] = {};
template <class A>
FASTPOSE_INLINE const A* zeros() {
  return reinterpret_cast<const A*>(kZeros);
}

// Pixel w of a row; with kEdge also outside the image.
template <bool kEdge, class A>
FASTPOSE_INLINE Vec<A> pixel_at(const Row<A>& row, int64_t w, int64_t width) {
  const A* p = row.data + w * row.pixel;
  if (kEdge && (w < 0 || w >= width)) p = zeros<A>();
  return load(p);
}

// Gives the rows of one image and channel block as vectors: from the tensor itself where it already has compute type
// and whole vectors, else from a gathered copy of rows [first, last).
template <class T, class A>
struct RowReader {
  const View& x;
  int64_t n, c, first, last, height, width;
  bool direct;
  const A* copy;

  RowReader(const View& x_, int64_t n_, int64_t c_, int64_t channels, int64_t height_, int64_t width_, int64_t first_,
            int64_t last_, int slot)
      : x(x_),
        n(n_),
        c(c_),
        first(std::max<int64_t>(first_, 0)),
        last(std::min(last_, height_)),
        height(height_),
        width(width_),
        direct(std::is_same<T, A>::value && x_.c == 1 && channels == kLanes<A>),
        copy(nullptr) {
    if (direct) return;
    A* to = scratch<A>(slot, std::max<int64_t>(last - first, 1) * width * kLanes<A>);
    gather_block<T, A>(x, n, c, channels, height, width, first, last, 0, 0, to);
    copy = to;
  }

  FASTPOSE_INLINE Row<A> operator()(int64_t h) const {
    if (h < 0 || h >= height) return {zeros<A>(), 0};
    if (direct) return {reinterpret_cast<const A*>(x.at<const T>(n, c, h)), x.w};
    return {copy + (h - first) * width * kLanes<A>, kLanes<A>};
  }
};

// Filters of `channels` output channels, `step` apart: dst [k * k][lane]; `flip` turns them by 180 degrees.
template <class T, class A>
void gather_filters(const View& weight, int64_t first, int64_t step, int64_t channels, int64_t k, bool flip, A* dst) {
  constexpr int L = kLanes<A>;
  for (int64_t tap = 0; tap < k * k; ++tap) {
    const int64_t from = flip ? k * k - 1 - tap : tap;
    const T* p = weight.at<const T>(first, 0, from / k, from % k);
    for (int64_t i = 0; i < L; ++i) dst[tap * L + i] = i < channels ? static_cast<A>(p[i * step * weight.n]) : A(0);
  }
}

template <class T, class A>
Vec<A> gather_bias(const T* bias, int64_t first, int64_t step, int64_t channels) {
  Vec<A> v{};
  if (bias != nullptr) {
    for (int64_t i = 0; i < channels; ++i) v[i] = static_cast<A>(bias[first + i * step]);
  }
  return v;
}

// Gradient of the filters of a depthwise correlation:
//   out[kh][kw] = sum over (h, w) of a[h][w] * b[h * s + kh][w * s + kw].
template <class A>
void filter_gradient(const A* a, int64_t a_row, const A* b, int64_t b_row, int64_t height, int64_t width, int64_t k,
                     int64_t s, A* out) {
  constexpr int L = kLanes<A>;
  constexpr int kTaps = 4;  // filter columns at a time, one accumulator each
  for (int64_t kh = 0; kh < k; ++kh) {
    for (int64_t kw = 0; kw < k; kw += kTaps) {
      Vec<A> sum[kTaps] = {};
      const int taps = static_cast<int>(std::min<int64_t>(kTaps, k - kw));
      for (int64_t h = 0; h < height; ++h) {
        const A* pa = a + h * a_row;
        const A* pb = b + (h * s + kh) * b_row + kw * L;
        if (taps == kTaps) {
          for (int64_t w = 0; w < width; ++w) {
            const Vec<A> v = load(pa + w * L);
#pragma GCC unroll 4
            for (int t = 0; t < kTaps; ++t) sum[t] += v * load(pb + (w * s + t) * L);
          }
        } else {
          for (int64_t w = 0; w < width; ++w) {
            const Vec<A> v = load(pa + w * L);
            for (int t = 0; t < taps; ++t) sum[t] += v * load(pb + (w * s + t) * L);
          }
        }
      }
      for (int t = 0; t < taps; ++t) store(out + (kh * k + kw + t) * L, sum[t]);
    }
  }
}

// Adds per-image partial sums partial[image][tap][lane] in a fixed order and writes lane i of tap t to
// out[(first + i * step) * taps + t].
template <class T, class A>
void reduce_partials(const A* partial, int64_t images, int64_t image_stride, int64_t taps, int64_t channels, T* out,
                     int64_t first, int64_t step) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t t = 0; t < taps; ++t) {
      double sum = 0;
      for (int64_t n = 0; n < images; ++n) sum += static_cast<double>(partial[n * image_stride + t * L + i]);
      out[(first + i * step) * taps + t] = static_cast<T>(static_cast<A>(sum));
    }
  }
}

}  // namespace
}  // namespace FASTPOSE_ISA
}  // namespace fastpose
