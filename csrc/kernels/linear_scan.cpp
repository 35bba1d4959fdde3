// linear_scan: elementwise first-order recurrence; docs/ops/linear_scan.md.
#include "ops.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

constexpr Index kColumns = 2048;      // columns a thread takes at once: their state stays in L1
constexpr Index kMaxInterleaved = 8;  // up to so many columns, rows advance together instead
constexpr Index kMaxChunks = 1024;
constexpr Index kChunkSteps = 128;  // shorter chunks of time are not worth the second pass
constexpr int kMaxGrowth = 64;      // of a chunk's products; beyond it the sum of two parts may cancel

// How far ahead of a tile memory is asked for: too many rows for the processor to foresee by itself.
template <class R>
constexpr Index kAhead = 512 / Index(sizeof(R));

template <class R>
inline void prefetch(const R* p) {
  __builtin_prefetch(p, 0, 2);
}

template <class T>
struct Number {
  using Real = T;
  static constexpr int parts = 1;
};
template <class T>
struct Number<Complex<T>> {
  using Real = T;
  static constexpr int parts = 2;
};
template <class T>
using RealOf = typename Number<T>::Real;

template <class T>
inline T multiply_add(T a, T h, T b) {
  return fused(a, h, b);
}
template <class T>
inline Complex<T> multiply_add(Complex<T> a, Complex<T> h, Complex<T> b) {
  return {fused(-a.im, h.im, fused(a.re, h.re, b.re)), fused(a.im, h.re, fused(a.re, h.im, b.im))};
}

template <class T>
inline bool is_large(const LinearScan<T>& p) {
  return std::size_t(p.M * p.T_len * p.C) * sizeof(T) >= kStreamBytes;
}

// Columns, where the elements of one step lie side by side.

template <class T>
inline void advance(T a, const T* __restrict previous, const T* __restrict b, T* __restrict h, Index count) {
#pragma GCC ivdep
  for (Index c = 0; c < count; ++c) h[c] = multiply_add(a, previous[c], b[c]);
}
template <class T>
inline void advance(const T* __restrict a, const T* __restrict previous, const T* __restrict b, T* __restrict h,
                    Index count) {
#pragma GCC ivdep
  for (Index c = 0; c < count; ++c) h[c] = multiply_add(a[c], previous[c], b[c]);
}

// re + i im times pairs of h, plus b; `im` has its signs alternating, -im for the real parts.
template <class T>
inline void advance_pairs(Vector<T> re, Vector<T> im, const Complex<T>* previous, const Complex<T>* b, Complex<T>* h) {
  const auto state = load(reinterpret_cast<const T*>(previous));
  const auto inner = fused_vector(re, state, load(reinterpret_cast<const T*>(b)));
  store(reinterpret_cast<T*>(h), fused_vector(im, swap_pairs<T>(state), inner));
}
template <class T>
inline void advance(Complex<T> a, const Complex<T>* previous, const Complex<T>* b, Complex<T>* h, Index count) {
  constexpr int W = kWidth<T> / 2;
  const auto re = broadcast(a.re), im = negate_even<T>(broadcast(a.im));
  Index c = 0;
  for (; c + W <= count; c += W) advance_pairs<T>(re, im, previous + c, b + c, h + c);
  for (; c < count; ++c) h[c] = multiply_add(a, previous[c], b[c]);
}
template <class T>
inline void advance(const Complex<T>* a, const Complex<T>* previous, const Complex<T>* b, Complex<T>* h, Index count) {
  constexpr int W = kWidth<T> / 2;
  Index c = 0;
  for (; c + W <= count; c += W) {
    const auto pairs = load(reinterpret_cast<const T*>(a + c));
    advance_pairs<T>(even_pairs<T>(pairs), negate_even<T>(odd_pairs<T>(pairs)), previous + c, b + c, h + c);
  }
  for (; c < count; ++c) h[c] = multiply_add(a[c], previous[c], b[c]);
}

// The vector of h from element j on, of reals; kOne: one coefficient for all columns.
template <bool kOne, class T>
inline Vector<T> next_vector(const T* a, const T* state, const T* b, Index j) {
  return fused_vector(kOne ? broadcast(*a) : load(a + j), load(state + j), load(b + j));
}
template <bool kOne, class T>
inline Vector<T> next_vector(const Complex<T>* a, const Complex<T>* state, const Complex<T>* b, Index j) {
  const auto at = [j](const Complex<T>* p) { return load(reinterpret_cast<const T*>(p) + j); };
  const auto h = at(state);
  const auto re = kOne ? broadcast(a->re) : even_pairs<T>(at(a));
  const auto im = kOne ? broadcast(a->im) : odd_pairs<T>(at(a));
  return fused_vector(negate_even<T>(im), swap_pairs<T>(h), fused_vector(re, h, at(b)));
}

