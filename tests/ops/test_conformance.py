"""What holds for every op of `OPS` in conformance.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from ops.conformance import DOUBLE, OPS, RESETS, SINGLE, Case, Inputs, Op, Outputs, cases
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

EVERY_RESET = [*RESETS, "random"]
ONE_STEP = ["none", "all"]


def middle(op: Op) -> list[tuple[int, ...]]:
    return [op.middle]


def is_differentiable(op: Op) -> bool:
    return bool(op.differentiable)


def scalar(outputs: Outputs) -> Tensor:
    """A loss that weighs every element of the outputs differently."""
    total = outputs[0].new_zeros((), dtype=outputs[0].real.dtype)
    for y in outputs:
        target = torch.linspace(-1, 1, y.numel(), dtype=y.real.dtype).view(y.shape)
        total = total + (y - target).abs().square().sum()
    return total


def with_leaves(inputs: Inputs, names: Sequence[str]) -> Inputs:
    return {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}


def gradients(
    loss: Tensor, inputs: Inputs, names: Sequence[str], *, again: bool = False
) -> tuple[Tensor, ...]:
    """Zeros for what the loss does not depend on, as A with one step from no state."""
    leaves = [inputs[name] for name in names]
    return torch.autograd.grad(
        loss, leaves, create_graph=again, allow_unused=True, materialize_grads=True
    )


def outputs_and_gradients(
    case: Case, inputs: Inputs, run: Callable[[Inputs], Outputs] | None = None
) -> list[Tensor]:
    """Outputs, and the gradient of each input that has one."""
    names = case.differentiable(inputs)
    inputs = with_leaves(inputs, names)
    outputs = (run or case.run)(inputs)
    if not names:
        return list(outputs)
    return [*(y.detach() for y in outputs), *gradients(scalar(outputs), inputs, names)]


def gradients_of_both_orders(
    case: Case, inputs: Inputs, run: Callable[[Inputs], Outputs] | None = None
) -> list[Tensor]:
    """First gradients that can be differentiated again, and what that gives."""
    names = case.differentiable(inputs)
    inputs = with_leaves(inputs, names)
    first = gradients(scalar((run or case.run)(inputs)), inputs, names, again=True)
    curvature = torch.stack([g.abs().square().sum() for g in first]).sum()
    return [*(g.detach() for g in first), *gradients(curvature, inputs, names)]


def error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square, relative to that of the expected values unless these cancel."""
    difference = (actual.to(expected.dtype) - expected).abs().square().mean().sqrt()
    return float(difference / expected.abs().square().mean().sqrt().clamp(min=1.0))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """NaN in all memory that is not initialised; test_fuzz.py checks that torch does so."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@cases(lambda op: op.sizes, every_variant=True, resets=EVERY_RESET)
def test_float64_equals_the_loop(case: Case) -> None:
    inputs = case.inputs()
    actual = outputs_and_gradients(case, inputs)
    expected = outputs_and_gradients(case, inputs, case.loop)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-10)


@cases(lambda op: op.sizes, having=lambda op: op.state or op.layout_of, every_variant=True)
def test_time_major_equals_the_loop(case: Case) -> None:
    inputs = case.inputs()
    time_major = {name: case.op.time_major(x) for name, x in inputs.items()}
    actual = outputs_and_gradients(case, time_major)
    expected = outputs_and_gradients(case, inputs, case.loop)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-10)


@cases(lambda op: op.float32, every_variant=True)
def test_float32_error_against_the_float64_loop(case: Case) -> None:
    single = case.inputs(SINGLE[case.dtype])
    double = {name: x.to(DOUBLE.get(x.dtype, x.dtype)) for name, x in single.items()}
    actual = outputs_and_gradients(case, single)
    expected = outputs_and_gradients(case, double, case.loop)
    for x, y in zip(actual, expected, strict=True):
        assert error(x, y) <= case.op.error
    if case.op.differentiable:
        actual = gradients_of_both_orders(case, single)
        expected = gradients_of_both_orders(case, double, case.loop)
        for x, y in zip(actual, expected, strict=True):
            assert error(x, y) <= 1e-4


@cases(lambda op: op.small[:1], having=is_differentiable, every_variant=True, resets=EVERY_RESET)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    check_gradients(case, batched=True)


@cases(lambda op: op.small[1:], having=is_differentiable, resets=ONE_STEP)
def test_gradients_of_one_step(case: Case) -> None:
    check_gradients(case, batched=False)  # torch cannot batch the cat of one tensor


def check_gradients(case: Case, *, batched: bool) -> None:
    """Of both orders and modes, over every input that has one."""
    inputs = case.inputs()
    names = case.differentiable(inputs)
    leaves = [inputs[name].requires_grad_() for name in names]

    def run(*values: Tensor) -> Outputs:
        return case.run(inputs | dict(zip(names, values, strict=True)))

    assert gradcheck(run, leaves, check_forward_ad=True, check_batched_grad=batched)
    # In full where resets are random; along random directions for each other pattern of them.
    fast = case.resets != "random"
    assert gradgradcheck(run, leaves, check_fwd_over_rev=True, fast_mode=fast)


@cases(lambda op: op.small, having=is_differentiable, every_variant=True)
def test_forward_mode_equals_reverse_mode(case: Case) -> None:
    inputs = case.inputs()
    for name in case.differentiable(inputs):

        def f(x: Tensor, name: str = name) -> Tensor:
            return case.run(inputs | {name: x})[0]

        if case.dtype.is_complex:  # jacrev and jacfwd are of real functions
            v, w = torch.randn_like(inputs[name]), torch.randn_like(f(inputs[name]))
            _, pull = torch.func.vjp(f, inputs[name])
            _, tangent = jvp(f, (inputs[name],), (v,))
            torch.testing.assert_close(
                (w.conj() * tangent).sum().real, (pull(w)[0].conj() * v).sum().real
            )
        else:
            torch.testing.assert_close(jacfwd(f)(inputs[name]), jacrev(f)(inputs[name]))


@cases(middle, having=lambda op: not op.differentiable)
def test_targets_carry_no_gradient(case: Case) -> None:
    inputs = {
        name: x.requires_grad_() if x.is_floating_point() else x
        for name, x in case.inputs().items()
    }
    assert not any(y.requires_grad for y in case.run(inputs))


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views with the values of ``x`` that lie in memory in another way, with NaN in the gaps."""
    for i in range(x.dim()):
        for j in range(i):
            yield f"{j} and {i} swapped", x.transpose(i, j).contiguous().transpose(i, j)
        gap = torch.full_like(x, torch.nan if x.dtype != torch.bool else True)
        wide = torch.stack([x, gap], dim=i + 1).flatten(i, i + 1)
        yield f"every other of {i}", wide[(slice(None),) * i + (slice(None, None, 2),)]


