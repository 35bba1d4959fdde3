// The actor of ImprovedSSM: h^0 = tanh(E x + e); for each layer s = dense_scan(B h + b), z = C s + D h,
// h' = [h +] tanh(norm(z)); the outputs W h + w. Its gradient and its curvature.
#include <utility>

#include "task_gradients.h"
#include "task_loss.h"

namespace ssm_fast {
namespace {

// Where each weight stands in a vector of all.
template <class T>
struct LayerWeights {
  T *A, *B, *bias, *C, *D, *norm_weight, *norm_bias;  // the last two null without a norm
};
template <class T>
struct Weights {
  T *encoder, *encoder_bias, *actor, *actor_bias, *log_std;  // the last null without one
  std::vector<LayerWeights<T>> layers;
};

template <class T>
Weights<T> weights_at(T* vector, const PolicySizes& sizes) {
  const auto take = [&](Index elements) { return std::exchange(vector, vector + elements); };
  const Index I = sizes.I, H = sizes.H, N = sizes.N, O = sizes.O;
  Weights<T> w{};
  w.encoder = take(H * I), w.encoder_bias = take(H), w.actor = take(O * H), w.actor_bias = take(O);
  for (Index l = 0; l < sizes.L; ++l) {
    LayerWeights<T> layer{};
    layer.A = take(N * N), layer.B = take(N * H), layer.bias = take(N), layer.C = take(H * N), layer.D = take(H * H);
    if (sizes.norm) layer.norm_weight = take(H), layer.norm_bias = take(H);
    w.layers.push_back(layer);
  }
  w.log_std = sizes.gaussian ? take(O) : nullptr;
  return w;
}

// What the passes over some rows leave for the second derivative. Gradients are with respect to the variable named.
template <class T>
struct Layer {
  T *s, *z, *mean, *rstd, *h;  // h is what the layer gives
  T *grad_h, *grad_z, *adjoint;
};
template <class T>
struct Activations {
  T *h, *grad_h;  // of the encoder
  T *y, *grad_y;
  std::vector<Layer<T>> layers;

  Activations from(Index row, const PolicySizes& sizes) const {
    const Index H = sizes.H, N = sizes.N, O = sizes.O;
    Activations a{h + row * H, grad_h + row * H, y + row * O, grad_y + row * O, layers};
    for (Layer<T>& l : a.layers) {
      l.s += row * N, l.z += row * H, l.mean += row, l.rstd += row, l.h += row * H;
      l.grad_h += row * H, l.grad_z += row * H, l.adjoint += row * N;
    }
    return a;
  }
  const T* taken(std::size_t l) const { return l ? layers[l - 1].h : h; }  // by layer l
  T* grad_taken(std::size_t l) const { return l ? layers[l - 1].grad_h : grad_h; }
};

template <class T>
class PolicyNetwork {
 public:
  PolicyNetwork(const PolicySizes& sizes, Room room, Index slots, bool alone)
      : sizes_(sizes), P_(ssm_fast::weights_of(sizes)), alone_(alone), kept_(std::size_t(slots)), tangents_(layers()) {
    const Index H = sizes.H, N = sizes.N, O = sizes.O, tile = room.tile;
    const auto take_activations = [&](auto take, Activations<T>& a, Index rows) {
      a = {take(rows * H), take(rows * H), take(rows * O), take(rows * O), std::vector<Layer<T>>(layers())};
      for (Layer<T>& l : a.layers) {  // a row before the states and one behind the adjoints: shifted products read them
        l = {take((rows + 1) * N), take(rows * H), take(rows),     take(rows),
             take(rows * H),       take(rows * H), take(rows * H), take((rows + 1) * N)};
      }
    };
    arrays_.place([&](auto take) {
      for (Activations<T>& a : kept_) take_activations(take, a, room.rows);
      take_activations(take, tile_, tile);
      part_ = take(P_), other_ = take(P_);
      for (Tangent& t : tangents_) t = {take(tile * N), take(tile * H), take(tile * H)};
      for (T*& buffer : narrow_) buffer = take(tile * N);
      for (T*& buffer : wide_) buffer = take(tile * H);
      h_t_ = take(tile * H), y_t_ = take(tile * O), turn_ = take(tile * H);
      probabilities_ = take(O), precision_ = take(O);
    });
    for (Activations<T>& a : kept_) {
      for (Layer<T>& l : a.layers) {
        std::memset(l.s, 0, std::size_t(N) * sizeof(T));
        std::memset(l.adjoint + room.rows * N, 0, std::size_t(N) * sizeof(T));
        l.s += N;
      }
    }
  }

