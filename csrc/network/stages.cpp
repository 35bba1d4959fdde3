// The stages of this package's models.
#include <cstring>
#include <map>
#include <stdexcept>

#include "stage.h"

namespace ssm_fast {
namespace {

// y = [tanh] (W x + b [+ V x0]), x0 the network's input.
template <class T>
class LinearStage final : public Stage<T> {
 public:
  LinearStage(Index I, Index H, Index O, int W, int bias, int V, bool tanh)
      : Stage<T>(H, O), I_(I), W_(W), bias_(bias), V_(V), tanh_(tanh) {}

  Index saved_t(const Tile& tile) const override { return tanh_ ? tile.rows() * this->outputs : 0; }
  Index work(const Tile& tile) const override { return tile.rows() * (this->inputs + this->outputs) + 32; }

  void forward(Call<T> c) const override {
    const Index M = c.tile.rows(), H = this->inputs, O = this->outputs;
    const T *bias = c.weight(bias_), *term = nullptr;
    if (V_ != kAbsent) {
      T* Vx = c.reserve(M * O);
      c.kernels.linear(c.input, c.weight(V_), bias, nullptr, false, Vx, M, I_, O);
      bias = nullptr, term = Vx;
    }
    c.kernels.linear(c.x, c.weight(W_), bias, term, tanh_, c.y, M, H, O);
  }

  void backward(Call<T> c) const override { products(c, c.grad_y, c.grad_x); }

  // With a tanh, saved_t is the tangent of its slope times grad_y, divided by the slope: -2 y grad_y (W x + ..)_t.
  void tangent(Call<T> c) const override {
    const Index M = c.tile.rows(), H = this->inputs, O = this->outputs;
    if (V_ == kAbsent) {
      return c.kernels.linear_tangent(c.x_t, c.tangent(W_), c.tangent(bias_), c.x, c.weight(W_), tanh_ ? c.y : nullptr,
                                      tanh_ ? c.grad_y : nullptr, c.y_t, tanh_ ? c.saved_t : nullptr, M, H, O);
    }
    c.kernels.linear_tangent(c.x_t, c.tangent(W_), c.tangent(bias_), c.x, c.weight(W_), nullptr, nullptr, c.y_t,
                             nullptr, M, H, O);
    c.kernels.linear(c.input, c.tangent(V_), nullptr, c.y_t, false, c.y_t, M, I_, O);
    for (Index i = 0; tanh_ && i < M * O; ++i) {
      c.saved_t[i] = T(-2) * c.y[i] * c.grad_y[i] * c.y_t[i];
      c.y_t[i] *= T(1) - c.y[i] * c.y[i];
    }
  }

  void backward_tangent(Call<T> c) const override {
    const Index M = c.tile.rows(), H = this->inputs, O = this->outputs;
    if (tanh_) add_to(c.grad_y_t, c.saved_t, M * O);
    products(c, c.grad_y_t, c.grad_x_t);
    if (!c.x_t && !c.grad_x_t) return;
    T* term = c.grad_x_t ? c.reserve(M * H) : nullptr;
    c.kernels.linear_grad(c.grad_y, tanh_ ? c.y : nullptr, c.x_t ? c.x_t : c.x, c.tangent(W_), term,
                          c.x_t ? c.second[W_] : nullptr, nullptr, M, H, O);
    if (term) add_to(c.grad_x_t, term, M * H);
  }

  int step(StepBuilder& program, int x) const override {
    const int y = program.other(x, this->outputs);
    if (V_ == kAbsent) {
      program.affine(y, this->outputs, x, this->inputs, W_, bias_);
    } else {
      program.affine(y, this->outputs, StepBuilder::kInput, I_, V_, x, this->inputs, W_, bias_);
    }
    if (tanh_) program.tanh(y, y);
    return y;
  }

