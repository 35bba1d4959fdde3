// Calls every kernel of every instruction set with random sizes and layouts, in memory of exactly the bytes that
// it may touch. `make sanitize` runs this under the sanitizers and, as the kernels are released, without.
//
// An element too far ends the program: the memory ends at a page without access (masked vector loads are not
// instrumented, so a sanitizer alone would miss them) or is a heap block of its own. Beyond that, outputs must be
// written in full, gaps and inputs must stay as they were, and results must be bitwise the same for any number of
// threads and for any content of the scratch memory.
//
// usage: exercise_kernels [cases of each kernel, dtype and instruction set = 100] [seed = 0]
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "network/step_program.h"

namespace ssm_fast {
namespace {

std::string running;  // what a failure is reported for

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "exercise_kernels: %s: %s\n", running.c_str(), what.c_str());
  std::exit(1);
}

// Names the case that touched memory it must not, then lets the sanitizer, or the system, end the program.
struct sigaction after_fault;
void name_fault(int) {
  for (const char* part : {"exercise_kernels: access out of bounds in ", running.c_str(), "\n"}) {
    if (write(STDERR_FILENO, part, std::strlen(part)) < 0) break;
  }
  sigaction(SIGSEGV, &after_fault, nullptr);
}

struct Random {
  std::mt19937_64 engine;

  Index below(Index n) { return Index(engine() % std::uint64_t(n)); }
  bool chance(double p) { return std::uniform_real_distribution<>()(engine) < p; }
  double normal() { return std::normal_distribution<>()(engine); }
  Index size(Index most) { return 1 + below(most); }
  // Small, or beside a multiple of a vector width or of a tile.
  Index features() {
    if (chance(0.5)) return size(20);
    const std::array<Index, 7> edges{16, 32, 48, 64, 96, 128, 192};
    return edges[std::size_t(below(Index(edges.size()) - (chance(0.9) ? 3 : 0)))] + below(5) - 2;
  }
};

// Memory of exactly `bytes`: a heap block, or pages between two that cannot be accessed.
class Memory {
 public:
  Memory(Random& random, std::size_t bytes, std::size_t alignment) : bytes_(bytes) {
    if (random.chance(0.3)) {
      if (posix_memalign(&block_, std::max(alignment, sizeof(void*)), bytes) != 0) fail("out of memory");
      data_ = static_cast<char*>(block_);
      return;
    }
    const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
    const std::size_t inside = (bytes + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    block_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block_ == MAP_FAILED) fail("mmap failed");
    char* const first = static_cast<char*>(block_) + page;
    if (mprotect(first, inside, PROT_READ | PROT_WRITE) != 0) fail("mprotect failed");
    data_ = random.chance(0.3) ? first : first + (inside - bytes) / alignment * alignment;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    if (mapped_ > 0) {
      munmap(block_, mapped_);
    } else {
      std::free(block_);
    }
  }

  char* data() const { return data_; }
  std::vector<char> copy() const { return {data_, data_ + bytes_}; }

 private:
  std::size_t bytes_, mapped_ = 0;
  void* block_;
  char* data_;
};

// A tensor whose last dimension is contiguous (and the outer ones in any order, with or without gaps).
template <class T>
class Tensor {
 public:
  enum class Use { input, output, left_out };

  // `broadcast`: dimensions may have a stride of zero.
  Tensor(Random& random, Use use, std::vector<Index> outer, Index features, bool broadcast = true)
      : sizes_(std::move(outer)), features_(features), strides_(sizes_.size()), use_(use) {
    std::vector<std::size_t> order(sizes_.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random.engine);
    Index stride = features_ + gap(random);
    Index end = features_;
    for (const std::size_t i : order) {
      if (use == Use::input && broadcast && random.chance(0.15)) continue;
      strides_[i] = stride;
      end += (sizes_[i] - 1) * stride;
      stride = stride * sizes_[i] + gap(random);
    }
    allocate(random, end);
  }

  // Exactly these strides.
  Tensor(Random& random, Use use, std::vector<Index> outer, Index features, std::vector<Index> strides)
      : sizes_(std::move(outer)), features_(features), strides_(std::move(strides)), use_(use) {
    Index end = features_;
    for (std::size_t i = 0; i < sizes_.size(); ++i) end += (sizes_[i] - 1) * strides_[i];
    allocate(random, end);
  }

  T* data() const { return memory_ ? reinterpret_cast<T*>(memory_->data()) : nullptr; }
  Index stride(std::size_t dim) const { return memory_ ? strides_[dim] : 0; }

  template <class U, std::size_t N>
  operator View<U, N>() const {
    View<U, N> view{data(), {}};
    for (std::size_t i = 0; i < N; ++i) view.strides[i] = stride(i);
    return view;
  }
  std::vector<char> bytes() const { return memory_ ? memory_->copy() : std::vector<char>{}; }

  void poison() const {
    if (memory_) std::memset(memory_->data(), kPoison, std::size_t(elements_) * sizeof(T));
  }

  void scale(double factor) const {
    for (Index i = 0; memory_ && i < elements_; ++i) data()[i] = T(double(data()[i]) * factor);
  }