@cases(middle, every_variant=True)
def test_any_layout_gives_the_same_results(case: Case) -> None:
    inputs = case.inputs()
    expected = outputs_and_gradients(case, inputs)
    for name, x in inputs.items():
        for layout, view in layouts(x):
            changed = inputs | {name: view}
            what = f"{name}, {layout}"
            if case.op.bitwise:
                outputs = case.run(changed)
                assert all(map(torch.equal, outputs, expected)), what
            actual = outputs_and_gradients(case, changed)
            torch.testing.assert_close(
                actual, expected, rtol=1e-11, atol=1e-11, msg=lambda m, what=what: f"{what}: {m}"
            )


@cases(middle, having=is_differentiable, every_variant=True)
def test_a_gradient_may_lie_in_memory_in_any_way(case: Case) -> None:
    inputs = case.inputs()
    names = case.differentiable(inputs)
    inputs = with_leaves(inputs, names)
    leaves = [inputs[name] for name in names]
    (y,) = case.run(inputs)
    cotangent = torch.randn_like(y)
    one = torch.ones((), dtype=y.dtype)
    for dense, others in (
        (cotangent, [view for _, view in layouts(cotangent)]),
        (torch.ones_like(y), [one.expand(y.shape)]),  # what sum() hands on
    ):
        expected = torch.autograd.grad(y, leaves, dense, retain_graph=True)
        for other in others:
            actual = torch.autograd.grad(y, leaves, other, retain_graph=True)
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@cases(middle, having=lambda op: op.layout_of)
def test_outputs_lie_in_memory_as_the_sequence_does(case: Case) -> None:
    inputs, name = case.inputs(), case.op.layout_of
    assert name is not None
    for view in (inputs[name], case.op.time_major(inputs[name])):
        laid_out = inputs | {name: view}
        assert all(y.stride() == view.stride() for y in case.run(laid_out))


@cases(middle, every_variant=True)
def test_inputs_are_left_as_they_were(case: Case) -> None:
    inputs = case.inputs()
    copies = {name: x.clone() for name, x in inputs.items()}
    outputs_and_gradients(case, inputs)
    case.run(inputs)
    assert all(torch.equal(inputs[name], x) for name, x in copies.items())


@cases(middle, every_variant=True)
def test_every_element_is_written(case: Case, poisoned_memory: None) -> None:
    inputs = case.inputs()
    results = [*case.run(inputs), *outputs_and_gradients(case, inputs)]
    if case.op.differentiable:
        results += gradients_of_both_orders(case, inputs)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("cut", [1, 3])