  double gradient(const Examples<T>& e, const T* weights, Index slot, T* out) {
    const Index I = sizes_.I, H = sizes_.H, N = sizes_.N, O = sizes_.O;
    const Weights<const T> w = weights_at(weights, sizes_);
    const Weights<T> grad = weights_at(part_, sizes_);
    double total = 0;
    std::memset(out, 0, std::size_t(P_) * sizeof(T));
    std::memset(part_, 0, std::size_t(P_) * sizeof(T));  // log_std is in no other loss than a policy's
    for_tiles(e, alone_, [&](const Tile& tile) {
      const Index M = tile.rows();
      const Activations<T> a = slot < 0 ? tile_ : kept_[std::size_t(slot)].from(tile.row(), sizes_);
      const T* x = e.x + tile.row() * I;
      const std::uint8_t* reset = e.reset ? e.reset + tile.row() : nullptr;
      passes_.linear(x, w.encoder, w.encoder_bias, nullptr, true, a.h, M, I, H);
      for (std::size_t l = 0; l < layers(); ++l) {
        const LayerWeights<const T>& of = w.layers[l];
        const Layer<T>& layer = a.layers[l];
        const T* h = a.taken(l);
        passes_.linear(h, of.B, of.bias, nullptr, false, narrow_[0], M, H, N);
        passes_.sweep(narrow_[0], of.A, false, state(e, tile, l), reset, layer.s, tile.B, tile.T_len, N);
        passes_.linear(h, of.D, nullptr, nullptr, false, wide_[0], M, H, H);
        passes_.linear(layer.s, of.C, nullptr, wide_[0], false, layer.z, M, N, H);
        passes_.output_norm(layer.z, norm(of, layer), sizes_.residual ? h : nullptr, layer.h, M, H);
      }
      passes_.linear(a.taken(layers()), w.actor, w.actor_bias, nullptr, false, a.y, M, H, O);
      total += loss(e, tile, w).gradient(a.y, a.grad_y, e.actions ? grad.log_std : nullptr);

      passes_.linear_grad(a.grad_y, nullptr, a.taken(layers()), w.actor, a.grad_taken(layers()), grad.actor,
                          grad.actor_bias, M, H, O);
      for (std::size_t l = layers(); l-- > 0;) {
        const LayerWeights<const T>& of = w.layers[l];
        const LayerWeights<T>& to = grad.layers[l];
        const Layer<T>& layer = a.layers[l];
        const T* h = a.taken(l);
        T *grad_h = a.grad_taken(l), *grad_s = narrow_[0];
        passes_.output_norm_grad(layer.grad_h, layer.z, norm(of, layer), layer.grad_z, to.norm_weight, to.norm_bias, M,
                                 H);
        passes_.linear_grad(layer.grad_z, nullptr, layer.s, of.C, grad_s, to.C, nullptr, M, N, H);
        passes_.sweep(grad_s, of.A, true, nullptr, reset, layer.adjoint, tile.B, tile.T_len, N);
        passes_.weight_grad(layer.adjoint, layer.s, state(e, tile, l), reset, to.A, tile.B, tile.T_len, N);
        passes_.linear_grad(layer.grad_z, nullptr, h, of.D, grad_h, to.D, nullptr, M, H, H);
        passes_.linear_grad(layer.adjoint, nullptr, h, of.B, wide_[0], to.B, to.bias, M, H, N);
        add_to(grad_h, wide_[0], M * H);
        if (sizes_.residual) add_to(grad_h, layer.grad_h, M * H);
      }
      passes_.linear_grad(a.grad_h, a.h, x, w.encoder, nullptr, grad.encoder, grad.encoder_bias, M, I, H);
      add_to(out, part_, P_);
    });
    return total / double(e.B * e.T_len);
  }