  // Of an output: everything inside is written, nothing outside is.
  void check_written(const char* name) const {
    if (!memory_) return;
    std::vector<bool> inside(std::size_t(elements_), false);
    mark(inside, 0, 0);
    for (Index i = 0; i < elements_; ++i) {
      if (is_poison(i) == inside[std::size_t(i)]) {
        fail(std::string(name) + (inside[std::size_t(i)] ? " is not written in full" : " is written outside its view"));
      }
    }
  }

 private:
  static constexpr int kPoison = 0xff;  // a NaN that no arithmetic makes

  static Index gap(Random& random) { return random.chance(0.4) ? random.below(4) : 0; }

  void allocate(Random& random, Index elements) {
    elements_ = elements;
    if (use_ == Use::left_out) return;
    memory_ = std::make_unique<Memory>(random, std::size_t(elements) * sizeof(T), alignof(T));
    if (use_ == Use::output) return poison();
    for (Index i = 0; i < elements; ++i) {
      if constexpr (std::is_same_v<T, std::uint8_t>) {
        data()[i] = random.chance(0.2);
      } else if constexpr (std::is_floating_point_v<T>) {
        data()[i] = T(random.normal());
      } else {
        data()[i] = T{decltype(T::re)(0.6 * random.normal()), decltype(T::im)(0.6 * random.normal())};
      }
    }
  }

  void mark(std::vector<bool>& inside, std::size_t dim, Index offset) const {
    if (dim == sizes_.size()) {
      std::fill_n(inside.begin() + offset, features_, true);
      return;
    }
    for (Index i = 0; i < sizes_[dim]; ++i) mark(inside, dim + 1, offset + i * strides_[dim]);
  }

  bool is_poison(Index i) const {
    std::array<unsigned char, sizeof(T)> bytes;
    std::memcpy(bytes.data(), data() + i, sizeof(T));
    return std::all_of(bytes.begin(), bytes.end(), [](unsigned char byte) { return byte == kPoison; });
  }

  std::vector<Index> sizes_;
  Index features_;
  std::vector<Index> strides_;
  Use use_;
  Index elements_ = 0;
  std::unique_ptr<Memory> memory_;
};

template <class T>
constexpr auto kInput = Tensor<T>::Use::input;
template <class T>
constexpr auto kOutput = Tensor<T>::Use::output;

template <class T>
typename Tensor<T>::Use sometimes(Random& random) {
  return random.chance(0.6) ? Tensor<T>::Use::input : Tensor<T>::Use::left_out;
}

// Runs `kernel(threads)` with one and with more threads: outputs are written in full, equal and alone in changing.
template <class Kernel, class... Inputs, class... Outputs>
void check(Random& random, Index most_threads, Kernel kernel, const std::tuple<Inputs...>& inputs,
           const std::tuple<Outputs...>& outputs) {
  const auto contents = [](const auto& tensors) {
    return std::apply([](const auto&... x) { return std::vector<std::vector<char>>{x.bytes()...}; }, tensors);
  };
  const auto inputs_before = contents(inputs);
  std::vector<std::vector<char>> expected;
  for (const Index threads : {Index(1), std::min(most_threads, 2 + random.below(3))}) {
    std::apply([](const auto&... x) { (x.poison(), ...); }, outputs);
    kernel(int(threads));
    std::apply([](const auto&... x) { (x.check_written("an output"), ...); }, outputs);
    if (contents(inputs) != inputs_before) fail("an input is written");
    auto results = contents(outputs);
    if (!expected.empty() && results != expected) fail("the result depends on the threads or on the scratch memory");
    expected = std::move(results);
  }
}

// Calls a kernel as `launch` does, with scratch memory whose content changes from call to call.
template <class K, template <class> class Op, class T>
void run(Random& random, Op<T> p, int threads) {
  p.threads = threads;
  const Cost cost = K::cost(p);
  const Index elements = cost.per_thread * threads + cost.shared;
  const Memory memory(random, std::size_t(elements) * sizeof(T), 64);
  p.scratch = reinterpret_cast<T*>(memory.data());
  if constexpr (std::is_floating_point_v<T>) {
    std::fill_n(p.scratch, elements, random.chance(0.5) ? std::numeric_limits<T>::quiet_NaN() : T(1));
  }
  K::run(p);
}

struct Sizes {
  Index G, B, T_len, N;
  std::vector<Index> rows() const { return {G, B, T_len}; }
};

// Mostly small; now and then long, or with enough rows for several blocks and chunks.
Sizes random_sizes(Random& random) {
  Sizes sizes{random.size(3), random.size(9), random.size(9), random.features()};
  if (random.chance(0.1)) sizes = {1, random.size(3), 200 + random.below(1400), random.size(18)};
  if (random.chance(0.1)) sizes = {random.size(2), 10 + random.below(40), random.size(40), random.size(34)};
  return sizes;
}