// A step whose states go past the caches into h: `state` keeps them for the next one.
template <bool kOne, class T>
inline void advance_large(const T* a, T* state, const T* b, T* h, Index count) {
  using R = RealOf<T>;
  constexpr Index W = kWidth<R>, parts = Number<T>::parts;
  Index j = 0;
  for (; j + W <= count * parts; j += W) {
    const auto next = next_vector<kOne>(a, state, b, j);
    store(reinterpret_cast<R*>(state) + j, next);
    stream(reinterpret_cast<R*>(h) + j, next);
  }
  for (Index c = j / parts; c < count; ++c) h[c] = state[c] = multiply_add(a[kOne ? 0 : c], state[c], b[c]);
}

template <class T>
void scan_large_columns(const LinearScan<T>& p, Index m, Index c, Index count) {
  alignas(64) T state[kColumns];
  const Index first = p.reverse ? p.T_len - 1 : 0;
  const Index step = p.reverse ? -1 : 1;
  const T* a = p.a.at(m, first, c);
  const T* b = p.b.at(m, first) + c;
  T* h = p.h.at(m, first) + c;
  const bool has_incoming = p.h0 && !p.shift;
  const std::size_t bytes = std::size_t(count) * sizeof(T);
  std::memcpy(state, has_incoming ? p.h0.at(m) + c : b, bytes);
  if (!has_incoming) std::memcpy(h, b, bytes);
  if (!p.shift && !has_incoming) a += step * p.a.strides[1];
  for (Index i = has_incoming ? 0 : 1; i < p.T_len; ++i, a += step * p.a.strides[1]) {
    const Index at = i * step;
    if (p.a.strides[2] == 0) {
      advance_large<true>(a, state, b + at * p.b.strides[1], h + at * p.h.strides[1], count);
    } else {
      advance_large<false>(a, state, b + at * p.b.strides[1], h + at * p.h.strides[1], count);
    }
  }
  stream_end();
}

// Time is the outer loop, and the previous row of h is the state.
template <class T>
void scan_columns(const LinearScan<T>& p, Index m, Index c, Index count) {
  const Index first = p.reverse ? p.T_len - 1 : 0;
  const Index step = p.reverse ? -1 : 1;
  const T* a = p.a.at(m, first, c);
  const T* b = p.b.at(m, first, c);
  T* h = p.h.at(m, first, c);
  const auto next = [&](const T* previous) {
    if (p.a.strides[2] == 0 || count == 1) {
      advance(*a, previous, b, h, count);
    } else {
      advance(a, previous, b, h, count);
    }
  };
  if (p.h0 && !p.shift) {
    next(p.h0.at(m, c));
  } else {
    std::memcpy(h, b, std::size_t(count) * sizeof(T));
  }
  if (!p.shift) a += step * p.a.strides[1];
  for (Index i = 1; i < p.T_len; ++i, a += step * p.a.strides[1]) {
    b += step * p.b.strides[1];
    const T* previous = h;
    h += step * p.h.strides[1];
    next(previous);
  }
}

// Rows, where time lies side by side, in turn with at most kMaxInterleaved columns.

// kWidth rows that advance together: sequences, or chunks of time of one sequence. All counts are
// of reals; pointers stand at the first step of a row in sweep order, in reverse one past it.
template <class R>
struct Rows {
  const R *a[kWidth<R>], *b[kWidth<R>];
  R* h[kWidth<R>];
  Index length[kWidth<R>];
  int starting;         // this many of the rows, from the first, start a sequence
  bool has_incoming;    // false: a row that starts a sequence reads no coefficient at its first step
  bool constant;        // a holds one coefficient for all steps, of column c at c * a_column
  Index a_column;       // only if `constant`
  Index columns, step;  // columns in turn, and the reals of one step
  bool large;           // the output goes past the caches
  bool has_initial;     // false: zeros come in
  const R* initial[kWidth<R>];
  Index initial_column;
};

// What the reducing pass leaves of each row: the last state, the product of the coefficients and its largest element.
template <class R>
struct Reduced {
  R *state, *product, *growth;
};

