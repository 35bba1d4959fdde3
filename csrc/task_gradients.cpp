#include "task_gradients.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#include "passes.h"

namespace ssm_fast {
namespace {

constexpr Index kTileRows = 512;   // rows whose activations stay in a core's cache from pass to pass
constexpr Index kTileScans = 6;    // sequences that a scan advances together: no tile has fewer
constexpr Index kLoneRows = 8192;  // of a task that is alone and shared by all threads

// Where each weight stands in a vector of all.
template <class T>
struct Weights {
  T *A, *B, *D, *C1, *c1, *C2, *c2;
};

template <class T>
Weights<T> weights_at(T* vector, Index I, Index N, Index H, Index O) {
  const auto take = [&](Index elements) { return std::exchange(vector, vector + elements); };
  T *A = take(N * N), *B = take(N * I), *D = take(O * I), *C1 = take(H * N), *c1 = take(H), *C2 = take(O * H);
  return {A, B, D, C1, c1, C2, vector};
}

Index weights_size(Index I, Index N, Index H, Index O) { return N * N + (N + O) * I + (N + 1) * H + (H + 1) * O; }

// What the passes over some rows leave for the second derivative: states, what the tanh gave, the adjoint states, and
// the gradient with respect to the outputs.
template <class T>
struct Activations {
  T *s, *h, *adjoint, *grad_y;
  Activations from(Index row, Index N, Index H, Index O) const {
    return {s + row * N, h + row * H, adjoint + row * N, grad_y + row * O};
  }
};

// The gradient of one task after the other.
template <class T>
class OneTask {
 public:
  explicit OneTask(const TaskGradients<T>& p);
  void run(Index g);

 private:
  Weights<const T> weights_of(const T* vector) const { return weights_at(vector, p_.I, p_.N, p_.H, p_.O); }
  template <class F>
  void for_tiles(const Examples<T>& e, F f);
  double gradient(const Examples<T>& e, const T* weights, const Activations<T>* kept, T* out);
  void curvature(const Examples<T>& e, const T* weights, const T* direction, const Activations<T>& kept, T* out);
  double loss(const Examples<T>& e, Index first, Index rows, T* y) const;
  void turn_loss(const Examples<T>& e, Index first, Index rows, const T* grad_y, T* y_t) const;
  void enter(const Examples<T>& tile, const T* s, const T* A_t, T* u);
  void leave(const Examples<T>& tile, const T* adjoint, const T* A_t, T* grad_s);
  Index tile_sequences(const Examples<T>& e) const;