template <class K, class T>
void exercise_dense_scan(Random& random) {
  const Sizes sizes = random_sizes(random);
  const auto [G, B, T_len, N] = sizes;
  const Tensor<T> u(random, kInput<T>, sizes.rows(), N);
  const Tensor<T> A(random, kInput<T>, {G, N, N}, 1);
  const Tensor<T> s0(random, sometimes<T>(random), {G, B}, N);
  const Tensor<std::uint8_t> reset(random, sometimes<std::uint8_t>(random), sizes.rows(), 1);
  const Tensor<T> s(random, kOutput<T>, sizes.rows(), N);
  A.scale(random.chance(0.9) ? 0.9 / double(N) : 1e3);  // states that grow without bound are legal, too
  const DenseScan<T> p{{}, u, A, s0, reset, s, G, B, T_len, N, random.chance(0.5)};
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  check(random, G * B, kernel, std::tie(u, A, s0, reset), std::tie(s));
}

template <class K, class T>
void exercise_norm_scan(Random& random) {
  const Sizes sizes = random_sizes(random);
  const auto [G, B, T_len, N] = sizes;
  const auto sweep = std::array{Sweep::forward, Sweep::tangent, Sweep::adjoint}[std::size_t(random.below(3))];
  const bool forward = sweep == Sweep::forward;
  const auto none = Tensor<T>::Use::left_out;
  const auto saved = !forward ? kInput<T> : random.chance(0.5) ? kOutput<T> : none;
  const Tensor<T> u(random, kInput<T>, sizes.rows(), N);
  const Tensor<T> c(random, forward ? none : sometimes<T>(random), sizes.rows(), N);
  const Tensor<T> A(random, kInput<T>, {G, N, N}, 1);
  const Tensor<T> weight(random, kInput<T>, {G}, N);
  const Tensor<T> bias(random, forward ? kInput<T> : none, {G}, N);
  const Tensor<T> n(random, saved, sizes.rows(), N, false);
  const Tensor<T> rstd(random, saved, sizes.rows(), 1, {B * T_len, T_len, 1});
  const Tensor<T> s0(random, sweep == Sweep::adjoint ? none : sometimes<T>(random), {G, B}, N);
  const Tensor<std::uint8_t> reset(random, sometimes<std::uint8_t>(random), sizes.rows(), 1);
  const Tensor<T> s(random, kOutput<T>, sizes.rows(), N);
  const bool sums = sweep == Sweep::adjoint && random.chance(0.5);  // gradients of weight and bias, then no x
  const Tensor<T> x(random, forward || sums ? none : kOutput<T>, sizes.rows(), N);
  const std::vector<Index> dense{N};
  const Tensor<T> weight_grad(random, sums ? kOutput<T> : none, {G}, N, dense);
  const Tensor<T> bias_grad(random, sums ? kOutput<T> : none, {G}, N, dense);
  A.scale(0.9 / double(N));
  if (!forward) rstd.scale(0.3);
  const NormScan<T> p{{},
                      u,
                      c,
                      A,
                      weight,
                      bias,
                      n,
                      rstd.data(),
                      s0,
                      reset,
                      s,
                      x,
                      G,
                      B,
                      T_len,
                      N,
                      T(1e-5),
                      sweep,
                      weight_grad.data(),
                      bias_grad.data()};
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  if (forward) {
    check(random, G * B, kernel, std::tie(u, A, weight, bias, s0, reset), std::tie(s, n, rstd));
  } else {
    check(random, G * B, kernel, std::tie(u, c, A, weight, n, rstd, s0, reset), std::tie(s, x, weight_grad, bias_grad));
  }
}

template <class K, class T>
void exercise_weight_grad(Random& random) {
  const Sizes sizes = random_sizes(random);
  const auto [G, B, T_len, N] = sizes;
  const Tensor<T> x(random, kInput<T>, sizes.rows(), N);
  const Tensor<T> s(random, kInput<T>, sizes.rows(), N);
  const Tensor<T> s0(random, sometimes<T>(random), {G, B}, N);
  const Tensor<std::uint8_t> reset(random, sometimes<std::uint8_t>(random), sizes.rows(), 1);
  const Tensor<T> grad(random, kOutput<T>, {G, N}, N, {N * N, N});
  const WeightGrad<T> p{{}, x, s, s0, reset, grad.data(), G, B, T_len, N, random.chance(0.5)};
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  check(random, G * B * T_len, kernel, std::tie(x, s, s0, reset), std::tie(grad));
}

struct Axes {
  Index M, T_len, C;
};

// Mostly small; now and then rows of one column, or more columns than a thread takes at once.
Axes random_axes(Random& random) {
  Axes axes{random.size(40), random.size(40), random.size(20)};
  if (random.chance(0.5)) axes.C = 1;
  if (random.chance(0.1)) axes = {random.size(3), random.size(5), 1000 + random.below(1500)};
  if (random.chance(0.1)) axes = {random.size(6), 200 + random.below(3000), random.size(3)};
  return axes;
}

// A tensor [M, T, C] of which one axis has stride 1, and its three strides.
template <class T>
struct Scanned {
  Tensor<T> tensor;
  std::array<Index, 3> strides{};

  // `broadcast`: the axis may have one element that stands for all.
  Scanned(Random& random, typename Tensor<T>::Use use, std::array<Index, 3> sizes, std::size_t axis, bool broadcast)
      : tensor(random, use, {sizes[(axis + 1) % 3], sizes[(axis + 2) % 3]}, broadcast ? 1 : sizes[axis]) {
    strides[axis] = broadcast ? 0 : 1;
    for (const std::size_t i : {std::size_t(0), std::size_t(1)}) strides[(axis + 1 + i) % 3] = tensor.stride(i);
  }
  View<const T, 3> input() const { return {tensor.data(), {strides[0], strides[1], strides[2]}}; }
  View<T, 3> view() const { return {tensor.data(), {strides[0], strides[1], strides[2]}}; }
};

