// A stage of a network: what it does to rows of features, its gradient, the tangents of both, and a single step.
//
// Models describe themselves as a list of stages (ssm_fast/native/plan.py); docs/architecture.md has the interface.
#pragma once

#include <cstdint>
#include <vector>

#include "../kernels/ops.h"
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

// What every call of a stage gets beside its own arrays. Parameters are numbered as in named_parameters().
template <class T>
struct Call {
  Kernels<T>& kernels;
  Tile tile;
  const T* input;               // of the network, [rows, I]
  const T* state;               // of the stage before the sequences, [B, N], or null: zeros
  const T* const* weights;      // of every parameter
  T* const* gradients;          // where their gradients go
  const T* const* direction;    // tangents of the weights
  T* const* second;             // where the second terms of the gradients' tangents go
  T* work;                      // of the stage, until it returns
  T* reserve(Index elements) {  // takes the front of `work`
    T* first = work;
    work += (elements + 15) / 16 * 16;
    return first;
  }
};

constexpr int kAbsent = -1;  // the number of a parameter that a module does not have

template <class T>
T* parameter(T* const* pointers, int number) {
  return number == kAbsent ? nullptr : pointers[number];
}

// Every array is contiguous. `y` and its tangent have a row before the first one (Layout::shifted).
template <class T>
class Stage {
 public:
  Stage(Index inputs, Index outputs, Index state = 0) : inputs(inputs), outputs(outputs), state(state) {}
  virtual ~Stage() = default;

  const Index inputs, outputs, state;  // features of a row before and after it, elements of a sequence's state

  // Elements that `forward` and `backward` leave for later, that `tangent` leaves for `backward_tangent`, and `work`.
  virtual Index saved(const Tile&) const { return 0; }
  virtual Index tangents(const Tile&) const { return 0; }
  virtual Index work(const Tile&) const { return 0; }

  virtual void forward(Call<T> call, const T* x, T* y, T* saved) const = 0;

  // Writes the gradients of its parameters, and grad_x unless that is null.
  virtual void backward(Call<T> call, const T* x, const T* y, T* saved, const T* grad_y, T* grad_x) const = 0;

  // The tangent of `forward`; x_t is null where x has none.
  virtual void tangent(Call<T> call, const T* x, const T* x_t, const T* y, const T* saved, const T* grad_y, T* y_t,
                       T* tangents) const = 0;

  // The tangent of `backward`; grad_y_t is overwritten.
  virtual void backward_tangent(Call<T> call, const T* x, const T* x_t, const T* y, const T* y_t, const T* saved,
                                const T* tangents, const T* grad_y, T* grad_y_t, T* grad_x_t) const = 0;

  // Writes what it does to a block of rows, and returns the register of its outputs.
  virtual int step(StepBuilder& program, int x) const = 0;
};

}  // namespace ssm_fast
