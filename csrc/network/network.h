// A network: stages one after the other (the trunk), and branches of stages that read what the trunk gives.
#pragma once

#include <memory>
#include <vector>

#include "stage.h"

namespace ssm_fast {

template <class T>
using Stages = std::vector<std::unique_ptr<Stage<T>>>;

template <class T>
struct Branch {
  Stages<T> stages;
  bool detached;  // no gradient flows into the trunk
};

// What a tile of sequences leaves in a network: the outputs of every stage, their gradients, and what stages save.
template <class T>
struct Activations {
  struct OfStage {
    T *y, *grad_y, *saved;
  };
  std::vector<OfStage> trunk;
  std::vector<std::vector<OfStage>> branches;
  T* output(std::size_t branch) const { return branches[branch].back().y; }
  T* grad_output(std::size_t branch) const { return branches[branch].back().grad_y; }
};

// The same for tangents.
template <class T>
struct Tangents {
  struct OfStage {
    T *y_t, *kept;
  };
  std::vector<OfStage> trunk;
  std::vector<std::vector<OfStage>> branches;
  T* output(std::size_t branch) const { return branches[branch].back().y_t; }
};

template <class T>
class Network {
 public:
  // `elements` of each parameter, in the order of named_parameters().
  Network(Stages<T> trunk, std::vector<Branch<T>> branches, std::vector<Index> elements);

  Index inputs() const { return trunk_.front()->inputs; }
  Index outputs(std::size_t branch) const { return branches_[branch].stages.back()->outputs; }
  Index state() const { return state_; }  // elements of a sequence's state, of all stages
  Index parameters() const { return Index(elements_.size()); }
  Index elements() const { return total_; }  // of all parameters
  const std::vector<std::unique_ptr<Stage<T>>>& trunk() const { return trunk_; }

  // Where each parameter lies in a vector of all.
  void split(T* vector, std::vector<T*>& pointers) const;

  // Arrays for tiles as large as this one.
  Activations<T> activations(Layout<T>& layout, const Tile& tile) const;
  Tangents<T> tangents(Layout<T>& layout, const Tile& tile) const;
  Index work(const Tile& tile) const;

  // The state of sequences is [stages with a state, `sequences`, N], of which the tile's begin at `first`.
  struct State {
    const T* at;  // or null: zeros
    Index sequences, first;
  };
  void forward(Call<T> call, const State& state, const Activations<T>& a) const;
  // From grad_output of every branch.
  void backward(Call<T> call, const State& state, const Activations<T>& a) const;
  void tangent(Call<T> call, const State& state, const Activations<T>& a, const Tangents<T>& t) const;
  // From the tangents of grad_output of every branch, which lie in the tangents of the outputs.
  void backward_tangent(Call<T> call, const State& state, const Activations<T>& a, const Tangents<T>& t) const;

  // The program of a step, and the registers of the branches' outputs.
  StepBuilder step(std::vector<int>& outputs) const;

 private:
  void set_state(Call<T>& call, const State& state, std::size_t i) const;
  static Index work_of(const Stages<T>& stages, const Tile& tile);
  Index widest() const;

  Stages<T> trunk_;
  std::vector<Branch<T>> branches_;
  std::vector<Index> elements_, states_before_;
  Index total_ = 0, state_ = 0;
};

}  // namespace ssm_fast
