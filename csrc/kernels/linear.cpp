// linear: y = [tanh] (x W^T + b) of groups of rows, its gradients and its tangents; docs/ops/linear.md.
#include "elementary.h"
#include "ops.h"
#include "outer_products.h"
#include "recurrence.h"
#include "simd.h"

namespace ssm_fast::SSM_FAST_ISA {
namespace {

// What a thread works in.
template <class T>
struct Workspace {
  T *W, *V;   // packed matrices, [inputs, outputs]
  T* zeros;   // a row of sums to start from
  T* rows;    // kBlock rows of the gradient before tanh
  Index row;  // their stride
};

// Of a packed matrix, whichever way around.
template <class T>
Index matrix_elements(Index I, Index O) {
  const Index forward = I * round_up(O, kWidth<T>), back = O * round_up(I, kWidth<T>);
  return forward > back ? forward : back;
}

template <class T>
Index workspace_elements(Index I, Index O) {
  constexpr Index L = kWidth<T>;
  return 2 * matrix_elements<T>(I, O) + round_up(I > O ? I : O, L) + kBlock * round_up(O, L);
}

template <class T>
Workspace<T> workspace_at(T* scratch, Index I, Index O) {
  const Index widest = round_up(I > O ? I : O, kWidth<T>), matrix = matrix_elements<T>(I, O);
  T* zeros = scratch + 2 * matrix;
  std::memset(zeros, 0, std::size_t(widest) * sizeof(T));
  return {scratch, scratch + matrix, zeros, zeros + widest, round_up(O, kWidth<T>)};
}

// What tanh passes on of a gradient g (or tangent), by its value y.
template <class T>
inline Vector<T> through_tanh(Vector<T> g, Vector<T> y) {
  return g * (T(1) - y * y);
}

template <class T>
void forward_rows(const Linear<T>& p, const Workspace<T>& work, Index g, Index first, Index rows) {
  const T *u[kBlock], *x[kBlock];
  T* y[kBlock];
  for (Index r = 0; r < rows; ++r) {
    u[r] = p.add ? p.add.at(g, first + r) : p.bias ? p.bias.at(g) : work.zeros;
    x[r] = p.x.at(g, first + r);
    y[r] = p.y + (g * p.M + first + r) * p.O;
  }
  multiply_rows<T>(u, x, y, int(rows), work.W, p.I, p.O);
  if (!p.tanh) return;
  for (Index r = 0; r < rows; ++r) {
    for (Index c = 0; c < p.O; c += kWidth<T>) store_at(y[r], c, p.O, tanh<T>(load_at(y[r], c, p.O)));
  }
}

// Tangent of y; with a gradient g of y also the tangent by y of the gradient before tanh, g (1 - y^2).
template <class T>
void tangent_rows(const LinearTangent<T>& p, const Workspace<T>& work, Index g, Index first, Index rows) {
  const T *u[kBlock], *x[kBlock];
  T* out[kBlock];
  for (Index r = 0; r < rows; ++r) {
    u[r] = p.bias_t ? p.bias_t.at(g) : work.zeros;
    out[r] = p.y_t + (g * p.M + first + r) * p.O;
  }
  if (p.x_t) {
    for (Index r = 0; r < rows; ++r) x[r] = p.x_t.at(g, first + r);
    multiply_rows<T>(u, x, out, int(rows), work.W, p.I, p.O);
    for (Index r = 0; r < rows; ++r) u[r] = out[r];
  }
  if (p.W_t) {
    for (Index r = 0; r < rows; ++r) x[r] = p.x.at(g, first + r);
    multiply_rows<T>(u, x, out, int(rows), work.V, p.I, p.O);
    for (Index r = 0; r < rows; ++r) u[r] = out[r];
  }
  for (Index r = 0; r < rows; ++r) {
    const T *y = p.y.at(g, first + r), *grad = p.grad_y.at(g, first + r);
    T* curvature = p.curvature ? p.curvature + (g * p.M + first + r) * p.O : nullptr;
    for (Index c = 0; c < p.O; c += kWidth<T>) {
      Vector<T> v = load_at(u[r], c, p.O);
      if (y) {
        const Vector<T> y_c = load_at(y, c, p.O);
        if (curvature) store_at(curvature, c, p.O, T(-2) * y_c * load_at(grad, c, p.O) * v);
        v = through_tanh<T>(v, y_c);
      }
      store_at(out[r], c, p.O, v);
    }
  }
}

// Rows of the gradient before tanh, and what follows from them: `C` and `sums` are partial sums.
template <class T>
void gradient_rows(const LinearGrad<T>& p, const Workspace<T>& work, Index g, Index first, Index rows, T* C, T* sums) {
  const T *z[kBlock], *x[kBlock], *u[kBlock];
  T* out[kBlock];
  for (Index r = 0; r < rows; ++r) {
    const T* grad = p.grad_y.at(g, first + r);
    x[r] = p.x.at(g, first + r);
    u[r] = work.zeros;
    out[r] = p.grad_x ? p.grad_x + (g * p.M + first + r) * p.I : nullptr;
    z[r] = grad;
    if (!p.y) continue;
    const T* y = p.y.at(g, first + r);
    T* row = work.rows + r * work.row;
    z[r] = row;
    for (Index c = 0; c < p.O; c += kWidth<T>) {
      store(row + c, through_tanh<T>(load_at(grad, c, p.O), load_at(y, c, p.O)));
    }
  }
  if (p.grad_x) multiply_rows<T>(u, z, out, int(rows), work.W, p.O, p.I);
  if (p.grad_W) add_block<T>(z, x, rows, p.O, p.I, C, round_up(p.I, kWidth<T>));
  if (!p.grad_bias) return;
  for (Index c = 0; c < p.O; c += kWidth<T>) {
    Vector<T> sum = load(sums + c);
    for (Index r = 0; r < rows; ++r) sum += load_at(z[r], c, p.O);
    store(sums + c, sum);
  }
}

// Calls f(group, first row, rows, workspace) for blocks of the rows of every group, on p.threads threads.
template <class P, class T, class Enter, class F>
void for_blocks(const P& p, T* scratch, Enter enter, F f) {
#pragma omp parallel for schedule(static, 1) num_threads(p.threads)
  for (int thread = 0; thread < p.threads; ++thread) {
    const Workspace<T> work = workspace_at(scratch + thread * workspace_elements<T>(p.I, p.O), p.I, p.O);
    for_row_blocks(
        p.G, p.M, thread, p.threads, kBlock, [&](Index g) { enter(work, g); },
        [&](Index g, Index first, int rows) { f(work, g, first, rows); });
  }
}

template <class T>
void compute(const Linear<T>& p) {
  for_blocks(
      p, p.scratch, [&](const Workspace<T>& work, Index g) { pack(p.W, g, p.I, p.O, work.W); },
      [&](const Workspace<T>& work, Index g, Index first, int rows) { forward_rows(p, work, g, first, rows); });
}

template <class T>
void compute(const LinearTangent<T>& p) {
  for_blocks(
      p, p.scratch,
      [&](const Workspace<T>& work, Index g) {
        if (p.x_t) pack(p.W, g, p.I, p.O, work.W);
        if (p.W_t) pack(p.W_t, g, p.I, p.O, work.V);
      },
      [&](const Workspace<T>& work, Index g, Index first, int rows) { tangent_rows(p, work, g, first, rows); });
}

template <class T>
void compute(const LinearGrad<T>& p) {
  const Index stride = round_up(p.I, kWidth<T>), chunks = chunks_of<T>(p.G, p.M, p.O, p.I);
  const Index wide = round_up(p.O, kWidth<T>);
  T* const parts = p.scratch + p.threads * workspace_elements<T>(p.I, p.O);  // [G, chunks, O, stride]
  T* const sums = parts + p.G * chunks * p.O * stride;                       // [G, chunks, wide]
#pragma omp parallel for schedule(static, 1) num_threads(p.threads)
  for (int thread = 0; thread < p.threads; ++thread) {
    const Workspace<T> work = workspace_at(p.scratch + thread * workspace_elements<T>(p.I, p.O), p.I, p.O);
    Index packed = -1;
    for (Index i = p.G * chunks * thread / p.threads; i < p.G * chunks * (thread + 1) / p.threads; ++i) {
      const Index g = i / chunks, chunk = i % chunks;
      if (p.grad_x && packed != g) pack(p.W.at(g), p.W.strides[2], p.W.strides[1], p.O, p.I, work.W);
      packed = g;
      T *C = parts + i * p.O * stride, *sum = sums + i * wide;
      if (p.grad_W) std::memset(C, 0, std::size_t(p.O * stride) * sizeof(T));
      if (p.grad_bias) std::memset(sum, 0, std::size_t(wide) * sizeof(T));
      const Index end = p.M * (chunk + 1) / chunks;
      for (Index first = p.M * chunk / chunks; first < end; first += kBlock) {
        gradient_rows(p, work, g, first, first + kBlock < end ? kBlock : end - first, C, sum);
      }
    }
  }
  if (p.grad_W) add_chunks(p.G, p.O, p.I, chunks, parts, stride, p.grad_W, p.threads);
  if (p.grad_bias) add_chunks(p.G, Index(1), p.O, chunks, sums, wide, p.grad_bias, 1);
}

// Threads have a workspace each, so there are no more of them than blocks of rows.
template <class P>
Cost block_cost(const P& p, Index workspace, double products = 1) {
  return {products * double(p.G * p.M) * double(p.I * p.O), (p.G * p.M + kBlock - 1) / kBlock, workspace};
}
template <class T>
Cost cost_of(const Linear<T>& p) {
  return block_cost(p, workspace_elements<T>(p.I, p.O));
}
template <class T>
Cost cost_of(const LinearTangent<T>& p) {
  return block_cost(p, workspace_elements<T>(p.I, p.O), 2);
}
template <class T>
Cost cost_of(const LinearGrad<T>& p) {
  const Index parts = p.G * chunks_of<T>(p.G, p.M, p.O, p.I);
  const Index part = p.O * round_up(p.I, kWidth<T>) + round_up(p.O, kWidth<T>);
  return {double(p.G * p.M) * double(p.I * p.O), parts, workspace_elements<T>(p.I, p.O), parts * part};
}

}  // namespace

SSM_FAST_DEFINE_REAL(Linear)
SSM_FAST_DEFINE_REAL(LinearGrad)
SSM_FAST_DEFINE_REAL(LinearTangent)

}  // namespace ssm_fast::SSM_FAST_ISA