template <class K, class T>
void exercise_linear_scan(Random& random) {
  Axes axes = random_axes(random);
  if (random.chance(0.1)) axes = {random.size(3), 2000 + random.below(9000), 1};  // enough for chunks of time
  const auto [M, T_len, C] = axes;
  const std::array<Index, 3> sizes{M, T_len, C};
  const std::size_t axis = std::size_t(random.below(3));
  const Scanned<T> a(random, kInput<T>, sizes, axis, random.chance(0.3)), b(random, kInput<T>, sizes, axis, false);
  const Scanned<T> h(random, kOutput<T>, sizes, axis, false);
  const Tensor<T> h0(random, sometimes<T>(random), {M, C}, 1);
  const LinearScan<T> p{{}, a.input(), b.input(), h0, h.view(), M, T_len, C, random.chance(0.5), random.chance(0.5)};
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  check(random, M * C, kernel, std::tie(a.tensor, b.tensor, h0), std::tie(h.tensor));
}

template <class K, class T>
void exercise_gae(Random& random) {
  const auto [M, T_len, C] = random_axes(random);
  using Flag = std::uint8_t;
  const std::vector<Index> outer{M, T_len}, contiguous{T_len * C, C};
  const Tensor<T> rewards(random, kInput<T>, outer, C, contiguous), values(random, kInput<T>, outer, C, contiguous),
      next_values(random, kInput<T>, outer, C, contiguous);
  const Tensor<Flag> terminated(random, kInput<Flag>, outer, C, contiguous),
      truncated(random, kInput<Flag>, outer, C, contiguous);
  const Tensor<T> advantages(random, kOutput<T>, outer, C, contiguous),
      returns(random, kOutput<T>, outer, C, contiguous);
  const Gae<T> p{{},
                 rewards.data(),
                 values.data(),
                 next_values.data(),
                 terminated.data(),
                 truncated.data(),
                 advantages.data(),
                 returns.data(),
                 M,
                 T_len,
                 C,
                 T(0.99),
                 T(0.95)};
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  check(random, M * C, kernel, std::tie(rewards, values, next_values, terminated, truncated),
        std::tie(advantages, returns));
}

template <class K, class T>
void exercise_discounted_returns(Random& random) {
  const auto [M, T_len, C] = random_axes(random);
  using Flag = std::uint8_t;
  const std::vector<Index> outer{M, T_len}, contiguous{T_len * C, C};
  const Tensor<T> rewards(random, kInput<T>, outer, C, contiguous),
      next_values(random, kInput<T>, outer, C, contiguous);
  const Tensor<Flag> terminated(random, kInput<Flag>, outer, C, contiguous),
      truncated(random, kInput<Flag>, outer, C, contiguous);
  const Tensor<T> returns(random, kOutput<T>, outer, C, contiguous);
  const DiscountedReturns<T> p{
      {}, rewards.data(), next_values.data(), terminated.data(), truncated.data(), returns.data(), M, T_len,
      C,  T(0.99)};
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  check(random, M * C, kernel, std::tie(rewards, next_values, terminated, truncated), std::tie(returns));
}

template <class K, class T>
void exercise_output_norm(Random& random) {
  const Index G = random.size(3), M = random.chance(0.1) ? 60 + random.below(100) : random.size(9);
  const Index H = random.features();
  const auto none = Tensor<T>::Use::left_out;
  const bool norm = random.chance(0.7), saves = norm && random.chance(0.5);
  const std::vector<Index> rows{G, M}, contiguous{M * H, H}, single{M, 1};
  const Tensor<T> z(random, kInput<T>, rows, H);
  const Tensor<T> weight(random, norm ? kInput<T> : none, {G}, H), bias(random, norm ? kInput<T> : none, {G}, H);
  const Tensor<T> residual(random, sometimes<T>(random), rows, H);
  const Tensor<T> y(random, kOutput<T>, rows, H, contiguous);
  const auto saved = saves ? kOutput<T> : none;
  const Tensor<T> mean(random, saved, rows, 1, single), rstd(random, saved, rows, 1, single);
  const OutputNorm<T> p{{},          z, weight, bias, residual, y.data(),          mean.data(),
                        rstd.data(), G, M,      H,    T(1e-5),  random.chance(0.5)};
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  check(random, G * M, kernel, std::tie(z, weight, bias, residual), std::tie(y, mean, rstd));
}