@cases(middle)
def test_split_in_two_equals_whole(case: Case, cut: int) -> None:
    inputs = case.inputs()
    whole = case.run(inputs)
    for actual, expected in zip(case.op.split(case.run, inputs, cut), whole, strict=True):
        if case.op.bitwise:
            assert torch.equal(actual, expected)
        else:
            torch.testing.assert_close(actual, expected)


@cases(middle, having=lambda op: op.state)
def test_no_state_is_a_state_of_zeros(case: Case) -> None:
    inputs, state = case.inputs(), case.op.state
    zeros = inputs | {state: torch.zeros_like(inputs[state])}
    del inputs[state]
    torch.testing.assert_close(case.run(inputs), case.run(zeros))


@cases(middle, having=lambda op: op.groups, every_variant=True)
def test_groups_equal_a_call_each(case: Case) -> None:
    alone = [case.inputs(seed=seed) for seed in range(3)]
    together = case.run({name: case.op.groups([x[name] for x in alone]) for name in alone[0]})
    expected = zip(*map(case.run, alone), strict=True)
    for actual, each in zip(together, expected, strict=True):
        assert torch.equal(actual, case.op.groups(each))


@cases(lambda op: op.small[:1], having=lambda op: op.vmaps, every_variant=True)
def test_vmap_equals_a_loop(case: Case) -> None:
    inputs = case.inputs()
    names, learnt = list(inputs), case.differentiable(inputs)

    def call(*values: Tensor) -> tuple[Outputs, dict[str, Tensor]]:
        """Outputs, and the gradient behind a step along the gradient."""
        given = dict(zip(names, values, strict=True))

        def loss(leaves: Inputs) -> Tensor:
            return scalar(case.run(given | leaves))

        def adapted(leaves: Inputs) -> Tensor:
            steps = grad(loss)(leaves)
            return loss({name: x - 0.01 * steps[name] for name, x in leaves.items()})

        leaves = {name: given[name] for name in learnt}
        return case.run(given), grad(adapted)(leaves)

    def another(x: Tensor) -> Tensor:
        return x.flip(0) if x.dtype == torch.bool else -0.5 * x

    # Each input alone, along its first or its last dimension; then all of them.
    alone = [{name: i % 2 == 1} for i, name in enumerate(names)]
    for batched in (*alone, dict.fromkeys(names, False), dict.fromkeys(names, True)):
        in_dims = tuple(
            (inputs[name].dim() if batched[name] else 0) if name in batched else None
            for name in names
        )
        stacked = [
            x if d is None else torch.stack([x, another(x)], dim=d)
            for x, d in zip(inputs.values(), in_dims, strict=True)
        ]
        together = vmap(call, in_dims)(*stacked)
        for i in range(2):
            one_call = call(
                *(x if d is None else x.select(d, i) for x, d in zip(stacked, in_dims, strict=True))
            )
            one = [y[i] for y in together[0]], {n: g[i] for n, g in together[1].items()}
            torch.testing.assert_close(
                one, (list(one_call[0]), one_call[1]), msg=lambda m, b=batched: f"{b}: {m}"
            )


@cases(lambda op: op.threads)
def test_results_are_bitwise_the_same_for_any_thread_count(case: Case) -> None:
    inputs = case.inputs(SINGLE[case.dtype])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = [*case.run(inputs)]
            if not case.dtype.is_complex:  # torch's own complex products differ by thread count
                found += outputs_and_gradients(case, inputs)
                if case.op.differentiable:
                    found += gradients_of_both_orders(case, inputs)
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


OPCHECKS = {f"{op.name}-{name}": make for op in OPS.values() for name, make in op.opchecks.items()}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name: str) -> None:
    op, arguments = OPCHECKS[name]()
    torch.library.opcheck(op.default, arguments)


@cases(middle)
def test_compile_sees_one_graph(case: Case) -> None:
    inputs = case.inputs()
    torch._dynamo.reset()
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        outputs_and_gradients(case, inputs, compiled), outputs_and_gradients(case, inputs)
    )


@cases(middle)
def test_export(case: Case) -> None:
    class Exported(nn.Module):
        def forward(self, inputs: Inputs) -> Outputs:
            return case.run(inputs)

    inputs, others = case.inputs(), case.inputs(seed=1)
    program = torch.export.export(Exported(), (inputs,))
    torch.testing.assert_close(program.module()(others), case.run(others))


@cases(lambda op: op.empty)
def test_empty_sizes(case: Case) -> None:
    inputs = case.inputs()
    results = outputs_and_gradients(case, inputs)
    some = 89  # a size that no other has, in the place of 0
    full = replace(case, sizes=tuple(size or some for size in case.sizes))
    shapes = [[0 if n == some else n for n in y.shape] for y in full.run(full.inputs())]
    shapes += [list(inputs[name].shape) for name in case.differentiable(inputs)]
    assert [list(x.shape) for x in results] == shapes
    assert all(x.isfinite().all() for x in results)
