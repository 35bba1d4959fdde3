// StateSpaceModel: s = dense_scan(x B^T), y = C2 tanh(C1 s + c1) + c2 + D x, its gradient and its curvature.
#include <utility>

#include "task_gradients.h"
#include "task_loss.h"

namespace ssm_fast {
namespace {

// Where each weight stands in a vector of all.
template <class T>
struct Weights {
  T *A, *B, *D, *C1, *c1, *C2, *c2;
};

template <class T>
Weights<T> weights_at(T* vector, const StateSpaceSizes& sizes) {
  const auto [I, N, H, O] = sizes;
  const auto take = [&](Index elements) { return std::exchange(vector, vector + elements); };
  T *A = take(N * N), *B = take(N * I), *D = take(O * I), *C1 = take(H * N), *c1 = take(H), *C2 = take(O * H);
  return {A, B, D, C1, c1, C2, vector};
}

// What the passes over some rows leave for the second derivative: states, what the tanh gave, outputs, the gradient
// with respect to these, and the adjoint states.
template <class T>
struct Activations {
  T *s, *h, *y, *grad_y, *adjoint;
  Activations from(Index row, Index N, Index H, Index O) const {
    return {s + row * N, h + row * H, y + row * O, grad_y + row * O, adjoint + row * N};
  }
};

template <class T>
class StateSpaceNetwork {
 public:
  StateSpaceNetwork(const StateSpaceSizes& sizes, Room room, Index slots, bool alone)
      : sizes_(sizes), P_(ssm_fast::weights_of(sizes)), alone_(alone), kept_(std::size_t(slots)) {
    const auto [I, N, H, O] = sizes;
    const Index rows = room.rows, tile = room.tile;
    arrays_.place([&](auto take) {
      // A row before the states and one behind the adjoints, which shifted products read.
      for (Activations<T>& a : kept_) {
        a = {take((rows + 1) * N), take(rows * H), take(rows * O), take(rows * O), take((rows + 1) * N)};
      }
      part_ = take(P_), other_ = take(P_);
      for (T*& buffer : narrow_) buffer = take(tile * N);
      for (T*& buffer : wide_) buffer = take(tile * H);
      for (T*& buffer : outputs_) buffer = take(tile * O);
      probabilities_ = take(O);
    });
    for (Activations<T>& a : kept_) {
      std::memset(a.s, 0, std::size_t(N) * sizeof(T));
      std::memset(a.adjoint + rows * N, 0, std::size_t(N) * sizeof(T));
      a.s += N;
    }
    tile_ = {narrow_[1], wide_[0], outputs_[0], outputs_[1], narrow_[2]};
  }

  double gradient(const Examples<T>& e, const T* weights, Index slot, T* out) {
    const auto [I, N, H, O] = sizes_;
    const Weights<const T> w = weights_at(weights, sizes_);
    const Weights<T> grad = weights_at(part_, sizes_);
    double total = 0;
    std::memset(out, 0, std::size_t(P_) * sizeof(T));
    for_tiles(e, alone_, [&](const Tile& tile) {
      const Index M = tile.rows();
      const Activations<T> a = slot < 0 ? tile_ : kept_[std::size_t(slot)].from(tile.row(), N, H, O);
      const auto [x, s0, reset] = inputs(e, tile);
      T *u = narrow_[0], *grad_h = wide_[1], *grad_s = u;
      passes_.linear(x, w.B, nullptr, nullptr, false, u, M, I, N);
      passes_.sweep(u, w.A, false, s0, reset, a.s, tile.B, tile.T_len, N);
      passes_.linear(a.s, w.C1, w.c1, nullptr, true, a.h, M, N, H);
      passes_.linear(a.h, w.C2, w.c2, nullptr, false, a.y, M, H, O);
      passes_.linear(x, w.D, nullptr, a.y, false, a.y, M, I, O);
      total += TaskLoss<T>(e, tile.row(), M, O, {}).gradient(a.y, a.grad_y, nullptr);

      passes_.linear_grad(a.grad_y, nullptr, a.h, w.C2, grad_h, grad.C2, grad.c2, M, H, O);
      passes_.linear_grad(a.grad_y, nullptr, x, w.D, nullptr, grad.D, nullptr, M, I, O);
      passes_.linear_grad(grad_h, a.h, a.s, w.C1, grad_s, grad.C1, grad.c1, M, N, H);
      passes_.sweep(grad_s, w.A, true, nullptr, reset, a.adjoint, tile.B, tile.T_len, N);
      passes_.linear_grad(a.adjoint, nullptr, x, w.B, nullptr, grad.B, nullptr, M, I, N);
      passes_.weight_grad(a.adjoint, a.s, s0, reset, grad.A, tile.B, tile.T_len, N);
      add_to(out, part_, P_);
    });
    return total / double(e.B * e.T_len);
  }