 private:
  void products(const Call<T>& c, const T* grad_y, T* grad_x) const {
    const Index M = c.tile.rows(), H = this->inputs, O = this->outputs;
    const T* y = tanh_ ? c.y : nullptr;
    c.kernels.linear_grad(grad_y, y, c.x, c.weight(W_), grad_x, c.gradient(W_), c.gradient(bias_), M, H, O);
    if (V_ == kAbsent) return;
    c.kernels.linear_grad(grad_y, y, c.input, c.weight(V_), nullptr, c.gradient(V_), nullptr, M, I_, O);
  }

  const Index I_;
  const int W_, bias_, V_;
  const bool tanh_;
};

// s_t = A m_t s_{t-1} + u_t, u = B x + b; with a norm s_t = LN(A m_t s_{t-1} + u_t) weight + bias.
struct ScanParameters {
  int A, B, bias, norm_weight, norm_bias;
  double eps;
};

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
class ScanStage final : public Stage<T> {
 public:
  ScanStage(Index I, Index N, ScanParameters p) : Stage<T>(I, N, N), p_(p) {}

  Index saved(const Tile& tile) const override { return arrays(nullptr, tile).used; }
  Index saved_t(const Tile& tile) const override { return has_norm() ? tile.rows() * this->outputs : 0; }  // z_t
  Index work(const Tile& tile) const override { return tile.rows() * (3 * this->outputs + this->inputs) + 64; }

  void forward(Call<T> c) const override {
    const auto [B, T_len, reset] = c.tile;
    const Index M = c.tile.rows(), N = this->outputs;
    T* u = c.reserve(M * N);
    c.kernels.linear(c.x, c.weight(p_.B), c.weight(p_.bias), nullptr, false, u, M, this->inputs, N);
    if (has_norm()) {
      c.kernels.norm_sweep(Sweep::forward, u, nullptr, c.weight(p_.A), norm(c), c.state, reset, c.y, nullptr, nullptr,
                           nullptr, B, T_len, N);
    } else {
      c.kernels.sweep(u, c.weight(p_.A), false, c.state, reset, c.y, B, T_len, N);
    }
  }

  void backward(Call<T> c) const override {
    const Saved saved = arrays(c.saved, c.tile);
    adjoint(c, c.grad_y, nullptr, saved.adjoint, saved.sigma);
    drive_gradients(c, saved.adjoint, c.grad_x);
  }

  void tangent(Call<T> c) const override {
    const auto [B, T_len, reset] = c.tile;
    const Index M = c.tile.rows(), N = this->outputs;
    T *u_t = c.reserve(M * N), *scratch = c.reserve(M * N);
    c.kernels.linear_tangent(c.x_t, c.tangent(p_.B), c.tangent(p_.bias), c.x, c.weight(p_.B), nullptr, nullptr, u_t,
                             nullptr, M, this->inputs, N);
    add_entering(c.kernels, c.tile, c.y, c.state, c.tangent(p_.A), u_t, scratch, N);
    if (!has_norm()) return c.kernels.sweep(u_t, c.weight(p_.A), false, nullptr, reset, c.y_t, B, T_len, N);
    const T *n = arrays(c.saved, c.tile).n, *weight_t = c.tangent(p_.norm_weight), *bias_t = c.tangent(p_.norm_bias);
    for (Index i = 0; i < M * N; ++i) scratch[i] = n[i] * weight_t[i % N] + bias_t[i % N];
    c.kernels.norm_sweep(Sweep::tangent, u_t, scratch, c.weight(p_.A), norm(c), nullptr, reset, c.y_t, c.saved_t,
                         nullptr, nullptr, B, T_len, N);
  }

