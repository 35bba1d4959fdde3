#include "network.h"

#include <algorithm>

namespace ssm_fast {

template <class T>
Network<T>::Network(Stages<T> trunk, std::vector<Branch<T>> branches, std::vector<Index> elements)
    : trunk_(std::move(trunk)), branches_(std::move(branches)), elements_(std::move(elements)) {
  for (const Index e : elements_) total_ += e;
  for (const auto& stage : trunk_) {
    states_before_.push_back(state_);
    state_ += stage->state;
  }
}

template <class T>
void Network<T>::split(T* vector, std::vector<T*>& pointers) const {
  pointers.resize(elements_.size());
  for (std::size_t i = 0; i < elements_.size(); ++i) {
    pointers[i] = vector;
    vector += elements_[i];
  }
}

template <class T>
Activations<T> Network<T>::activations(Layout<T>& layout, const Tile& tile) const {
  const auto place = [&](const Stages<T>& stages) {
    std::vector<typename Activations<T>::OfStage> found;
    for (const auto& stage : stages) {
      T* y = layout.shifted(tile.rows(), stage->outputs);
      T* grad_y = layout.array(tile.rows() * stage->outputs);
      found.push_back({y, grad_y, layout.array(stage->saved(tile))});
    }
    return found;
  };
  Activations<T> a;
  a.trunk = place(trunk_);
  for (const Branch<T>& branch : branches_) a.branches.push_back(place(branch.stages));
  return a;
}

template <class T>
Tangents<T> Network<T>::tangents(Layout<T>& layout, const Tile& tile) const {
  const auto place = [&](const Stages<T>& stages) {
    std::vector<typename Tangents<T>::OfStage> found;
    for (const auto& stage : stages) {
      T* y_t = layout.shifted(tile.rows(), stage->outputs);
      found.push_back({y_t, layout.array(stage->tangents(tile))});
    }
    return found;
  };
  Tangents<T> t;
  t.trunk = place(trunk_);
  for (const Branch<T>& branch : branches_) t.branches.push_back(place(branch.stages));
  return t;
}

template <class T>
Index Network<T>::work_of(const Stages<T>& stages, const Tile& tile) {
  Index most = 0;
  for (const auto& stage : stages) most = std::max(most, stage->work(tile));
  return most;
}

template <class T>
Index Network<T>::widest() const {
  Index most = 0;
  const auto look = [&](const Stages<T>& stages) {
    for (const auto& stage : stages) most = std::max({most, stage->inputs, stage->outputs});
  };
  look(trunk_);
  for (const Branch<T>& branch : branches_) look(branch.stages);
  return most;
}

// Of a stage, and three arrays of the network's own: gradients that come from several branches, and their tangents.
template <class T>
Index Network<T>::work(const Tile& tile) const {
  Index most = work_of(trunk_, tile);
  for (const Branch<T>& branch : branches_) most = std::max(most, work_of(branch.stages, tile));
  return most + 3 * (tile.rows() * widest() + 16);
}

template <class T>
void Network<T>::set_state(Call<T>& call, const State& state, std::size_t i) const {
  const Index before = states_before_[i], N = trunk_[i]->state;
  call.state = state.at && N ? state.at + before * state.sequences + state.first * N : nullptr;
}

template <class T>
void Network<T>::forward(Call<T> call, const State& state, const Activations<T>& a) const {
  const T* x = call.input;
  for (std::size_t i = 0; i < trunk_.size(); ++i) {
    set_state(call, state, i);
    trunk_[i]->forward(call, x, a.trunk[i].y, a.trunk[i].saved);
    x = a.trunk[i].y;
  }
  for (std::size_t b = 0; b < branches_.size(); ++b) {
    const T* h = x;
    for (std::size_t i = 0; i < branches_[b].stages.size(); ++i) {
      const auto& own = a.branches[b][i];
      branches_[b].stages[i]->forward(call, h, own.y, own.saved);
      h = own.y;
    }
  }
}

template <class T>
void Network<T>::backward(Call<T> call, const State& state, const Activations<T>& a) const {
  const T* features = a.trunk.back().y;
  T* grad_features = a.trunk.back().grad_y;
  const Index elements = call.tile.rows() * trunk_.back()->outputs;
  T* term = call.reserve(elements);
  bool is_first = true;
  for (std::size_t b = 0; b < branches_.size(); ++b) {
    const auto& [stages, detached] = branches_[b];
    for (std::size_t i = stages.size(); i-- > 0;) {
      const auto& own = a.branches[b][i];
      T* grad_x = i ? a.branches[b][i - 1].grad_y : detached ? nullptr : is_first ? grad_features : term;
      stages[i]->backward(call, i ? a.branches[b][i - 1].y : features, own.y, own.saved, own.grad_y, grad_x);
    }
    if (!detached && !is_first) add_to(grad_features, term, elements);
    is_first = is_first && detached;
  }
  if (is_first) std::fill(grad_features, grad_features + elements, T(0));
  for (std::size_t i = trunk_.size(); i-- > 0;) {
    set_state(call, state, i);
    const auto& own = a.trunk[i];
    trunk_[i]->backward(call, i ? a.trunk[i - 1].y : call.input, own.y, own.saved, own.grad_y,
                        i ? a.trunk[i - 1].grad_y : nullptr);
  }
}

template <class T>
void Network<T>::tangent(Call<T> call, const State& state, const Activations<T>& a, const Tangents<T>& t) const {
  for (std::size_t i = 0; i < trunk_.size(); ++i) {
    set_state(call, state, i);
    const auto& own = a.trunk[i];
    trunk_[i]->tangent(call, i ? a.trunk[i - 1].y : call.input, i ? t.trunk[i - 1].y_t : nullptr, own.y, own.saved,
                       own.grad_y, t.trunk[i].y_t, t.trunk[i].kept);
  }
  for (std::size_t b = 0; b < branches_.size(); ++b) {
    const auto& [stages, detached] = branches_[b];
    for (std::size_t i = 0; i < stages.size(); ++i) {
      const auto& own = a.branches[b][i];
      const T* x_t = i ? t.branches[b][i - 1].y_t : detached ? nullptr : t.trunk.back().y_t;
      stages[i]->tangent(call, i ? a.branches[b][i - 1].y : a.trunk.back().y, x_t, own.y, own.saved, own.grad_y,
                         t.branches[b][i].y_t, t.branches[b][i].kept);
    }
  }
}

template <class T>
void Network<T>::backward_tangent(Call<T> call, const State& state, const Activations<T>& a,
                                  const Tangents<T>& t) const {
  const Index elements = call.tile.rows() * widest();
  // The gradient's tangent of what a stage gave and took, in turn, and a summand.
  T *given = call.reserve(elements), *taken = call.reserve(elements), *features = call.reserve(elements);
  bool is_first = true;
  for (std::size_t b = 0; b < branches_.size(); ++b) {
    const auto& [stages, detached] = branches_[b];
    T* grad_y_t = t.branches[b].back().y_t;
    for (std::size_t i = stages.size(); i-- > 0;) {
      const auto& own = a.branches[b][i];
      T* grad_x_t = i || !detached ? (i == 0 && is_first ? features : taken) : nullptr;
      const T* x_t = i ? t.branches[b][i - 1].y_t : detached ? nullptr : t.trunk.back().y_t;
      stages[i]->backward_tangent(call, i ? a.branches[b][i - 1].y : a.trunk.back().y, x_t, own.y, t.branches[b][i].y_t,
                                  own.saved, t.branches[b][i].kept, own.grad_y, grad_y_t, grad_x_t);
      grad_y_t = grad_x_t;
      std::swap(given, taken);
    }
    if (!detached && !is_first) add_to(features, grad_y_t, call.tile.rows() * trunk_.back()->outputs);
    is_first = is_first && detached;
  }
  if (is_first) std::fill(features, features + elements, T(0));
  T* grad_y_t = features;
  for (std::size_t i = trunk_.size(); i-- > 0;) {
    set_state(call, state, i);
    const auto& own = a.trunk[i];
    T* grad_x_t = i ? taken : nullptr;
    trunk_[i]->backward_tangent(call, i ? a.trunk[i - 1].y : call.input, i ? t.trunk[i - 1].y_t : nullptr, own.y,
                                t.trunk[i].y_t, own.saved, t.trunk[i].kept, own.grad_y, grad_y_t, grad_x_t);
    grad_y_t = grad_x_t;
    std::swap(given, taken);
  }
}

template <class T>
StepBuilder Network<T>::step(std::vector<int>& outputs) const {
  StepBuilder program(inputs());
  int features = StepBuilder::kInput;
  for (const auto& stage : trunk_) features = stage->step(program, features);
  program.keep(features);
  outputs.clear();
  for (const Branch<T>& branch : branches_) {
    int x = features;
    for (const auto& stage : branch.stages) x = stage->step(program, x);
    program.keep(x);
    outputs.push_back(x);
  }
  return program;
}

template class Network<float>;
template class Network<double>;

}  // namespace ssm_fast
