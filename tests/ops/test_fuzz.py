"""Every op on random sizes, layouts, dtypes, resets and values: what its reference gives, or its error.

`make test` runs a fixed few hundred cases, `make fuzz` thousands of new ones.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssm_fast.ops import dense_scan, discounted_returns, gae, linear_scan, norm_scan
from ssm_fast.ops.output_norm import output_norm

CASES = int(os.environ.get("SSM_FAST_FUZZ_CASES", "0"))


def cases(share):
    """Settings of a test that makes ``share`` of all cases, in percent."""
    return settings(
        max_examples=max(1, (CASES or 900) * share // 100),
        derandomize=CASES == 0,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def _fill_new_memory_with_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what is not initialised
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.isa_independent
def test_new_memory_is_nan():
    x = torch.zeros(2)
    for fresh in (x.new_empty(3, 4), torch.empty_strided((3, 4), (1, 3)), torch.empty_like(x)):
        assert fresh.isnan().all()


# The structure is drawn, for hypothesis to shrink; the numbers come from a seed that is drawn.

SMALL = st.one_of(st.integers(1, 5), st.integers(0, 20))
EDGES = st.sampled_from([7, 8, 9, 15, 16, 17, 31, 32, 33])
FEATURES = st.one_of(SMALL, EDGES, EDGES, st.integers(63, 70))
REAL = st.sampled_from([torch.float32, torch.float64])
KINDS = st.sampled_from(["normal", "normal", "zero", "tiny", "huge", "special"])
SCALES = {"normal": 0, "special": 0, "zero": 0, "tiny": -30, "huge": 30}
DOUBLE = {
    torch.float32: torch.float64,
    torch.float64: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex128: torch.complex128,
}


class Case:
    """Draws the arguments of one call."""

    def __init__(self, data):
        self.draw = data.draw
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def chance(self, percent):
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def laid_out(self, x):
        """A view with the values of ``x`` and any layout; NaN (or 1) stands in its gaps."""
        if x.dim() == 0:
            return x
        if self.chance(40):
            order = self.draw(st.permutations(range(x.dim())))
            sizes = [x.shape[d] for d in order]
            step, offset = self.draw(st.integers(1, 3)), self.draw(st.integers(0, 3))
            stepped = self.draw(st.integers(0, x.dim() - 1))
            sizes[stepped] *= step
            gap = torch.nan if x.dtype.is_floating_point or x.is_complex() else 1
            memory = torch.full((torch.Size(sizes).numel() + offset,), gap, dtype=x.dtype)
            view = memory[offset:].view(sizes)
            view = view[(slice(None),) * stepped + (slice(None, None, step),)]
            view = view.permute([order.index(d) for d in range(x.dim())])
            return view.copy_(x)
        if self.chance(20) and x.numel() > 0:
            dim = self.draw(st.integers(0, x.dim() - 1))
            return x.narrow(dim, 0, 1).expand_as(x)  # a stride of zero
        return x

    def values(self, shape, dtype, kind="normal"):
        x = torch.randn(shape, dtype=DOUBLE[dtype], generator=self.generator)
        if kind == "zero":
            x = torch.zeros_like(x)
        x = (x * 10.0 ** SCALES[kind]).to(dtype)
        if kind == "special":
            odd = torch.tensor([torch.nan, torch.inf, -torch.inf])
            places = torch.rand(shape, generator=self.generator) < 0.03
            which = torch.randint(3, tuple(shape), generator=self.generator)
            x = torch.where(places, odd[which].to(dtype), x)
        return self.laid_out(x)

    def flags(self, shape):
        share = self.draw(st.sampled_from([0.0, 0.2, 0.2, 1.0]))
        return torch.rand(shape, generator=self.generator) < share

    def reset(self, shape):
        if self.chance(30):
            return None
        kind = self.draw(
            st.sampled_from([torch.bool, torch.bool, torch.uint8, torch.int64, torch.float32])
        )
        return self.laid_out(self.flags(shape).to(kind))

    def scan_arguments(self, *, norm, kind=None, dtype=None):
        """The arguments of dense_scan, or with ``norm`` of norm_scan."""
        dtype = dtype or self.draw(REAL)
        kind = kind or self.draw(KINDS)
        group = [self.draw(st.integers(0, 3))] if self.chance(40) else []
        B, T, N = self.draw(SMALL), self.draw(SMALL), self.draw(FEATURES)
        A = self.values([*group, N, N], torch.float64) * (0.5 / max(N, 1) ** 0.5)
        arguments = {
            "u": self.values([*group, B, T, N], dtype, kind),
            "A": self.laid_out(A.to(dtype)),
        }
        if norm:
            arguments["weight"] = self.values([*group, N], dtype)
            arguments["bias"] = self.values([*group, N], dtype)
        arguments["s0"] = self.values([*group, B, N], dtype, kind) if self.chance(50) else None
        arguments["reset"] = self.reset([*group, B, T])
        return arguments, kind

    def linear_arguments(self, kind=None):
        dtype = self.draw(st.sampled_from(list(DOUBLE)))
        kind = kind or self.draw(KINDS)
        shape = self.draw(st.lists(FEATURES, min_size=1, max_size=3))
        if torch.Size(shape).numel() > 40_000:
            shape = [size % 20 for size in shape]
        dim = self.draw(st.integers(-len(shape), len(shape) - 1))
        a_shape = [1 if self.chance(20) else size for size in shape]
        if self.chance(20):
            a_shape = a_shape[1:]
        a = self.values(a_shape, DOUBLE[dtype])
        without_time = [size for d, size in enumerate(shape) if d != dim % len(shape)]
        return {
            "a": self.laid_out((0.5 * a).to(dtype)),
            "b": self.values(shape, dtype, kind),
            "h0": self.values(without_time, dtype, kind) if self.chance(50) else None,
            "reverse": self.draw(st.booleans()),
            "dim": dim,
        }

    def rollout(self, op, kind=None):
        dtype = self.draw(REAL)
        kind = kind or self.draw(KINDS)
        shape = self.draw(st.lists(FEATURES, min_size=1, max_size=3))
        if torch.Size(shape).numel() > 40_000:
            shape = [size % 20 for size in shape]
        fraction = st.one_of(st.sampled_from([0.0, 1.0, 0.99]), st.floats(0, 1))
        arguments = {"rewards": self.values(shape, dtype, kind)}
        if op is gae:
            arguments["values"] = self.values(shape, dtype, kind)
        if op is gae or self.chance(70):
            arguments["next_values"] = self.values(shape, dtype, kind)
        for name in ("terminated", "truncated"):
            arguments[name] = self.laid_out(self.flags(shape))
        arguments["gamma"] = self.draw(fraction)
        if op is gae:
            arguments["gae_lambda"] = self.draw(fraction)
        arguments["dim"] = self.draw(st.integers(-len(shape), len(shape) - 1))
        return arguments


def in_double(arguments):
    return {
        name: x.to(DOUBLE[x.dtype])
        if isinstance(x, torch.Tensor) and x.dtype in DOUBLE and name != "reset"
        else x
        for name, x in arguments.items()
    }


def assert_same(actual, same_dtype, exact, dims, tolerance=None, floor=0.0):
    """``actual`` equals the reference.

    An element is not finite exactly where the reference of the same dtype is not; whether it is NaN
    or an infinity there depends on the order of a sum. Finite elements differ from the float64
    reference by at most ``tolerance`` times the largest finite value along ``dims`` (or ``floor``).
    """
    assert actual.shape == same_dtype.shape
    assert actual.dtype == same_dtype.dtype
    finite = same_dtype.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    if actual.numel() == 0:
        return
    if tolerance is None:
        tolerance = 1e-4 if actual.dtype in (torch.float32, torch.complex64) else 1e-9
    finite = finite & exact.isfinite()
    exact = exact.masked_fill(~finite, 0)
    scale = exact.abs().amax(dims, keepdim=True).clamp(min=max(floor, 1e-36))
    error = (actual.to(exact.dtype).masked_fill(~finite, 0) - exact).abs()
    assert (error <= tolerance * scale).all(), f"error {(error / scale).max():.1e} of the scale"


def gradients(op, arguments, impl):
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in arguments.items()
        if isinstance(x, torch.Tensor) and x.dtype in DOUBLE and name != "reset"
    }
    output = op(**(arguments | leaves), impl=impl)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    loss = (output * weights.to(output.dtype)).sum()
    loss = loss.real if loss.is_complex() else loss
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def assert_same_gradients(op, arguments, tolerance):
    expected = gradients(op, in_double(arguments), "reference")
    for name, grad in gradients(op, arguments, "native").items():
        exact = expected[name]
        assert grad.shape == exact.shape
        if grad.numel():
            scale = exact.abs().max().clamp(min=1.0)
            error = (grad.to(exact.dtype) - exact).abs().max()
            assert error <= tolerance * scale, f"gradient of {name} differs by {error / scale:.1e}"


@cases(20)
@given(st.data())
def test_dense_scan_equals_its_reference(data):
    case = Case(data)
    arguments, kind = case.scan_arguments(norm=False)
    same_dtype = dense_scan(**arguments, impl="reference")
    exact = dense_scan(**in_double(arguments), impl="reference")
    assert_same(dense_scan(**arguments), same_dtype, exact, (-1, -2))
    if kind in ("normal", "zero") and case.chance(50):
        single = arguments["u"].dtype == torch.float32
        assert_same_gradients(dense_scan, arguments, 1e-4 if single else 1e-9)


@cases(20)
@given(st.data())
def test_norm_scan_equals_its_reference(data):
    case = Case(data)
    arguments, kind = case.scan_arguments(norm=True)
    arguments["eps"] = data.draw(st.sampled_from([1e-5, 1e-2, 1.0]))
    same_dtype = norm_scan(**arguments, impl="reference")
    # squares of huge float32 overflow, in the kernel as in the reference; in float64 they do not
    exact = same_dtype if kind == "huge" else norm_scan(**in_double(arguments), impl="reference")
    single = arguments["u"].dtype == torch.float32
    # a step divides by the deviation of the state and so enlarges an error by up to eps^-1/2
    tolerance = 1e-2 if single else 1e-6
    assert_same(norm_scan(**arguments), same_dtype, exact, (-1, -2), tolerance, 1.0)
    if kind in ("normal", "zero") and case.chance(50) and not single:
        assert_same_gradients(norm_scan, arguments, 1e-6)


@cases(6)
@given(st.data())
def test_output_norm_equals_its_reference(data):
    case = Case(data)
    kind, dtype = data.draw(KINDS), data.draw(REAL)
    shape = [*data.draw(st.lists(SMALL, max_size=2)), data.draw(FEATURES)]
    arguments = {"z": case.values(shape, dtype, kind), "tanh": case.chance(50)}
    if case.chance(70):
        arguments |= {name: case.values(shape[-1:], dtype) for name in ("weight", "bias")}
    if case.chance(50):
        arguments["residual"] = case.values(shape, dtype, kind)
    same_dtype = output_norm(**arguments, impl="reference")
    # squares of huge float32 overflow, in the kernel as in the reference; in float64 they do not
    exact = same_dtype if kind == "huge" else output_norm(**in_double(arguments), impl="reference")
    single = dtype == torch.float32
    tolerance = 1e-2 if single else 1e-6  # as for norm_scan
    assert_same(output_norm(**arguments), same_dtype, exact, (-1,), tolerance, 1.0)
    if kind in ("normal", "zero") and case.chance(50) and not single:
        assert_same_gradients(output_norm, arguments, 1e-6)


@cases(13)
@given(st.data())
def test_linear_scan_equals_its_reference(data):
    case = Case(data)
    kind = data.draw(KINDS)
    arguments = case.linear_arguments(kind)
    same_dtype = linear_scan(**arguments, impl="reference")
    exact = linear_scan(**in_double(arguments), impl="reference")
    actual = linear_scan(**arguments)
    single = actual.dtype in (torch.float32, torch.complex64)
    assert_same(actual, same_dtype, exact, arguments["dim"])
    if kind in ("normal", "zero") and case.chance(50):
        assert_same_gradients(linear_scan, arguments, 1e-4 if single else 1e-9)


@pytest.mark.parametrize("op", [gae, discounted_returns])
@cases(6)
@given(st.data())
def test_returns_equal_their_reference(op, data):
    arguments = Case(data).rollout(op)
    results = []
    for inputs, impl in (
        (arguments, "native"),
        (arguments, "reference"),
        (in_double(arguments), "reference"),
    ):
        result = op(**inputs, impl=impl)
        results.append(result if op is gae else (result,))
    for actual, same_dtype, exact in zip(*results, strict=True):
        assert_same(actual, same_dtype, exact, arguments["dim"])


def spoilt(x, case):
    """``x`` with one element that is not finite, and the place of the element."""
    place = tuple(int(torch.randint(size, (), generator=case.generator)) for size in x.shape)
    x = x.clone(memory_format=torch.contiguous_format)  # a stride of zero holds it many times
    x[place] = case.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    return x, place


@pytest.mark.parametrize("op", [dense_scan, norm_scan])
@cases(5)
@given(st.data())
def test_what_is_not_finite_stays_in_its_row_and_before_a_reset(op, data):
    case = Case(data)
    arguments, _ = case.scan_arguments(norm=op is norm_scan, kind="normal")
    if arguments["u"].numel() == 0:
        return
    clean = op(**arguments)
    u, (*row, t, n) = spoilt(arguments["u"], case)
    actual = op(**(arguments | {"u": u}))
    reached = torch.zeros(u.shape[:-1], dtype=torch.bool)
    reset = arguments["reset"]
    for later in range(t, u.shape[-2]):
        if later > t and reset is not None and reset[(*row, later)] != 0:
            break
        reached[(*row, later)] = True
    assert not actual[(*row, t, n)].isfinite()
    torch.testing.assert_close(actual[~reached], clean[~reached])


@cases(4)
@given(st.data())
def test_linear_scan_keeps_what_is_not_finite_in_its_element(data):
    case = Case(data)
    arguments = case.linear_arguments("normal")
    if arguments["b"].numel() == 0:
        return
    clean = linear_scan(**arguments)
    b, place = spoilt(arguments["b"], case)
    actual = linear_scan(**(arguments | {"b": b}))
    dim = arguments["dim"] % b.dim()
    reached = torch.zeros(b.shape, dtype=torch.bool)
    steps = slice(None, place[dim] + 1) if arguments["reverse"] else slice(place[dim], None)
    reached[(*place[:dim], steps, *place[dim + 1 :])] = True
    assert not actual[place].isfinite()
    torch.testing.assert_close(actual[~reached], clean[~reached])


@pytest.mark.parametrize("op", [gae, discounted_returns])
@cases(3)
@given(st.data())
def test_returns_keep_what_is_not_finite_in_its_episode(op, data):
    case = Case(data)
    arguments = case.rollout(op, "normal")
    rewards = arguments["rewards"]
    if rewards.numel() == 0:
        return
    clean = op(**arguments)
    arguments["rewards"], place = spoilt(rewards, case)
    actual = op(**arguments)
    dim = arguments["dim"] % rewards.dim()
    ended = (arguments["terminated"] | arguments["truncated"]).movedim(dim, 0)
    column = (slice(None), *place[:dim], *place[dim + 1 :])
    reached = torch.zeros(ended.shape, dtype=torch.bool)
    for earlier in range(place[dim], -1, -1):
        if earlier < place[dim] and ended[column][earlier]:
            break
        reached[column][earlier] = True
    reached = reached.movedim(0, dim)
    for x, y in zip(
        actual if op is gae else (actual,), clean if op is gae else (clean,), strict=True
    ):
        assert not x[place].isfinite()
        torch.testing.assert_close(x[~reached], y[~reached])


WRONG_DTYPES = [torch.int64, torch.float16, torch.bool, torch.complex64, torch.float64, torch.uint8]


def damaged(case, x):
    """Something that is probably not allowed in the place of ``x``."""
    ways = ["list", "None", "dtype", "more", "dimension", "scalar", "meta"]
    way = case.draw(st.sampled_from(ways)) if isinstance(x, torch.Tensor) else "number"
    if way == "number":
        return case.draw(st.sampled_from([-1, 7, float("nan"), float("inf"), -5]))
    if way == "dtype":
        return x.to(case.draw(st.sampled_from(WRONG_DTYPES)))
    if way == "more" and x.dim() > 0:
        dim = case.draw(st.integers(0, x.dim() - 1))
        return torch.cat([x, x.narrow(dim, 0, min(1, x.shape[dim]))], dim)
    if way == "dimension":
        return x.unsqueeze(case.draw(st.integers(0, x.dim())))
    return {"list": [0.0], "None": None, "meta": x.to("meta")}.get(
        way, torch.zeros((), dtype=x.dtype)
    )


@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")
@pytest.mark.parametrize("op", [dense_scan, norm_scan, linear_scan, gae, discounted_returns])
@cases(3)
@given(st.data())
def test_wrong_arguments_raise_the_same_error_for_every_impl(op, data):
    case = Case(data)
    if op in (dense_scan, norm_scan):
        arguments, _ = case.scan_arguments(norm=op is norm_scan, kind="normal")
    elif op is linear_scan:
        arguments = case.linear_arguments("normal")
    else:
        arguments = case.rollout(op, "normal")
    name = case.draw(st.sampled_from([n for n, x in arguments.items() if n != "reverse"]))
    if arguments[name] is None:
        arguments[name] = torch.zeros(case.draw(st.lists(SMALL, max_size=3)))
    else:
        arguments[name] = damaged(case, arguments[name])
    outcomes = []
    for impl in ("native", "reference"):
        try:
            results = op(**arguments, impl=impl)
            outcomes.append([x.shape for x in (results if op is gae else (results,))])
        except (ValueError, TypeError) as error:
            outcomes.append(type(error))
        except RuntimeError as error:  # what is right but for its device has no kernel there
            if "device meta" not in str(error):
                raise
            outcomes.append(RuntimeError)
    assert outcomes[0] == outcomes[1] or RuntimeError in outcomes