  void backward_tangent(Call<T> c) const override {
    const auto [B, T_len, reset] = c.tile;
    const Index M = c.tile.rows(), I = this->inputs, N = this->outputs;
    const Saved saved = arrays(c.saved, c.tile);
    T *adjoint_t = c.reserve(M * N), *scratch = c.reserve(M * N), *sigma_t = has_norm() ? c.reserve(M * N) : nullptr;
    add_leaving(c.kernels, c.tile, saved.adjoint, c.tangent(p_.A), c.grad_y_t, scratch, N);
    if (has_norm()) norm_tangent(c, saved, scratch);
    adjoint(c, c.grad_y_t, has_norm() ? scratch : nullptr, adjoint_t, sigma_t);
    drive_gradients(c, adjoint_t, c.grad_x_t);
    c.kernels.weight_grad(saved.adjoint, c.y_t, nullptr, reset, c.second[p_.A], B, T_len, N);
    if (!c.x_t) return;
    T* term = c.grad_x_t ? c.reserve(M * I) : nullptr;
    c.kernels.linear_grad(saved.adjoint, nullptr, c.x_t, c.tangent(p_.B), term, c.second[p_.B], nullptr, M, I, N);
    if (term) add_to(c.grad_x_t, term, M * I);
  }

  int step(StepBuilder& program, int x) const override {
    const Index N = this->outputs;
    const int state = program.buffer(StepBuilder::kState, N), next = program.buffer(StepBuilder::kNext, N);
    program.load_state(state, N);
    program.affine(next, N, x, this->inputs, p_.B, state, N, p_.A, p_.bias, true);
    if (has_norm()) program.layer_norm(next, N, p_.norm_weight, p_.norm_bias, p_.eps);
    program.save_state(next, N);
    return next;
  }

 private:
  struct Saved {
    T *adjoint, *n, *rstd, *sigma;  // the last three with a norm
    Index used;
  };

  bool has_norm() const { return p_.norm_weight != kAbsent; }

  Saved arrays(T* block, const Tile& tile) const {
    const Index N = this->outputs, rows = tile.rows();
    Layout<T> layout(block);
    Saved saved{layout.array((rows + 1) * N), nullptr, nullptr, nullptr, 0};  // the adjoints have a row behind them
    if (has_norm()) {
      saved.n = layout.array(rows * N), saved.rstd = layout.array(rows), saved.sigma = layout.array(rows * N);
    }
    saved.used = layout.used();
    return saved;
  }

  typename Kernels<T>::StateNorm norm(const Call<T>& c) const {
    const Saved saved = arrays(c.saved, c.tile);
    return {c.weight(p_.norm_weight), c.weight(p_.norm_bias), saved.n, saved.rstd, T(p_.eps)};
  }

  // The adjoint sweep, with the gradients of the norm.
  void adjoint(const Call<T>& c, const T* grad_s, const T* behind, T* to, T* sigma) const {
    const auto [B, T_len, reset] = c.tile;
    if (has_norm()) {
      c.kernels.norm_sweep(Sweep::adjoint, grad_s, behind, c.weight(p_.A), norm(c), nullptr, reset, to, sigma,
                           c.gradient(p_.norm_weight), c.gradient(p_.norm_bias), B, T_len, this->outputs);
    } else {
      c.kernels.sweep(grad_s, c.weight(p_.A), true, nullptr, reset, to, B, T_len, this->outputs);
    }
  }

  // Those of A, B, the bias and x, from adjoints.
  void drive_gradients(const Call<T>& c, const T* adjoint, T* grad_x) const {
    const auto [B, T_len, reset] = c.tile;
    c.kernels.weight_grad(adjoint, c.y, c.state, reset, c.gradient(p_.A), B, T_len, this->outputs);
    c.kernels.linear_grad(adjoint, nullptr, c.x, c.weight(p_.B), grad_x, c.gradient(p_.B), c.gradient(p_.bias),
                          c.tile.rows(), this->inputs, this->outputs);
  }