  // The tangents of all that `gradient` does.
  void curvature(const Examples<T>& e, const T* weights, const T* direction, Index slot, T* out) {
    const Index I = sizes_.I, H = sizes_.H, N = sizes_.N, O = sizes_.O;
    const Weights<const T> w = weights_at(weights, sizes_), d = weights_at(direction, sizes_);
    const Weights<T> grad = weights_at(part_, sizes_), other = weights_at(other_, sizes_);
    std::memset(out, 0, std::size_t(P_) * sizeof(T));
    std::memset(part_, 0, std::size_t(P_) * sizeof(T));
    std::memset(other_, 0, std::size_t(P_) * sizeof(T));
    for_tiles(e, alone_, [&](const Tile& tile) {
      const Index M = tile.rows();
      const Activations<T> a = kept_[std::size_t(slot)].from(tile.row(), sizes_);
      const T* x = e.x + tile.row() * I;
      const std::uint8_t* reset = e.reset ? e.reset + tile.row() : nullptr;
      const auto taken_t = [&](std::size_t l) { return l ? tangents_[l - 1].h : h_t_; };
      passes_.linear_tangent(nullptr, d.encoder, d.encoder_bias, x, w.encoder, a.h, a.grad_h, h_t_, turn_, M, I, H);
      for (std::size_t l = 0; l < layers(); ++l) {
        const LayerWeights<const T>&of = w.layers[l], &of_t = d.layers[l];
        const Layer<T>& layer = a.layers[l];
        const Tangent& t = tangents_[l];
        const T *h = a.taken(l), *h_t = taken_t(l);
        T* u_t = narrow_[0];
        passes_.linear_tangent(h_t, of_t.B, of_t.bias, h, of.B, nullptr, nullptr, u_t, nullptr, M, H, N);
        add_entering(passes_, tile, layer.s, state(e, tile, l), reset, of_t.A, u_t, narrow_[1], N);
        passes_.sweep(u_t, of.A, false, nullptr, reset, t.s, tile.B, tile.T_len, N);
        passes_.linear_tangent(t.s, of_t.C, nullptr, layer.s, of.C, nullptr, nullptr, t.z, nullptr, M, N, H);
        passes_.linear_tangent(h_t, of_t.D, nullptr, h, of.D, nullptr, nullptr, wide_[0], nullptr, M, H, H);
        add_to(t.z, wide_[0], M * H);
        passes_.output_norm_tangent(layer.z, t.z, norm(of, layer), of_t.norm_weight, of_t.norm_bias,
                                    sizes_.residual ? h_t : nullptr, t.h, M, H);
      }
      passes_.linear_tangent(taken_t(layers()), d.actor, d.actor_bias, a.taken(layers()), w.actor, nullptr, nullptr,
                             y_t_, nullptr, M, H, O);
      loss(e, tile, w).turn(a.y, d.log_std, y_t_, e.actions ? grad.log_std : nullptr, probabilities_);

      T *grad_t = wide_[0], *next = wide_[1], *grad_z_t = wide_[2],
        *summand = wide_[3];  // grad_t is of the tangent of h
      passes_.linear_grad(y_t_, nullptr, a.taken(layers()), w.actor, grad_t, grad.actor, grad.actor_bias, M, H, O);
      passes_.linear_grad(a.grad_y, nullptr, taken_t(layers()), d.actor, summand, other.actor, nullptr, M, H, O);
      add_to(grad_t, summand, M * H);
      for (std::size_t l = layers(); l-- > 0;) {
        const LayerWeights<const T>&of = w.layers[l], &of_t = d.layers[l];
        const LayerWeights<T>&to = grad.layers[l], &too = other.layers[l];
        const Layer<T>& layer = a.layers[l];
        const Tangent& t = tangents_[l];
        const T *h = a.taken(l), *h_t = taken_t(l);
        T *grad_s = narrow_[0], *adjoint_t = narrow_[1];
        passes_.output_norm_grad_tangent(layer.grad_h, grad_t, layer.z, t.z, norm(of, layer), of_t.norm_weight,
                                         of_t.norm_bias, grad_z_t, to.norm_weight, to.norm_bias, M, H);
        passes_.linear_grad(grad_z_t, nullptr, layer.s, of.C, grad_s, to.C, nullptr, M, N, H);
        passes_.linear_grad(layer.grad_z, nullptr, t.s, of_t.C, narrow_[1], too.C, nullptr, M, N, H);
        add_to(grad_s, narrow_[1], M * N);
        add_leaving(passes_, tile, layer.adjoint, reset, of_t.A, grad_s, narrow_[1], N);
        passes_.sweep(grad_s, of.A, true, nullptr, reset, adjoint_t, tile.B, tile.T_len, N);
        passes_.weight_grad(adjoint_t, layer.s, state(e, tile, l), reset, to.A, tile.B, tile.T_len, N);
        passes_.weight_grad(layer.adjoint, t.s, nullptr, reset, too.A, tile.B, tile.T_len, N);
        passes_.linear_grad(grad_z_t, nullptr, h, of.D, next, to.D, nullptr, M, H, H);
        passes_.linear_grad(layer.grad_z, nullptr, h_t, of_t.D, summand, too.D, nullptr, M, H, H);
        add_to(next, summand, M * H);
        passes_.linear_grad(adjoint_t, nullptr, h, of.B, summand, to.B, to.bias, M, H, N);
        add_to(next, summand, M * H);
        passes_.linear_grad(layer.adjoint, nullptr, h_t, of_t.B, summand, too.B, nullptr, M, H, N);
        add_to(next, summand, M * H);
        if (sizes_.residual) add_to(next, grad_t, M * H);
        std::swap(grad_t, next);
      }
      add_to(turn_, grad_t, M * H);
      passes_.linear_grad(turn_, a.h, x, w.encoder, nullptr, grad.encoder, grad.encoder_bias, M, I, H);
      add_to(out, part_, P_);
      add_to(out, other_, P_);
    });
  }

