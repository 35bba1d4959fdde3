#include "stages.h"

#include <cstring>

namespace ssm_fast {
namespace {

// u += A_t times the states that enter the steps: that of the row before, at the first of a sequence s0. `s` has a
// row before its first one, whatever it holds; scratch is [rows, N].
template <class T>
void add_entering(Kernels<T>& kernels, const Tile& tile, const T* s, const T* s0, const T* A_t, T* u, T* scratch,
                  Index N) {
  const auto add = [&](Index row, const T* from) { add_to(u + row * N, from, N); };
  kernels.linear(s - N, A_t, nullptr, nullptr, false, scratch, tile.rows(), N, N);
  for (Index row = 0; row < tile.rows(); ++row) {
    if (row % tile.T_len && !(tile.reset && tile.reset[row])) add(row, scratch + row * N);
  }
  if (!s0) return;
  kernels.linear(s0, A_t, nullptr, nullptr, false, scratch, tile.B, N, N);
  for (Index b = 0; b < tile.B; ++b) {
    if (!(tile.reset && tile.reset[b * tile.T_len])) add(b * tile.T_len, scratch + b * N);
  }
}

// grad_s += A_t^T times the adjoints of the rows behind, which the states enter; those of the last steps go nowhere.
// `adjoint` has a row behind its last one.
template <class T>
void add_leaving(Kernels<T>& kernels, const Tile& tile, const T* adjoint, const T* A_t, T* grad_s, T* scratch,
                 Index N) {
  kernels.linear(adjoint + N, A_t, nullptr, nullptr, false, scratch, tile.rows(), N, N, true);
  for (Index row = 0; row < tile.rows(); ++row) {
    if ((row + 1) % tile.T_len && !(tile.reset && tile.reset[row + 1])) {
      add_to(grad_s + row * N, scratch + row * N, N);
    }
  }
}

template <class T>
T mean_product(const T* x, const T* y, Index N) {
  T sum = 0;
  for (Index i = 0; i < N; ++i) sum += x[i] * y[i];
  return sum / T(N);
}

template <class T>
T mean(const T* x, Index N) {
  T sum = 0;
  for (Index i = 0; i < N; ++i) sum += x[i];
  return sum / T(N);
}

}  // namespace

// LinearStage

template <class T>
Index LinearStage<T>::tangents(const Tile& tile) const {
  return tanh_ ? tile.rows() * this->outputs : 0;
}

template <class T>
Index LinearStage<T>::work(const Tile& tile) const {
  return tile.rows() * this->inputs + 16;
}

template <class T>
void LinearStage<T>::forward(Call<T> call, const T* x, T* y, T*) const {
  call.kernels.linear(x, call.weights[W_], parameter(call.weights, bias_), nullptr, tanh_, y, call.tile.rows(),
                      this->inputs, this->outputs);
}

template <class T>
void LinearStage<T>::backward(Call<T> call, const T* x, const T* y, T*, const T* grad_y, T* grad_x) const {
  call.kernels.linear_grad(grad_y, tanh_ ? y : nullptr, x, call.weights[W_], grad_x, call.gradients[W_],
                           parameter(call.gradients, bias_), call.tile.rows(), this->inputs, this->outputs);
}

template <class T>
void LinearStage<T>::tangent(Call<T> call, const T* x, const T* x_t, const T* y, const T*, const T* grad_y, T* y_t,
                             T* slope_t) const {
  call.kernels.linear_tangent(x_t, call.direction[W_], parameter(call.direction, bias_), x, call.weights[W_],
                              tanh_ ? y : nullptr, tanh_ ? grad_y : nullptr, y_t, tanh_ ? slope_t : nullptr,
                              call.tile.rows(), this->inputs, this->outputs);
}

template <class T>
void LinearStage<T>::backward_tangent(Call<T> call, const T* x, const T* x_t, const T* y, const T*, const T*,
                                      const T* slope_t, const T* grad_y, T* grad_y_t, T* grad_x_t) const {
  const Index M = call.tile.rows(), I = this->inputs, O = this->outputs;
  const T* output = tanh_ ? y : nullptr;
  if (tanh_) add_to(grad_y_t, slope_t, M * O);
  call.kernels.linear_grad(grad_y_t, output, x, call.weights[W_], grad_x_t, call.gradients[W_],
                           parameter(call.gradients, bias_), M, I, O);
  if (!x_t && !grad_x_t) return;
  T* term = grad_x_t ? call.reserve(M * I) : nullptr;
  call.kernels.linear_grad(grad_y, output, x_t ? x_t : x, call.direction[W_], term, x_t ? call.second[W_] : nullptr,
                           nullptr, M, I, O);
  if (grad_x_t) add_to(grad_x_t, term, M * I);
}

template <class T>
int LinearStage<T>::step(StepBuilder& program, int x) const {
  const int y = program.other(x, this->outputs);
  program.affine(y, this->outputs, x, this->inputs, W_, bias_);
  if (tanh_) program.tanh(y, y);
  return y;
}

// ScanStage

template <class T>
typename ScanStage<T>::Saved ScanStage<T>::saved_at(Layout<T>& layout, const Tile& tile) const {
  const Index N = this->outputs, rows = tile.rows();
  Saved saved{layout.array((rows + 1) * N), nullptr, nullptr, nullptr};  // the adjoints have a row behind them
  if (has_norm())
    saved.n = layout.array(rows * N), saved.rstd = layout.array(rows), saved.sigma = layout.array(rows * N);
  return saved;
}

template <class T>
Index ScanStage<T>::saved(const Tile& tile) const {
  Layout<T> layout;
  saved_at(layout, tile);
  return layout.used();
}

template <class T>
Index ScanStage<T>::tangents(const Tile& tile) const {
  return has_norm() ? tile.rows() * this->outputs : 0;  // z_t
}

template <class T>
Index ScanStage<T>::work(const Tile& tile) const {
  return tile.rows() * (3 * this->outputs + this->inputs) + 64;
}

template <class T>
typename Kernels<T>::StateNorm ScanStage<T>::norm(const Call<T>& call, const Saved& saved) const {
  return {parameter(call.weights, p_.norm_weight), parameter(call.weights, p_.norm_bias), saved.n, saved.rstd,
          T(p_.eps)};
}

template <class T>
void ScanStage<T>::forward(Call<T> call, const T* x, T* y, T* block) const {
  const auto [B, T_len, reset] = call.tile;
  const Index M = call.tile.rows(), I = this->inputs, N = this->outputs;
  const T* A = call.weights[p_.A];
  T* u = call.reserve(M * N);
  call.kernels.linear(x, call.weights[p_.B], parameter(call.weights, p_.bias), nullptr, false, u, M, I, N);
  if (!has_norm()) return call.kernels.sweep(u, A, false, call.state, reset, y, B, T_len, N);
  Layout<T> layout(block);
  const Saved saved = saved_at(layout, call.tile);
  call.kernels.norm_sweep(Sweep::forward, u, nullptr, A, norm(call, saved), call.state, reset, y, nullptr, nullptr,
                          nullptr, B, T_len, N);
}

template <class T>
void ScanStage<T>::backward(Call<T> call, const T* x, const T* y, T* block, const T* grad_y, T* grad_x) const {
  const auto [B, T_len, reset] = call.tile;
  const Index M = call.tile.rows(), I = this->inputs, N = this->outputs;
  const T* A = call.weights[p_.A];
  Layout<T> layout(block);
  const Saved saved = saved_at(layout, call.tile);
  if (has_norm()) {
    call.kernels.norm_sweep(Sweep::adjoint, grad_y, nullptr, A, norm(call, saved), nullptr, reset, saved.adjoint,
                            saved.sigma, call.gradients[p_.norm_weight], call.gradients[p_.norm_bias], B, T_len, N);
  } else {
    call.kernels.sweep(grad_y, A, true, nullptr, reset, saved.adjoint, B, T_len, N);
  }
  call.kernels.weight_grad(saved.adjoint, y, call.state, reset, call.gradients[p_.A], B, T_len, N);
  call.kernels.linear_grad(saved.adjoint, nullptr, x, call.weights[p_.B], grad_x, call.gradients[p_.B],
                           parameter(call.gradients, p_.bias), M, I, N);
}

template <class T>
void ScanStage<T>::tangent(Call<T> call, const T* x, const T* x_t, const T* y, const T* block, const T*, T* y_t,
                           T* z_t) const {
  const auto [B, T_len, reset] = call.tile;
  const Index M = call.tile.rows(), I = this->inputs, N = this->outputs;
  const T* A = call.weights[p_.A];
  T *u_t = call.reserve(M * N), *scratch = call.reserve(M * N);
  call.kernels.linear_tangent(x_t, call.direction[p_.B], parameter(call.direction, p_.bias), x, call.weights[p_.B],
                              nullptr, nullptr, u_t, nullptr, M, I, N);
  add_entering(call.kernels, call.tile, y, call.state, call.direction[p_.A], u_t, scratch, N);
  if (!has_norm()) return call.kernels.sweep(u_t, A, false, nullptr, reset, y_t, B, T_len, N);
  Layout<T> layout(const_cast<T*>(block));
  const Saved saved = saved_at(layout, call.tile);
  const T *weight_t = call.direction[p_.norm_weight], *bias_t = call.direction[p_.norm_bias];
  T* behind = scratch;
  for (Index i = 0; i < M * N; ++i) behind[i] = saved.n[i] * weight_t[i % N] + bias_t[i % N];
  call.kernels.norm_sweep(Sweep::tangent, u_t, behind, A, norm(call, saved), nullptr, reset, y_t, z_t, nullptr, nullptr,
                          B, T_len, N);
}

// With n_t = rstd P(z_t), rstd_t = -rstd^2 mean(n z_t) and p = weight sigma, the tangent of rstd P(p) is
// rstd P(p_t) + rstd_t P(p) - rstd (n_t mean(p n) + n mean(p n_t)); docs/ops/norm_scan.md.
template <class T>
void ScanStage<T>::backward_tangent(Call<T> call, const T* x, const T* x_t, const T* y, const T* y_t, const T* block,
                                    const T* z_t, const T*, T* grad_y_t, T* grad_x_t) const {
  const auto [B, T_len, reset] = call.tile;
  const Index M = call.tile.rows(), I = this->inputs, N = this->outputs;
  const T* A = call.weights[p_.A];
  Layout<T> layout(const_cast<T*>(block));
  const Saved saved = saved_at(layout, call.tile);
  T *adjoint_t = call.reserve(M * N), *scratch = call.reserve(M * N);
  add_leaving(call.kernels, call.tile, saved.adjoint, call.direction[p_.A], grad_y_t, scratch, N);
  if (has_norm()) {
    const T *weight = call.weights[p_.norm_weight], *weight_t = call.direction[p_.norm_weight];
    T *behind = scratch, *sigma_t = call.reserve(M * N), *row = call.second[p_.norm_weight];
    std::memset(row, 0, std::size_t(N) * sizeof(T));
    for (Index m = 0; m < M; ++m) {
      const T *n = saved.n + m * N, *sigma = saved.sigma + m * N, *z = z_t + m * N;
      const T rstd = saved.rstd[m], mean_z = mean(z, N), mean_nz = mean_product(n, z, N);
      const T rstd_t = -rstd * rstd * mean_nz;
      T p_mean = 0, p_n = 0, p_nt = 0, pt_mean = 0, pt_n = 0;
      for (Index i = 0; i < N; ++i) {
        const T n_t = rstd * (z[i] - mean_z - n[i] * mean_nz), p = weight[i] * sigma[i], p_t = weight_t[i] * sigma[i];
        p_mean += p, p_n += p * n[i], p_nt += p * n_t, pt_mean += p_t, pt_n += p_t * n[i];
        row[i] += sigma[i] * n_t;  // the second term of the gradient of the norm's weight
      }
      p_mean /= T(N), p_n /= T(N), p_nt /= T(N), pt_mean /= T(N), pt_n /= T(N);
      for (Index i = 0; i < N; ++i) {
        const T n_t = rstd * (z[i] - mean_z - n[i] * mean_nz), p = weight[i] * sigma[i], p_t = weight_t[i] * sigma[i];
        behind[m * N + i] = rstd * (p_t - pt_mean - n[i] * pt_n) + rstd_t * (p - p_mean - n[i] * p_n) -
                            rstd * (n_t * p_n + n[i] * p_nt);
      }
    }
    call.kernels.norm_sweep(Sweep::adjoint, grad_y_t, behind, A, norm(call, saved), nullptr, reset, adjoint_t, sigma_t,
                            call.gradients[p_.norm_weight], call.gradients[p_.norm_bias], B, T_len, N);
  } else {
    call.kernels.sweep(grad_y_t, A, true, nullptr, reset, adjoint_t, B, T_len, N);
  }
  call.kernels.weight_grad(adjoint_t, y, call.state, reset, call.gradients[p_.A], B, T_len, N);
  call.kernels.weight_grad(saved.adjoint, y_t, nullptr, reset, call.second[p_.A], B, T_len, N);
  call.kernels.linear_grad(adjoint_t, nullptr, x, call.weights[p_.B], grad_x_t, call.gradients[p_.B],
                           parameter(call.gradients, p_.bias), M, I, N);
  if (!x_t) return;
  T* term = grad_x_t ? call.reserve(M * I) : nullptr;
  call.kernels.linear_grad(saved.adjoint, nullptr, x_t, call.direction[p_.B], term, call.second[p_.B], nullptr, M, I,
                           N);
  if (grad_x_t) add_to(grad_x_t, term, M * I);
}

template <class T>
int ScanStage<T>::step(StepBuilder& program, int x) const {
  const Index I = this->inputs, N = this->outputs;
  const int state = program.buffer(StepBuilder::kState, N), next = program.buffer(StepBuilder::kNext, N);
  program.load_state(state, N);
  program.affine(next, N, x, I, p_.B, state, N, p_.A, p_.bias, true);
  if (has_norm()) program.layer_norm(next, N, p_.norm_weight, p_.norm_bias, p_.eps);
  program.save_state(next, N);
  return next;
}

// DenseCell

template <class T>
Index DenseCell<T>::saved(const Tile& tile) const {
  Layout<T> layout;
  layout.shifted(tile.rows(), scan_.outputs);
  return layout.used() + scan_.saved(tile);
}

template <class T>
Index DenseCell<T>::tangents(const Tile& tile) const {
  Layout<T> layout;
  layout.shifted(tile.rows(), scan_.outputs);
  return layout.used() + scan_.tangents(tile);
}

template <class T>
Index DenseCell<T>::work(const Tile& tile) const {
  return tile.rows() * (this->inputs + this->outputs + 2 * scan_.outputs) + 64 + scan_.work(tile);
}

template <class T>
void DenseCell<T>::forward(Call<T> call, const T* x, T* y, T* block) const {
  const Index M = call.tile.rows(), I = this->inputs, H = this->outputs, N = scan_.outputs;
  Layout<T> layout(block);
  T *s = layout.shifted(M, N), *Dx = call.reserve(M * H);
  scan_.forward(call, x, s, block + layout.used());
  call.kernels.linear(x, call.weights[D_], nullptr, nullptr, false, Dx, M, I, H);
  call.kernels.linear(s, call.weights[C_], nullptr, Dx, false, y, M, N, H);
}

template <class T>
void DenseCell<T>::backward(Call<T> call, const T* x, const T*, T* block, const T* grad_y, T* grad_x) const {
  const Index M = call.tile.rows(), I = this->inputs, H = this->outputs, N = scan_.outputs;
  Layout<T> layout(block);
  T *s = layout.shifted(M, N), *grad_s = call.reserve(M * N), *term = call.reserve(M * I);
  call.kernels.linear_grad(grad_y, nullptr, s, call.weights[C_], grad_s, call.gradients[C_], nullptr, M, N, H);
  scan_.backward(call, x, s, block + layout.used(), grad_s, grad_x ? term : nullptr);
  call.kernels.linear_grad(grad_y, nullptr, x, call.weights[D_], grad_x, call.gradients[D_], nullptr, M, I, H);
  if (grad_x) add_to(grad_x, term, M * I);
}

template <class T>
void DenseCell<T>::tangent(Call<T> call, const T* x, const T* x_t, const T*, const T* block, const T*, T* y_t,
                           T* tangents) const {
  const Index M = call.tile.rows(), I = this->inputs, H = this->outputs, N = scan_.outputs;
  Layout<T> layout(const_cast<T*>(block)), layout_t(tangents);
  T *s = layout.shifted(M, N), *s_t = layout_t.shifted(M, N), *term = call.reserve(M * H);
  scan_.tangent(call, x, x_t, s, block + layout.used(), nullptr, s_t, tangents + layout_t.used());
  call.kernels.linear_tangent(s_t, call.direction[C_], nullptr, s, call.weights[C_], nullptr, nullptr, y_t, nullptr, M,
                              N, H);
  call.kernels.linear_tangent(x_t, call.direction[D_], nullptr, x, call.weights[D_], nullptr, nullptr, term, nullptr, M,
                              I, H);
  add_to(y_t, term, M * H);
}

template <class T>
void DenseCell<T>::backward_tangent(Call<T> call, const T* x, const T* x_t, const T*, const T*, const T* block,
                                    const T* tangents, const T* grad_y, T* grad_y_t, T* grad_x_t) const {
  const Index M = call.tile.rows(), I = this->inputs, H = this->outputs, N = scan_.outputs;
  Layout<T> layout(const_cast<T*>(block)), layout_t(const_cast<T*>(tangents));
  T *s = layout.shifted(M, N), *s_t = layout_t.shifted(M, N);
  T *grad_s_t = call.reserve(M * N), *term = call.reserve(M * N), *of_x = call.reserve(M * I);
  call.kernels.linear_grad(grad_y_t, nullptr, s, call.weights[C_], grad_s_t, call.gradients[C_], nullptr, M, N, H);
  call.kernels.linear_grad(grad_y, nullptr, s_t, call.direction[C_], term, call.second[C_], nullptr, M, N, H);
  add_to(grad_s_t, term, M * N);
  scan_.backward_tangent(call, x, x_t, s, s_t, block + layout.used(), tangents + layout_t.used(), nullptr, grad_s_t,
                         grad_x_t);
  call.kernels.linear_grad(grad_y_t, nullptr, x, call.weights[D_], grad_x_t ? of_x : nullptr, call.gradients[D_],
                           nullptr, M, I, H);
  if (grad_x_t) add_to(grad_x_t, of_x, M * I);
  if (!x_t) return;
  call.kernels.linear_grad(grad_y, nullptr, x_t, call.direction[D_], grad_x_t ? of_x : nullptr, call.second[D_],
                           nullptr, M, I, H);
  if (grad_x_t) add_to(grad_x_t, of_x, M * I);
}

template <class T>
int DenseCell<T>::step(StepBuilder& program, int x) const {
  const int s = scan_.step(program, x), y = program.buffer(StepBuilder::kOutput, this->outputs);
  program.affine(y, this->outputs, s, scan_.outputs, C_, x, this->inputs, D_, kAbsent);
  return y;
}

// LayerStage

template <class T>
typename LayerStage<T>::Saved LayerStage<T>::saved_at(T* block, const Tile& tile) const {
  const Index M = tile.rows(), H = this->outputs;
  Layout<T> layout(block);
  Saved saved{layout.shifted(M, H), layout.array(M * H), layout.array(M), layout.array(M), nullptr};
  saved.cell = block + layout.used();
  return saved;
}

template <class T>
Index LayerStage<T>::saved(const Tile& tile) const {
  const Index M = tile.rows(), H = this->outputs;
  Layout<T> layout;
  layout.shifted(M, H), layout.array(M * H), layout.array(M), layout.array(M);
  return layout.used() + cell_->saved(tile);
}

template <class T>
Index LayerStage<T>::tangents(const Tile& tile) const {
  Layout<T> layout;
  layout.shifted(tile.rows(), this->outputs);
  return layout.used() + cell_->tangents(tile);
}

template <class T>
Index LayerStage<T>::work(const Tile& tile) const {
  return tile.rows() * this->outputs + 16 + cell_->work(tile);
}

template <class T>
typename Kernels<T>::Norm LayerStage<T>::norm(const Call<T>& call, const Saved& saved) const {
  return {parameter(call.weights, weight_), parameter(call.weights, bias_), saved.mean, saved.rstd, eps_};
}

template <class T>
void LayerStage<T>::forward(Call<T> call, const T* x, T* y, T* block) const {
  const Saved saved = saved_at(block, call.tile);
  cell_->forward(call, x, saved.z, saved.cell);
  call.kernels.output_norm(saved.z, norm(call, saved), residual_ ? x : nullptr, y, call.tile.rows(), this->outputs);
}

template <class T>
void LayerStage<T>::backward(Call<T> call, const T* x, const T*, T* block, const T* grad_y, T* grad_x) const {
  const Index M = call.tile.rows(), H = this->outputs;
  const Saved saved = saved_at(block, call.tile);
  call.kernels.output_norm_grad(grad_y, saved.z, norm(call, saved), saved.grad_z, parameter(call.gradients, weight_),
                                parameter(call.gradients, bias_), M, H);
  cell_->backward(call, x, saved.z, saved.cell, saved.grad_z, grad_x);
  if (residual_ && grad_x) add_to(grad_x, grad_y, M * H);
}

template <class T>
void LayerStage<T>::tangent(Call<T> call, const T* x, const T* x_t, const T*, const T* block, const T*, T* y_t,
                            T* tangents) const {
  const Index M = call.tile.rows(), H = this->outputs;
  const Saved saved = saved_at(const_cast<T*>(block), call.tile);
  Layout<T> layout(tangents);
  T* z_t = layout.shifted(M, H);
  cell_->tangent(call, x, x_t, saved.z, saved.cell, saved.grad_z, z_t, tangents + layout.used());
  call.kernels.output_norm_tangent(saved.z, z_t, norm(call, saved), parameter(call.direction, weight_),
                                   parameter(call.direction, bias_), residual_ ? x_t : nullptr, y_t, M, H);
}

template <class T>
void LayerStage<T>::backward_tangent(Call<T> call, const T* x, const T* x_t, const T*, const T*, const T* block,
                                     const T* tangents, const T* grad_y, T* grad_y_t, T* grad_x_t) const {
  const Index M = call.tile.rows(), H = this->outputs;
  const Saved saved = saved_at(const_cast<T*>(block), call.tile);
  Layout<T> layout(const_cast<T*>(tangents));
  T *z_t = layout.shifted(M, H), *grad_z_t = call.reserve(M * H);
  call.kernels.output_norm_grad_tangent(grad_y, grad_y_t, saved.z, z_t, norm(call, saved),
                                        parameter(call.direction, weight_), parameter(call.direction, bias_), grad_z_t,
                                        parameter(call.gradients, weight_), parameter(call.gradients, bias_), M, H);
  cell_->backward_tangent(call, x, x_t, saved.z, z_t, saved.cell, tangents + layout.used(), saved.grad_z, grad_z_t,
                          grad_x_t);
  if (residual_ && grad_x_t) add_to(grad_x_t, grad_y_t, M * H);
}

template <class T>
int LayerStage<T>::step(StepBuilder& program, int x) const {
  const Index H = this->outputs;
  const int z = cell_->step(program, x);
  if (weight_ != kAbsent) program.layer_norm(z, H, weight_, bias_, eps_);
  const int y = residual_ ? x : program.other(x, H);
  program.tanh(y, z, residual_);
  return y;
}

// JoinStage

template <class T>
Index JoinStage<T>::tangents(const Tile& tile) const {
  return tile.rows() * this->outputs;
}

template <class T>
Index JoinStage<T>::work(const Tile& tile) const {
  return tile.rows() * (this->outputs + this->inputs) + 32;
}

template <class T>
void JoinStage<T>::forward(Call<T> call, const T* x, T* y, T*) const {
  const Index M = call.tile.rows(), O = this->outputs;
  T* term = call.reserve(M * O);
  call.kernels.linear(call.input, call.weights[V_], parameter(call.weights, bias_), nullptr, false, term, M, I_, O);
  call.kernels.linear(x, call.weights[U_], nullptr, term, true, y, M, this->inputs, O);
}

template <class T>
void JoinStage<T>::backward(Call<T> call, const T* x, const T* y, T*, const T* grad_y, T* grad_x) const {
  const Index M = call.tile.rows(), O = this->outputs;
  call.kernels.linear_grad(grad_y, y, call.input, call.weights[V_], nullptr, call.gradients[V_],
                           parameter(call.gradients, bias_), M, I_, O);
  call.kernels.linear_grad(grad_y, y, x, call.weights[U_], grad_x, call.gradients[U_], nullptr, M, this->inputs, O);
}

template <class T>
void JoinStage<T>::tangent(Call<T> call, const T* x, const T* x_t, const T* y, const T*, const T* grad_y, T* y_t,
                           T* slope_t) const {
  const Index M = call.tile.rows(), O = this->outputs;
  T* term = call.reserve(M * O);
  call.kernels.linear(call.input, call.direction[V_], parameter(call.direction, bias_), nullptr, false, term, M, I_, O);
  call.kernels.linear_tangent(x_t, call.direction[U_], nullptr, x, call.weights[U_], nullptr, nullptr, y_t, nullptr, M,
                              this->inputs, O);
  for (Index i = 0; i < M * O; ++i) {
    const T before_tanh = y_t[i] + term[i];
    slope_t[i] = T(-2) * y[i] * grad_y[i] * before_tanh;
    y_t[i] = (T(1) - y[i] * y[i]) * before_tanh;
  }
}

template <class T>
void JoinStage<T>::backward_tangent(Call<T> call, const T* x, const T* x_t, const T* y, const T*, const T*,
                                    const T* slope_t, const T* grad_y, T* grad_y_t, T* grad_x_t) const {
  const Index M = call.tile.rows(), I = this->inputs, O = this->outputs;
  add_to(grad_y_t, slope_t, M * O);
  backward(call, x, y, nullptr, grad_y_t, grad_x_t);
  if (!x_t && !grad_x_t) return;
  T* term = grad_x_t ? call.reserve(M * I) : nullptr;
  call.kernels.linear_grad(grad_y, y, x_t ? x_t : x, call.direction[U_], term, x_t ? call.second[U_] : nullptr, nullptr,
                           M, I, O);
  if (grad_x_t) add_to(grad_x_t, term, M * I);
}

template <class T>
int JoinStage<T>::step(StepBuilder& program, int x) const {
  const int y = program.buffer(StepBuilder::kJoin, this->outputs);
  program.affine(y, this->outputs, StepBuilder::kInput, I_, V_, x, this->inputs, U_, bias_);
  program.tanh(y, y);
  return y;
}

// SkipStage

template <class T>
Index SkipStage<T>::work(const Tile& tile) const {
  return tile.rows() * (this->inputs + this->outputs) + 32;
}

template <class T>
void SkipStage<T>::forward(Call<T> call, const T* x, T* y, T*) const {
  const Index M = call.tile.rows(), O = this->outputs;
  call.kernels.linear(x, call.weights[W_], parameter(call.weights, bias_), nullptr, false, y, M, this->inputs, O);
  call.kernels.linear(call.input, call.weights[D_], nullptr, y, false, y, M, I_, O);
}

template <class T>
void SkipStage<T>::backward(Call<T> call, const T* x, const T*, T*, const T* grad_y, T* grad_x) const {
  const Index M = call.tile.rows(), O = this->outputs;
  call.kernels.linear_grad(grad_y, nullptr, x, call.weights[W_], grad_x, call.gradients[W_],
                           parameter(call.gradients, bias_), M, this->inputs, O);
  call.kernels.linear_grad(grad_y, nullptr, call.input, call.weights[D_], nullptr, call.gradients[D_], nullptr, M, I_,
                           O);
}

template <class T>
void SkipStage<T>::tangent(Call<T> call, const T* x, const T* x_t, const T*, const T*, const T*, T* y_t, T*) const {
  const Index M = call.tile.rows(), O = this->outputs;
  call.kernels.linear_tangent(x_t, call.direction[W_], parameter(call.direction, bias_), x, call.weights[W_], nullptr,
                              nullptr, y_t, nullptr, M, this->inputs, O);
  call.kernels.linear(call.input, call.direction[D_], nullptr, y_t, false, y_t, M, I_, O);
}

template <class T>
void SkipStage<T>::backward_tangent(Call<T> call, const T* x, const T* x_t, const T* y, const T*, const T*, const T*,
                                    const T* grad_y, T* grad_y_t, T* grad_x_t) const {
  const Index M = call.tile.rows(), I = this->inputs, O = this->outputs;
  backward(call, x, y, nullptr, grad_y_t, grad_x_t);
  if (!x_t && !grad_x_t) return;
  T* term = grad_x_t ? call.reserve(M * I) : nullptr;
  call.kernels.linear_grad(grad_y, nullptr, x_t ? x_t : x, call.direction[W_], term, x_t ? call.second[W_] : nullptr,
                           nullptr, M, I, O);
  if (grad_x_t) add_to(grad_x_t, term, M * I);
}

template <class T>
int SkipStage<T>::step(StepBuilder& program, int x) const {
  const int y = program.other(x, this->outputs);
  program.affine(y, this->outputs, x, this->inputs, W_, StepBuilder::kInput, I_, D_, bias_);
  return y;
}

#define SSM_FAST_STAGES(T)       \
  template class LinearStage<T>; \
  template class ScanStage<T>;   \
  template class DenseCell<T>;   \
  template class LayerStage<T>;  \
  template class JoinStage<T>;   \
  template class SkipStage<T>;
SSM_FAST_STAGES(float)
SSM_FAST_STAGES(double)

}  // namespace ssm_fast