template <class K, class T>
void exercise_output_norm_grad(Random& random) {
  const Index G = random.size(3), M = random.chance(0.1) ? 60 + random.below(100) : random.size(9);
  const Index H = random.features();
  const auto none = Tensor<T>::Use::left_out;
  const auto input = random.chance(0.7) ? kInput<T> : none, output = input == none ? none : kOutput<T>;
  const std::vector<Index> rows{G, M}, single{M, 1};
  const Tensor<T> grad_y(random, kInput<T>, rows, H), z(random, kInput<T>, rows, H);
  const Tensor<T> weight(random, input, {G}, H), bias(random, input, {G}, H);
  const Tensor<T> mean(random, input, rows, 1, single), rstd(random, input, rows, 1, single);
  const Tensor<T> grad_z(random, kOutput<T>, rows, H, {M * H, H});
  const std::vector<Index> sums{H};
  const Tensor<T> grad_weight(random, output, {G}, H, sums), grad_bias(random, output, {G}, H, sums);
  const OutputNormGrad<T> p{{},
                            grad_y,
                            z,
                            weight,
                            bias,
                            mean.data(),
                            rstd.data(),
                            grad_z.data(),
                            grad_weight.data(),
                            grad_bias.data(),
                            G,
                            M,
                            H,
                            random.chance(0.5)};
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  check(random, G * M, kernel, std::tie(grad_y, z, weight, bias, mean, rstd), std::tie(grad_z, grad_weight, grad_bias));
}

struct LinearSizes {
  Index G, M, I, O;
  std::vector<Index> rows() const { return {G, M}; }
  std::vector<Index> matrices() const { return {G, O, I}; }
};

// Mostly small; now and then rows of several blocks, or of several partial sums.
LinearSizes random_linear(Random& random) {
  LinearSizes sizes{random.size(3), random.size(9), random.features(), random.features()};
  if (random.chance(0.1)) sizes.M = 90 + random.below(120);
  if (random.chance(0.05)) sizes = {random.size(2), 1000 + random.below(600), random.size(20), random.size(20)};
  return sizes;
}

template <class K, class T>
void exercise_output_norm_tangents(Random& random) {
  const Index M = random.size(random.chance(0.2) ? 200 : 9), H = random.features();
  const std::vector<Index> rows{M}, contiguous{H}, of_rows{M}, one{1};
  const bool has_norm = random.chance(0.7);
  const auto affine = has_norm ? kInput<T> : Tensor<T>::Use::left_out;
  const Tensor<T> z(random, kInput<T>, rows, H, contiguous), z_t(random, kInput<T>, rows, H, contiguous),
      grad(random, kInput<T>, rows, H, contiguous), grad_t(random, kInput<T>, rows, H, contiguous),
      residual(random, random.chance(0.5) ? kInput<T> : Tensor<T>::Use::left_out, rows, H, contiguous);
  const Tensor<T> weight(random, affine, one, H, contiguous), weight_t(random, affine, one, H, contiguous),
      bias(random, affine, one, H, contiguous), bias_t(random, affine, one, H, contiguous),
      mean(random, affine, one, M, of_rows), rstd(random, affine, one, M, of_rows);
  const auto sums = has_norm ? kOutput<T> : Tensor<T>::Use::left_out;
  const Tensor<T> y_t(random, kOutput<T>, rows, H, contiguous), grad_z_t(random, kOutput<T>, rows, H, contiguous),
      grad_weight_t(random, sums, one, H, contiguous), grad_bias_t(random, sums, one, H, contiguous);
  const bool tanh = random.chance(0.7);
  const OutputNormTangent<T> p{{},
                               z.data(),
                               z_t.data(),
                               weight.data(),
                               weight_t.data(),
                               bias.data(),
                               bias_t.data(),
                               mean.data(),
                               rstd.data(),
                               residual.data(),
                               y_t.data(),
                               M,
                               H,
                               tanh};
  const OutputNormGradTangent<T> q{{},
                                   grad.data(),
                                   grad_t.data(),
                                   z.data(),
                                   z_t.data(),
                                   weight.data(),
                                   weight_t.data(),
                                   bias.data(),
                                   bias_t.data(),
                                   mean.data(),
                                   rstd.data(),
                                   grad_z_t.data(),
                                   grad_weight_t.data(),
                                   grad_bias_t.data(),
                                   M,
                                   H,
                                   tanh};
  const auto kernel = [&](int threads) {
    run<K>(random, p, threads);
    run<K>(random, q, threads);
  };
  check(random, M, kernel, std::tie(z, z_t, grad, grad_t, residual, weight, weight_t, bias, bias_t, mean, rstd),
        std::tie(y_t, grad_z_t, grad_weight_t, grad_bias_t));
}

template <class K, class T>
void exercise_linear(Random& random) {
  const auto sizes = random_linear(random);
  const auto [G, M, I, O] = sizes;
  const Tensor<T> x(random, kInput<T>, sizes.rows(), I), W(random, kInput<T>, sizes.matrices(), 1);
  const auto none = Tensor<T>::Use::left_out, add_use = sometimes<T>(random);
  const Tensor<T> bias(random, add_use == none ? sometimes<T>(random) : none, {G}, O),
      add(random, add_use, sizes.rows(), O);
  const Tensor<T> y(random, kOutput<T>, sizes.rows(), O, {M * O, O});
  const Linear<T> p{{}, x, W, bias, add, y.data(), G, M, I, O, random.chance(0.5)};
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  check(random, G * M, kernel, std::tie(x, W, bias, add), std::tie(y));
}