  // The tangent of the norm's Jacobian times weight sigma, and the second term of the gradient of the norm's weight.
  // With n_t = rstd P(z_t), rstd_t = -rstd^2 mean(n z_t) and p = weight sigma, that of rstd P(p) is
  // rstd P(p_t) + rstd_t P(p) - rstd (n_t mean(p n) + n mean(p n_t)); docs/ops/norm_scan.md.
  void norm_tangent(const Call<T>& c, const Saved& saved, T* to) const {
    const Index N = this->outputs;
    const T *weight = c.weight(p_.norm_weight), *weight_t = c.tangent(p_.norm_weight);
    T* grad_weight = c.second[p_.norm_weight];
    std::memset(grad_weight, 0, std::size_t(N) * sizeof(T));
    for (Index m = 0; m < c.tile.rows(); ++m) {
      const T *n = saved.n + m * N, *sigma = saved.sigma + m * N, *z = c.saved_t + m * N, rstd = saved.rstd[m];
      T mean_z = 0, mean_nz = 0;
      for (Index i = 0; i < N; ++i) mean_z += z[i] / T(N), mean_nz += n[i] * z[i] / T(N);
      const auto n_t = [&](Index i) { return rstd * (z[i] - mean_z - n[i] * mean_nz); };
      T p_mean = 0, p_n = 0, p_nt = 0, pt_mean = 0, pt_n = 0;
      for (Index i = 0; i < N; ++i) {
        const T p = weight[i] * sigma[i] / T(N), p_t = weight_t[i] * sigma[i] / T(N);
        p_mean += p, p_n += p * n[i], p_nt += p * n_t(i), pt_mean += p_t, pt_n += p_t * n[i];
        grad_weight[i] += sigma[i] * n_t(i);
      }
      for (Index i = 0; i < N; ++i) {
        const T p = weight[i] * sigma[i], p_t = weight_t[i] * sigma[i];
        to[m * N + i] = rstd * (p_t - pt_mean - n[i] * pt_n) - rstd * rstd * mean_nz * (p - p_mean - n[i] * p_n) -
                        rstd * (n_t(i) * p_n + n[i] * p_nt);
      }
    }
  }

  const ScanParameters p_;
};

// The dense cell: y = C s + D x of the states s of a ScanStage.
template <class T>
class DenseCell final : public Stage<T> {
 public:
  DenseCell(Index I, Index H, Index N, ScanParameters scan, int C, int D)
      : Stage<T>(I, H, N), scan_(I, N, scan), C_(C), D_(D) {}

  Index saved(const Tile& tile) const override { return states(nullptr, tile).used + scan_.saved(tile); }
  Index saved_t(const Tile& tile) const override { return states(nullptr, tile).used + scan_.saved_t(tile); }
  Index work(const Tile& tile) const override {
    return tile.rows() * (this->inputs + this->outputs + 2 * scan_.outputs) + 64 + scan_.work(tile);
  }

  void forward(Call<T> c) const override {
    const Index M = c.tile.rows(), H = this->outputs;
    T* Dx = c.reserve(M * H);
    const Call<T> scan = of_scan(c);
    scan_.forward(scan);
    c.kernels.linear(c.x, c.weight(D_), nullptr, nullptr, false, Dx, M, this->inputs, H);
    c.kernels.linear(scan.y, c.weight(C_), nullptr, Dx, false, c.y, M, scan_.outputs, H);
  }

  void backward(Call<T> c) const override {
    const Index M = c.tile.rows(), I = this->inputs, H = this->outputs, N = scan_.outputs;
    T *grad_s = c.reserve(M * N), *term = c.grad_x ? c.reserve(M * I) : nullptr;
    Call<T> scan = of_scan(c);
    scan.grad_y = grad_s, scan.grad_x = term;
    c.kernels.linear_grad(c.grad_y, nullptr, scan.y, c.weight(C_), grad_s, c.gradient(C_), nullptr, M, N, H);
    scan_.backward(scan);
    c.kernels.linear_grad(c.grad_y, nullptr, c.x, c.weight(D_), c.grad_x, c.gradient(D_), nullptr, M, I, H);
    if (term) add_to(c.grad_x, term, M * I);
  }