  const TaskGradients<T>& p_;
  const Index P_;
  Passes<T> passes_;
  Arrays<T> arrays_;
  std::vector<Activations<T>> kept_;     // of the support set, of each inner step
  std::vector<T*> weights_, gradients_;  // of each inner step
  Activations<T> tile_;
  T *part_, *other_, *direction_;  // [P]
  T *narrow_[3], *wide_[3], *y_;   // [rows of a tile, N], [.., H] and [.., O]
};

template <class T>
Index OneTask<T>::tile_sequences(const Examples<T>& e) const {
  const Index by_rows = (p_.G == 1 ? kLoneRows : kTileRows) / e.T_len;
  const Index most = by_rows > kTileScans ? by_rows : kTileScans, tiles = (e.B + most - 1) / most;
  return (e.B + tiles - 1) / tiles;
}

template <class T>
OneTask<T>::OneTask(const TaskGradients<T>& p) : p_(p), P_(weights_size(p.I, p.N, p.H, p.O)) {
  Index rows = 0, tile = 0;
  for (Index g = 0; g < p.G; ++g) {
    for (const Examples<T>* e : {p.support + g, p.query + g}) {
      const Index of_tile = tile_sequences(*e) * e->T_len;
      if (e == p.support + g && e->B * e->T_len > rows) rows = e->B * e->T_len;
      if (of_tile > tile) tile = of_tile;
    }
  }
  kept_.resize(std::size_t(p.first_order ? 0 : p.K));
  weights_.resize(std::size_t(p.K)), gradients_.resize(std::size_t(p.K));
  arrays_.place([&](auto take) {
    // A row before the states and one behind the adjoints, which shifted products read.
    for (Activations<T>& a : kept_) {
      a = {take((rows + 1) * p.N), take(rows * p.H), take((rows + 1) * p.N), take(rows * p.O)};
    }
    for (T*& vector : weights_) vector = take(P_);
    for (T*& vector : gradients_) vector = take(P_);
    part_ = take(P_), other_ = take(P_), direction_ = take(P_);
    for (T*& buffer : narrow_) buffer = take(tile * p.N);
    for (T*& buffer : wide_) buffer = take(tile * p.H);
    y_ = take(tile * p.O);
  });
  for (Activations<T>& a : kept_) {
    std::memset(a.s, 0, std::size_t(p.N) * sizeof(T));
    std::memset(a.adjoint + rows * p.N, 0, std::size_t(p.N) * sizeof(T));
    a.s += p.N;
  }
  tile_ = {narrow_[1], wide_[0], narrow_[2], y_};
}

// Calls f(sequences of the tile, first row) for tiles of whole sequences.
template <class T>
template <class F>
void OneTask<T>::for_tiles(const Examples<T>& e, F f) {
  const Index most = tile_sequences(e);
  for (Index b = 0; b < e.B; b += most) {
    const Index row = b * e.T_len;
    Examples<T> tile = e;
    tile.B = e.B - b < most ? e.B - b : most;
    tile.x = e.x + row * p_.I;
    tile.s0 = e.s0 ? e.s0 + b * p_.N : nullptr;
    tile.reset = e.reset ? e.reset + row : nullptr;
    f(tile, row);
  }
}

// The sum of the losses of some rows; turns their outputs into the gradient of the mean.
template <class T>
double OneTask<T>::loss(const Examples<T>& e, Index first, Index rows, T* y) const {
  const Index O = p_.O;
  double total = 0;
  if (e.y) {
    const T* target = e.y + first * O;
    const T scale = T(2.0 / double(e.B * e.T_len * O));
    for (Index i = 0; i < rows * O; ++i) {
      const T error = y[i] - target[i];
      total += double(error) * double(error);
      y[i] = scale * error;
    }
    return total / double(O);
  }
  const T scale = T(1.0 / double(e.B * e.T_len));
  for (Index r = 0; r < rows; ++r, y += O) {
    T highest = y[0], sum = 0;
    for (Index o = 1; o < O; ++o) highest = y[o] > highest ? y[o] : highest;
    const T chosen = y[e.labels[first + r]] - highest;
    for (Index o = 0; o < O; ++o) sum += y[o] = std::exp(y[o] - highest);
    total += std::log(double(sum)) - double(chosen);
    for (Index o = 0; o < O; ++o) y[o] *= scale / sum;
    y[e.labels[first + r]] -= scale;
  }
  return total;
}

// Turns the tangent of the outputs into that of the gradient with respect to them.
template <class T>
void OneTask<T>::turn_loss(const Examples<T>& e, Index first, Index rows, const T* grad_y, T* y_t) const {
  const Index O = p_.O;
  if (e.y) {
    const T scale = T(2.0 / double(e.B * e.T_len * O));
    for (Index i = 0; i < rows * O; ++i) y_t[i] *= scale;
    return;
  }
  const T scale = T(1.0 / double(e.B * e.T_len));
  for (Index r = 0; r < rows; ++r, grad_y += O, y_t += O) {
    const Index label = e.labels[first + r];
    const auto weighted = [&](Index o) { return grad_y[o] + (o == label ? scale : T(0)); };  // probability / rows
    T mean = 0;
    for (Index o = 0; o < O; ++o) mean += weighted(o) * y_t[o];
    mean /= scale;
    for (Index o = 0; o < O; ++o) y_t[o] = weighted(o) * (y_t[o] - mean);
  }
}

// The gradient of the mean loss at some weights; returns the loss.
template <class T>
double OneTask<T>::gradient(const Examples<T>& e, const T* weights, const Activations<T>* kept, T* out) {
  const Index I = p_.I, N = p_.N, H = p_.H, O = p_.O;
  const Weights<const T> w = weights_of(weights);
  const Weights<T> grad = weights_at(part_, I, N, H, O);
  double total = 0;
  std::memset(out, 0, std::size_t(P_) * sizeof(T));
  for_tiles(e, [&](const Examples<T>& tile, Index row) {
    const Index M = tile.B * tile.T_len;
    const Activations<T> a = kept ? kept->from(row, N, H, O) : tile_;
    T *u = narrow_[0], *grad_h = wide_[1], *grad_s = u;
    passes_.linear(tile.x, w.B, nullptr, nullptr, false, u, M, I, N);
    passes_.sweep(u, w.A, false, tile.s0, tile.reset, a.s, tile.B, tile.T_len, N);
    passes_.linear(a.s, w.C1, w.c1, nullptr, true, a.h, M, N, H);
    passes_.linear(a.h, w.C2, w.c2, nullptr, false, a.grad_y, M, H, O);
    passes_.linear(tile.x, w.D, nullptr, a.grad_y, false, a.grad_y, M, I, O);
    total += loss(e, row, M, a.grad_y);

    passes_.linear_grad(a.grad_y, nullptr, a.h, w.C2, grad_h, grad.C2, grad.c2, M, H, O);
    passes_.linear_grad(a.grad_y, nullptr, tile.x, w.D, nullptr, grad.D, nullptr, M, I, O);
    passes_.linear_grad(grad_h, a.h, a.s, w.C1, grad_s, grad.C1, grad.c1, M, N, H);
    passes_.sweep(grad_s, w.A, true, nullptr, tile.reset, a.adjoint, tile.B, tile.T_len, N);
    passes_.linear_grad(a.adjoint, nullptr, tile.x, w.B, nullptr, grad.B, nullptr, M, I, N);
    passes_.weight_grad(a.adjoint, a.s, tile.s0, tile.reset, grad.A, tile.B, tile.T_len, N);
    add_to(out, part_, P_);
  });
  return total / double(e.B * e.T_len);
}

// u = A_t times the states that enter the steps: that of the row before, at the first of a sequence s0.
template <class T>
void OneTask<T>::enter(const Examples<T>& tile, const T* s, const T* A_t, T* u) {
  const Index N = p_.N, T_len = tile.T_len, bytes = N * Index(sizeof(T));
  T* first = narrow_[2];
  passes_.linear(s - N, A_t, nullptr, nullptr, false, u, tile.B * T_len, N, N);
  if (tile.s0) passes_.linear(tile.s0, A_t, nullptr, nullptr, false, first, tile.B, N, N);
  for (Index b = 0; b < tile.B; ++b, u += T_len * N) {
    if (tile.s0) {
      std::memcpy(u, first + b * N, std::size_t(bytes));
    } else {
      std::memset(u, 0, std::size_t(bytes));
    }
    for (Index t = 0; tile.reset && t < T_len; ++t) {
      if (tile.reset[b * T_len + t]) std::memset(u + t * N, 0, std::size_t(bytes));
    }
  }
}

// grad_s += A_t^T times the adjoints of the rows behind, which the states enter; those of the last steps go nowhere.
template <class T>
void OneTask<T>::leave(const Examples<T>& tile, const T* adjoint, const T* A_t, T* grad_s) {
  const Index N = p_.N, T_len = tile.T_len, M = tile.B * T_len;
  T* summand = narrow_[2];
  passes_.linear(adjoint + N, A_t, nullptr, nullptr, false, summand, M, N, N, true);
  for (Index row = 0; row < M; ++row) {
    if ((row + 1) % T_len == 0 || (tile.reset && tile.reset[row + 1])) {
      std::memset(summand + row * N, 0, std::size_t(N) * sizeof(T));
    }
  }
  add_to(grad_s, summand, M * N);
}

// The Hessian of the mean loss at some weights, times a direction: the tangents of all that `gradient` does.
template <class T>
void OneTask<T>::curvature(const Examples<T>& e, const T* weights, const T* direction, const Activations<T>& kept,
                           T* out) {
  const Index I = p_.I, N = p_.N, H = p_.H, O = p_.O;
  const Weights<const T> w = weights_of(weights), d = weights_of(direction);
  const Weights<T> grad = weights_at(part_, I, N, H, O), other = weights_at(other_, I, N, H, O);
  std::memset(out, 0, std::size_t(P_) * sizeof(T));
  const Weights<T> sum = weights_at(out, I, N, H, O);
  for_tiles(e, [&](const Examples<T>& tile, Index row) {
    const Index M = tile.B * tile.T_len;
    const Activations<T> a = kept.from(row, N, H, O);
    T *u = narrow_[0], *s_t = narrow_[1], *grad_h = wide_[0], *h_t = wide_[1], *turn = wide_[2], *y_t = y_;
    enter(tile, a.s, d.A, u);
    passes_.linear(tile.x, d.B, nullptr, u, false, u, M, I, N);
    passes_.sweep(u, w.A, false, nullptr, tile.reset, s_t, tile.B, tile.T_len, N);
    passes_.linear(a.grad_y, w.C2, nullptr, nullptr, false, grad_h, M, O, H, true);
    passes_.linear_tangent(s_t, d.C1, d.c1, a.s, w.C1, a.h, grad_h, h_t, turn, M, N, H);
    passes_.linear_tangent(h_t, d.C2, d.c2, a.h, w.C2, nullptr, nullptr, y_t, nullptr, M, H, O);
    passes_.linear(tile.x, d.D, nullptr, y_t, false, y_t, M, I, O);
    turn_loss(e, row, M, a.grad_y, y_t);

    T *grad_s = narrow_[0], *summand = narrow_[2], *adjoint_t = narrow_[2];
    passes_.linear_grad(a.grad_y, nullptr, h_t, d.C2, nullptr, other.C2, nullptr, M, H, O);
    passes_.linear(a.grad_y, d.C2, nullptr, turn, false, turn, M, O, H, true);
    T* of_y = h_t;  // which is not needed any more
    passes_.linear_grad(y_t, nullptr, a.h, w.C2, of_y, grad.C2, grad.c2, M, H, O);
    add_to(turn, of_y, M * H);
    passes_.linear_grad(y_t, nullptr, tile.x, w.D, nullptr, grad.D, nullptr, M, I, O);
    passes_.linear_grad(turn, a.h, a.s, w.C1, grad_s, grad.C1, grad.c1, M, N, H);
    passes_.linear_grad(grad_h, a.h, s_t, d.C1, summand, other.C1, nullptr, M, N, H);
    add_to(grad_s, summand, M * N);
    leave(tile, a.adjoint, d.A, grad_s);
    passes_.sweep(grad_s, w.A, true, nullptr, tile.reset, adjoint_t, tile.B, tile.T_len, N);
    passes_.linear_grad(adjoint_t, nullptr, tile.x, w.B, nullptr, grad.B, nullptr, M, I, N);
    passes_.weight_grad(adjoint_t, a.s, tile.s0, tile.reset, grad.A, tile.B, tile.T_len, N);
    passes_.weight_grad(a.adjoint, s_t, nullptr, tile.reset, other.A, tile.B, tile.T_len, N);
    add_to(out, part_, P_);
    add_to(sum.A, other.A, N * N);
    add_to(sum.C1, other.C1, H * N);
    add_to(sum.C2, other.C2, O * H);
  });
}

template <class T>
void OneTask<T>::run(Index g) {
  const Examples<T>&support = p_.support[g], &query = p_.query[g];
  const auto kept = [&](Index k) { return p_.first_order ? nullptr : &kept_[std::size_t(k)]; };
  const T* weights = p_.weights;
  for (Index k = 0; k < p_.K; ++k) {
    T *grad = gradients_[std::size_t(k)], *next = weights_[std::size_t(k)];
    p_.losses[k * p_.G + g] = gradient(support, weights, kept(k), grad);
    for (Index i = 0; i < P_; ++i) next[i] = weights[i] - p_.rates[i] * grad[i];
    weights = next;
  }
  T* v = p_.gradients + g * P_;
  T* of_rates = p_.rate_gradients ? p_.rate_gradients + g * P_ : nullptr;
  p_.losses[p_.K * p_.G + g] = gradient(query, weights, nullptr, v);
  if (of_rates) std::memset(of_rates, 0, std::size_t(P_) * sizeof(T));
  for (Index k = p_.K - 1; k >= 0; --k) {
    const T* grad = gradients_[std::size_t(k)];
    for (Index i = 0; of_rates && i < P_; ++i) of_rates[i] -= v[i] * grad[i];
    if (p_.first_order) continue;
    for (Index i = 0; i < P_; ++i) direction_[i] = p_.rates[i] * v[i];
    weights = k ? weights_[std::size_t(k - 1)] : p_.weights;
    T* product = gradients_[std::size_t(k)];  // not needed any more
    curvature(support, weights, direction_, kept_[std::size_t(k)], product);
    for (Index i = 0; i < P_; ++i) v[i] -= product[i];
  }
}

template <class T>
void gradients(const TaskGradients<T>& p) {
  if (p.G == 1) {  // all threads share it
    OneTask<T>(p).run(0);
    return;
  }
  const int threads = threads_for(1e9, p.G);
  std::exception_ptr error;  // of the memory: none may leave a parallel region
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    try {
      OneTask<T> task(p);
      for (Index g = p.G * thread / threads; g < p.G * (thread + 1) / threads; ++g) task.run(g);
    } catch (...) {
#pragma omp critical(ssm_fast_task_gradients)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace

void task_gradients(const TaskGradients<float>& p) { gradients(p); }
void task_gradients(const TaskGradients<double>& p) { gradients(p); }

}  // namespace ssm_fast
