// A network and what is made of it: a step, gradients, MAML's chain and PPO's epoch. ssm_fast/native/plan.py calls it.
#include <algorithm>
#include <cmath>
#include <string>

#include "../launch.h"
#include "../network/network.h"
#include "../training/maml.h"
#include "../training/ppo_epoch.h"
#include "bindings.h"

namespace ssm_fast {
namespace {

StageDescription describe(const py::dict& stage) {
  StageDescription found{stage["kind"].cast<std::string>(),   stage["inputs"].cast<Index>(),
                         stage["outputs"].cast<Index>(),      stage["state"].cast<Index>(),
                         stage["observations"].cast<Index>(), stage["parameters"].cast<std::vector<int>>(),
                         stage["eps"].cast<double>(),         stage["tanh"].cast<bool>(),
                         stage["residual"].cast<bool>(),      {}};
  if (!stage["cell"].is_none()) found.cell.push_back(describe(stage["cell"].cast<py::dict>()));
  return found;
}

template <class T>
Stages<T> make_stages(const std::vector<py::dict>& descriptions) {
  Stages<T> stages;
  for (const py::dict& description : descriptions) stages.push_back(make_stage<T>(describe(description)));
  return stages;
}

// True if all elements are finite, or x is null.
template <class T>
bool all_finite(const T* x, Index elements) {
  return !x || std::all_of(x, x + elements, [](T y) { return std::isfinite(y); });
}

// A network as Python holds it.
template <class T>
class BoundNetwork {
 public:
  using Descriptions = std::vector<py::dict>;
  BoundNetwork(const Descriptions& trunk, const std::vector<std::pair<Descriptions, bool>>& branches,
               std::vector<Index> elements, int log_std)
      : network_(make_stages<T>(trunk), make_branches(branches), elements),
        elements_(std::move(elements)),
        log_std_(log_std),
        program_(network_.step(outputs_)) {}

  // x, y, labels, actions, log_probs, advantages, s0, reset; B, T_len; clip_epsilon, largest_log_ratio
  using ExamplesOfTask = std::tuple<std::array<Address, 8>, Sizes<2>, std::array<double, 2>>;

  // weights, rates, gradients, rate_gradients, inner_losses, outer_losses
  void task_gradients(const std::array<Address, 6>& vectors, const std::vector<ExamplesOfTask>& inner,
                      const std::vector<ExamplesOfTask>& outer, Index G, bool first_order) const {
    const std::vector<Examples<T>> of_inner = examples_at(inner), of_outer = examples_at(outer);
    const auto [weights, rates, gradients, rate_gradients, inner_losses, outer_losses] = vectors;
    TaskGradients<T> p{};
    p.weights = at<T>(weights), p.rates = at<T>(rates);
    p.inner = of_inner.data(), p.outer = of_outer.data();
    p.gradients = at<T>(gradients), p.rate_gradients = at<T>(rate_gradients);
    p.inner_losses = at<double>(inner_losses), p.outer_losses = at<double>(outer_losses);
    p.G = G, p.K = Index(inner.size()) / G;
    p.log_std = log_std_;
    p.first_order = first_order;
    const py::gil_scoped_release release;
    ssm_fast::task_gradients(network_, p);
  }

