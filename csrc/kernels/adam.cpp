// Steps of Adam over a vector of parameters, and the square of a gradient's norm.
#include "ops.h"
#include "simd.h"
#include "sums.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

constexpr Index kBlock = 4096;  // elements that are summed in their own precision

// With g the scaled gradient: m += (1 - beta1) (g - m), v = beta2 v + (1 - beta2) g^2,
// w -= lr_scale rate m / (sqrt(v) / root + eps).
template <class T>
void step(const Adam<T>& p) {
  for (Index c = 0; c < p.P; c += kWidth<T>) {
    const int count = int(p.P - c < kWidth<T> ? p.P - c : kWidth<T>);
    const Vector<T> g = load_part(p.grad + c, count) * p.scale;
    Vector<T> m = load_part(p.m + c, count), v = load_part(p.v + c, count);
    m = fused_vector(g - m, broadcast(T(1) - p.beta1), m);
    v = fused_vector(g * g, broadcast(T(1) - p.beta2), v * p.beta2);
    const Vector<T> step = m * p.rate / (roots(v) / p.root + p.eps);
    store_part(p.m + c, m, count);
    store_part(p.v + c, v, count);
    store_part(p.w + c, load_part(p.w + c, count) - load_part(p.lr_scales + c, count) * step, count);
  }
}

template <class T>
double sum_of_squares(const T* x, Index P) {
  double total = 0;
  for (Index first = 0; first < P; first += kBlock) {
    const Index end = first + kBlock < P ? first + kBlock : P;
    Vector<T> sums[4] = {};
    Index c = first;
    for (; c + 4 * kWidth<T> <= end; c += 4 * kWidth<T>) {
      for (int i = 0; i < 4; ++i) {
        const Vector<T> y = load(x + c + i * kWidth<T>);
        sums[i] = fused_vector(y, y, sums[i]);
      }
    }
    for (; c < end; c += kWidth<T>) {
      const Vector<T> y = load_part(x + c, int(end - c < kWidth<T> ? end - c : kWidth<T>));
      sums[0] = fused_vector(y, y, sums[0]);
    }
    total += double(sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  return total;
}

}  // namespace

void adam(const Adam<float>& p) { step(p); }
void adam(const Adam<double>& p) { step(p); }
double squared_norm(const float* x, Index P) { return sum_of_squares(x, P); }
double squared_norm(const double* x, Index P) { return sum_of_squares(x, P); }

}  // namespace ssm_fast::SSM_FAST_ISA
