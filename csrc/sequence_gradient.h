// The forward pass of an actor-critic over sequences and its gradient, all kernels in one call each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "passes.h"

namespace ssm_fast {

// The network of PolicyStep without norm_state, for one group: docs/training.md.
template <class T>
class SequenceGradient {
 public:
  struct Sizes {
    Index I, H, N, L, K, W;  // W is 0 without a network of the critic's own
  };

  // `weights` and where their gradients go, contiguous, null where one is left out: weight and bias of the
  // encoder, the actor and the critic, V_x, V_h, b, V and c of its network, and of every layer in turn A, B, bias,
  // C, D and weight and bias of its norm.
  SequenceGradient(std::vector<T*> weights, std::vector<T*> gradients, Sizes sizes, bool residual, T eps);

  // Another one of the same weights, whose gradients lie as these do, but from `to` on instead of `from`.
  SequenceGradient with_gradients(const T* from, T* to) const;

  const Sizes& sizes() const { return sizes_; }

  // mean [S T, K] and value [S T] from x [S, T, I], state [L, S, N] and reset [S, T], all contiguous. What came in
  // has to stay until the call of `backward`.
  void forward(const T* x, const T* state, const std::uint8_t* reset, T* mean, T* value, Index S, Index T_len);

  // The gradients of all weights, from those of mean and value.
  void backward(const T* grad_mean, const T* grad_value);

 private:
  struct Layer {
    T *u, *s, *y, *h, *mean, *rstd;  // h is what the layer gives
  };
  enum Head { kEncoder = 0, kActor = 2, kCritic = 4, kValueX = 6, kValueH, kValueBias, kHidden, kHiddenBias, kHeads };
  enum Part { kA, kB, kBias, kC, kD, kNormWeight, kNormBias, kParts };

  std::size_t part(Index l, Part which) const { return std::size_t(kHeads + l * kParts + which); }
  Index features() const { return sizes_.W ? sizes_.W : sizes_.H; }  // what the critic's last layer reads
  void reserve(Index rows);
  void linear_grad(const T* grad, const T* y, const T* x, std::size_t weight, T* grad_x, T* grad_bias, Index I,
                   Index O);
  typename Passes<T>::Norm norm(Index l) const;
  void layer_forward(Index l, const T* h);
  void layer_backward(Index l, const T* h);

  Passes<T> passes_;
  std::vector<T*> weights_, gradients_;
  Sizes sizes_;
  bool residual_;
  T eps_;
  Index S_ = 0, T_ = 0, M_ = 0, reserved_ = 0;
  const T *x_ = nullptr, *state_ = nullptr;
  const std::uint8_t* reset_ = nullptr;
  Arrays<T> arrays_;
  std::vector<Layer> layers_;
  T *encoded_ = nullptr, *first_ = nullptr, *second_ = nullptr;  // h^0 and the hidden layers of the critic's network
  T *grad_h_ = nullptr, *grad_y_ = nullptr, *wide_ = nullptr;    // [M, H or W]
  T *grad_s_ = nullptr, *grad_u_ = nullptr;                      // [M, N]
};

extern template class SequenceGradient<float>;
extern template class SequenceGradient<double>;

}  // namespace ssm_fast
