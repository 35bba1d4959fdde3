// The instructions of a network's step, written stage by stage; csrc/kernels/network_step.cpp runs them.
#pragma once

#include <map>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../kernels/ops.h"

namespace ssm_fast {

class StepBuilder {
 public:
  explicit StepBuilder(Index inputs) : features_{inputs} {}

  static constexpr int kInput = 0;  // the register of the observations

  // A register for rows of features. The same use of the same width is the same register.
  int buffer(int use, Index features) {
    const auto [found, is_new] = registers_.emplace(std::make_pair(use, features), int(features_.size()));
    if (is_new && features_.size() == kStepRegisters) throw std::invalid_argument("a step needs too many registers");
    if (is_new) features_.push_back(features);
    return found->second;
  }

  // A register of that width which is neither that of x nor one that is kept.
  int other(int x, Index features) {
    int use = kOther;
    while (buffer(use, features) == x || kept_.count(buffer(use, features))) ++use;
    return buffer(use, features);
  }

  // What is in this register is read later: no stage writes it again.
  void keep(int at) { kept_.insert(at); }

  void affine(int to, Index M, int x, Index K, int W, int bias) {
    if (to == x) throw std::invalid_argument("a product must not overwrite what it reads");
    StepInstruction i{};
    i.kind = StepKind::affine, i.to = to, i.M = M, i.x = x, i.K = K, i.W = W, i.bias = bias;
    instructions_.push_back(i);
  }
  void affine(int to, Index M, int x, Index K, int W, int x2, Index K2, int W2, int bias, bool x2_is_state = false) {
    affine(to, M, x, K, W, bias);
    StepInstruction& i = instructions_.back();
    i.x2 = x2, i.K2 = K2, i.W2 = W2, i.x2_is_state = x2_is_state;
  }
  void tanh(int to, int x, bool add = false) {
    StepInstruction i{};
    i.kind = add ? StepKind::add_tanh : StepKind::tanh, i.to = to, i.x = x;
    instructions_.push_back(i);
  }
  void layer_norm(int to, Index M, int weight, int bias, double eps) {
    StepInstruction i{};
    i.kind = StepKind::layer_norm, i.to = to, i.M = M, i.W = weight, i.bias = bias, i.eps = eps;
    instructions_.push_back(i);
  }
  void load_state(int to, Index M) { move_state(StepKind::load_state, to, M, state_); }
  void save_state(int from, Index M) {
    move_state(StepKind::save_state, from, M, state_);
    state_ += M;
  }

  const std::vector<StepInstruction>& instructions() const { return instructions_; }
  const std::vector<Index>& features() const { return features_; }

  enum Use { kState, kNext, kOutput, kOther };

 private:
  void move_state(StepKind kind, int at, Index M, Index state) {
    StepInstruction i{};
    i.kind = kind, i.to = at, i.M = M, i.state = state;
    instructions_.push_back(i);
  }
  std::vector<Index> features_;
  std::map<std::pair<int, Index>, int> registers_;
  std::set<int> kept_;
  std::vector<StepInstruction> instructions_;
  Index state_ = 0;
};

}  // namespace ssm_fast
