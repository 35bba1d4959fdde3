// dense_scan: a block of rows advances through time with the state matrix in cache; docs/ops/dense_scan.md.
#include "ops.h"
#include "recurrence.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

constexpr Index kWideRows = 48;          // rows that share a pass over a matrix too large for the cache
constexpr Index kWideBytes = 256 << 10;  // size of such a matrix

// A stretch of time of one row: from step `start` of the sweep on, entered with the state h0.
template <class T>
struct Segment {
  Index g, b, start;
  const T* h0;
};

// Whether the state that enters step i of the sweep is cut.
template <class T>
inline bool resets(const DenseScan<T>& p, Index g, Index b, Index i) {
  if (p.reverse && i == 0) return false;
  return *p.reset.at(g, b, p.reverse ? p.T_len - i : i);
}

// `length` steps of up to kWideRows segments of one group. The state of a row is read where the step
// before stored it; `zeros` is a state of N zeros. `lone` segments never share a block.
template <class T>
void scan_segments(const DenseScan<T>& p, const Segment<T>* segments, int rows, Index length, const T* W,
                   const T* zeros, bool lone) {
  const Index step = p.reverse ? -1 : 1;
  const T *u[kWideRows], *h[kWideRows];
  T* s[kWideRows];
  for (int r = 0; r < rows; ++r) {
    const Segment<T>& at = segments[r];
    const Index t = p.reverse ? p.T_len - 1 - at.start : at.start;
    u[r] = p.u.at(at.g, at.b, t);
    s[r] = p.s.at(at.g, at.b, t);
    h[r] = at.h0;
  }
  for (Index i = 0; i < length; ++i) {
    if (p.reset) {
      for (int r = 0; r < rows; ++r) {
        if (resets(p, segments[r].g, segments[r].b, segments[r].start + i)) h[r] = zeros;
      }
    }
    if (i + kAhead < length) {
      prefetch<T>(u, rows, kAhead * step * p.u.strides[2], p.N);
      if (p.reverse) prefetch<T>(s, rows, kAhead * step * p.s.strides[2], p.N);
    }
    if (lone) {
      multiply_rows<T, 1, kLoneSums>(u, h, s, W, p.N, p.N);
    } else {
      multiply_rows<T>(u, h, s, rows, W, p.N, p.N);
    }
    for (int r = 0; r < rows; ++r) {
      h[r] = s[r];
      u[r] += step * p.u.strides[2];
      s[r] += step * p.s.strides[2];
    }
  }
}

template <class T>
Index packed_elements(Index N) {  // W and a row of zeros
  return round_up((N + 1) * round_up(N, kWidth<T>), 64 / Index(sizeof(T)));
}

// Scans `count` segments of equal length, `at(i)` the i-th of them and all of group g, with the threads.
template <class T, class At>
void scan_all(const DenseScan<T>& p, Index count, Index length, At at) {
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int thread = 0; thread < p.threads; ++thread) {
    T* W = p.scratch + thread * packed_elements<T>(p.N);
    T* zeros = W + p.N * round_up(p.N, kWidth<T>);
    std::memset(zeros, 0, std::size_t(round_up(p.N, kWidth<T>)) * sizeof(T));
    const Index most = Index(sizeof(T)) * p.N * p.N > kWideBytes ? kWideRows : kMaxRows;
    for_row_blocks(
        p.G, count / p.G, thread, p.threads, most, [&](Index g) { pack(p.A, g, p.N, p.N, W); },
        [&](Index g, Index first, int rows) {
          Segment<T> segments[kWideRows];
          for (int r = 0; r < rows; ++r) {
            segments[r] = at(g * (count / p.G) + first + r);
            if (!segments[r].h0) segments[r].h0 = zeros;
          }
          scan_segments(p, segments, rows, length, W, zeros, count == p.G);
        });
  }
}

template <class T>
const T* initial(const DenseScan<T>& p, Index g, Index b) {
  return p.s0.at(g, b);
}

// Steps of a chunk of time, or 0 for one sweep: a rule of the sizes, so that results do not depend on
// the number of threads. Chunks double the operations, so they pay where one row alone leaves a second
// core idle and runs far below its peak: the state is narrow, or the matrix exceeds the first cache.
Index chunk_steps(Index G, Index B, Index T_len, Index N) {
  const bool slow = N <= 32 || N >= 96;
  return G * B == 1 && slow && T_len >= 2048 && T_len >= 16 * N ? 64 : 0;
}

// P := P P for [N, stride], the sum of its squares returned. `square` and W are of the same size.
template <class T>
T square_matrix(T* P, T* square, T* W, const T* zeros, Index N, Index stride, int threads) {
  pack(P, Index(1), stride, N, N, W);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Index first = 0; first < N; first += kMaxRows) {
    const int rows = int(N - first < kMaxRows ? N - first : kMaxRows);
    const T *u[kMaxRows], *h[kMaxRows];
    T* out[kMaxRows];
    for (int r = 0; r < rows; ++r) {
      u[r] = zeros;
      h[r] = P + (first + r) * stride;
      out[r] = square + (first + r) * stride;
    }
    multiply_rows<T>(u, h, out, rows, W, N, N);
  }
  T total = 0;
  for (Index i = 0; i < N; ++i) {
    for (Index j = 0; j < N; ++j) {
      P[i * stride + j] = square[i * stride + j];
      total += P[i * stride + j] * P[i * stride + j];
    }
  }
  return total;
}

