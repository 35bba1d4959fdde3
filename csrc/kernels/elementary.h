// Elementary functions (square root, exponential, tanh to a few units in the last place), and the moments
// of a row.
#pragma once

#include "ops.h"
#include "simd.h"
#include "sums.h"

namespace ssm_fast::SSM_FAST_ISA {

template <class T>
inline T square_root(T x) {
  if constexpr (sizeof(T) == 4) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

template <class T>
inline T exponential(T x) {
  if constexpr (sizeof(T) == 4) {
    return __builtin_expf(x);
  } else {
    return __builtin_exp(x);
  }
}

// The vector at column `c` of a row of N elements, of which the last may be part of one.
template <class T>
inline Vector<T> load_at(const T* row, Index c, Index N) {
  return c + kWidth<T> <= N ? load(row + c) : load_part(row + c, int(N - c));
}
template <class T>
inline void store_at(T* row, Index c, Index N, Vector<T> v) {
  if (c + kWidth<T> <= N) {
    store(row + c, v);
  } else {
    store_part(row + c, v, int(N - c));
  }
}

// row - mean in the vector at column `c`; 0 beyond the N elements of the row.
template <class T>
inline Vector<T> deviation(const T* row, Index c, Index N, Vector<T> mean) {
  const Vector<T> d = load_at(row, c, N) - mean;
  if (c + kWidth<T> <= N) return d;
  T part[kWidth<T>] = {};
  store_part(part, d, int(N - c));
  return load(part);
}

template <class T>
struct Moments {
  T mean, rstd;
};

// Of a row of N elements, in two passes: its mean, and one over the root of its variance plus eps.
template <class T>
inline Moments<T> moments(const T* row, Index N, T eps) {
  constexpr int L = kWidth<T>;
  Vector<T> total{}, squares{};
  for (Index c = 0; c < N; c += L) total += load_at(row, c, N);
  const T mean = sum<T>(total) / T(N);
  for (Index c = 0; c < N; c += L) {
    const Vector<T> d = deviation(row, c, N, broadcast(mean));
    squares = fused_vector(d, d, squares);
  }
  return {mean, T(1) / square_root(sum<T>(squares) / T(N) + eps)};
}

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef std::uint32_t Type __attribute__((vector_size(kVectorBytes)));
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float kLog2e = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kSaturated = 9.02f;  // where tanh rounds to 1
  static constexpr int kMantissa = 23, kTerms = 7;
  static constexpr float kSeries[kTerms] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f};
  static constexpr std::uint32_t kOne = 0x3F800000u;
};
template <>
struct BitsOf<double> {
  typedef std::uint64_t Type __attribute__((vector_size(kVectorBytes)));
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2e = 1.44269504088896341, kLn2High = 6.93145751953125e-1,
                          kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kSaturated = 19.07;
  static constexpr int kMantissa = 52, kTerms = 13;
  static constexpr double kSeries[kTerms] = {
      1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
      1. / 720,        1. / 120,       1. / 24,       1. / 6,       1. / 2,      1.};
  static constexpr std::uint64_t kOne = 0x3FF0000000000000u;
};

// exp(x) - 1 for |x| < 88, without cancellation near 0: with x = n ln 2 + r and p = exp(r) - 1 from its
// Taylor series, 2^n p + (2^n - 1), which is p itself for n = 0.
template <class T>
inline Vector<T> expm1(Vector<T> x) {
  using Bits = BitsOf<T>;
  const Vector<T> shifted = fused_vector(x, broadcast(Bits::kLog2e), broadcast(Bits::kMagic));
  const Vector<T> n = shifted - Bits::kMagic;
  Vector<T> r = fused_vector(n, broadcast(-Bits::kLn2High), x);
  r = fused_vector(n, broadcast(-Bits::kLn2Low), r);
  Vector<T> series = broadcast(Bits::kSeries[0]);  // 1/1! + r/2! + r^2/3! + ... by Horner's rule
#pragma GCC unroll 16
  for (int i = 1; i < Bits::kTerms; ++i) series = fused_vector(series, r, broadcast(Bits::kSeries[i]));
  const Vector<T> p = series * r;
  const auto bits = ((typename Bits::Type)shifted << Bits::kMantissa) + Bits::kOne;
  const Vector<T> scale = (Vector<T>)bits;
  return fused_vector(scale, p, scale - T(1));
}

// tanh(x) = (exp(2x) - 1) / (exp(2x) + 1).
template <class T>
inline Vector<T> tanh(Vector<T> x) {
  const Vector<T> bound = broadcast(BitsOf<T>::kSaturated);
  x = x > bound ? bound : x;  // a NaN compares false and stays
  x = x < -bound ? -bound : x;
  const Vector<T> e = expm1<T>(x + x);
  return e / (e + T(2));
}

}  // namespace ssm_fast::SSM_FAST_ISA
