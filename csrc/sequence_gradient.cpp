#include "sequence_gradient.h"

#include <utility>

namespace ssm_fast {
namespace {

constexpr Index kLine = 64;  // bytes

template <class T>
void add_to(T* x, const T* y, Index elements) {
#pragma GCC ivdep
  for (Index i = 0; i < elements; ++i) x[i] += y[i];
}

}  // namespace

template <class T>
SequenceGradient<T>::SequenceGradient(std::vector<T*> weights, std::vector<T*> gradients, Sizes sizes, bool residual,
                                      T eps)
    : weights_(std::move(weights)),
      gradients_(std::move(gradients)),
      sizes_(sizes),
      residual_(residual),
      eps_(eps),
      layers_(std::size_t(sizes.L)) {}

// Room for that many rows.
template <class T>
void SequenceGradient<T>::reserve(Index rows) {
  if (rows <= reserved_) return;
  const auto [I, H, N, L, K, W] = sizes_;
  const Index line = kLine / Index(sizeof(T));
  const auto padded = [&](Index elements) { return (elements + line - 1) / line * line; };
  const Index wide = padded(rows * (H > W ? H : W)), states = padded(rows * N), own = padded(rows * W);
  const Index of_layer = 2 * states + 2 * padded(rows * H) + 2 * padded(rows);
  memory_ = scratch_block<T>(L * of_layer + 4 * wide + 2 * own + 2 * states);
  T* next = static_cast<T*>(memory_.get());
  const auto take = [&](Index elements) { return std::exchange(next, next + elements); };
  for (Layer& layer : layers_) {
    layer = {take(states),           take(states),       take(padded(rows * H)),
             take(padded(rows * H)), take(padded(rows)), take(padded(rows))};
  }
  encoded_ = take(wide), first_ = take(own), second_ = take(own);
  grad_h_ = take(wide), grad_y_ = take(wide), wide_ = take(wide);
  grad_s_ = take(states), grad_u_ = take(states);
  reserved_ = rows;
}

template <class T>
T* SequenceGradient<T>::scratch(Index elements) {
  if (elements > scratch_elements_) {
    scratch_ = scratch_block<T>(elements);
    scratch_elements_ = elements;
  }
  return static_cast<T*>(scratch_.get());
}

template <class T>
void SequenceGradient<T>::linear(const T* x, Index I, const T* W, const T* bias, const T* add, bool tanh, T* y,
                                 Index O) {
  Linear<T> p{};
  p.x = x, p.x_m = I;
  p.W = W, p.W_o = I, p.W_i = 1;
  p.bias = bias;
  p.add = add, p.add_m = O;
  p.y = y;
  p.G = 1, p.M = M_, p.I = I, p.O = O;
  p.tanh = tanh;
  p.threads = linear_threads(M_, double(I * O));
  p.scratch = scratch(p.threads * SSM_FAST_CALL(linear_scratch(I, O, sizeof(T) == 8)));
  SSM_FAST_CALL(linear(p));
}

template <class T>
void SequenceGradient<T>::linear_grad(const T* grad, const T* y, Index O, const T* x, Index I, std::size_t weight,
                                      T* grad_x, T* grad_bias) {
  LinearGrad<T> p{};
  p.grad_y = grad, p.grad_m = O;
  p.y = y, p.y_m = O;
  p.x = x, p.x_m = I;
  p.W = weights_[weight], p.W_o = I, p.W_i = 1;
  p.grad_x = grad_x, p.grad_W = gradients_[weight], p.grad_bias = grad_bias;
  p.G = 1, p.M = M_, p.I = I, p.O = O;
  p.threads = threads_for(double(M_) * double(I * O), SSM_FAST_CALL(linear_grad_parts(1, M_, I, O, sizeof(T) == 8)));
  p.scratch = scratch(SSM_FAST_CALL(linear_grad_scratch(1, M_, I, O, p.threads, sizeof(T) == 8)));
  SSM_FAST_CALL(linear_grad(p));
}

// dense_scan, or with the matrix transposed its adjoint.
template <class T>
void SequenceGradient<T>::sweep(const T* u, const T* A, bool transposed, const T* s0, T* s) {
  const Index N = sizes_.N;
  DenseScan<T> p{};
  p.u = u, p.u_b = T_ * N, p.u_t = N;
  p.A = A, p.A_row = transposed ? 1 : N, p.A_col = transposed ? N : 1;
  p.s0 = s0, p.s0_b = N;
  p.reset = reset_, p.reset_b = T_, p.reset_t = 1;
  p.s = s, p.s_b = T_ * N, p.s_t = N;
  p.G = 1, p.B = S_, p.T_len = T_, p.N = N;
  p.reverse = transposed;
  p.threads = threads_for(double(M_) * double(N * N), SSM_FAST_CALL(dense_scan_rows(1, S_, T_, N)));
  p.scratch = scratch(SSM_FAST_CALL(dense_scan_scratch(1, S_, T_, N, p.threads, sizeof(T) == 8)));
  SSM_FAST_CALL(dense_scan(p));
}

template <class T>
void SequenceGradient<T>::layer_forward(Index l, const T* h) {
  const auto [I, H, N, L, K, W] = sizes_;
  const Layer& layer = layers_[std::size_t(l)];
  const auto weight = [&](Part which) { return weights_[part(l, which)]; };
  linear(h, H, weight(kB), weight(kBias), nullptr, false, layer.u, N);
  sweep(layer.u, weight(kA), false, state_ + l * S_ * N, layer.s);
  linear(h, H, weight(kD), nullptr, nullptr, false, wide_, H);
  linear(layer.s, N, weight(kC), nullptr, wide_, false, layer.y, H);
  OutputNorm<T> p{};
  p.z = layer.y, p.z_m = H;
  p.weight = weight(kNormWeight), p.bias = weight(kNormBias);
  p.residual = residual_ ? h : nullptr, p.residual_m = H;
  p.y = layer.h, p.mean = layer.mean, p.rstd = layer.rstd;
  p.G = 1, p.M = M_, p.H = H;
  p.eps = eps_;
  p.tanh = true;
  p.threads = threads_for(double(M_) * double(H) / 4, M_);
  SSM_FAST_CALL(output_norm(p));
}

// Turns grad_h, the gradient of what the layer gave, into that of what it took, h.
template <class T>
void SequenceGradient<T>::layer_backward(Index l, const T* h) {
  const auto [I, H, N, L, K, W] = sizes_;
  const Layer& layer = layers_[std::size_t(l)];
  const auto gradient = [&](Part which) { return gradients_[part(l, which)]; };
  OutputNormGrad<T> norm{};
  norm.grad_y = grad_h_, norm.grad_m = H;
  norm.z = layer.y, norm.z_m = H;
  norm.weight = weights_[part(l, kNormWeight)], norm.bias = weights_[part(l, kNormBias)];
  norm.mean = layer.mean, norm.rstd = layer.rstd;
  norm.grad_z = grad_y_, norm.grad_weight = gradient(kNormWeight), norm.grad_bias = gradient(kNormBias);
  norm.G = 1, norm.M = M_, norm.H = H;
  norm.tanh = true;
  norm.threads = threads_for(double(M_) * double(H) / 4, M_);
  norm.scratch = scratch(SSM_FAST_CALL(output_norm_scratch(1, M_, H, sizeof(T) == 8)));
  SSM_FAST_CALL(output_norm_grad(norm));

  linear_grad(grad_y_, nullptr, H, layer.s, N, part(l, kC), grad_s_, nullptr);
  sweep(grad_s_, weights_[part(l, kA)], true, nullptr, grad_u_);
  WeightGrad<T> sum{};
  sum.x = grad_u_, sum.x_b = T_ * N, sum.x_t = N;
  sum.s = layer.s, sum.s_b = T_ * N, sum.s_t = N;
  sum.s0 = state_ + l * S_ * N, sum.s0_b = N;
  sum.reset = reset_, sum.reset_b = T_, sum.reset_t = 1;
  sum.grad = gradient(kA);
  sum.G = 1, sum.B = S_, sum.T_len = T_, sum.N = N;
  sum.threads = threads_for(double(M_) * double(N * N), M_);
  sum.scratch = scratch(SSM_FAST_CALL(weight_grad_scratch(1, S_, T_, N, sizeof(T) == 8)));
  SSM_FAST_CALL(weight_grad(sum));

  if (!residual_) {
    linear_grad(grad_y_, nullptr, H, h, H, part(l, kD), grad_h_, nullptr);
  } else {
    linear_grad(grad_y_, nullptr, H, h, H, part(l, kD), wide_, nullptr);
    add_to(grad_h_, wide_, M_ * H);
  }
  linear_grad(grad_u_, nullptr, N, h, H, part(l, kB), wide_, gradient(kBias));
  add_to(grad_h_, wide_, M_ * H);
}

template <class T>
void SequenceGradient<T>::forward(const T* x, const T* state, const std::uint8_t* reset, T* mean, T* value, Index S,
                                  Index T_len) {
  const auto [I, H, N, L, K, W] = sizes_;
  S_ = S, T_ = T_len, M_ = S * T_len;
  x_ = x, state_ = state, reset_ = reset;
  reserve(M_);
  linear(x, I, weights_[kEncoder], weights_[kEncoder + 1], nullptr, true, encoded_, H);
  const T* h = encoded_;
  for (Index l = 0; l < L; ++l) {
    layer_forward(l, h);
    h = layers_[std::size_t(l)].h;
  }
  linear(h, H, weights_[kActor], weights_[kActor + 1], nullptr, false, mean, K);
  if (W) {
    linear(x, I, weights_[kValueX], weights_[kValueBias], nullptr, false, wide_, W);
    linear(h, H, weights_[kValueH], nullptr, wide_, true, first_, W);
    linear(first_, W, weights_[kHidden], weights_[kHiddenBias], nullptr, true, second_, W);
    h = second_;
  }
  linear(h, features(), weights_[kCritic], weights_[kCritic + 1], nullptr, false, value, 1);
}

template <class T>
void SequenceGradient<T>::backward(const T* grad_mean, const T* grad_value) {
  const auto [I, H, N, L, K, W] = sizes_;
  const auto taken = [&](Index l) { return l ? layers_[std::size_t(l - 1)].h : encoded_; };  // by layer l
  const T* h = taken(L);
  linear_grad(grad_mean, nullptr, K, h, H, kActor, grad_h_, gradients_[kActor + 1]);
  if (W) {  // no gradient flows from it into the features
    linear_grad(grad_value, nullptr, 1, second_, W, kCritic, grad_y_, gradients_[kCritic + 1]);
    linear_grad(grad_y_, second_, W, first_, W, kHidden, wide_, gradients_[kHiddenBias]);
    linear_grad(wide_, first_, W, x_, I, kValueX, nullptr, gradients_[kValueBias]);
    linear_grad(wide_, first_, W, h, H, kValueH, nullptr, nullptr);
  } else {
    linear_grad(grad_value, nullptr, 1, h, H, kCritic, wide_, gradients_[kCritic + 1]);
    add_to(grad_h_, wide_, M_ * H);
  }
  for (Index l = L - 1; l >= 0; --l) layer_backward(l, taken(l));
  linear_grad(grad_h_, encoded_, H, x_, I, kEncoder, nullptr, gradients_[kEncoder + 1]);
}

template class SequenceGradient<float>;
template class SequenceGradient<double>;

}  // namespace ssm_fast