 private:
  struct Tangent {
    T *s, *z, *h;  // of a layer
  };

  std::size_t layers() const { return std::size_t(sizes_.L); }
  const T* state(const Examples<T>& e, const Tile& tile, std::size_t l) const {
    return e.s0 ? e.s0 + (Index(l) * e.B + tile.first) * sizes_.N : nullptr;
  }
  typename Passes<T>::Norm norm(const LayerWeights<const T>& w, const Layer<T>& layer) const {
    return {w.norm_weight, w.norm_bias, layer.mean, layer.rstd, T(sizes_.eps)};
  }
  TaskLoss<T> loss(const Examples<T>& e, const Tile& tile, const Weights<const T>& w) {
    for (Index o = 0; w.log_std && o < sizes_.O; ++o) precision_[o] = std::exp(-w.log_std[o]);
    return {e, tile.row(), tile.rows(), sizes_.O, {w.log_std, precision_}};
  }

  const PolicySizes sizes_;
  const Index P_;
  const bool alone_;
  Passes<T> passes_;
  Arrays<T> arrays_;
  std::vector<Activations<T>> kept_;  // of each slot
  Activations<T> tile_;
  std::vector<Tangent> tangents_;
  T *part_, *other_;               // [P]
  T *narrow_[2], *wide_[4];        // [rows of a tile, N] and [.., H]
  T *h_t_, *turn_, *y_t_;          // [.., H] of the encoder, and [.., O]
  T *probabilities_, *precision_;  // [O]
};

template <class T>
void run(const TaskGradients<T>& p, const PolicySizes& sizes) {
  for_tasks(p, [&] { return PolicyNetwork<T>(sizes, room_for(p), p.first_order ? 0 : p.K, p.G == 1); });
}

}  // namespace

Index weights_of(const PolicySizes& sizes) {
  const Index I = sizes.I, H = sizes.H, N = sizes.N, O = sizes.O;
  const Index layer = (N + H + 1) * N + (N + H) * H + (sizes.norm ? 2 * H : 0);
  return (I + 1) * H + (H + 1) * O + sizes.L * layer + (sizes.gaussian ? O : 0);
}
void task_gradients(const TaskGradients<float>& p, const PolicySizes& sizes) { run(p, sizes); }
void task_gradients(const TaskGradients<double>& p, const PolicySizes& sizes) { run(p, sizes); }

}  // namespace ssm_fast