// Elements [from, to) in sweep order of a tile that starts after `done`; zeros for the others.
template <class R, bool kReverse>
inline Vector<R> load_edge(const R* row, Index done, Index from, Index to) {
  constexpr int W = kWidth<R>;
  if (from == 0 && to == W) return load(kReverse ? row - done - W : row + done);
  Vector<R> v{};
  for (Index i = from; i < to; ++i) {
    if (kReverse) {
      v[W - 1 - i] = row[-done - 1 - i];
    } else {
      v[i] = row[done + i];
    }
  }
  return v;
}

template <class R, bool kReverse>
inline void store_edge(R* row, Vector<R> v, Index done, Index to) {
  constexpr int W = kWidth<R>;
  if (to == W) return store(kReverse ? row - done - W : row + done, v);
  for (Index i = 0; i < to; ++i) {
    if (kReverse) {
      row[-done - 1 - i] = v[W - 1 - i];
    } else {
      row[done + i] = v[i];
    }
  }
}

template <class R>
inline Index within_tile(Index count) {
  return count < 0 ? 0 : (count < kWidth<R> ? count : kWidth<R>);
}

// A tile of every row, transposed: vector j holds real j of all rows. Not kFull: it may lie over the ends.
template <class R, bool kReverse, bool kFull>
inline void load_tile(Vector<R> (&tile)[kWidth<R>], const R* const* rows, const Index* length, Index done, Index skip,
                      int skipping) {
  constexpr int W = kWidth<R>;
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) {
    const R* row = rows[r];
    if constexpr (kFull) {
      prefetch(row + (kReverse ? -done - W - kAhead<R> : done + kAhead<R>));
      tile[r] = load(kReverse ? row - done - W : row + done);
    } else {
      const Index from = r < skipping ? within_tile<R>(skip - done) : 0;
      tile[r] = load_edge<R, kReverse>(row, done, from, within_tile<R>(length[r] - done));
    }
  }
  transpose<R>(tile);
}

template <class R>
struct State {
  Vector<R> h[2 * kMaxInterleaved], product[2 * kMaxInterleaved], growth;
};

// One tile: kOne says that there is one column, so that its state stays in registers.
template <class T, bool kReverse, bool kReduce, bool kOne, bool kFull>
inline void advance_tile(const Rows<RealOf<T>>& p, Index done, const Vector<RealOf<T>>* constant,
                         State<RealOf<T>>& state, Index& column) {
  using R = RealOf<T>;
  constexpr int W = kWidth<R>;
  constexpr int parts = Number<T>::parts;
  const Index skip = p.has_incoming ? 0 : p.step;
  Vector<R> a[W], b[W];
  if (p.constant) {
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) {
      const int s = (kReverse ? W - 1 - j : j) / parts;  // in sweep order
      const Index c = kOne ? 0 : (column + s) % p.columns;
      a[j] = constant[c * parts + j % parts];
      if constexpr (!kFull) {
        if (done + s * parts < skip) {
          for (int r = 0; r < p.starting; ++r) a[j][r] = 0;
        }
      }
    }
  } else {
    load_tile<R, kReverse, kFull>(a, p.a, p.length, done, skip, p.starting);
  }
  load_tile<R, kReverse, kFull>(b, p.b, p.length, done, 0, 0);
#pragma GCC unroll 16
  for (int s = 0; s < W / parts; ++s) {
    const int j = (kReverse ? W / parts - 1 - s : s) * parts;
    const Index k = kOne ? 0 : column * parts;
    if constexpr (parts == 1) {
      state.h[k] = b[j] = fused_vector(a[j], state.h[k], b[j]);
      if constexpr (kReduce) {
        state.product[k] = state.product[k] * a[j];
        state.growth = larger_magnitude<R>(state.growth, state.product[k]);
      }
    } else {
      const auto re = state.h[k], im = state.h[k + 1];
      state.h[k] = b[j] = fused_vector(-a[j + 1], im, fused_vector(a[j], re, b[j]));
      state.h[k + 1] = b[j + 1] = fused_vector(a[j + 1], re, fused_vector(a[j], im, b[j + 1]));
      if constexpr (kReduce) {
        const auto p_re = state.product[k], p_im = state.product[k + 1];
        state.product[k] = fused_vector(-a[j + 1], p_im, a[j] * p_re);
        state.product[k + 1] = fused_vector(a[j + 1], p_re, a[j] * p_im);
        state.growth = larger_magnitude<R>(larger_magnitude<R>(state.growth, state.product[k]), state.product[k + 1]);
      }
    }
    if constexpr (!kOne) column = column + 1 == p.columns ? 0 : column + 1;
  }
  if constexpr (!kReduce) {
    transpose<R>(b);
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      R* row = p.h[r];
      if constexpr (kFull) {
        R* at = kReverse ? row - done - W : row + done;
        p.large ? stream(at, b[r]) : store(at, b[r]);
      } else {
        store_edge<R, kReverse>(row, b[r], done, within_tile<R>(p.length[r] - done));
      }
    }
  }
}