template <class K, class T>
void exercise_linear_grad(Random& random) {
  const auto sizes = random_linear(random);
  const auto [G, M, I, O] = sizes;
  const auto none = Tensor<T>::Use::left_out;
  const auto wanted = [&] { return random.chance(0.7) ? kOutput<T> : none; };
  const Tensor<T> grad_y(random, kInput<T>, sizes.rows(), O), y(random, sometimes<T>(random), sizes.rows(), O);
  const Tensor<T> x(random, kInput<T>, sizes.rows(), I), W(random, kInput<T>, sizes.matrices(), 1);
  const Tensor<T> grad_x(random, wanted(), sizes.rows(), I, {M * I, I});
  const Tensor<T> grad_W(random, wanted(), {G, O}, I, {O * I, I});
  const Tensor<T> grad_bias(random, wanted(), {G}, O, std::vector<Index>{O});
  const LinearGrad<T> p{{}, grad_y, y, x, W, grad_x.data(), grad_W.data(), grad_bias.data(), G, M, I, O};
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  check(random, G * M, kernel, std::tie(grad_y, y, x, W), std::tie(grad_x, grad_W, grad_bias));
}

template <class K, class T>
void exercise_linear_tangent(Random& random) {
  const auto sizes = random_linear(random);
  const auto [G, M, I, O] = sizes;
  const auto none = Tensor<T>::Use::left_out;
  const auto through_tanh = random.chance(0.7) ? kInput<T> : none;
  const bool is_curved = through_tanh == kInput<T> && random.chance(0.7);
  const std::vector<Index> contiguous{M * O, O};
  const Tensor<T> x_t(random, sometimes<T>(random), sizes.rows(), I), x(random, kInput<T>, sizes.rows(), I);
  const Tensor<T> W_t(random, sometimes<T>(random), sizes.matrices(), 1), W(random, kInput<T>, sizes.matrices(), 1);
  const Tensor<T> bias_t(random, sometimes<T>(random), {G}, O), y(random, through_tanh, sizes.rows(), O);
  const Tensor<T> grad_y(random, is_curved ? kInput<T> : none, sizes.rows(), O);
  const Tensor<T> y_t(random, kOutput<T>, sizes.rows(), O, contiguous);
  const Tensor<T> curvature(random, is_curved ? kOutput<T> : none, sizes.rows(), O, contiguous);
  const LinearTangent<T> p{{}, x_t, W_t, bias_t, x, W, y, grad_y, y_t.data(), curvature.data(), G, M, I, O};
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  check(random, G * M, kernel, std::tie(x_t, W_t, bias_t, x, W, y, grad_y), std::tie(y_t, curvature));
}

template <class K, class T>
void exercise_adam(Random& random) {
  const Index P = random.size(random.chance(0.5) ? 40 : 9000);
  const std::vector<Index> outer{1}, contiguous{P};
  const Tensor<T> w0(random, kInput<T>, outer, P, contiguous), m0(random, kInput<T>, outer, P, contiguous),
      v0(random, kInput<T>, outer, P, contiguous), grad(random, kInput<T>, outer, P, contiguous),
      rates(random, kInput<T>, outer, P, contiguous);
  const Tensor<T> w(random, kOutput<T>, outer, P, contiguous), m(random, kOutput<T>, outer, P, contiguous),
      v(random, kOutput<T>, outer, P, contiguous);
  const Tensor<double> squares(random, kOutput<double>, outer, 1, outer);
  Adam<T> p{};
  p.w = w.data(), p.m = m.data(), p.v = v.data();
  p.grad = grad.data(), p.lr_scales = rates.data();
  p.P = P;
  p.scale = T(0.7), p.rate = T(0.1), p.root = T(0.5), p.beta1 = T(0.9), p.beta2 = T(0.999), p.eps = T(1e-5);
  const auto kernel = [&](int) {
    for (Index i = 0; i < P; ++i) {
      w.data()[i] = w0.data()[i], m.data()[i] = m0.data()[i], v.data()[i] = v0.data()[i] * v0.data()[i];
    }
    K::adam(p);
    squares.data()[0] = K::squared_norm(grad.data(), P);
  };
  check(random, 1, kernel, std::tie(w0, m0, v0, grad, rates), std::tie(w, m, v, squares));
}

