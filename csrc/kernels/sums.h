// The sum of the lanes of a vector, and of several at once: half a row's lanes are added to the other half
// until one is left. The order of the additions is the same for one row and for many.
#pragma once

#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {

template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int... I>
struct CountLanes<0, I...> {
  using Type = Lanes<I...>;
};
template <class T>
using AllLanes = typename CountLanes<kWidth<T>>::Type;

template <int kDistance, class V, int... I>
inline V exchange(V v, Lanes<I...>) {
  return __builtin_shufflevector(v, v, (I ^ kDistance)...);
}

// Each lane becomes the sum of the 2 kHalf lanes of its row.
template <class T, int kHalf>
inline Vector<T> fold_rows(Vector<T> v) {
  if constexpr (kHalf == 0) {
    return v;
  } else {
    return fold_rows<T, kHalf / 2>(v + exchange<kHalf>(v, AllLanes<T>{}));
  }
}

template <class T>
inline T sum(Vector<T> v) {
  return fold_rows<T, kWidth<T> / 2>(v)[0];
}

// Of two vectors a and b that hold `rows` rows each, L / rows lanes a row: which lane of the 2 L comes to
// `lane` when every row hands over its lower half, or with `upper` the other one.
constexpr int lane_of_half(int L, int rows, bool upper, int lane) {
  const int half = L / rows / 2, row = lane / half;
  return row * 2 * half + upper * half + lane % half;
}

// The rows of a and b in one vector, half as wide.
template <int kRows, class V, int... I>
inline V fold_pair(V a, V b, Lanes<I...>) {
  constexpr int L = int(sizeof...(I));
  return __builtin_shufflevector(a, b, lane_of_half(L, kRows, false, I)...) +
         __builtin_shufflevector(a, b, lane_of_half(L, kRows, true, I)...);
}

// each[r] = f(sum of row r) in every lane; a vector of x holds kRows rows, and f takes such vectors.
template <class T, int kRows = 1, int V, class F, int R>
inline void map_sums(const Vector<T> (&x)[V], F f, Vector<T> (&each)[R]) {
  constexpr int L = kWidth<T>;
  if constexpr (V > 1 && kRows < L) {
    Vector<T> pairs[(V + 1) / 2];
#pragma GCC unroll 8
    for (int i = 0; i < (V + 1) / 2; ++i) {
      pairs[i] = fold_pair<kRows>(x[2 * i], x[2 * i + 1 < V ? 2 * i + 1 : 2 * i], AllLanes<T>{});
    }
    map_sums<T, 2 * kRows>(pairs, f, each);
  } else {
    T values[V * L];
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) store(values + i * L, f(fold_rows<T, L / kRows / 2>(x[i])));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) each[r] = broadcast(values[r * (L / kRows)]);
  }
}

}  // namespace ssm_fast::SSM_FAST_ISA
