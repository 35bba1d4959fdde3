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

// Scratch memory as the bindings allocate it, with content that changes from call to call.
template <class T>
T* fresh_scratch(Random& random, Index elements, std::unique_ptr<Memory>& memory) {
  const std::size_t bytes = std::size_t(elements) * sizeof(T);
  memory = std::make_unique<Memory>(random, bytes, 64);
  T* const scratch = reinterpret_cast<T*>(memory->data());
  std::fill_n(scratch, elements, random.chance(0.5) ? std::numeric_limits<T>::quiet_NaN() : T(1));
  return scratch;
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
  DenseScan<T> p{};
  p.u = u.data(), p.u_g = u.stride(0), p.u_b = u.stride(1), p.u_t = u.stride(2);
  p.A = A.data(), p.A_g = A.stride(0), p.A_row = A.stride(1), p.A_col = A.stride(2);
  p.s0 = s0.data(), p.s0_g = s0.stride(0), p.s0_b = s0.stride(1);
  p.reset = reset.data(), p.reset_g = reset.stride(0), p.reset_b = reset.stride(1), p.reset_t = reset.stride(2);
  p.s = s.data(), p.s_g = s.stride(0), p.s_b = s.stride(1), p.s_t = s.stride(2);
  p.G = G, p.B = B, p.T_len = T_len, p.N = N;
  p.reverse = random.chance(0.5);
  const auto kernel = [&](int threads) {
    std::unique_ptr<Memory> memory;
    p.threads = threads;
    p.scratch = fresh_scratch<T>(random, K::dense_scan_scratch(G, B, T_len, N, threads, sizeof(T) == 8), memory);
    K::dense_scan(p);
  };
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
  const std::vector<Index> s_strides{s.stride(0), s.stride(1), s.stride(2)};  // x shares them
  const bool sums = sweep == Sweep::adjoint && random.chance(0.5);            // gradients of weight and bias, then no x
  const Tensor<T> x(random, forward || sums ? none : kOutput<T>, sizes.rows(), N, s_strides);
  const std::vector<Index> dense{N};
  const Tensor<T> weight_grad(random, sums ? kOutput<T> : none, {G}, N, dense);
  const Tensor<T> bias_grad(random, sums ? kOutput<T> : none, {G}, N, dense);
  A.scale(0.9 / double(N));
  if (!forward) rstd.scale(0.3);
  NormScan<T> p{};
  p.u = u.data(), p.u_g = u.stride(0), p.u_b = u.stride(1), p.u_t = u.stride(2);
  p.c = c.data(), p.c_g = c.stride(0), p.c_b = c.stride(1), p.c_t = c.stride(2);
  p.A = A.data(), p.A_g = A.stride(0), p.A_row = A.stride(1), p.A_col = A.stride(2);
  p.weight = weight.data(), p.weight_g = weight.stride(0);
  p.bias = bias.data(), p.bias_g = bias.stride(0);
  p.n = n.data(), p.n_g = n.stride(0), p.n_b = n.stride(1), p.n_t = n.stride(2);
  p.rstd = rstd.data();
  p.s0 = s0.data(), p.s0_g = s0.stride(0), p.s0_b = s0.stride(1);
  p.reset = reset.data(), p.reset_g = reset.stride(0), p.reset_b = reset.stride(1), p.reset_t = reset.stride(2);
  p.s = s.data(), p.x = x.data(), p.s_g = s.stride(0), p.s_b = s.stride(1), p.s_t = s.stride(2);
  p.G = G, p.B = B, p.T_len = T_len, p.N = N;
  p.eps = T(1e-5);
  p.sweep = sweep;
  p.weight_grad = weight_grad.data(), p.bias_grad = bias_grad.data();
  const auto kernel = [&](int threads) {
    std::unique_ptr<Memory> memory, rows;
    p.threads = threads;
    if (sums) p.sums = fresh_scratch<T>(random, K::norm_scan_sums(G, B, N, sizeof(T) == 8), rows);
    p.scratch = fresh_scratch<T>(random, K::norm_scan_scratch(N, sizeof(T) == 8) * threads, memory);
    K::norm_scan(p);
  };
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
  WeightGrad<T> p{};
  p.x = x.data(), p.x_g = x.stride(0), p.x_b = x.stride(1), p.x_t = x.stride(2);
  p.s = s.data(), p.s_g = s.stride(0), p.s_b = s.stride(1), p.s_t = s.stride(2);
  p.s0 = s0.data(), p.s0_g = s0.stride(0), p.s0_b = s0.stride(1);
  p.reset = reset.data(), p.reset_g = reset.stride(0), p.reset_b = reset.stride(1), p.reset_t = reset.stride(2);
  p.grad = grad.data();
  p.G = G, p.B = B, p.T_len = T_len, p.N = N;
  p.reverse = random.chance(0.5);
  p.time_major = random.chance(0.5);
  const auto kernel = [&](int threads) {
    std::unique_ptr<Memory> memory;
    p.threads = threads;
    p.scratch = fresh_scratch<T>(random, K::weight_grad_scratch(G, B, T_len, N, sizeof(T) == 8), memory);
    K::weight_grad(p);
  };
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
  LinearScan<T> p{};
  p.a = a.tensor.data(), std::tie(p.a_m, p.a_t, p.a_c) = std::tuple_cat(a.strides);
  p.b = b.tensor.data(), std::tie(p.b_m, p.b_t, p.b_c) = std::tuple_cat(b.strides);
  p.h = h.tensor.data(), std::tie(p.h_m, p.h_t, p.h_c) = std::tuple_cat(h.strides);
  p.h0 = h0.data(), p.h0_m = h0.stride(0), p.h0_c = h0.stride(1);
  p.M = M, p.T_len = T_len, p.C = C;
  p.reverse = random.chance(0.5);
  p.shift = random.chance(0.5);
  const auto kernel = [&](int threads) {
    p.threads = threads;
    K::linear_scan(p);
  };
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
  Gae<T> p{};
  p.rewards = rewards.data(), p.values = values.data(), p.next_values = next_values.data();
  p.terminated = terminated.data(), p.truncated = truncated.data();
  p.advantages = advantages.data(), p.returns = returns.data();
  p.M = M, p.T_len = T_len, p.C = C;
  p.gamma = T(0.99), p.gae_lambda = T(0.95);
  const auto kernel = [&](int threads) {
    p.threads = threads;
    K::gae(p);
  };
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
  DiscountedReturns<T> p{};
  p.rewards = rewards.data(), p.next_values = next_values.data();
  p.terminated = terminated.data(), p.truncated = truncated.data();
  p.returns = returns.data();
  p.M = M, p.T_len = T_len, p.C = C;
  p.gamma = T(0.99);
  const auto kernel = [&](int threads) {
    p.threads = threads;
    K::discounted_returns(p);
  };
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
  OutputNorm<T> p{};
  p.z = z.data(), p.z_g = z.stride(0), p.z_m = z.stride(1);
  p.weight = weight.data(), p.weight_g = weight.stride(0);
  p.bias = bias.data(), p.bias_g = bias.stride(0);
  p.residual = residual.data(), p.residual_g = residual.stride(0), p.residual_m = residual.stride(1);
  p.y = y.data(), p.mean = mean.data(), p.rstd = rstd.data();
  p.G = G, p.M = M, p.H = H;
  p.eps = T(1e-5);
  p.tanh = random.chance(0.5);
  const auto kernel = [&](int threads) {
    p.threads = threads;
    K::output_norm(p);
  };
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
  OutputNormGrad<T> p{};
  p.grad_y = grad_y.data(), p.grad_g = grad_y.stride(0), p.grad_m = grad_y.stride(1);
  p.z = z.data(), p.z_g = z.stride(0), p.z_m = z.stride(1);
  p.weight = weight.data(), p.weight_g = weight.stride(0);
  p.bias = bias.data(), p.bias_g = bias.stride(0);
  p.mean = mean.data(), p.rstd = rstd.data();
  p.grad_z = grad_z.data(), p.grad_weight = grad_weight.data(), p.grad_bias = grad_bias.data();
  p.G = G, p.M = M, p.H = H;
  p.tanh = random.chance(0.5);
  const auto kernel = [&](int threads) {
    std::unique_ptr<Memory> memory;
    p.threads = threads;
    p.scratch = fresh_scratch<T>(random, K::output_norm_scratch(G, M, H, sizeof(T) == 8), memory);
    K::output_norm_grad(p);
  };
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
  OutputNormTangent<T> p{};
  p.z = z.data(), p.z_t = z_t.data();
  p.weight = weight.data(), p.weight_t = weight_t.data(), p.bias = bias.data(), p.bias_t = bias_t.data();
  p.mean = mean.data(), p.rstd = rstd.data();
  p.residual_t = residual.data();
  p.y_t = y_t.data();
  p.M = M, p.H = H;
  p.tanh = random.chance(0.7);
  OutputNormGradTangent<T> q{};
  q.grad_y = grad.data(), q.grad_y_t = grad_t.data(), q.z = p.z, q.z_t = p.z_t;
  q.weight = p.weight, q.weight_t = p.weight_t, q.bias = p.bias, q.bias_t = p.bias_t;
  q.mean = p.mean, q.rstd = p.rstd;
  q.grad_z_t = grad_z_t.data(), q.grad_weight_t = grad_weight_t.data(), q.grad_bias_t = grad_bias_t.data();
  q.M = M, q.H = H;
  q.tanh = p.tanh;
  const auto kernel = [&](int threads) {
    p.threads = q.threads = threads;
    std::unique_ptr<Memory> memory;
    q.scratch = fresh_scratch<T>(random, K::output_norm_tangent_scratch(M, H, sizeof(T) == 8), memory);
    K::output_norm_tangent(p);
    K::output_norm_grad_tangent(q);
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
  Linear<T> p{};
  p.x = x.data(), p.x_g = x.stride(0), p.x_m = x.stride(1);
  p.W = W.data(), p.W_g = W.stride(0), p.W_o = W.stride(1), p.W_i = W.stride(2);
  p.bias = bias.data(), p.bias_g = bias.stride(0);
  p.add = add.data(), p.add_g = add.stride(0), p.add_m = add.stride(1);
  p.y = y.data();
  p.G = G, p.M = M, p.I = I, p.O = O;
  p.tanh = random.chance(0.5);
  const auto kernel = [&](int threads) {
    std::unique_ptr<Memory> memory;
    p.threads = threads;
    p.scratch = fresh_scratch<T>(random, K::linear_scratch(I, O, sizeof(T) == 8) * threads, memory);
    K::linear(p);
  };
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
  LinearGrad<T> p{};
  p.grad_y = grad_y.data(), p.grad_g = grad_y.stride(0), p.grad_m = grad_y.stride(1);
  p.y = y.data(), p.y_g = y.stride(0), p.y_m = y.stride(1);
  p.x = x.data(), p.x_g = x.stride(0), p.x_m = x.stride(1);
  p.W = W.data(), p.W_g = W.stride(0), p.W_o = W.stride(1), p.W_i = W.stride(2);
  p.grad_x = grad_x.data(), p.grad_W = grad_W.data(), p.grad_bias = grad_bias.data();
  p.G = G, p.M = M, p.I = I, p.O = O;
  const auto kernel = [&](int threads) {
    std::unique_ptr<Memory> memory;
    p.threads = threads;
    p.scratch = fresh_scratch<T>(random, K::linear_grad_scratch(G, M, I, O, threads, sizeof(T) == 8), memory);
    K::linear_grad(p);
  };
  check(random, G * M, kernel, std::tie(grad_y, y, x, W), std::tie(grad_x, grad_W, grad_bias));
}

template <class K, class T>
void exercise_linear_tangent(Random& random) {
  const auto sizes = random_linear(random);
  const auto [G, M, I, O] = sizes;
  const auto none = Tensor<T>::Use::left_out;
  const auto through_tanh = random.chance(0.7) ? kInput<T> : none;
  const bool turns = through_tanh == kInput<T> && random.chance(0.7);
  const std::vector<Index> contiguous{M * O, O};
  const Tensor<T> x_t(random, sometimes<T>(random), sizes.rows(), I), x(random, kInput<T>, sizes.rows(), I);
  const Tensor<T> W_t(random, sometimes<T>(random), sizes.matrices(), 1), W(random, kInput<T>, sizes.matrices(), 1);
  const Tensor<T> bias_t(random, sometimes<T>(random), {G}, O), y(random, through_tanh, sizes.rows(), O);
  const Tensor<T> grad_y(random, turns ? kInput<T> : none, sizes.rows(), O);
  const Tensor<T> y_t(random, kOutput<T>, sizes.rows(), O, contiguous);
  const Tensor<T> turn(random, turns ? kOutput<T> : none, sizes.rows(), O, contiguous);
  LinearTangent<T> p{};
  p.x_t = x_t.data(), p.xt_g = x_t.stride(0), p.xt_m = x_t.stride(1);
  p.W_t = W_t.data(), p.Wt_g = W_t.stride(0), p.Wt_o = W_t.stride(1), p.Wt_i = W_t.stride(2);
  p.bias_t = bias_t.data(), p.bias_g = bias_t.stride(0);
  p.x = x.data(), p.x_g = x.stride(0), p.x_m = x.stride(1);
  p.W = W.data(), p.W_g = W.stride(0), p.W_o = W.stride(1), p.W_i = W.stride(2);
  p.y = y.data(), p.y_g = y.stride(0), p.y_m = y.stride(1);
  p.grad_y = grad_y.data(), p.grad_g = grad_y.stride(0), p.grad_m = grad_y.stride(1);
  p.y_t = y_t.data(), p.turn = turn.data();
  p.G = G, p.M = M, p.I = I, p.O = O;
  const auto kernel = [&](int threads) {
    std::unique_ptr<Memory> memory;
    p.threads = threads;
    p.scratch = fresh_scratch<T>(random, K::linear_scratch(I, O, sizeof(T) == 8) * threads, memory);
    K::linear_tangent(p);
  };
  check(random, G * M, kernel, std::tie(x_t, W_t, bias_t, x, W, y, grad_y), std::tie(y_t, turn));
}

template <class K, class T>
void exercise_adam(Random& random) {
  const Index P = random.size(random.chance(0.5) ? 40 : 9000);
  const std::vector<Index> outer{1}, contiguous{P};
  const Tensor<T> w0(random, kInput<T>, outer, P, contiguous), m0(random, kInput<T>, outer, P, contiguous),
      v0(random, kInput<T>, outer, P, contiguous), grad(random, kInput<T>, outer, P, contiguous),
      pace(random, kInput<T>, outer, P, contiguous);
  const Tensor<T> w(random, kOutput<T>, outer, P, contiguous), m(random, kOutput<T>, outer, P, contiguous),
      v(random, kOutput<T>, outer, P, contiguous);
  const Tensor<double> squares(random, kOutput<double>, outer, 1, outer);
  Adam<T> p{};
  p.w = w.data(), p.m = m.data(), p.v = v.data();
  p.grad = grad.data(), p.pace = pace.data();
  p.P = P;
  p.scale = T(0.7), p.rate = T(0.1), p.root = T(0.5), p.beta1 = T(0.9), p.beta2 = T(0.999), p.eps = T(1e-5);
  const auto kernel = [&](int) {
    for (Index i = 0; i < P; ++i) {
      w.data()[i] = w0.data()[i], m.data()[i] = m0.data()[i], v.data()[i] = v0.data()[i] * v0.data()[i];
    }
    K::adam(p);
    squares.data()[0] = K::squared_norm(grad.data(), P);
  };
  check(random, 1, kernel, std::tie(w0, m0, v0, grad, pace), std::tie(w, m, v, squares));
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
  p.features = program.features().data(), p.registers = registers;
  p.x = x.data(), p.state = state.data(), p.reset = reset.data(), p.noise = noise.data();
  p.obs_mean = obs_mean.data(), p.obs_var = obs_var.data(), p.obs_eps = 1e-8, p.obs_clip = 10.0;
  p.weights = weights.data();
  p.action = action.data(), p.log_prob = log_prob.data(), p.value = value.data(), p.next_state = next_state.data();
  p.G = G, p.B = B, p.I = I, p.K = K_, p.P = kWeights;
  p.mean = mean, p.value_register = values, p.log_std = discrete ? -1 : int(kLogStd);
  const auto kernel = [&](int threads) {
    std::unique_ptr<Memory> memory;
    p.threads = threads;
    const Index elements = K::network_step_scratch(program.features().data(), registers, sizeof(T) == 8);
    p.scratch = fresh_scratch<T>(random, elements * threads, memory);
    K::network_step(p);
  };
  check(random, G * B, kernel,
        std::tie(x, state, noise, obs_mean, obs_var, reset, encoder_weight, encoder_bias, actor_weight, actor_bias,
                 critic_weight, critic_bias, log_std, value_x, value_h, value_bias, value_hidden, value_hidden_bias, A,
                 W, bias, C, D, weight, norm_bias),
        std::tie(action, log_prob, value, next_state));
}

// The kernels of one instruction set as a type.
#define SSM_FAST_KERNELS(isa)                          \
  struct Kernels_##isa {                               \
    template <class... P>                              \
    static Index dense_scan_scratch(P... p) {          \
      return isa::dense_scan_scratch(p...);            \
    }                                                  \
    template <class... P>                              \
    static Index norm_scan_scratch(P... p) {           \
      return isa::norm_scan_scratch(p...);             \
    }                                                  \
    template <class... P>                              \
    static Index norm_scan_sums(P... p) {              \
      return isa::norm_scan_sums(p...);                \
    }                                                  \
    template <class... P>                              \
    static Index weight_grad_scratch(P... p) {         \
      return isa::weight_grad_scratch(p...);           \
    }                                                  \
    template <class... P>                              \
    static Index output_norm_scratch(P... p) {         \
      return isa::output_norm_scratch(p...);           \
    }                                                  \
    template <class... P>                              \
    static Index linear_scratch(P... p) {              \
      return isa::linear_scratch(p...);                \
    }                                                  \
    template <class... P>                              \
    static Index linear_grad_scratch(P... p) {         \
      return isa::linear_grad_scratch(p...);           \
    }                                                  \
    template <class... P>                              \
    static Index network_step_scratch(P... p) {        \
      return isa::network_step_scratch(p...);          \
    }                                                  \
    template <class P>                                 \
    static void output_norm(const P& p) {              \
      isa::output_norm(p);                             \
    }                                                  \
    template <class P>                                 \
    static void output_norm_grad(const P& p) {         \
      isa::output_norm_grad(p);                        \
    }                                                  \
    template <class... P>                              \
    static Index output_norm_tangent_scratch(P... p) { \
      return isa::output_norm_tangent_scratch(p...);   \
    }                                                  \
    template <class P>                                 \
    static void output_norm_tangent(const P& p) {      \
      isa::output_norm_tangent(p);                     \
    }                                                  \
    template <class P>                                 \
    static void output_norm_grad_tangent(const P& p) { \
      isa::output_norm_grad_tangent(p);                \
    }                                                  \
    template <class P>                                 \
    static void linear(const P& p) {                   \
      isa::linear(p);                                  \
    }                                                  \
    template <class P>                                 \
    static void linear_grad(const P& p) {              \
      isa::linear_grad(p);                             \
    }                                                  \
    template <class P>                                 \
    static void linear_tangent(const P& p) {           \
      isa::linear_tangent(p);                          \
    }                                                  \
    template <class P>                                 \
    static void network_step(const P& p) {             \
      isa::network_step(p);                            \
    }                                                  \
    template <class P>                                 \
    static void adam(const P& p) {                     \
      isa::adam(p);                                    \
    }                                                  \
    template <class... P>                              \
    static double squared_norm(P... p) {               \
      return isa::squared_norm(p...);                  \
    }                                                  \
    template <class P>                                 \
    static void dense_scan(const P& p) {               \
      isa::dense_scan(p);                              \
    }                                                  \
    template <class P>                                 \
    static void norm_scan(const P& p) {                \
      isa::norm_scan(p);                               \
    }                                                  \
    template <class P>                                 \
    static void weight_grad(const P& p) {              \
      isa::weight_grad(p);                             \
    }                                                  \
    template <class P>                                 \
    static void linear_scan(const P& p) {              \
      isa::linear_scan(p);                             \
    }                                                  \
    template <class P>                                 \
    static void gae(const P& p) {                      \
      isa::gae(p);                                     \
    }                                                  \
    template <class P>                                 \
    static void discounted_returns(const P& p) {       \
      isa::discounted_returns(p);                      \
    }                                                  \
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
