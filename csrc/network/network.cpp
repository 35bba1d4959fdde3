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
  Activations<T> a;
  for (std::size_t chain = 0; chain < chains(); ++chain) {
    a.chains.emplace_back();
    for (const auto& stage : stages(chain)) {
      T* y = layout.shifted(tile.rows(), stage->outputs);
      T* grad_y = layout.array(tile.rows() * stage->outputs);
      a.chains.back().push_back({y, grad_y, layout.array(stage->saved(tile))});
    }
  }
  return a;
}

template <class T>
Tangents<T> Network<T>::tangents(Layout<T>& layout, const Tile& tile) const {
  Tangents<T> t;
  for (std::size_t chain = 0; chain < chains(); ++chain) {
    t.chains.emplace_back();
    for (const auto& stage : stages(chain)) {
      T* y_t = layout.shifted(tile.rows(), stage->outputs);
      t.chains.back().push_back({y_t, layout.array(stage->saved_t(tile))});
    }
  }
  return t;
}

template <class T>
Index Network<T>::widest() const {
  Index most = 0;
  for (std::size_t chain = 0; chain < chains(); ++chain) {
    for (const auto& stage : stages(chain)) most = std::max({most, stage->inputs, stage->outputs});
  }
  return most;
}

// The work of the largest stage, and three arrays for gradients from branches and their tangents.
template <class T>
Index Network<T>::work(const Tile& tile) const {
  Index most = 0;
  for (std::size_t chain = 0; chain < chains(); ++chain) {
    for (const auto& stage : stages(chain)) most = std::max(most, stage->work(tile));
  }
  return most + 3 * (tile.rows() * widest() + 16);
}

template <class T>
Call<T> Network<T>::of_stage(Call<T> call, const State& state, const Activations<T>& a, const Tangents<T>* t,
                             std::size_t chain, std::size_t i) const {
  const auto& own = a.chains[chain][i];
  const bool is_first = i == 0, reads_trunk = is_first && chain > 0;
  call.x = !is_first ? a.chains[chain][i - 1].y : reads_trunk ? a.chains[0].back().y : call.input;
  call.y = own.y, call.saved = own.saved, call.grad_y = own.grad_y;
  call.grad_x = is_first ? nullptr : a.chains[chain][i - 1].grad_y;
  if (t) {
    call.y_t = t->chains[chain][i].y_t, call.saved_t = t->chains[chain][i].saved_t;
    if (!is_first) call.x_t = t->chains[chain][i - 1].y_t;
    if (reads_trunk && !branches_[chain - 1].detached) call.x_t = t->chains[0].back().y_t;
  }
  const Index N = stages(chain)[i]->state;
  if (N && state.at) call.state = state.at + states_before_[i] * state.sequences + state.first * N;
  return call;
}

template <class T>
void Network<T>::forward(const Call<T>& call, const State& state, const Activations<T>& a) const {
  for (std::size_t chain = 0; chain < chains(); ++chain) {
    for (std::size_t i = 0; i < stages(chain).size(); ++i) {
      stages(chain)[i]->forward(of_stage(call, state, a, nullptr, chain, i));
    }
  }
}

template <class T>
void Network<T>::backward(Call<T> call, const State& state, const Activations<T>& a) const {
  const Index elements = call.tile.rows() * trunk_.back()->outputs;
  T *features = a.chains[0].back().grad_y, *term = call.reserve(elements);
  std::fill(features, features + elements, T(0));
  for (std::size_t chain = chains(); chain-- > 0;) {
    const bool reaches_trunk = chain > 0 && !branches_[chain - 1].detached;
    for (std::size_t i = stages(chain).size(); i-- > 0;) {
      Call<T> own = of_stage(call, state, a, nullptr, chain, i);
      if (i == 0 && reaches_trunk) own.grad_x = term;
      stages(chain)[i]->backward(own);
    }
    if (reaches_trunk) add_to(features, term, elements);
  }
}

template <class T>
void Network<T>::tangent(const Call<T>& call, const State& state, const Activations<T>& a, const Tangents<T>& t) const {
  for (std::size_t chain = 0; chain < chains(); ++chain) {
    for (std::size_t i = 0; i < stages(chain).size(); ++i) {
      stages(chain)[i]->tangent(of_stage(call, state, a, &t, chain, i));
    }
  }
}

template <class T>
void Network<T>::backward_tangent(Call<T> call, const State& state, const Activations<T>& a,
                                  const Tangents<T>& t) const {
  const Index elements = call.tile.rows() * widest();
  // The gradient's tangents with respect to the output and the input of a stage, and the sum of those of the branches.
  T *outer = call.reserve(elements), *inner = call.reserve(elements), *features = call.reserve(elements);
  std::fill(features, features + elements, T(0));
  for (std::size_t chain = chains(); chain-- > 0;) {
    const bool reaches_trunk = chain > 0 && !branches_[chain - 1].detached;
    T* grad_y_t = chain ? t.chains[chain].back().y_t : features;
    for (std::size_t i = stages(chain).size(); i-- > 0;) {
      Call<T> own = of_stage(call, state, a, &t, chain, i);
      own.grad_y_t = grad_y_t;
      own.grad_x_t = i || reaches_trunk ? inner : nullptr;
      stages(chain)[i]->backward_tangent(own);
      grad_y_t = own.grad_x_t;
      std::swap(outer, inner);
    }
    if (reaches_trunk) add_to(features, grad_y_t, call.tile.rows() * trunk_.back()->outputs);
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
