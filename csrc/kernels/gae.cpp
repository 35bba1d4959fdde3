// gae and discounted_returns: linear_scan in reverse with the temporal difference fused in; docs/ops/gae.md.
#include "ops.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

constexpr Index kColumns = 1024;  // columns a thread takes at once: their state stays in L1
constexpr int kTiles = 4;         // tiles of a row at once
constexpr Index kMaxChunks = 1024;
constexpr Index kChunkSteps = 128;  // shorter chunks of time are not worth the second pass

template <class T>
constexpr T kSmallest = sizeof(T) == 4 ? T(1e-37) : T(1e-307);

// One vector of steps.
template <class T>
struct Steps {
  Vector<T> rewards, values, next_values;
  Mask<T> terminated, truncated;
};

// A value that is not used may be anything, NaN included, so it is left out rather than multiplied by zero.
template <class T>
inline Vector<T> source_of(const Gae<T>& p, const Steps<T>& x, Mask<T>) {
  const auto bootstrap = x.terminated ? Vector<T>{} : x.next_values;
  return fused_vector(broadcast(p.gamma), bootstrap, x.rewards) - x.values;
}
template <class T>
inline T coefficient_of(const Gae<T>& p) {
  return p.gamma * p.gae_lambda;
}
template <class T>
constexpr bool cuts_at_last(const Gae<T>&) {
  return false;
}

template <class T>
inline Vector<T> source_of(const DiscountedReturns<T>& p, const Steps<T>& x, Mask<T> last) {
  const auto bootstrap = ((x.truncated | last) & ~x.terminated) ? x.next_values : Vector<T>{};
  return fused_vector(broadcast(p.gamma), bootstrap, x.rewards);
}
template <class T>
inline T coefficient_of(const DiscountedReturns<T>& p) {
  return p.gamma;
}
template <class T>
constexpr bool cuts_at_last(const DiscountedReturns<T>&) {
  return true;
}

// coefficient * later + source, where `cut` steps leave out whatever came later.
template <class T>
inline Vector<T> advance(Vector<T> coefficient, Mask<T> cut, Vector<T> later, Vector<T> source) {
  return cut ? source : fused_vector(coefficient, later, source);
}

// Elements [from, to) of a vector at p; zeros for the others, which are not read.
template <class T>
inline Vector<T> load_between(const T* p, int from, int to) {
  if (from == 0) return load_part(p, to);
  Vector<T> v{};
  for (int i = from; i < to; ++i) v[i] = p[i];
  return v;
}
template <class T>
inline void store_between(T* p, Vector<T> v, int from, int to, bool large) {
  if (large && to - from == kWidth<T>) return stream(p, v);
  if (from == 0) return store_part(p, v, to);
  for (int i = from; i < to; ++i) p[i] = v[i];
}
template <class T>
inline Bytes<T> load_flags(const std::uint8_t* p, int from, int to) {
  Bytes<T> bytes{};
  if (from == 0 && to == kWidth<T>) {
    std::memcpy(&bytes, p, sizeof(bytes));
  } else {
    for (int i = from; i < to; ++i) bytes[i] = p[i];
  }
  return bytes;
}
template <class T>
inline Steps<T> load_steps(const Gae<T>& p, Index i, int from, int to) {
  return {load_between(p.rewards + i, from, to), load_between(p.values + i, from, to),
          load_between(p.next_values + i, from, to), widen<T>(load_flags<T>(p.terminated + i, from, to)),
          widen<T>(load_flags<T>(p.truncated + i, from, to))};
}
template <class T>
inline Steps<T> load_steps(const DiscountedReturns<T>& p, Index i, int from, int to) {
  return {load_between(p.rewards + i, from, to), Vector<T>{}, load_between(p.next_values + i, from, to),
          widen<T>(load_flags<T>(p.terminated + i, from, to)), widen<T>(load_flags<T>(p.truncated + i, from, to))};
}

template <class T>
inline void write(const Gae<T>& p, Index i, Vector<T> scanned, int from, int to, bool large) {
  store_between(p.advantages + i, scanned, from, to, large);
  store_between(p.returns + i, scanned + load_between(p.values + i, from, to), from, to, large);
}
template <class T>
inline void write(const DiscountedReturns<T>& p, Index i, Vector<T> scanned, int from, int to, bool large) {
  store_between(p.returns + i, scanned, from, to, large);
}

// Asks for what lies at i: there are too many streams of memory for the processor to foresee by itself.
template <class T>
inline void prefetch(const Gae<T>& p, Index i) {
  __builtin_prefetch(p.rewards + i, 0, 2);
  __builtin_prefetch(p.values + i, 0, 2);
  __builtin_prefetch(p.next_values + i, 0, 2);
  __builtin_prefetch(p.terminated + i, 0, 2);
  __builtin_prefetch(p.truncated + i, 0, 2);
}
template <class T>
inline void prefetch(const DiscountedReturns<T>& p, Index i) {
  __builtin_prefetch(p.rewards + i, 0, 2);
  __builtin_prefetch(p.next_values + i, 0, 2);
  __builtin_prefetch(p.terminated + i, 0, 2);
  __builtin_prefetch(p.truncated + i, 0, 2);
}

