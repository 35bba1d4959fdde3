// One vector of the instruction set this file is compiled for, and the few operations the kernels need.
//
// Included by the op sources only. No STL: a template of the library instantiated here would be a weak
// symbol that the linker may pick for every level, wide instructions included.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(SSM_FAST_ISA_avx2) || defined(SSM_FAST_ISA_avx512)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace ssm_fast::SSM_FAST_ISA {

#if defined(SSM_FAST_ISA_avx512)
constexpr int kVectorBytes = 64;
constexpr int kTileVectors = 4;  // 6 x 4 accumulators, 4 weights and a broadcast in 32 registers
#elif defined(SSM_FAST_ISA_avx2)
constexpr int kVectorBytes = 32;
constexpr int kTileVectors = 2;  // 6 x 2 accumulators, 2 weights and a broadcast in 16 registers
#else
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::Type;
template <class T>
constexpr int kWidth = kVectorBytes / int(sizeof(T));

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, Vector<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

// a * b + c, rounded once where the processor can: the same in every block shape of a level.
template <class T>
inline T fused(T a, T b, T c) {
#if defined(__FMA__) || defined(__aarch64__)
  if constexpr (sizeof(T) == 4) {
    return __builtin_fmaf(a, b, c);
  } else {
    return __builtin_fma(a, b, c);
  }
#else
  return a * b + c;
#endif
}

