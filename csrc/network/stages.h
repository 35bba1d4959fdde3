// The stages of this package's models.
#pragma once

#include <memory>

#include "stage.h"

namespace ssm_fast {

// y = [tanh] (W x + b)
template <class T>
class LinearStage final : public Stage<T> {
 public:
  LinearStage(Index I, Index O, int W, int bias, bool tanh) : Stage<T>(I, O), W_(W), bias_(bias), tanh_(tanh) {}
  Index tangents(const Tile&) const override;
  Index work(const Tile&) const override;
  void forward(Call<T>, const T* x, T* y, T* saved) const override;
  void backward(Call<T>, const T* x, const T* y, T* saved, const T* grad_y, T* grad_x) const override;
  void tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* saved, const T* grad_y, T* y_t,
               T* tangents) const override;
  void backward_tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* y_t, const T* saved, const T* tangents,
                        const T* grad_y, T* grad_y_t, T* grad_x_t) const override;
  int step(StepBuilder& program, int x) const override;

 private:
  const int W_, bias_;
  const bool tanh_;
};

// s_t = A m_t s_{t-1} + u_t, u = B x + b; with a norm s_t = LN(A m_t s_{t-1} + u_t) weight + bias.
struct DriveParameters {
  int A, B, bias;
  int norm_weight = kAbsent, norm_bias = kAbsent;
  double eps = 0;
};
template <class T>
class ScanStage final : public Stage<T> {
 public:
  ScanStage(Index I, Index N, DriveParameters p) : Stage<T>(I, N, N), p_(p) {}
  Index saved(const Tile&) const override;
  Index tangents(const Tile&) const override;
  Index work(const Tile&) const override;
  void forward(Call<T>, const T* x, T* y, T* saved) const override;
  void backward(Call<T>, const T* x, const T* y, T* saved, const T* grad_y, T* grad_x) const override;
  void tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* saved, const T* grad_y, T* y_t,
               T* tangents) const override;
  void backward_tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* y_t, const T* saved, const T* tangents,
                        const T* grad_y, T* grad_y_t, T* grad_x_t) const override;
  int step(StepBuilder& program, int x) const override;

 private:
  struct Saved {
    T *adjoint, *n, *rstd, *sigma;  // the last three with a norm
  };
  bool has_norm() const { return p_.norm_weight != kAbsent; }
  Saved saved_at(Layout<T>& layout, const Tile& tile) const;
  typename Kernels<T>::StateNorm norm(const Call<T>& call, const Saved& saved) const;
  const DriveParameters p_;
};

// The dense cell: y = C s + D x of the states s of a ScanStage.
template <class T>
class DenseCell final : public Stage<T> {
 public:
  DenseCell(Index I, Index H, Index N, DriveParameters drive, int C, int D)
      : Stage<T>(I, H, N), scan_(I, N, drive), C_(C), D_(D) {}
  Index saved(const Tile&) const override;
  Index tangents(const Tile&) const override;
  Index work(const Tile&) const override;
  void forward(Call<T>, const T* x, T* y, T* saved) const override;
  void backward(Call<T>, const T* x, const T* y, T* saved, const T* grad_y, T* grad_x) const override;
  void tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* saved, const T* grad_y, T* y_t,
               T* tangents) const override;
  void backward_tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* y_t, const T* saved, const T* tangents,
                        const T* grad_y, T* grad_y_t, T* grad_x_t) const override;
  int step(StepBuilder& program, int x) const override;

 private:
  ScanStage<T> scan_;
  const int C_, D_;
};

// A cell within a policy: y = [x +] tanh(z), z = [LN] (cell(x)).
template <class T>
class LayerStage final : public Stage<T> {
 public:
  LayerStage(std::unique_ptr<Stage<T>> cell, int norm_weight, int norm_bias, double eps, bool residual)
      : Stage<T>(cell->inputs, cell->outputs, cell->state),
        cell_(std::move(cell)),
        weight_(norm_weight),
        bias_(norm_bias),
        eps_(T(eps)),
        residual_(residual) {}
  Index saved(const Tile&) const override;
  Index tangents(const Tile&) const override;
  Index work(const Tile&) const override;
  void forward(Call<T>, const T* x, T* y, T* saved) const override;
  void backward(Call<T>, const T* x, const T* y, T* saved, const T* grad_y, T* grad_x) const override;
  void tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* saved, const T* grad_y, T* y_t,
               T* tangents) const override;
  void backward_tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* y_t, const T* saved, const T* tangents,
                        const T* grad_y, T* grad_y_t, T* grad_x_t) const override;
  int step(StepBuilder& program, int x) const override;

 private:
  struct Saved {
    T *z, *grad_z, *mean, *rstd;
    T* cell;
  };
  Saved saved_at(T* block, const Tile& tile) const;
  typename Kernels<T>::Norm norm(const Call<T>& call, const Saved& saved) const;
  const std::unique_ptr<Stage<T>> cell_;
  const int weight_, bias_;
  const T eps_;
  const bool residual_;
};

// A hidden layer that reads the network's input too: y = tanh(V x0 + U x + b). No gradient flows into x if detached.
template <class T>
class JoinStage final : public Stage<T> {
 public:
  JoinStage(Index I, Index H, Index O, int V, int U, int bias) : Stage<T>(H, O), I_(I), V_(V), U_(U), bias_(bias) {}
  Index tangents(const Tile&) const override;
  Index work(const Tile&) const override;
  void forward(Call<T>, const T* x, T* y, T* saved) const override;
  void backward(Call<T>, const T* x, const T* y, T* saved, const T* grad_y, T* grad_x) const override;
  void tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* saved, const T* grad_y, T* y_t,
               T* tangents) const override;
  void backward_tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* y_t, const T* saved, const T* tangents,
                        const T* grad_y, T* grad_y_t, T* grad_x_t) const override;
  int step(StepBuilder& program, int x) const override;

 private:
  const Index I_;
  const int V_, U_, bias_;
};

// y = W x + b + D x0, with the network's input x0.
template <class T>
class SkipStage final : public Stage<T> {
 public:
  SkipStage(Index I, Index H, Index O, int W, int bias, int D) : Stage<T>(H, O), I_(I), W_(W), bias_(bias), D_(D) {}
  Index work(const Tile&) const override;
  void forward(Call<T>, const T* x, T* y, T* saved) const override;
  void backward(Call<T>, const T* x, const T* y, T* saved, const T* grad_y, T* grad_x) const override;
  void tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* saved, const T* grad_y, T* y_t,
               T* tangents) const override;
  void backward_tangent(Call<T>, const T* x, const T* x_t, const T* y, const T* y_t, const T* saved, const T* tangents,
                        const T* grad_y, T* grad_y_t, T* grad_x_t) const override;
  int step(StepBuilder& program, int x) const override;

 private:
  const Index I_;
  const int W_, bias_, D_;
};

}  // namespace ssm_fast