template <class T, class P>
inline bool is_large(const P& p) {
  return std::size_t(p.M * p.T_len * p.C) * sizeof(T) >= kStreamBytes;
}

// Columns, where the elements of one step lie side by side.

// `later` holds the scanned values of the step behind.
template <class T, class P>
void scan_columns(const P& p, Index m, Index c, Index count) {
  constexpr int W = kWidth<T>;
  alignas(64) T later[kColumns] = {};
  const T factor = coefficient_of(p);
  const auto coefficient = broadcast(factor);
  const bool large = is_large<T>(p);
  const Mask<T> always = broadcast(factor) == Vector<T>{};
  for (Index t = p.T_len - 1; t >= 0; --t) {
    const Index row = (m * p.T_len + t) * p.C + c;
    const Mask<T> last = (t == p.T_len - 1) != Mask<T>{};
    const auto vector = [&](Index j, int width) {
      prefetch(p, row + j - p.C);
      const auto steps = load_steps(p, row + j, 0, width);
      const auto source = source_of(p, steps, last);
      const auto scanned =
          advance<T>(coefficient, steps.terminated | steps.truncated | always, load(later + j), source);
      store(later + j, scanned);
      write(p, row + j, scanned, 0, width, large);
    };
    Index j = 0;
    for (; j + W <= count; j += W) vector(j, W);
    if (j < count) vector(j, int(count - j));
  }
  stream_end();
}

// Rows, where time lies side by side.

// kWidth rows that advance together: sequences, or chunks of time of one sequence.
template <class T>
struct Rows {
  Index end[kWidth<T>];     // one past the last step of a row
  Index length[kWidth<T>];  // of them, row 0 has the most
  int with_last;            // this many of the rows, from the first, end with the last step of their sequence
  Vector<T> later;          // the scanned values behind the rows
};

// What the reducing pass leaves of the rows: their first scanned value and the product of the
// coefficients. Zero stands for a cut only, so that an infinity outlives a product that underflows.
template <class T>
struct Reduced {
  T *scanned, *product;
};

// The kTiles tiles of steps that end `done` before the end of each row; returns where they cut. Row by
// row on the way in and out, because all rows at once are more pages than the processor translates
// quickly. Not kFull: the tiles may lie over the starts of the rows.
template <class T, bool kReduce, bool kFull, class P>
inline Mask<T> advance_tiles(const P& p, const Rows<T>& rows, Index done, T coefficient, Vector<T>& later) {
  constexpr int W = kWidth<T>;
  Vector<T> source[kTiles][W];
  Mask<T> cuts[kTiles], any{};  // bit j of row r: step j leaves out what came later
  const auto from = [&](int r, int tile) {
    const Index left = rows.length[r] - done - (kTiles - 1 - tile) * W;
    return kFull || left >= W ? 0 : (left < 0 ? W : int(W - left));
  };
  for (int r = 0; r < W; ++r) {
    const Index start = rows.end[r] - done - kTiles * W;
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile) {
      const Index i = start + tile * W;
      if constexpr (kFull) prefetch(p, i - 2 * kTiles * W);
      Mask<T> last{};
      const bool has_last = cuts_at_last(p) && tile == kTiles - 1 && done == 0 && r < rows.with_last;
      if (has_last) last[W - 1] = -1;
      source[tile][r] = source_of(p, load_steps(p, i, from(r, tile), W), last);
      const auto flags =
          load_flags<T>(p.terminated + i, from(r, tile), W) | load_flags<T>(p.truncated + i, from(r, tile), W);
      cuts[tile][r] = bits_of<T>(flags) | (has_last ? 1u << (W - 1) : 0u);
    }
  }
  for (int tile = kTiles - 1; tile >= 0; --tile) {
    if (coefficient == T(0)) cuts[tile] = ~Mask<T>{};
    any |= cuts[tile];
    Vector<T> x[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) x[r] = source[tile][r];
    transpose<T>(x);
#pragma GCC unroll 16
    for (int j = W - 1; j >= 0; --j) {
      later = x[j] = advance<T>(broadcast(coefficient), (cuts[tile] & (1 << j)) != 0, later, x[j]);
    }
    if constexpr (kReduce) continue;
    transpose<T>(x);
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) source[tile][r] = x[r];
  }
  if constexpr (kReduce) return any;
  const bool large = is_large<T>(p);
  for (int r = 0; r < W; ++r) {
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile) {
      write(p, rows.end[r] - done - (kTiles - tile) * W, source[tile][r], from(r, tile), W, large);
    }
  }
  return any;
}

