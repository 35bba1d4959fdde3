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

// What a tile of sequences leaves in a network, stage by stage: of the trunk first, then of every branch.
template <class T>
struct Activations {
  struct OfStage {
    T *y, *grad_y, *saved;
  };
  std::vector<std::vector<OfStage>> chains;
  T* output(std::size_t branch) const { return chains[branch + 1].back().y; }
  T* grad_output(std::size_t branch) const { return chains[branch + 1].back().grad_y; }
};

// The same for tangents.
template <class T>
struct Tangents {
  struct OfStage {
    T *y_t, *saved_t;
  };
  std::vector<std::vector<OfStage>> chains;
  T* output(std::size_t branch) const { return chains[branch + 1].back().y_t; }
};

template <class T>
class Network {
 public:
  // `elements` of each parameter, in the order of named_parameters().
  Network(Stages<T> trunk, std::vector<Branch<T>> branches, std::vector<Index> elements);

  Index inputs() const { return trunk_.front()->inputs; }
  Index outputs(std::size_t branch) const { return branches_[branch].stages.back()->outputs; }
  Index state() const { return state_; }     // elements of a sequence's state, of all stages
  Index elements() const { return total_; }  // of all parameters
  const Stages<T>& trunk() const { return trunk_; }

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
  void forward(const Call<T>& call, const State& state, const Activations<T>& a) const;
  // From grad_output of every branch.
  void backward(Call<T> call, const State& state, const Activations<T>& a) const;
  void tangent(const Call<T>& call, const State& state, const Activations<T>& a, const Tangents<T>& t) const;
  // From the tangents of grad_output of every branch, which lie in the tangents of the outputs.
  void backward_tangent(Call<T> call, const State& state, const Activations<T>& a, const Tangents<T>& t) const;

  // The program of a step, and the registers of the branches' outputs.
  StepBuilder step(std::vector<int>& outputs) const;

 private:
  // The call of stage i of a chain, 0 the trunk. What a branch reads is what the trunk gives.
  Call<T> of_stage(Call<T> call, const State& state, const Activations<T>& a, const Tangents<T>* t, std::size_t chain,
                   std::size_t i) const;
  const Stages<T>& stages(std::size_t chain) const { return chain ? branches_[chain - 1].stages : trunk_; }
  std::size_t chains() const { return branches_.size() + 1; }
  Index widest() const;

  Stages<T> trunk_;
  std::vector<Branch<T>> branches_;
  std::vector<Index> elements_, states_before_;
  Index total_ = 0, state_ = 0;
};

}  // namespace ssm_fast