  void tangent(Call<T> c) const override {
    const Index M = c.tile.rows(), H = this->outputs;
    T* term = c.reserve(M * H);
    const Call<T> scan = of_scan(c);
    scan_.tangent(scan);
    c.kernels.linear_tangent(scan.y_t, c.tangent(C_), nullptr, scan.y, c.weight(C_), nullptr, nullptr, c.y_t, nullptr,
                             M, scan_.outputs, H);
    c.kernels.linear_tangent(c.x_t, c.tangent(D_), nullptr, c.x, c.weight(D_), nullptr, nullptr, term, nullptr, M,
                             this->inputs, H);
    add_to(c.y_t, term, M * H);
  }

  void backward_tangent(Call<T> c) const override {
    const Index M = c.tile.rows(), I = this->inputs, H = this->outputs, N = scan_.outputs;
    T *grad_s_t = c.reserve(M * N), *term = c.reserve(M * N), *of_x = c.grad_x_t ? c.reserve(M * I) : nullptr;
    Call<T> scan = of_scan(c);
    scan.grad_y_t = grad_s_t;
    c.kernels.linear_grad(c.grad_y_t, nullptr, scan.y, c.weight(C_), grad_s_t, c.gradient(C_), nullptr, M, N, H);
    c.kernels.linear_grad(c.grad_y, nullptr, scan.y_t, c.tangent(C_), term, c.second[C_], nullptr, M, N, H);
    add_to(grad_s_t, term, M * N);
    scan_.backward_tangent(scan);
    const auto add = [&] {
      if (of_x) add_to(c.grad_x_t, of_x, M * I);
    };
    c.kernels.linear_grad(c.grad_y_t, nullptr, c.x, c.weight(D_), of_x, c.gradient(D_), nullptr, M, I, H);
    add();
    if (!c.x_t) return;
    c.kernels.linear_grad(c.grad_y, nullptr, c.x_t, c.tangent(D_), of_x, c.second[D_], nullptr, M, I, H);
    add();
  }

  int step(StepBuilder& program, int x) const override {
    const int s = scan_.step(program, x), y = program.buffer(StepBuilder::kOutput, this->outputs);
    program.affine(y, this->outputs, s, scan_.outputs, C_, x, this->inputs, D_, kAbsent);
    return y;
  }

 private:
  struct States {
    T* at;
    Index used;
  };
  States states(T* block, const Tile& tile) const {
    Layout<T> layout(block);
    T* at = layout.shifted(tile.rows(), scan_.outputs);
    return {at, layout.used()};
  }
  Call<T> of_scan(Call<T> c) const {
    const States s = states(c.saved, c.tile), s_t = states(c.saved_t, c.tile);
    c.y = s.at, c.saved += s.used;
    c.y_t = s_t.at;
    if (c.saved_t) c.saved_t += s_t.used;
    return c;
  }

  const ScanStage<T> scan_;
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
        eps_(eps),
        residual_(residual) {}

  Index saved(const Tile& tile) const override { return arrays(nullptr, tile).used + cell_->saved(tile); }
  Index saved_t(const Tile& tile) const override {
    Layout<T> layout;
    layout.shifted(tile.rows(), this->outputs);
    return layout.used() + cell_->saved_t(tile);
  }
  Index work(const Tile& tile) const override { return tile.rows() * this->outputs + 16 + cell_->work(tile); }

  void forward(Call<T> c) const override {
    const Call<T> cell = of_cell(c);
    cell_->forward(cell);
    c.kernels.output_norm(cell.y, norm(c), residual_ ? c.x : nullptr, c.y, c.tile.rows(), this->outputs);
  }

  void backward(Call<T> c) const override {
    const Index M = c.tile.rows(), H = this->outputs;
    const Call<T> cell = of_cell(c);
    c.kernels.output_norm_grad(c.grad_y, cell.y, norm(c), cell.grad_y, c.gradient(weight_), c.gradient(bias_), M, H);
    cell_->backward(cell);
    if (residual_ && c.grad_x) add_to(c.grad_x, c.grad_y, M * H);
  }

  void tangent(Call<T> c) const override {
    const Call<T> cell = of_cell(c);
    cell_->tangent(cell);
    c.kernels.output_norm_tangent(cell.y, cell.y_t, norm(c), c.tangent(weight_), c.tangent(bias_),
                                  residual_ ? c.x_t : nullptr, c.y_t, c.tile.rows(), this->outputs);
  }