template <class K, class T>
void exercise_network_step(Random& random) {
  const Index G = random.size(3), B = random.size(20), I = random.size(20), H = random.features(),
              N = random.features();
  const Index L = random.size(3), K_ = random.size(8);
  const auto none = Tensor<T>::Use::left_out;
  // One row of `count` elements, as all of them lie: contiguous.
  const auto flat = [&](Index count, auto use) {
    return Tensor<T>(random, use, {Index(1)}, count, std::vector<Index>{count});
  };
  const bool discrete = random.chance(0.3), norm_state = random.chance(0.3);
  const auto norm = random.chance(0.7) ? kInput<T> : none;
  const Tensor<T> x = flat(G * B * I, kInput<T>), state = flat(L * G * B * N, sometimes<T>(random));
  const Tensor<T> noise = flat(G * B * K_, discrete ? none : sometimes<T>(random));
  const auto statistics = sometimes<double>(random);
  const std::vector<Index> features{I}, rows{G * B};
  const Tensor<double> obs_mean(random, statistics, {1}, I, features), obs_var(random, statistics, {1}, I, features);
  const Tensor<std::uint8_t> reset(random, sometimes<std::uint8_t>(random), {1}, G * B, rows);
  const Tensor<T> encoder_weight = flat(H * I, kInput<T>), encoder_bias = flat(H, sometimes<T>(random));
  const Tensor<T> actor_weight = flat(K_ * H, kInput<T>), actor_bias = flat(K_, sometimes<T>(random));
  // The critic reads the features through a network of its own of this width, if any.
  const Index width = random.chance(0.5) ? random.features() : 0;
  const auto network = width > 0 ? kInput<T> : none, network_bias = width > 0 ? sometimes<T>(random) : none;
  const Tensor<T> value_x = flat(width * I, network), value_h = flat(width * H, network);
  const Tensor<T> value_bias = flat(width, network_bias), value_hidden_bias = flat(width, network_bias);
  const Tensor<T> value_hidden = flat(width * width, network);
  const Tensor<T> critic_weight = flat(width > 0 ? width : H, kInput<T>), critic_bias = flat(1, sometimes<T>(random));
  const Tensor<T> log_std = flat(K_, discrete ? none : kInput<T>);
  // One tensor of each kind serves all layers and groups.
  const Tensor<T> A = flat(N * N, kInput<T>), W = flat(N * H, kInput<T>), bias = flat(N, sometimes<T>(random));
  const Tensor<T> C = flat(H * N, kInput<T>), D = flat(H * H, kInput<T>);
  const Tensor<T> weight = flat(norm_state ? N : H, norm), norm_bias = flat(norm_state ? N : H, norm);
  const Tensor<T> action = flat(G * B * K_, kOutput<T>), value = flat(G * B, kOutput<T>);
  const Tensor<T> log_prob = flat(G * B, discrete ? none : kOutput<T>);
  const Tensor<T> next_state = flat(L * G * B * N, kOutput<T>);
  enum Weight {
    kEncoder,
    kEncoderBias,
    kActor,
    kActorBias,
    kCritic,
    kCriticBias,
    kLogStd,
    kValueX,
    kValueH,
    kValueBias,
    kHidden,
    kHiddenBias,
    kA,
    kB,
    kBias,
    kC,
    kD,
    kNorm,
    kNormBias,
    kWeights
  };
  const T* const of_group[] = {encoder_weight.data(),
                               encoder_bias.data(),
                               actor_weight.data(),
                               actor_bias.data(),
                               critic_weight.data(),
                               critic_bias.data(),
                               log_std.data(),
                               value_x.data(),
                               value_h.data(),
                               value_bias.data(),
                               value_hidden.data(),
                               value_hidden_bias.data(),
                               A.data(),
                               W.data(),
                               bias.data(),
                               C.data(),
                               D.data(),
                               weight.data(),
                               norm_bias.data()};
  static_assert(std::size(of_group) == kWeights);
  std::vector<const T*> weights;
  for (Index g = 0; g < G; ++g) weights.insert(weights.end(), std::begin(of_group), std::end(of_group));

  StepBuilder program(I);
  const bool has_norm = weight.data() != nullptr, residual = random.chance(0.5);
  const int encoded = program.other(StepBuilder::kInput, H);
  program.affine(encoded, H, StepBuilder::kInput, I, kEncoder, kEncoderBias);
  program.tanh(encoded, encoded);
  int h = encoded;
  for (Index l = 0; l < L; ++l) {
    const int s = program.buffer(StepBuilder::kState, N), z = program.buffer(StepBuilder::kNext, N);
    const int y = program.buffer(StepBuilder::kOutput, H);
    program.load_state(s, N);
    program.affine(z, N, h, H, kB, s, N, kA, kBias, true);
    if (norm_state && has_norm) program.layer_norm(z, N, kNorm, kNormBias, 1e-5);
    program.save_state(z, N);
    program.affine(y, H, z, N, kC, h, H, kD, -1);
    if (!norm_state && has_norm) program.layer_norm(y, H, kNorm, kNormBias, 1e-5);
    const int next = residual ? h : program.other(h, H);
    program.tanh(next, y, residual);
    h = next;
  }
  program.keep(h);
  const int mean = program.other(h, K_);
  program.affine(mean, K_, h, H, kActor, kActorBias);
  program.keep(mean);
  Index wide = H;
  if (width > 0) {
    const int v = program.other(h, width), u = program.other(v, width);
    program.affine(v, width, StepBuilder::kInput, I, kValueX, h, H, kValueH, kValueBias);
    program.tanh(v, v);
    program.affine(u, width, v, width, kHidden, kHiddenBias);
    program.tanh(u, u);
    h = u, wide = width;
  }
  const int values = program.other(h, 1);
  program.affine(values, 1, h, wide, kCritic, kCriticBias);

  const int registers = int(program.features().size());
  NetworkStep<T> p{};
  p.program = program.instructions().data(), p.instructions = int(program.instructions().size());
  p.features = program.features().data(), p.registers = registers, p.parameters = 1;
  p.x = x.data(), p.state = state.data(), p.reset = reset.data(), p.noise = noise.data();
  p.obs_mean = obs_mean.data(), p.obs_var = obs_var.data(), p.obs_eps = 1e-8, p.obs_clip = 10.0;
  p.weights = weights.data();
  p.action = action.data(), p.log_prob = log_prob.data(), p.value = value.data(), p.next_state = next_state.data();
  p.G = G, p.B = B, p.I = I, p.K = K_, p.P = kWeights;
  p.mean = mean, p.value_register = values, p.log_std = discrete ? -1 : int(kLogStd);
  const auto kernel = [&](int threads) { run<K>(random, p, threads); };
  check(random, G * B, kernel,
        std::tie(x, state, noise, obs_mean, obs_var, reset, encoder_weight, encoder_bias, actor_weight, actor_bias,
                 critic_weight, critic_bias, log_std, value_x, value_h, value_bias, value_hidden, value_hidden_bias, A,
                 W, bias, C, D, weight, norm_bias),
        std::tie(action, log_prob, value, next_state));
}