template <class T, bool kReverse, bool kReduce, bool kOne>
void scan_rows(const Rows<RealOf<T>>& p, const Reduced<RealOf<T>>& out) {
  using R = RealOf<T>;
  constexpr int W = kWidth<R>;
  constexpr int parts = Number<T>::parts;
  const Index columns = kOne ? 1 : p.columns;
  State<R> state;
  Vector<R> constant[2 * kMaxInterleaved];
  state.growth = broadcast(R(1));
  Index longest = 0, shortest = p.length[0];
  for (int r = 0; r < W; ++r) {
    longest = p.length[r] > longest ? p.length[r] : longest;
    shortest = p.length[r] < shortest ? p.length[r] : shortest;
  }
  for (Index c = 0; c < columns; ++c) {
    const Index stands = kReverse ? columns - 1 - c : c;
    for (int part = 0; part < parts; ++part) {
      const Index k = c * parts + part;
      state.h[k] = constant[k] = Vector<R>{};
      state.product[k] = broadcast(R(1 - part));
      for (int r = 0; r < W; ++r) {
        if (p.has_initial) state.h[k][r] = p.initial[r][stands * p.initial_column + part];
        if (p.constant) constant[k][r] = p.a[r][stands * p.a_column + part];
      }
    }
  }
  const Index skip = p.has_incoming || p.starting == 0 ? 0 : p.step;
  Index done = 0, column = 0;
  for (; done < skip && done < longest; done += W) {
    advance_tile<T, kReverse, kReduce, kOne, false>(p, done, constant, state, column);
  }
  for (; done + W <= shortest; done += W) {
    advance_tile<T, kReverse, kReduce, kOne, true>(p, done, constant, state, column);
  }
  for (; done < longest; done += W) {
    advance_tile<T, kReverse, kReduce, kOne, false>(p, done, constant, state, column);
  }
  stream_end();
  if constexpr (kReduce) {
    for (int r = 0; r < W; ++r) {
      out.growth[r] = state.growth[r];
      for (Index c = 0; c < columns; ++c) {
        const Index stands = (r * columns + (kReverse ? columns - 1 - c : c)) * parts;
        for (int part = 0; part < parts; ++part) {
          out.state[stands + part] = state.h[c * parts + part][r];
          out.product[stands + part] = state.product[c * parts + part][r];
        }
      }
    }
  }
}

template <class T, bool kReduce = false>
void scan_rows(const Rows<RealOf<T>>& rows, bool reverse, const Reduced<RealOf<T>>& out = {}) {
  if (rows.columns == 1) {
    reverse ? scan_rows<T, true, kReduce, true>(rows, out) : scan_rows<T, false, kReduce, true>(rows, out);
  } else {
    reverse ? scan_rows<T, true, kReduce, false>(rows, out) : scan_rows<T, false, kReduce, false>(rows, out);
  }
}

// Row r: `steps` steps of sequence m from step `from` on.
template <class T>
void place_row(Rows<RealOf<T>>& rows, int r, const LinearScan<T>& p, Index m, Index from, Index steps) {
  using R = RealOf<T>;
  const Index first = p.reverse ? p.T_len - from : from;
  const Index lag = p.shift ? (p.reverse ? 1 : -1) : 0;  // where a step's coefficient stands
  rows.a[r] = reinterpret_cast<const R*>(p.a.at(m, first + lag));
  rows.b[r] = reinterpret_cast<const R*>(p.b.at(m, first));
  rows.h[r] = reinterpret_cast<R*>(p.h.at(m, first));
  rows.length[r] = steps * rows.step;
}