// What the chunked form works in, behind the packed matrices of the threads.
template <class T>
struct Chunks {
  Index steps, count, stride;
  T *power, *square;  // [N, stride]
  T* entry;           // [B, count, stride]: the state that enters each chunk
};

// Whether row b is reset at a step of chunk c.
template <class T>
bool resets_within(const DenseScan<T>& p, Index b, Index c, Index steps) {
  for (Index i = 0; p.reset && i < steps; ++i) {
    if (resets(p, 0, b, c * steps + i)) return true;
  }
  return false;
}

// The transposed power A^steps, or false where it is so large that it would amplify rounding errors.
template <class T>
bool raise(const DenseScan<T>& p, const Chunks<T>& chunks) {
  const Index stride = chunks.stride;
  T* W = p.scratch;
  T* zeros = W + p.N * stride;
  std::memset(zeros, 0, std::size_t(stride) * sizeof(T));
  for (Index i = 0; i < p.N; ++i) {
    for (Index j = 0; j < p.N; ++j) chunks.power[i * stride + j] = *p.A.at(0, j, i);
  }
  for (Index power = 1; power < chunks.steps; power *= 2) {
    const T squares = square_matrix(chunks.power, chunks.square, W, zeros, p.N, stride, p.threads);
    if (!(squares <= T(4 * p.N))) return false;  // its mean singular value is above 2, or it is not finite
  }
  return true;
}

// Few rows, long time. Each chunk is scanned from a state of zero, all at once; its last state and
// A^steps give the state that enters the next chunk; from these the chunks are scanned again.
template <class T>
bool run_chunked(const DenseScan<T>& p, Index steps) {
  const Index stride = round_up(p.N, kWidth<T>), count = (p.T_len + steps - 1) / steps;
  T* power = p.scratch + p.threads * packed_elements<T>(p.N);
  const Chunks<T> chunks{steps, count, stride, power, power + p.N * stride, power + 2 * p.N * stride};
  if (!raise(p, chunks)) return false;
  const Index whole = count - 1;  // the last chunk may be short, and nothing follows it
  scan_all(p, p.B * whole, steps, [&](Index i) {
    const Index b = i / whole, c = i % whole;
    return Segment<T>{0, b, c * steps, c == 0 ? initial(p, 0, b) : nullptr};
  });
  T* W = p.scratch;
  pack(chunks.power, Index(1), stride, p.N, p.N, W);
  for (Index b = 0; b < p.B; ++b) {
    for (Index c = 0; c < whole; ++c) {
      const Index last = (c + 1) * steps - 1;
      const T* local = p.s.at(0, b, p.reverse ? p.T_len - 1 - last : last);
      const T* entry = chunks.entry + (b * count + c) * stride;
      T* next = chunks.entry + (b * count + c + 1) * stride;
      if (c == 0 || resets_within(p, b, c, steps)) {
        std::memcpy(next, local, std::size_t(p.N) * sizeof(T));
      } else {
        multiply_rows<T>(&local, &entry, &next, 1, W, p.N, p.N);
      }
      // A power that underflowed would turn an infinity into a NaN that a step at a time does not give.
      for (Index n = 0; n < p.N; ++n) {
        if (!(next[n] - next[n] == T(0))) return false;
      }
    }
  }
  const auto entered = [&](Index b, Index c) {
    return Segment<T>{0, b, c * steps, chunks.entry + (b * count + c) * stride};
  };
  if (whole > 1) {
    scan_all(p, p.B * (whole - 1), steps, [&](Index i) { return entered(i / (whole - 1), i % (whole - 1) + 1); });
  }
  scan_all(p, p.B, p.T_len - whole * steps, [&](Index b) { return entered(b, whole); });
  return true;
}

template <class T>
void compute(const DenseScan<T>& p) {
  const Index steps = chunk_steps(p.G, p.B, p.T_len, p.N);
  if (steps && run_chunked(p, steps)) return;
  scan_all(p, p.G * p.B, p.T_len,
           [&](Index i) { return Segment<T>{i / p.B, i % p.B, 0, initial(p, i / p.B, i % p.B)}; });
}

template <class T>
Cost cost_of(const DenseScan<T>& p) {
  const Index steps = chunk_steps(p.G, p.B, p.T_len, p.N), stride = round_up(p.N, kWidth<T>);
  const Index chunks = steps ? (p.T_len + steps - 1) / steps : 0;
  return {double(p.G * p.B * p.T_len) * double(p.N * p.N), steps ? p.B * (p.T_len / steps) : p.G * p.B,
          packed_elements<T>(p.N), steps ? (2 * p.N + p.B * chunks) * stride : 0};
}

}  // namespace

SSM_FAST_DEFINE_REAL(DenseScan)

}  // namespace ssm_fast::SSM_FAST_ISA