  // Addresses and sizes in the order of the structures in ppo_epoch.h.
  Index ppo_epoch(const std::array<Address, 9>& rollout, Sizes<2> sequences, Address order, Sizes<2> counts,
                  const std::array<double, 3>& loss, bool clip_value_loss, const std::array<Address, 5>& adam,
                  const std::vector<Address>& values, const std::array<double, 5>& settings, Index steps,
                  Address metrics) const {
    const auto [x, actions, labels, log_probs, old_values, returns, advantages, reset, state] = rollout;
    const RolloutSequences<T> r{
        at<T>(x),       at<T>(actions),    at<std::int64_t>(labels), at<T>(log_probs), at<T>(old_values),
        at<T>(returns), at<T>(advantages), at<std::uint8_t>(reset),  at<T>(state),     sequences[0],
        sequences[1]};
    const auto [vector, vector_gradient, m, v, lr_scales] = adam;
    const auto [learning_rate, beta1, beta2, eps, max_norm] = settings;
    AdamState<T> state_of_adam{at<T>(vector),
                               at<T>(vector_gradient),
                               at<T>(m),
                               at<T>(v),
                               at<T>(lr_scales),
                               {},
                               learning_rate,
                               beta1,
                               beta2,
                               eps,
                               max_norm,
                               steps};
    for (std::size_t i = 0; i < values.size(); ++i) state_of_adam.values.emplace_back(at<T>(values[i]), elements_[i]);
    const py::gil_scoped_release release;
    return ssm_fast::ppo_epoch(network_, log_std_, r, at<std::int64_t>(order), counts[0], counts[1],
                               PpoLoss{loss[0], loss[1], loss[2], clip_value_loss}, state_of_adam, at<double>(metrics));
  }

  const Network<T>& network() const { return network_; }
  const StepBuilder& program() const { return program_; }
  const std::vector<int>& output_registers() const { return outputs_; }
  Index elements_of(std::size_t parameter) const { return elements_[parameter]; }
  int log_std() const { return log_std_; }

 private:
  static std::vector<Branch<T>> make_branches(const std::vector<std::pair<Descriptions, bool>>& descriptions) {
    std::vector<Branch<T>> branches;
    for (const auto& [stages, detached] : descriptions) branches.push_back({make_stages<T>(stages), detached});
    return branches;
  }

  static std::vector<Examples<T>> examples_at(const std::vector<ExamplesOfTask>& tasks) {
    std::vector<Examples<T>> found;
    for (const auto& [addresses, sizes, ratio] : tasks) {
      const auto [x, y, labels, actions, log_probs, advantages, s0, reset] = addresses;
      found.push_back({at<T>(x), at<T>(y), at<std::int64_t>(labels), at<T>(actions), at<T>(log_probs),
                       at<T>(advantages), at<T>(s0), at<std::uint8_t>(reset), sizes[0], sizes[1], ratio[0], ratio[1]});
    }
    return found;
  }

  Network<T> network_;
  std::vector<Index> elements_;
  int log_std_;
  std::vector<int> outputs_;  // registers of the branches; before the program, which fills them
  StepBuilder program_;
};

// Steps of a network whose weights lie at these addresses, those of G groups one behind the other.
template <class T>
class BoundStep {
 public:
  BoundStep(const BoundNetwork<T>& bound, const std::vector<Address>& weights, const std::array<Address, 2>& statistics,
            const std::array<double, 2>& obs_options, Index G) {
    for (Index g = 0; g < G; ++g) {
      for (std::size_t i = 0; i < weights.size(); ++i) {
        weights_.push_back(weights[i] ? at<T>(weights[i]) + g * bound.elements_of(i) : nullptr);
      }
    }
    const StepBuilder& program = bound.program();
    p_.program = program.instructions().data(), p_.instructions = int(program.instructions().size());
    p_.features = program.features().data(), p_.registers = int(program.features().size());
    p_.parameters = bound.network().elements();
    p_.obs_mean = at<double>(statistics[0]), p_.obs_var = at<double>(statistics[1]);
    p_.obs_eps = obs_options[0], p_.obs_clip = obs_options[1];
    p_.weights = weights_.data();
    p_.G = G, p_.I = bound.network().inputs(), p_.K = bound.network().outputs(0), p_.P = Index(weights.size());
    p_.mean = bound.output_registers()[0], p_.value_register = bound.output_registers().back();
    p_.log_std = bound.log_std();
  }

  // B rows of each group. Returns whether values and log-probabilities are finite.
  bool run(Index B, Address x, Address state, Address reset, Address noise, Address action, Address log_prob,
           Address value, Address next_state) const {
    NetworkStep<T> p = p_;
    p.B = B;
    p.x = at<T>(x), p.state = at<T>(state), p.reset = at<std::uint8_t>(reset), p.noise = at<T>(noise);
    p.action = at<T>(action), p.log_prob = at<T>(log_prob), p.value = at<T>(value), p.next_state = at<T>(next_state);
    const py::gil_scoped_release release;
    Scratch scratch;
    launch(p, scratch);
    return all_finite(p.value, p.G * B) && all_finite(p.log_prob, p.G * B);
  }