  // The tangents of all that `gradient` does.
  void curvature(const Examples<T>& e, const T* weights, const T* direction, Index slot, T* out) {
    const auto [I, N, H, O] = sizes_;
    const Weights<const T> w = weights_at(weights, sizes_), d = weights_at(direction, sizes_);
    const Weights<T> grad = weights_at(part_, sizes_), other = weights_at(other_, sizes_);
    std::memset(out, 0, std::size_t(P_) * sizeof(T));
    const Weights<T> sum = weights_at(out, sizes_);
    for_tiles(e, alone_, [&](const Tile& tile) {
      const Index M = tile.rows();
      const Activations<T> a = kept_[std::size_t(slot)].from(tile.row(), N, H, O);
      const auto [x, s0, reset] = inputs(e, tile);
      T *u = narrow_[0], *s_t = narrow_[1], *grad_h = wide_[0], *h_t = wide_[1], *turn = wide_[2], *y_t = outputs_[0];
      passes_.linear(x, d.B, nullptr, nullptr, false, u, M, I, N);
      add_entering(passes_, tile, a.s, s0, reset, d.A, u, narrow_[2], N);
      passes_.sweep(u, w.A, false, nullptr, reset, s_t, tile.B, tile.T_len, N);
      passes_.linear(a.grad_y, w.C2, nullptr, nullptr, false, grad_h, M, O, H, true);
      passes_.linear_tangent(s_t, d.C1, d.c1, a.s, w.C1, a.h, grad_h, h_t, turn, M, N, H);
      passes_.linear_tangent(h_t, d.C2, d.c2, a.h, w.C2, nullptr, nullptr, y_t, nullptr, M, H, O);
      passes_.linear(x, d.D, nullptr, y_t, false, y_t, M, I, O);
      TaskLoss<T>(e, tile.row(), M, O, {}).turn(a.y, nullptr, y_t, nullptr, probabilities_);

      T *grad_s = narrow_[0], *summand = narrow_[2], *adjoint_t = narrow_[2];
      passes_.linear_grad(a.grad_y, nullptr, h_t, d.C2, nullptr, other.C2, nullptr, M, H, O);
      passes_.linear(a.grad_y, d.C2, nullptr, turn, false, turn, M, O, H, true);
      T* of_y = h_t;  // which is not needed any more
      passes_.linear_grad(y_t, nullptr, a.h, w.C2, of_y, grad.C2, grad.c2, M, H, O);
      add_to(turn, of_y, M * H);
      passes_.linear_grad(y_t, nullptr, x, w.D, nullptr, grad.D, nullptr, M, I, O);
      passes_.linear_grad(turn, a.h, a.s, w.C1, grad_s, grad.C1, grad.c1, M, N, H);
      passes_.linear_grad(grad_h, a.h, s_t, d.C1, summand, other.C1, nullptr, M, N, H);
      add_to(grad_s, summand, M * N);
      add_leaving(passes_, tile, a.adjoint, reset, d.A, grad_s, narrow_[2], N);
      passes_.sweep(grad_s, w.A, true, nullptr, reset, adjoint_t, tile.B, tile.T_len, N);
      passes_.linear_grad(adjoint_t, nullptr, x, w.B, nullptr, grad.B, nullptr, M, I, N);
      passes_.weight_grad(adjoint_t, a.s, s0, reset, grad.A, tile.B, tile.T_len, N);
      passes_.weight_grad(a.adjoint, s_t, nullptr, reset, other.A, tile.B, tile.T_len, N);
      add_to(out, part_, P_);
      add_to(sum.A, other.A, N * N);
      add_to(sum.C1, other.C1, H * N);
      add_to(sum.C2, other.C2, O * H);
    });
  }

 private:
  struct Inputs {
    const T *x, *s0;
    const std::uint8_t* reset;
  };
  Inputs inputs(const Examples<T>& e, const Tile& tile) const {
    return {e.x + tile.row() * sizes_.I, e.s0 ? e.s0 + tile.first * sizes_.N : nullptr,
            e.reset ? e.reset + tile.row() : nullptr};
  }

  const StateSpaceSizes sizes_;
  const Index P_;
  const bool alone_;
  Passes<T> passes_;
  Arrays<T> arrays_;
  std::vector<Activations<T>> kept_;  // of each slot
  Activations<T> tile_;
  T *part_, *other_;                       // [P]
  T *narrow_[3], *wide_[3], *outputs_[2];  // [rows of a tile, N], [.., H] and [.., O]
  T* probabilities_;                       // [O]
};

template <class T>
void run(const TaskGradients<T>& p, const StateSpaceSizes& sizes) {
  for_tasks(p, [&] { return StateSpaceNetwork<T>(sizes, room_for(p), p.first_order ? 0 : p.K, p.G == 1); });
}

}  // namespace

Index weights_of(const StateSpaceSizes& sizes) {
  const auto [I, N, H, O] = sizes;
  return N * N + (N + O) * I + (N + 1) * H + (H + 1) * O;
}
void task_gradients(const TaskGradients<float>& p, const StateSpaceSizes& sizes) { run(p, sizes); }
void task_gradients(const TaskGradients<double>& p, const StateSpaceSizes& sizes) { run(p, sizes); }

}  // namespace ssm_fast