template <class T>
Rows<RealOf<T>> rows_of(const LinearScan<T>& p) {
  constexpr Index parts = Number<T>::parts;
  Rows<RealOf<T>> rows;
  rows.starting = kWidth<RealOf<T>>;
  rows.has_incoming = rows.has_initial = p.h0 && !p.shift;
  rows.initial_column = p.h0.strides[1] * parts;
  rows.large = is_large(p) && kVectorBytes == 64;  // a row gets a vector at a time, and should get a whole line
  rows.constant = p.a.strides[1] == 0;
  rows.a_column = p.a.strides[2] * parts;
  rows.columns = p.C;
  rows.step = p.C * parts;
  return rows;
}

// Every sequence is a row; where they run out, the last one takes the place of those that lack.
template <class T>
void scan_sequences(const LinearScan<T>& p) {
  constexpr int W = kWidth<RealOf<T>>;
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (Index block = 0; block < p.M; block += W) {
    auto rows = rows_of(p);
    for (int r = 0; r < W; ++r) {
      const Index m = block + r < p.M ? block + r : p.M - 1;
      place_row(rows, r, p, m, 0, p.T_len);
      if (rows.has_initial) rows.initial[r] = reinterpret_cast<const RealOf<T>*>(p.h0.at(m));
    }
    scan_rows<T>(rows, p.reverse);
  }
}

// The rows are chunks of time of sequence m: reduce each to a product and a last state, run over
// those in order, and scan every chunk from the state that comes in. False: a product grew so far
// that the two parts of a state may cancel, or a state is not finite, where order matters.
template <class T>
bool scan_chunks(const LinearScan<T>& p, Index m, Index chunks, Index steps) {
  using R = RealOf<T>;
  constexpr int W = kWidth<R>;
  constexpr Index parts = Number<T>::parts;
  const Index columns = p.C;
  R state[kMaxChunks * parts], product[kMaxChunks * parts], growth[kMaxChunks];
  const auto block = [&](Index chunk, bool has_initial) {
    auto rows = rows_of(p);
    rows.starting = chunk == 0 ? 1 : 0;
    rows.has_initial = has_initial;
    rows.initial_column = parts;
    for (int r = 0; r < W; ++r) {
      const Index from = (chunk + r) * steps < p.T_len ? (chunk + r) * steps : p.T_len;
      place_row(rows, r, p, m, from, p.T_len - from < steps ? p.T_len - from : steps);
      rows.initial[r] = state + (chunk + r) * columns * parts;
    }
    return rows;
  };
  R incoming[2 * kMaxInterleaved] = {};
  for (Index c = 0; c < columns && p.h0 && !p.shift; ++c) {
    std::memcpy(incoming + c * parts, p.h0.at(m, c), sizeof(T));
  }
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (Index chunk = 0; chunk < chunks; chunk += W) {
    const Index at = chunk * columns * parts;
    scan_rows<T, true>(block(chunk, false), p.reverse, Reduced<R>{state + at, product + at, growth + chunk});
  }
  for (Index chunk = 0; chunk < chunks; ++chunk) {
    if (!(growth[chunk] <= R(kMaxGrowth))) return false;
    for (Index c = 0; c < columns; ++c) {  // what comes in takes the place of the last state
      T last, factor, enters;
      R* at = state + (chunk * columns + c) * parts;
      std::memcpy(&last, at, sizeof(T));
      std::memcpy(&factor, product + (chunk * columns + c) * parts, sizeof(T));
      std::memcpy(&enters, incoming + c * parts, sizeof(T));
      last = multiply_add(factor, enters, last);
      std::memcpy(at, &enters, sizeof(T));
      std::memcpy(incoming + c * parts, &last, sizeof(T));
    }
  }
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (Index chunk = 0; chunk < chunks; chunk += W) {
    scan_rows<T>(block(chunk, true), p.reverse);
  }
  for (Index chunk = 1; chunk <= chunks; ++chunk) {  // what is not finite stays so to the end of its chunk
    const Index last = chunk * steps < p.T_len ? chunk * steps - 1 : p.T_len - 1;
    const R* at = reinterpret_cast<const R*>(p.h.at(m, p.reverse ? p.T_len - 1 - last : last));
    for (Index i = 0; i < columns * parts; ++i) {
      if (!(at[i] - at[i] == R(0))) return false;
    }
  }
  return true;
}