#if defined(SSM_FAST_ISA_avx512)
inline Vector<float> fused_vector(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vector<double> fused_vector(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
inline Vector<float> load_part(const float* p, int count) {
  return (Vector<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
inline Vector<double> load_part(const double* p, int count) {
  return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
}
inline void store_part(float* p, Vector<float> v, int count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
}
inline void store_part(double* p, Vector<double> v, int count) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
}
inline Vector<float> roots(Vector<float> v) { return (Vector<float>)_mm512_sqrt_ps((__m512)v); }
inline Vector<double> roots(Vector<double> v) { return (Vector<double>)_mm512_sqrt_pd((__m512d)v); }
#else
#if defined(SSM_FAST_ISA_avx2)
inline Vector<float> fused_vector(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Vector<double> fused_vector(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
inline Vector<float> roots(Vector<float> v) { return (Vector<float>)_mm256_sqrt_ps((__m256)v); }
inline Vector<double> roots(Vector<double> v) { return (Vector<double>)_mm256_sqrt_pd((__m256d)v); }
#elif defined(__aarch64__)
inline Vector<float> fused_vector(Vector<float> a, Vector<float> b, Vector<float> c) {
  return (Vector<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Vector<double> fused_vector(Vector<double> a, Vector<double> b, Vector<double> c) {
  return (Vector<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
inline Vector<float> roots(Vector<float> v) { return (Vector<float>)vsqrtq_f32((float32x4_t)v); }
inline Vector<double> roots(Vector<double> v) { return (Vector<double>)vsqrtq_f64((float64x2_t)v); }
#else
template <class V>
inline V fused_vector(V a, V b, V c) {
  return a * b + c;
}
template <class V>
inline V roots(V v) {
  for (std::size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) {
    v[i] = sizeof(v[0]) == 4 ? __builtin_sqrtf(v[i]) : __builtin_sqrt(v[i]);
  }
  return v;
}
#endif
template <class T>
inline Vector<T> load_part(const T* p, int count) {
  if (count == kWidth<T>) return load(p);
  Vector<T> v{};
  std::memcpy(&v, p, std::size_t(count) * sizeof(T));
  return v;
}
template <class T>
inline void store_part(T* p, Vector<T> v, int count) {
  if (count == kWidth<T>) return store(p, v);
  std::memcpy(p, &v, std::size_t(count) * sizeof(T));
}
#endif

template <class V>
struct Pair {
  V low, high;
};

// The elements of a and b in turn: a0 b0 a1 b1 ...
template <class T>
inline Pair<Vector<T>> interleave(Vector<T> a, Vector<T> b) {
  if constexpr (kWidth<T> == 2) {
    return {__builtin_shufflevector(a, b, 0, 2), __builtin_shufflevector(a, b, 1, 3)};
  } else if constexpr (kWidth<T> == 4) {
    return {__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7)};
  } else if constexpr (kWidth<T> == 8) {
    return {__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11),
            __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)};
  } else {
    return {__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
            __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
  }
}

// Transpose of a square tile held in kWidth vectors: log2(kWidth) rounds of a perfect shuffle.
template <class T>
inline void transpose(Vector<T> (&x)[kWidth<T>]) {
  constexpr int W = kWidth<T>;
  Vector<T> y[W];
#pragma GCC unroll 8
  for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      const auto pair = interleave<T>(x[i], x[i + W / 2]);
      y[2 * i] = pair.low;
      y[2 * i + 1] = pair.high;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = y[i];
  }
}

// Elements of pairs (re, im): (im, re), (re, re), (im, im), and (-re, im).
template <class T>
inline Vector<T> swap_pairs(Vector<T> v) {
  if constexpr (kWidth<T> == 2) {
    return __builtin_shufflevector(v, v, 1, 0);
  } else if constexpr (kWidth<T> == 4) {
    return __builtin_shufflevector(v, v, 1, 0, 3, 2);
  } else if constexpr (kWidth<T> == 8) {
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  } else {
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  }
}
template <class T>
inline Vector<T> even_pairs(Vector<T> v) {
  if constexpr (kWidth<T> == 2) {
    return __builtin_shufflevector(v, v, 0, 0);
  } else if constexpr (kWidth<T> == 4) {
    return __builtin_shufflevector(v, v, 0, 0, 2, 2);
  } else if constexpr (kWidth<T> == 8) {
    return __builtin_shufflevector(v, v, 0, 0, 2, 2, 4, 4, 6, 6);
  } else {
    return __builtin_shufflevector(v, v, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
  }
}
template <class T>
inline Vector<T> odd_pairs(Vector<T> v) {
  return even_pairs<T>(swap_pairs<T>(v));
}
template <class T>
inline Vector<T> negate_even(Vector<T> v) {
  Vector<T> sign;
  for (int i = 0; i < kWidth<T>; ++i) sign[i] = i % 2 == 0 ? T(-1) : T(1);
  return v * sign;
}

// The larger of the magnitudes, NaN where y is NaN.
template <class T>
inline Vector<T> larger_magnitude(Vector<T> x, Vector<T> y) {
  const Vector<T> magnitude = y < Vector<T>{} ? -y : y;
  return x > magnitude ? x : magnitude;
}

// Whole elements set or clear, one for each element of a Vector<T>.
template <class T>
struct MaskOf;
template <>
struct MaskOf<float> {
  typedef std::int32_t Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct MaskOf<double> {
  typedef std::int64_t Type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Mask = typename MaskOf<T>::Type;

// A byte for each element of a Vector<T>.
template <class T>
struct BytesOf {
  typedef std::uint8_t Type __attribute__((vector_size(kWidth<T>)));
};
template <class T>
using Bytes = typename BytesOf<T>::Type;

#if defined(SSM_FAST_ISA_avx2) || defined(SSM_FAST_ISA_avx512)
template <class T>
inline __m128i in_register(Bytes<T> bytes) {
  __m128i x = _mm_setzero_si128();
  std::memcpy(&x, &bytes, sizeof(bytes));
  return x;
}
#endif

// Set where a byte is not zero. The compiler's own conversion goes element by element.
template <class T>
inline Mask<T> widen(Bytes<T> bytes) {
#if defined(SSM_FAST_ISA_avx512)
  const __m128i x = in_register<T>(bytes);
  return (sizeof(T) == 4 ? (Mask<T>)_mm512_cvtepu8_epi32(x) : (Mask<T>)_mm512_cvtepu8_epi64(x)) != 0;
#elif defined(SSM_FAST_ISA_avx2)
  const __m128i x = in_register<T>(bytes);
  return (sizeof(T) == 4 ? (Mask<T>)_mm256_cvtepu8_epi32(x) : (Mask<T>)_mm256_cvtepu8_epi64(x)) != 0;
#else
  return __builtin_convertvector(bytes, Mask<T>) != 0;
#endif
}

// A bit for each byte that is not zero.
template <class T>
inline std::uint32_t bits_of(Bytes<T> bytes) {
#if defined(SSM_FAST_ISA_avx512)
  const __m128i x = in_register<T>(bytes);
  return _mm_test_epi8_mask(x, x);
#elif defined(SSM_FAST_ISA_avx2)
  const int zeros = _mm_movemask_epi8(_mm_cmpeq_epi8(in_register<T>(bytes), _mm_setzero_si128()));
  return ~std::uint32_t(zeros) & ((1u << kWidth<T>)-1);
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < kWidth<T>; ++i) bits |= std::uint32_t(bytes[i] != 0) << i;
  return bits;
#endif
}

constexpr std::size_t kStreamBytes = 8 << 20;  // an output from this size on leaves the caches before it is read

// A store past the caches, where the line need not be read first; finish with stream_end().
template <class T>
inline void stream(T* p, Vector<T> v) {
#if defined(SSM_FAST_ISA_avx512) || defined(SSM_FAST_ISA_avx2)
  if (reinterpret_cast<std::uintptr_t>(p) % kVectorBytes == 0) {
#if defined(SSM_FAST_ISA_avx512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#endif
    return;
  }
#endif
  store(p, v);
}
inline void stream_end() {
#if defined(SSM_FAST_ISA_avx512) || defined(SSM_FAST_ISA_avx2)
  _mm_sfence();
#endif
}

}  // namespace ssm_fast::SSM_FAST_ISA