// The kernels of one instruction set as a type.
#define SSM_FAST_KERNELS(isa)            \
  struct Kernels_##isa {                 \
    template <class P>                   \
    static Cost cost(const P& p) {       \
      return isa::cost(p);               \
    }                                    \
    template <class P>                   \
    static void run(const P& p) {        \
      isa::run(p);                       \
    }                                    \
    template <class P>                   \
    static void adam(const P& p) {       \
      isa::adam(p);                      \
    }                                    \
    template <class... P>                \
    static double squared_norm(P... p) { \
      return isa::squared_norm(p...);    \
    }                                    \
  };
SSM_FAST_KERNELS(baseline)
#if defined(SSM_FAST_HAS_avx2)
SSM_FAST_KERNELS(avx2)
#endif
#if defined(SSM_FAST_HAS_avx512)
SSM_FAST_KERNELS(avx512)
#endif
#undef SSM_FAST_KERNELS

template <class K>
void exercise(const std::string& isa, int cases, std::uint64_t seed) {
  const auto repeat = [&](const std::string& kernel, auto exercise_kernel) {
    for (int i = 0; i < cases; ++i) {
      running = isa + " " + kernel + ", case " + std::to_string(i) + " of seed " + std::to_string(seed);
      Random random{std::mt19937_64(seed * 1000003 + std::uint64_t(i))};
      exercise_kernel(random);
    }
  };
  repeat("dense_scan float32", exercise_dense_scan<K, float>);
  repeat("dense_scan float64", exercise_dense_scan<K, double>);
  repeat("norm_scan float32", exercise_norm_scan<K, float>);
  repeat("norm_scan float64", exercise_norm_scan<K, double>);
  repeat("weight_grad float32", exercise_weight_grad<K, float>);
  repeat("weight_grad float64", exercise_weight_grad<K, double>);
  repeat("linear_scan float32", exercise_linear_scan<K, float>);
  repeat("linear_scan float64", exercise_linear_scan<K, double>);
  repeat("linear_scan complex64", exercise_linear_scan<K, Complex<float>>);
  repeat("linear_scan complex128", exercise_linear_scan<K, Complex<double>>);
  repeat("gae float32", exercise_gae<K, float>);
  repeat("gae float64", exercise_gae<K, double>);
  repeat("discounted_returns float32", exercise_discounted_returns<K, float>);
  repeat("discounted_returns float64", exercise_discounted_returns<K, double>);
  repeat("output_norm float32", exercise_output_norm<K, float>);
  repeat("output_norm float64", exercise_output_norm<K, double>);
  repeat("output_norm_grad float32", exercise_output_norm_grad<K, float>);
  repeat("output_norm_grad float64", exercise_output_norm_grad<K, double>);
  repeat("output_norm_tangents float32", exercise_output_norm_tangents<K, float>);
  repeat("output_norm_tangents float64", exercise_output_norm_tangents<K, double>);
  repeat("linear float32", exercise_linear<K, float>);
  repeat("linear float64", exercise_linear<K, double>);
  repeat("linear_grad float32", exercise_linear_grad<K, float>);
  repeat("linear_grad float64", exercise_linear_grad<K, double>);
  repeat("linear_tangent float32", exercise_linear_tangent<K, float>);
  repeat("linear_tangent float64", exercise_linear_tangent<K, double>);
  repeat("network_step float32", exercise_network_step<K, float>);
  repeat("network_step float64", exercise_network_step<K, double>);
  repeat("adam float32", exercise_adam<K, float>);
  repeat("adam float64", exercise_adam<K, double>);
  std::printf("%s: every kernel, %d cases each\n", isa.c_str(), cases);
}

void exercise_all(int cases, std::uint64_t seed) {
  for (const Isa isa : available_isas()) {
    switch (isa) {
      case Isa::baseline: exercise<Kernels_baseline>(name(isa), cases, seed); break;
#if defined(SSM_FAST_HAS_avx2)
      case Isa::avx2: exercise<Kernels_avx2>(name(isa), cases, seed); break;
#endif
#if defined(SSM_FAST_HAS_avx512)
      case Isa::avx512: exercise<Kernels_avx512>(name(isa), cases, seed); break;
#endif
      default: fail("unknown instruction set " + name(isa));
    }
  }
}

}  // namespace
}  // namespace ssm_fast

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  struct sigaction on_fault{};
  on_fault.sa_handler = ssm_fast::name_fault;
  sigaction(SIGSEGV, &on_fault, &ssm_fast::after_fault);
  ssm_fast::exercise_all(cases, seed);
}