 private:
  std::vector<const T*> weights_;
  NetworkStep<T> p_{};
};

// One pass over sequences and back, for losses of any kind. It keeps its memory for the next one.
template <class T>
class Pass {
 public:
  // Copies the outputs of the branches to `outputs`. What came in has to stay until the call of `backward`.
  void forward(const BoundNetwork<T>& network, const std::vector<Address>& weights, Address x, Address state,
               Address reset, const std::vector<Address>& outputs, Index B, Index T_len) {
    const Network<T>& n = network.network();
    weights_ = pointers<T>(weights);
    tile_ = {B, T_len, at<std::uint8_t>(reset)};
    x_ = at<T>(x), state_ = at<T>(state);
    const py::gil_scoped_release release;
    if (B * T_len > capacity_ || T_len != T_len_) place(n);
    n.forward(call(), {state_, B, 0}, activations_);
    for (std::size_t b = 0; b < outputs.size(); ++b) {
      std::copy_n(activations_.output(b), tile_.rows() * n.outputs(b), at<T>(outputs[b]));
    }
  }

  // From the gradients of the outputs into those of all parameters, a vector in the network's order.
  void backward(const BoundNetwork<T>& network, const std::vector<Address>& grad_outputs, Address gradient) {
    const Network<T>& n = network.network();
    n.split(at<T>(gradient), gradients_);
    const py::gil_scoped_release release;
    for (std::size_t b = 0; b < grad_outputs.size(); ++b) {
      std::copy_n(at<T>(grad_outputs[b]), tile_.rows() * n.outputs(b), activations_.grad_output(b));
    }
    n.backward(call(), {state_, tile_.B, 0}, activations_);
  }

 private:
  Call<T> call() { return {kernels_, tile_, x_, weights_.data(), gradients_.data(), nullptr, nullptr, work_}; }
  void place(const Network<T>& n) {
    capacity_ = 0;  // should there be no memory
    lay_out<T>(memory_, [&](Layout<T>& layout) {
      activations_ = n.activations(layout, tile_);
      work_ = layout.array(n.work(tile_));
    });
    capacity_ = tile_.rows(), T_len_ = tile_.T_len;
  }

  Kernels<T> kernels_;
  std::vector<T*> weights_, gradients_;
  Tile tile_{};
  const T *x_ = nullptr, *state_ = nullptr;
  T* work_ = nullptr;
  Index capacity_ = 0, T_len_ = 0;
  Activations<T> activations_;
  Scratch memory_;
};

template <class T>
void bind(py::module_& m, const std::string& dtype) {
  using Bound = BoundNetwork<T>;
  py::class_<Bound>(m, ("Network_" + dtype).c_str())
      .def(py::init<const typename Bound::Descriptions&,
                    const std::vector<std::pair<typename Bound::Descriptions, bool>>&, std::vector<Index>, int>())
      .def(
          "stepper",
          [](const Bound& bound, const std::vector<Address>& weights, const std::array<Address, 2>& statistics,
             const std::array<double, 2>& obs_options,
             Index G) { return std::make_unique<BoundStep<T>>(bound, weights, statistics, obs_options, G); },
          py::keep_alive<0, 1>())
      .def("task_gradients", &Bound::task_gradients)
      .def("ppo_epoch", &Bound::ppo_epoch);
  py::class_<BoundStep<T>>(m, ("Step_" + dtype).c_str()).def("run", &BoundStep<T>::run);
  py::class_<Pass<T>>(m, ("Pass_" + dtype).c_str())
      .def(py::init<>())
      .def("forward", &Pass<T>::forward)
      .def("backward", &Pass<T>::backward);
}

}  // namespace

void bind_network(py::module_& m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
}

}  // namespace ssm_fast