  void backward_tangent(Call<T> c) const override {
    const Index M = c.tile.rows(), H = this->outputs;
    T* grad_z_t = c.reserve(M * H);
    Call<T> cell = of_cell(c);
    cell.grad_y_t = grad_z_t;
    c.kernels.output_norm_grad_tangent(c.grad_y, c.grad_y_t, cell.y, cell.y_t, norm(c), c.tangent(weight_),
                                       c.tangent(bias_), grad_z_t, c.gradient(weight_), c.gradient(bias_), M, H);
    cell_->backward_tangent(cell);
    if (residual_ && c.grad_x_t) add_to(c.grad_x_t, c.grad_y_t, M * H);
  }

  int step(StepBuilder& program, int x) const override {
    const Index H = this->outputs;
    const int z = cell_->step(program, x);
    if (weight_ != kAbsent) program.layer_norm(z, H, weight_, bias_, eps_);
    const int y = residual_ ? x : program.other(x, H);
    program.tanh(y, z, residual_);
    return y;
  }

 private:
  struct Saved {
    T *z, *grad_z, *mean, *rstd;
    Index used;
  };
  Saved arrays(T* block, const Tile& tile) const {
    const Index M = tile.rows(), H = this->outputs;
    Layout<T> layout(block);
    Saved saved{layout.shifted(M, H), layout.array(M * H), layout.array(M), layout.array(M), 0};
    saved.used = layout.used();
    return saved;
  }
  typename Kernels<T>::Norm norm(const Call<T>& c) const {
    const Saved saved = arrays(c.saved, c.tile);
    return {c.weight(weight_), c.weight(bias_), saved.mean, saved.rstd, T(eps_)};
  }
  Call<T> of_cell(Call<T> c) const {
    const Saved saved = arrays(c.saved, c.tile);
    c.y = saved.z, c.grad_y = saved.grad_z, c.saved += saved.used;
    Layout<T> layout(c.saved_t);
    c.y_t = layout.shifted(c.tile.rows(), this->outputs);
    if (c.saved_t) c.saved_t += layout.used();
    return c;
  }

  const std::unique_ptr<Stage<T>> cell_;
  const int weight_, bias_;
  const double eps_;
  const bool residual_;
};

}  // namespace

template <class T>
std::unique_ptr<Stage<T>> make_stage(const StageDescription& d) {
  static const std::map<std::string, std::size_t> kParameters{{"linear", 3}, {"scan", 5}, {"dense", 7}, {"layer", 2}};
  const auto found = kParameters.find(d.kind);
  if (found == kParameters.end() || found->second != d.parameters.size() || (d.kind == "layer") != !d.cell.empty()) {
    throw std::invalid_argument("no stage '" + d.kind + "' of " + std::to_string(d.parameters.size()) + " parameters");
  }
  const std::vector<int>& p = d.parameters;
  if (d.kind == "linear") {
    return std::make_unique<LinearStage<T>>(d.observations, d.inputs, d.outputs, p[0], p[1], p[2], d.tanh);
  }
  if (d.kind == "scan") {
    return std::make_unique<ScanStage<T>>(d.inputs, d.state, ScanParameters{p[0], p[1], p[2], p[3], p[4], d.eps});
  }
  if (d.kind == "dense") {
    const ScanParameters scan{p[0], p[1], p[2], p[5], p[6], d.eps};
    return std::make_unique<DenseCell<T>>(d.inputs, d.outputs, d.state, scan, p[3], p[4]);
  }
  return std::make_unique<LayerStage<T>>(make_stage<T>(d.cell[0]), p[0], p[1], d.eps, d.residual);
}

template std::unique_ptr<Stage<float>> make_stage(const StageDescription&);
template std::unique_ptr<Stage<double>> make_stage(const StageDescription&);

}  // namespace ssm_fast
