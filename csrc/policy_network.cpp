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
      h_t_ = take(tile * H), y_t_ = take(tile * O), turn_ = take(tile * H), grad_t_ = take(tile * H);
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
    const Weights<const T> w = weights_at(weights, sizes_);
    const Weights<T> grad = weights_at(part_, sizes_);
    double total = 0;
    std::memset(out, 0, std::size_t(P_) * sizeof(T));
    std::memset(part_, 0, std::size_t(P_) * sizeof(T));  // log_std is in no other loss than a policy's
    for_tiles(e, alone_, [&](const Tile& tile) {
      const Rows r = rows_of(e, tile, slot);
      const Activations<T>& a = r.a;
      const T* h = a.taken(layers());
      passes_.linear(r.x, w.encoder, w.encoder_bias, nullptr, true, a.h, r.M, sizes_.I, sizes_.H);
      for (std::size_t l = 0; l < layers(); ++l) layer_forward(r, l, w.layers[l]);
      passes_.linear(h, w.actor, w.actor_bias, nullptr, false, a.y, r.M, sizes_.H, sizes_.O);
      total += loss(r, w).gradient(a.y, a.grad_y, e.actions ? grad.log_std : nullptr);

      passes_.linear_grad(a.grad_y, nullptr, h, w.actor, a.grad_taken(layers()), grad.actor, grad.actor_bias, r.M,
                          sizes_.H, sizes_.O);
      for (std::size_t l = layers(); l-- > 0;) layer_backward(r, l, w.layers[l], grad.layers[l]);
      passes_.linear_grad(a.grad_h, a.h, r.x, w.encoder, nullptr, grad.encoder, grad.encoder_bias, r.M, sizes_.I,
                          sizes_.H);
      add_to(out, part_, P_);
    });
    return total / double(e.B * e.T_len);
  }

  // The tangents of all that `gradient` does. A gradient of a matrix has two terms, of which `other` takes the second.
  void curvature(const Examples<T>& e, const T* weights, const T* direction, Index slot, T* out) {
    const Index H = sizes_.H, O = sizes_.O;
    const Weights<const T> w = weights_at(weights, sizes_), d = weights_at(direction, sizes_);
    const Weights<T> grad = weights_at(part_, sizes_), other = weights_at(other_, sizes_);
    for (T* vector : {out, part_, other_}) std::memset(vector, 0, std::size_t(P_) * sizeof(T));
    for_tiles(e, alone_, [&](const Tile& tile) {
      const Rows r = rows_of(e, tile, slot);
      const Activations<T>& a = r.a;
      const T *h = a.taken(layers()), *h_t = taken_t(layers());
      passes_.linear_tangent(nullptr, d.encoder, d.encoder_bias, r.x, w.encoder, a.h, a.grad_h, h_t_, turn_, r.M,
                             sizes_.I, H);
      for (std::size_t l = 0; l < layers(); ++l) layer_tangent(r, l, w.layers[l], d.layers[l]);
      passes_.linear_tangent(h_t, d.actor, d.actor_bias, h, w.actor, nullptr, nullptr, y_t_, nullptr, r.M, H, O);
      loss(r, w).turn(a.y, d.log_std, y_t_, e.actions ? grad.log_std : nullptr, probabilities_);

      passes_.linear_grad(y_t_, nullptr, h, w.actor, grad_t_, grad.actor, grad.actor_bias, r.M, H, O);
      passes_.linear_grad(a.grad_y, nullptr, h_t, d.actor, wide_[0], other.actor, nullptr, r.M, H, O);
      add_to(grad_t_, wide_[0], r.M * H);
      for (std::size_t l = layers(); l-- > 0;) {
        layer_backward_tangent(r, l, w.layers[l], d.layers[l], grad.layers[l], other.layers[l]);
      }
      add_to(turn_, grad_t_, r.M * H);
      passes_.linear_grad(turn_, a.h, r.x, w.encoder, nullptr, grad.encoder, grad.encoder_bias, r.M, sizes_.I, H);
      add_to(out, part_, P_);
      add_to(out, other_, P_);
    });
  }

 private:
  struct Tangent {
    T *s, *z, *h;  // of a layer
  };
  // Those of a tile.
  struct Rows {
    const Examples<T>& e;
    const Tile tile;
    const Index M;
    const T* x;
    const std::uint8_t* reset;
    const Activations<T> a;
  };

  Rows rows_of(const Examples<T>& e, const Tile& tile, Index slot) const {
    return {e,
            tile,
            tile.rows(),
            e.x + tile.row() * sizes_.I,
            e.reset ? e.reset + tile.row() : nullptr,
            slot < 0 ? tile_ : kept_[std::size_t(slot)].from(tile.row(), sizes_)};
  }

  void layer_forward(const Rows& r, std::size_t l, const LayerWeights<const T>& w) {
    const Index H = sizes_.H, N = sizes_.N;
    const Layer<T>& layer = r.a.layers[l];
    const T* h = r.a.taken(l);
    T* u = narrow_[0];
    passes_.linear(h, w.B, w.bias, nullptr, false, u, r.M, H, N);
    passes_.sweep(u, w.A, false, state(r, l), r.reset, layer.s, r.tile.B, r.tile.T_len, N);
    passes_.linear(h, w.D, nullptr, nullptr, false, wide_[0], r.M, H, H);
    passes_.linear(layer.s, w.C, nullptr, wide_[0], false, layer.z, r.M, N, H);
    passes_.output_norm(layer.z, norm(w, layer), sizes_.residual ? h : nullptr, layer.h, r.M, H);
  }

  void layer_backward(const Rows& r, std::size_t l, const LayerWeights<const T>& w, const LayerWeights<T>& grad) {
    const Index H = sizes_.H, N = sizes_.N;
    const Layer<T>& layer = r.a.layers[l];
    const T* h = r.a.taken(l);
    T *grad_h = r.a.grad_taken(l), *grad_s = narrow_[0];
    passes_.output_norm_grad(layer.grad_h, layer.z, norm(w, layer), layer.grad_z, grad.norm_weight, grad.norm_bias, r.M,
                             H);
    passes_.linear_grad(layer.grad_z, nullptr, layer.s, w.C, grad_s, grad.C, nullptr, r.M, N, H);
    passes_.sweep(grad_s, w.A, true, nullptr, r.reset, layer.adjoint, r.tile.B, r.tile.T_len, N);
    passes_.weight_grad(layer.adjoint, layer.s, state(r, l), r.reset, grad.A, r.tile.B, r.tile.T_len, N);
    passes_.linear_grad(layer.grad_z, nullptr, h, w.D, grad_h, grad.D, nullptr, r.M, H, H);
    passes_.linear_grad(layer.adjoint, nullptr, h, w.B, wide_[0], grad.B, grad.bias, r.M, H, N);
    add_to(grad_h, wide_[0], r.M * H);
    if (sizes_.residual) add_to(grad_h, layer.grad_h, r.M * H);
  }

  void layer_tangent(const Rows& r, std::size_t l, const LayerWeights<const T>& w, const LayerWeights<const T>& d) {
    const Index H = sizes_.H, N = sizes_.N;
    const Layer<T>& layer = r.a.layers[l];
    const Tangent& t = tangents_[l];
    const T *h = r.a.taken(l), *h_t = taken_t(l);
    T* u_t = narrow_[0];
    passes_.linear_tangent(h_t, d.B, d.bias, h, w.B, nullptr, nullptr, u_t, nullptr, r.M, H, N);
    add_entering(passes_, r.tile, layer.s, state(r, l), r.reset, d.A, u_t, narrow_[1], N);
    passes_.sweep(u_t, w.A, false, nullptr, r.reset, t.s, r.tile.B, r.tile.T_len, N);
    passes_.linear_tangent(t.s, d.C, nullptr, layer.s, w.C, nullptr, nullptr, t.z, nullptr, r.M, N, H);
    passes_.linear_tangent(h_t, d.D, nullptr, h, w.D, nullptr, nullptr, wide_[0], nullptr, r.M, H, H);
    add_to(t.z, wide_[0], r.M * H);
    passes_.output_norm_tangent(layer.z, t.z, norm(w, layer), d.norm_weight, d.norm_bias,
                                sizes_.residual ? h_t : nullptr, t.h, r.M, H);
  }

  // Turns grad_t_, the tangent of the gradient of what the layer gave, into that of what it took.
  void layer_backward_tangent(const Rows& r, std::size_t l, const LayerWeights<const T>& w,
                              const LayerWeights<const T>& d, const LayerWeights<T>& grad,
                              const LayerWeights<T>& other) {
    const Index H = sizes_.H, N = sizes_.N;
    const Layer<T>& layer = r.a.layers[l];
    const Tangent& t = tangents_[l];
    const T *h = r.a.taken(l), *h_t = taken_t(l);
    T *grad_s = narrow_[0], *summand = narrow_[1], *adjoint_t = narrow_[1], *grad_z_t = wide_[1], *wide = wide_[0];
    passes_.output_norm_grad_tangent(layer.grad_h, grad_t_, layer.z, t.z, norm(w, layer), d.norm_weight, d.norm_bias,
                                     grad_z_t, grad.norm_weight, grad.norm_bias, r.M, H);
    passes_.linear_grad(grad_z_t, nullptr, layer.s, w.C, grad_s, grad.C, nullptr, r.M, N, H);
    passes_.linear_grad(layer.grad_z, nullptr, t.s, d.C, summand, other.C, nullptr, r.M, N, H);
    add_to(grad_s, summand, r.M * N);
    add_leaving(passes_, r.tile, layer.adjoint, r.reset, d.A, grad_s, summand, N);
    passes_.sweep(grad_s, w.A, true, nullptr, r.reset, adjoint_t, r.tile.B, r.tile.T_len, N);
    passes_.weight_grad(adjoint_t, layer.s, state(r, l), r.reset, grad.A, r.tile.B, r.tile.T_len, N);
    passes_.weight_grad(layer.adjoint, t.s, nullptr, r.reset, other.A, r.tile.B, r.tile.T_len, N);

    const auto add = [&](const T* term) { add_to(grad_t_, term, r.M * H); };
    if (!sizes_.residual) std::memset(grad_t_, 0, std::size_t(r.M * H) * sizeof(T));
    passes_.linear_grad(grad_z_t, nullptr, h, w.D, wide, grad.D, nullptr, r.M, H, H);
    add(wide);
    passes_.linear_grad(layer.grad_z, nullptr, h_t, d.D, wide, other.D, nullptr, r.M, H, H);
    add(wide);
    passes_.linear_grad(adjoint_t, nullptr, h, w.B, wide, grad.B, grad.bias, r.M, H, N);
    add(wide);
    passes_.linear_grad(layer.adjoint, nullptr, h_t, d.B, wide, other.B, nullptr, r.M, H, N);
    add(wide);
  }

  const T* taken_t(std::size_t l) const { return l ? tangents_[l - 1].h : h_t_; }
  std::size_t layers() const { return std::size_t(sizes_.L); }
  const T* state(const Rows& r, std::size_t l) const {
    return r.e.s0 ? r.e.s0 + (Index(l) * r.e.B + r.tile.first) * sizes_.N : nullptr;
  }
  typename Passes<T>::Norm norm(const LayerWeights<const T>& w, const Layer<T>& layer) const {
    return {w.norm_weight, w.norm_bias, layer.mean, layer.rstd, T(sizes_.eps)};
  }
  TaskLoss<T> loss(const Rows& r, const Weights<const T>& w) {
    for (Index o = 0; w.log_std && o < sizes_.O; ++o) precision_[o] = std::exp(-w.log_std[o]);
    return {r.e, r.tile.row(), r.M, sizes_.O, {w.log_std, precision_}};
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
  T *narrow_[2], *wide_[2];        // [rows of a tile, N] and [.., H]
  T *h_t_, *turn_, *y_t_;          // [.., H] of the encoder, and [.., O]
  T* grad_t_;                      // [.., H], the tangent of the gradient of what a layer gave
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