template <class T, bool kReduce, class P>
void scan_rows(const P& p, const Rows<T>& rows, const Reduced<T>& out) {
  constexpr int W = kWidth<T>;
  Index shortest = rows.length[0];
  for (int r = 1; r < W; ++r) shortest = rows.length[r] < shortest ? rows.length[r] : shortest;
  const T coefficient = coefficient_of(p);
  auto later = rows.later;
  Mask<T> cuts{};
  T product = 1;
  Index done = 0;
  for (; done + kTiles * W <= shortest; done += kTiles * W) {
    cuts |= advance_tiles<T, kReduce, true>(p, rows, done, coefficient, later);
  }
  for (; done < rows.length[0]; done += kTiles * W) {
    cuts |= advance_tiles<T, kReduce, false>(p, rows, done, coefficient, later);
  }
  stream_end();
  if constexpr (kReduce) {
    for (Index i = 0; i < rows.length[0] && product > kSmallest<T>; ++i) product *= coefficient;
    product = product > kSmallest<T> ? product : kSmallest<T>;
    store(out.scanned, later);
    store(out.product, cuts != 0 ? Vector<T>{} : broadcast(product));
  }
}

// Every sequence is a row; where they run out, the last one takes the place of those that lack.
template <class T, class P>
void scan_sequences(const P& p) {
  constexpr int W = kWidth<T>;
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (Index block = 0; block < p.M; block += W) {
    Rows<T> rows{};
    rows.with_last = W;
    for (int r = 0; r < W; ++r) {
      rows.end[r] = ((block + r < p.M ? block + r : p.M - 1) + 1) * p.T_len;
      rows.length[r] = p.T_len;
    }
    scan_rows<T, false>(p, rows, {});
  }
}

// The rows are chunks of time of sequence m, in sweep order: reduce each, run over them in order, and scan every
// chunk from the value behind it. The coefficients are at most 1, so that no product grows.
template <class T, class P>
void scan_chunks(const P& p, Index m, Index chunks) {
  constexpr int W = kWidth<T>;
  constexpr Index whole = kTiles * W;  // only the last chunk has a tail
  const Index steps = ((p.T_len + chunks - 1) / chunks + whole - 1) / whole * whole;
  T scanned[kMaxChunks], product[kMaxChunks];
  const auto block = [&](Index chunk) {
    Rows<T> rows{};
    rows.with_last = chunk == 0 ? 1 : 0;
    for (int r = 0; r < W; ++r) {
      const Index behind = (chunk + r) * steps < p.T_len ? (chunk + r) * steps : p.T_len;
      rows.end[r] = (m + 1) * p.T_len - behind;
      rows.length[r] = p.T_len - behind < steps ? p.T_len - behind : steps;
    }
    return rows;
  };
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (Index chunk = 0; chunk < chunks; chunk += W) {
    scan_rows<T, true>(p, block(chunk), Reduced<T>{scanned + chunk, product + chunk});
  }
  T later = 0;
  for (Index chunk = 0; chunk < chunks; ++chunk) {  // the value behind a chunk takes the place of its first one
    const T last = product[chunk] == T(0) ? scanned[chunk] : fused(product[chunk], later, scanned[chunk]);
    scanned[chunk] = later;
    later = last;
  }
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (Index chunk = 0; chunk < chunks; chunk += W) {
    auto rows = block(chunk);
    rows.later = load(scanned + chunk);
    scan_rows<T, false>(p, rows, {});
  }
}

template <template <class> class Op, class T>
void compute(const Op<T>& p) {
  if (p.C == 1) {
    constexpr Index W = kWidth<T>;
    const Index wanted = p.M >= 4 * W ? 0 : p.T_len / kChunkSteps / W * W;
    const Index chunks = wanted < kMaxChunks ? wanted : kMaxChunks;
    if (chunks < 2 * W) return scan_sequences<T>(p);
    for (Index m = 0; m < p.M; ++m) scan_chunks<T>(p, m, chunks);
    return;
  }
  const Index wide = (p.C + p.threads - 1) / p.threads;
  const Index columns = p.M >= p.threads || wide > kColumns ? kColumns : (wide + 63) / 64 * 64;
  const Index blocks = (p.C + columns - 1) / columns;
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (Index m = 0; m < p.M; ++m) {
    for (Index b = 0; b < blocks; ++b) {
      const Index c = b * columns;
      scan_columns<T>(p, m, c, p.C - c < columns ? p.C - c : columns);
    }
  }
}

template <template <class> class Op, class T>
Cost cost_of(const Op<T>& p) {
  const Index elements = p.M * p.T_len * p.C;
  return {double(elements), elements};
}

}  // namespace

SSM_FAST_DEFINE_REAL(Gae)
SSM_FAST_DEFINE_REAL(DiscountedReturns)

}  // namespace ssm_fast::SSM_FAST_ISA