template <class T>
void scan_all_columns(const LinearScan<T>& p) {
  const bool side_by_side =
      p.b.strides[2] == 1 && p.h.strides[2] == 1 && p.a.strides[2] <= 1 && (!p.h0 || p.h0.strides[1] == 1);
  const Index wide = (p.C + p.threads - 1) / p.threads;
  Index columns = p.M >= p.threads || wide > kColumns ? kColumns : (wide < 16 ? 16 : wide);
  if (!side_by_side) columns = 1;
  const bool large = side_by_side && is_large(p) && p.C * Index(sizeof(T)) >= 64;
  const Index blocks = (p.C + columns - 1) / columns;
#pragma omp parallel for collapse(2) schedule(static) num_threads(p.threads)
  for (Index m = 0; m < p.M; ++m) {
    for (Index block = 0; block < blocks; ++block) {
      const Index c = block * columns;
      const Index count = p.C - c < columns ? p.C - c : columns;
      large ? scan_large_columns(p, m, c, count) : scan_columns(p, m, c, count);
    }
  }
}

template <class T>
inline void swap(T& x, T& y) {
  const T z = x;
  x = y;
  y = z;
}

// The sequences are [M, C]; which of the two is which is free.
template <class T>
LinearScan<T> transposed(LinearScan<T> p) {
  swap(p.M, p.C);
  swap(p.a.strides[0], p.a.strides[2]);
  swap(p.b.strides[0], p.b.strides[2]);
  swap(p.h.strides[0], p.h.strides[2]);
  swap(p.h0.strides[0], p.h0.strides[1]);
  return p;
}

// Sequences [M, C] of which each lies side by side in time, or all C of one m in turn.
template <class T>
bool in_rows(const LinearScan<T>& p) {
  const bool dense =
      p.b.strides[1] == p.C && p.h.strides[1] == p.C && (p.C == 1 || (p.b.strides[2] == 1 && p.h.strides[2] == 1));
  const bool coefficients = p.a.strides[1] == 0 || (p.a.strides[1] == p.C && (p.C == 1 || p.a.strides[2] == 1));
  return p.C <= kMaxInterleaved && dense && coefficients;
}

// Chunks of time for a sequence, a multiple of the rows that advance together; 0 for no chunks.
template <class T>
Index chunks_of(const LinearScan<T>& p) {
  constexpr Index W = kWidth<RealOf<T>>;
  if (p.M >= 4 * W) return 0;
  const Index chunks = p.T_len / kChunkSteps / W * W;
  const Index most = kMaxChunks / p.C / W * W;
  return chunks < 2 * W ? 0 : (chunks < most ? chunks : most);
}

// Sequences in rows; a few of them alone would leave lanes and threads idle, so long ones are cut.
template <class T>
void run_rows(const LinearScan<T>& p) {
  const Index chunks = chunks_of(p);
  if (chunks == 0) {
    p.M < 4 && p.C == 1 ? scan_all_columns(p) : scan_sequences(p);
    return;
  }
  constexpr Index W = kWidth<RealOf<T>>;
  const Index steps = ((p.T_len + chunks - 1) / chunks + W - 1) / W * W;  // whole tiles: only the last chunk has a tail
  for (Index m = 0; m < p.M; ++m) {
    if (!scan_chunks(p, m, chunks, steps)) {
      for (Index c = 0; c < p.C; ++c) scan_columns(p, m, c, 1);
    }
  }
}

template <class T>
void compute(const LinearScan<T>& given) {
  auto p = given.C == 1 || (given.b.strides[2] != 1 && given.b.strides[0] == 1) ? transposed(given) : given;
  if (p.b.strides[1] == 1 && p.h.strides[1] == 1 &&
      p.a.strides[1] <= 1) {  // every sequence is a row; rows of one m after those of another
    for (Index m = 0; m < p.M; ++m) {
      auto one = p;
      one.a.data = p.a.at(m);
      one.b.data = p.b.at(m);
      one.h.data = p.h.at(m);
      one.h0.data = p.h0.at(m);
      one.M = 1;
      run_rows(transposed(one));
    }
  } else if (in_rows(p) && (p.M >= kWidth<RealOf<T>> / 2 || chunks_of(p) > 0)) {
    run_rows(p);
  } else {
    scan_all_columns(p);
  }
}

template <class T>
Cost cost_of(const LinearScan<T>& p) {
  const Index elements = p.M * p.T_len * p.C;
  return {double(elements), elements};
}

}  // namespace

SSM_FAST_DEFINE_REAL(LinearScan)
SSM_FAST_DEFINE_OP(LinearScan<Complex<float>>)
SSM_FAST_DEFINE_OP(LinearScan<Complex<double>>)

}  // namespace ssm_fast::SSM_FAST_ISA
