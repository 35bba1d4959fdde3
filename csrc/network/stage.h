// A stage of a network: what it does to rows of features, its gradient, the tangents of both, and a single step.
//
// Models describe themselves as a list of stages (ssm_fast/nn/stages.py); docs/architecture.md has the interface.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "step_program.h"

namespace ssm_fast {

// Whole sequences that pass through a network together; row b * T_len + t is step t of sequence b.
struct Tile {
  Index B, T_len;
  const std::uint8_t* reset;  // [B, T_len], or null
  Index rows() const { return B * T_len; }
};

// Gives out arrays of a block, each from a cache line on. Without a block it only counts.
template <class T>
class Layout {
 public:
  explicit Layout(T* block = nullptr) : block_(block) {}
  T* array(Index elements) {
    constexpr Index kLine = 64 / Index(sizeof(T));
    T* first = block_ ? block_ + used_ : nullptr;
    used_ += (elements + kLine - 1) / kLine * kLine;
    return first;
  }
  // Rows of features, with one more before the first: shifted products read it, whatever it holds.
  T* shifted(Index rows, Index features) {
    T* before = array((rows + 1) * features);
    return before ? before + features : nullptr;
  }
  Index used() const { return used_; }

 private:
  T* block_;
  Index used_ = 0;
};

// Calls place(layout) twice: to count what it takes, and to give out as much of `memory`.
template <class T, class F>
void lay_out(Scratch& memory, F place) {
  Layout<T> counted;
  place(counted);
  Layout<T> layout(memory.get<T>(counted.used()));
  place(layout);
}

constexpr int kAbsent = -1;  // the number of a parameter that a module does not have

// What a call of a stage reads and writes. Every array is contiguous. Parameters are numbered as in
// named_parameters(). A stage copies the call to hand on parts of it to another one.
template <class T>
struct Call {
  Kernels<T>& kernels;
  Tile tile;
  const T* input;             // of the network, [rows, I]
  const T* const* weights;    // of every parameter
  T* const* gradients;        // where their gradients go
  const T* const* direction;  // tangents of the weights
  T* const* second;           // where the second terms of the gradients' tangents go
  T* work;                    // memory until the stage returns

  const T* state = nullptr;  // of the stage before the sequences, [B, N], or null: zeros
  // Inputs, outputs and what the stage saves; their gradients; the tangents of all. y and y_t have a row before the
  // first one (Layout::shifted). grad_x is null where it is not wanted, x_t where there is none.
  const T* x = nullptr;
  T *y = nullptr, *saved = nullptr;
  T *grad_y = nullptr, *grad_x = nullptr;
  const T* x_t = nullptr;
  T *y_t = nullptr, *saved_t = nullptr;
  T *grad_y_t = nullptr, *grad_x_t = nullptr;  // grad_y_t is overwritten

  T* reserve(Index elements) {  // the front of `work`
    T* first = work;
    work += (elements + 15) / 16 * 16;
    return first;
  }
  const T* weight(int number) const { return number == kAbsent ? nullptr : weights[number]; }
  T* gradient(int number) const { return number == kAbsent ? nullptr : gradients[number]; }
  const T* tangent(int number) const { return number == kAbsent ? nullptr : direction[number]; }
};

template <class T>
class Stage {
 public:
  Stage(Index inputs, Index outputs, Index state = 0) : inputs(inputs), outputs(outputs), state(state) {}
  virtual ~Stage() = default;

  const Index inputs, outputs, state;  // features of a row before and after it, elements of a sequence's state

  // Elements of `saved`, of `saved_t` and of `work`.
  virtual Index saved(const Tile&) const { return 0; }
  virtual Index saved_t(const Tile&) const { return 0; }
  virtual Index work(const Tile&) const { return 0; }

  virtual void forward(Call<T>) const = 0;           // writes y and saved
  virtual void backward(Call<T>) const = 0;          // writes grad_x, gradients, and adds to saved
  virtual void tangent(Call<T>) const = 0;           // writes y_t and saved_t
  virtual void backward_tangent(Call<T>) const = 0;  // writes grad_x_t, gradients and second

  // Writes what it does to a block of rows, and returns the register of its outputs.
  virtual int step(StepBuilder& program, int x) const = 0;
};

// A stage as Python describes it (ssm_fast/nn/stages.py).
struct StageDescription {
  std::string kind;
  Index inputs, outputs, state;
  Index observations;  // of a linear stage that reads the network's input, else 0
  std::vector<int> parameters;
  double eps;
  bool tanh, residual;
  std::vector<StageDescription> cell;  // none, or one
};

// Throws std::invalid_argument for an unknown kind.
template <class T>
std::unique_ptr<Stage<T>> make_stage(const StageDescription& description);

}  // namespace ssm_fast
