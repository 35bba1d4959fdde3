#include "sequence_gradient.h"

#include <utility>

namespace ssm_fast {

template <class T>
SequenceGradient<T>::SequenceGradient(std::vector<T*> weights, std::vector<T*> gradients, Sizes sizes, bool residual,
                                      T eps)
    : weights_(std::move(weights)),
      gradients_(std::move(gradients)),
      sizes_(sizes),
      residual_(residual),
      eps_(eps),
      layers_(std::size_t(sizes.L)) {}

template <class T>
SequenceGradient<T> SequenceGradient<T>::with_gradients(const T* from, T* to) const {
  std::vector<T*> gradients = gradients_;
  for (T*& gradient : gradients) {
    if (gradient) gradient = to + (gradient - from);
  }
  return {weights_, gradients, sizes_, residual_, eps_};
}

// Room for that many rows.
template <class T>
void SequenceGradient<T>::reserve(Index rows) {
  if (rows <= reserved_) return;
  const auto [I, H, N, L, K, W] = sizes_;
  const Index wide = rows * (H > W ? H : W), states = rows * N, own = rows * W;
  arrays_.place([&](auto take) {
    for (Layer& layer : layers_) {
      layer = {take(states), take(states), take(rows * H), take(rows * H), take(rows), take(rows)};
    }
    encoded_ = take(wide), first_ = take(own), second_ = take(own);
    grad_h_ = take(wide), grad_y_ = take(wide), wide_ = take(wide);
    grad_s_ = take(states), grad_u_ = take(states);
  });
  reserved_ = rows;
}

// By its place in weights_, the gradient of a matrix [O, I] and of what it takes.
template <class T>
void SequenceGradient<T>::linear_grad(const T* grad, const T* y, const T* x, std::size_t weight, T* grad_x,
                                      T* grad_bias, Index I, Index O) {
  passes_.linear_grad(grad, y, x, weights_[weight], grad_x, gradients_[weight], grad_bias, M_, I, O);
}

template <class T>
typename Passes<T>::Norm SequenceGradient<T>::norm(Index l) const {
  const Layer& layer = layers_[std::size_t(l)];
  return {weights_[part(l, kNormWeight)], weights_[part(l, kNormBias)], layer.mean, layer.rstd, eps_};
}

template <class T>
void SequenceGradient<T>::layer_forward(Index l, const T* h) {
  const auto [I, H, N, L, K, W] = sizes_;
  const Layer& layer = layers_[std::size_t(l)];
  const auto weight = [&](Part which) { return weights_[part(l, which)]; };
  passes_.linear(h, weight(kB), weight(kBias), nullptr, false, layer.u, M_, H, N);
  passes_.sweep(layer.u, weight(kA), false, state_ + l * S_ * N, reset_, layer.s, S_, T_, N);
  passes_.linear(h, weight(kD), nullptr, nullptr, false, wide_, M_, H, H);
  passes_.linear(layer.s, weight(kC), nullptr, wide_, false, layer.y, M_, N, H);
  passes_.output_norm(layer.y, norm(l), residual_ ? h : nullptr, layer.h, M_, H);
}

// Turns grad_h, the gradient of what the layer gave, into that of what it took, h.
template <class T>
void SequenceGradient<T>::layer_backward(Index l, const T* h) {
  const auto [I, H, N, L, K, W] = sizes_;
  const Layer& layer = layers_[std::size_t(l)];
  const auto gradient = [&](Part which) { return gradients_[part(l, which)]; };
  passes_.output_norm_grad(grad_h_, layer.y, norm(l), grad_y_, gradient(kNormWeight), gradient(kNormBias), M_, H);

  linear_grad(grad_y_, nullptr, layer.s, part(l, kC), grad_s_, nullptr, N, H);
  passes_.sweep(grad_s_, weights_[part(l, kA)], true, nullptr, reset_, grad_u_, S_, T_, N);
  passes_.weight_grad(grad_u_, layer.s, state_ + l * S_ * N, reset_, gradient(kA), S_, T_, N);

  if (!residual_) {
    linear_grad(grad_y_, nullptr, h, part(l, kD), grad_h_, nullptr, H, H);
  } else {
    linear_grad(grad_y_, nullptr, h, part(l, kD), wide_, nullptr, H, H);
    add_to(grad_h_, wide_, M_ * H);
  }
  linear_grad(grad_u_, nullptr, h, part(l, kB), wide_, gradient(kBias), H, N);
  add_to(grad_h_, wide_, M_ * H);
}

template <class T>
void SequenceGradient<T>::forward(const T* x, const T* state, const std::uint8_t* reset, T* mean, T* value, Index S,
                                  Index T_len) {
  const auto [I, H, N, L, K, W] = sizes_;
  S_ = S, T_ = T_len, M_ = S * T_len;
  x_ = x, state_ = state, reset_ = reset;
  reserve(M_);
  passes_.linear(x, weights_[kEncoder], weights_[kEncoder + 1], nullptr, true, encoded_, M_, I, H);
  const T* h = encoded_;
  for (Index l = 0; l < L; ++l) {
    layer_forward(l, h);
    h = layers_[std::size_t(l)].h;
  }
  passes_.linear(h, weights_[kActor], weights_[kActor + 1], nullptr, false, mean, M_, H, K);
  if (W) {
    passes_.linear(x, weights_[kValueX], weights_[kValueBias], nullptr, false, wide_, M_, I, W);
    passes_.linear(h, weights_[kValueH], nullptr, wide_, true, first_, M_, H, W);
    passes_.linear(first_, weights_[kHidden], weights_[kHiddenBias], nullptr, true, second_, M_, W, W);
    h = second_;
  }
  passes_.linear(h, weights_[kCritic], weights_[kCritic + 1], nullptr, false, value, M_, features(), 1);
}

template <class T>
void SequenceGradient<T>::backward(const T* grad_mean, const T* grad_value) {
  const auto [I, H, N, L, K, W] = sizes_;
  const auto taken = [&](Index l) { return l ? layers_[std::size_t(l - 1)].h : encoded_; };  // by layer l
  const T* h = taken(L);
  linear_grad(grad_mean, nullptr, h, kActor, grad_h_, gradients_[kActor + 1], H, K);
  if (W) {  // no gradient flows from it into the features
    linear_grad(grad_value, nullptr, second_, kCritic, grad_y_, gradients_[kCritic + 1], W, 1);
    linear_grad(grad_y_, second_, first_, kHidden, wide_, gradients_[kHiddenBias], W, W);
    linear_grad(wide_, first_, x_, kValueX, nullptr, gradients_[kValueBias], I, W);
    linear_grad(wide_, first_, h, kValueH, nullptr, nullptr, H, W);
  } else {
    linear_grad(grad_value, nullptr, h, kCritic, wide_, gradients_[kCritic + 1], H, 1);
    add_to(grad_h_, wide_, M_ * H);
  }
  for (Index l = L - 1; l >= 0; --l) layer_backward(l, taken(l));
  linear_grad(grad_h_, encoded_, x_, kEncoder, nullptr, gradients_[kEncoder + 1], I, H);
}

template class SequenceGradient<float>;
template class SequenceGradient<double>;

}  // namespace ssm_fast
