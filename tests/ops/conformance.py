"""What every op promises, one entry an op: a new op is one more `Op` in `OPS`.

An entry says how to call the op, what a plain loop makes of the same inputs, how inputs of given
sizes are drawn, and which promises hold. `test_conformance.py` checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from references import (
    dense_scan_loop,
    gae_by_definition,
    linear_by_groups,
    linear_scan_eager,
    norm_scan_loop,
    output_norm_written_out,
    returns_by_definition,
    weight_grad_sum,
)
from torch import Tensor

from ssm_fast.ops import dense_scan, discounted_returns, gae, linear_scan, norm_scan
from ssm_fast.ops.linear import grouped_linear
from ssm_fast.ops.output_norm import output_norm
from ssm_fast.ops.weight_grad import weight_grad

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Sizes = tuple[int, ...]

DOUBLE = {
    torch.float32: torch.float64,
    torch.float64: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex128: torch.complex128,
}
SINGLE = {torch.float64: torch.float32, torch.complex128: torch.complex64}

# Steps at which an episode begins (or, for returns, ends), in every row.
RESETS: dict[str, list[int] | slice] = {
    "none": [],
    "first": [0],
    "last": [-1],
    "consecutive": [1, 2],
    "all": slice(None),
}


class Draw:
    """Random numbers, and the steps at which episodes begin."""

    def __init__(self, dtype: torch.dtype, resets: str, seed: int) -> None:
        self.dtype, self.resets = dtype, resets
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        # Drawn in double, so that float32 and float64 see the same numbers.
        x = torch.randn(shape, dtype=DOUBLE[self.dtype], generator=self.generator)
        return x.to(self.dtype)

    def coins(self, *shape: int, share: float = 0.5) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def starts(self, *shape: int) -> Tensor:
        if self.resets == "random":
            return self.coins(*shape, share=0.2)
        starts = torch.zeros(shape, dtype=torch.bool)  # [..., T]
        steps = RESETS[self.resets]
        T = shape[-1]
        starts[..., [t for t in steps if t < T] if isinstance(steps, list) else steps] = True
        return starts


@dataclass(frozen=True)
class Variant:
    """One way to call an op.

    Attributes:
        settings: Arguments that are no tensors, for the op and its loop.
        change: What it makes of the inputs, such as leaving one out.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Inputs], Inputs] = dict


def without(*names: str) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {name: x for name, x in inputs.items() if name not in names}


@dataclass(frozen=True)
class Op:
    """What an op promises.

    Attributes:
        name: As in ``torch.ops.ssm_fast``.
        call: The public function, or what the models call.
        loop: The same by plain torch calls or Python loops, from float64 inputs.
        inputs: Draws the inputs of given sizes, by their names.
        sizes: What equals the loop: one row, one step, odd sizes and those that take code of their own.
        small: Of the tests that differentiate numerically, and of transforms; the second has one step.
        middle: Of all other tests: several rows, steps and odd features.
        empty: Sizes without an element.
        float32: Sizes that show how rounding errors grow.
        threads: Sizes whose work is worth several threads.
        opchecks: Arguments of each op of the dispatcher.
        split: The outputs of a call from those of two, ``(run, inputs, cut)``.
        variants: Ways to call it; the first does the most.
        differentiable: Inputs that have a gradient; empty if the results are targets, by design.
        resets: Whether episodes begin (or end) within the sequence.
        state: The input that is a state from before the first step, if there is one.
        groups: How inputs of groups become those of one call, if it takes groups.
        vmaps: Whether it runs under ``torch.func.vmap``; if not, it takes any number of dimensions.
        layout_of: The input whose order in memory the outputs have; None if they are contiguous.
        bitwise: Whether layouts and splits change no bit.
        dtypes: In double precision.
        error: Relative RMS error of float32 outputs and gradients, at most.
        rows: Which dimension of the inputs counts rows; the one behind it counts steps.
    """

    name: str
    call: Callable[..., Tensor | Outputs]
    loop: Callable[..., Tensor | Outputs]
    inputs: Callable[..., Inputs]
    sizes: Sequence[Sizes]
    small: tuple[Sizes, Sizes]
    middle: Sizes
    empty: Sequence[Sizes]
    float32: Sequence[Sizes]
    threads: Sequence[Sizes]
    opchecks: Mapping[str, Callable[[], tuple[Any, ...]]]
    split: Callable[[Callable[[Inputs], Outputs], Inputs, int], Outputs]
    variants: Mapping[str, Variant] = field(default_factory=lambda: {"default": Variant()})
    differentiable: tuple[str, ...] = ()
    resets: bool = False
    state: str | None = None
    groups: Callable[[Sequence[Tensor]], Tensor] | None = None
    vmaps: bool = True
    layout_of: str | None = None
    bitwise: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    error: float = 1e-5
    rows: int = 0

    def time_major(self, x: Tensor) -> Tensor:
        """The same values, in memory with the steps (or whatever follows the rows) outermost."""
        rows = self.rows
        if x.dim() < rows + 2:
            return x
        return x.transpose(rows, rows + 1).contiguous().transpose(rows, rows + 1)


@dataclass(frozen=True)
class Case:
    """One op, called in one way on inputs of one size."""

    op: Op
    variant: str
    sizes: Sizes
    resets: str = "none"
    dtype: torch.dtype = torch.float64

    def inputs(self, dtype: torch.dtype | None = None, seed: int = 0) -> Inputs:
        drawn = self.op.inputs(Draw(dtype or self.dtype, self.resets, seed), *self.sizes)
        return self.op.variants[self.variant].change(drawn)

    def run(self, inputs: Inputs) -> Outputs:
        return self._tuple(self.op.call, inputs)

    def loop(self, inputs: Inputs) -> Outputs:
        return self._tuple(self.op.loop, inputs)

    def _tuple(self, function: Callable[..., Any], inputs: Inputs) -> Outputs:
        found = function(**inputs, **self.op.variants[self.variant].settings)
        return found if isinstance(found, tuple) else (found,)

    def differentiable(self, inputs: Inputs) -> list[str]:
        return [name for name in inputs if name in self.op.differentiable]

    def __str__(self) -> str:
        parts = [self.op.name, self.variant, "x".join(map(str, self.sizes))]
        if self.op.resets:
            parts.append(self.resets)
        if len(self.op.dtypes) > 1:
            parts.append(str(self.dtype).removeprefix("torch."))
        return "-".join(parts)


def cases(
    sizes: Callable[[Op], Sequence[Sizes]],
    *,
    having: Callable[[Op], Any] = lambda op: True,
    every_variant: bool = False,
    resets: Sequence[str] = ("random",),
) -> pytest.MarkDecorator:
    """Parametrize a test by the ops that have what it tests.

    The first variant meets every pattern of ``resets``, the others random ones.
    """
    found = [
        Case(op, variant, size, reset, dtype)
        for op in OPS.values()
        if having(op)
        for variant in (op.variants if every_variant else list(op.variants)[:1])
        for size in sizes(op)
        for reset in (resets if op.resets and variant == next(iter(op.variants)) else ["random"])
        for dtype in op.dtypes
    ]
    return pytest.mark.parametrize("case", found, ids=str)


# How a call is two calls. ``cut`` is the number of steps (or rows) of the first.


def _scan_in_two(state: str, *sequences: str) -> Callable[..., Outputs]:
    """The second half goes on from the last state of the first."""

    def split(run: Callable[[Inputs], Outputs], inputs: Inputs, cut: int) -> Outputs:
        first = run(inputs | {name: inputs[name][:, :cut] for name in sequences})[0]
        rest = {name: inputs[name][:, cut:] for name in sequences}
        second = run(inputs | rest | {state: first[:, -1]})[0]
        return (torch.cat([first, second], dim=1),)

    return split


def _rows_in_two(dim: int, *rows: str) -> Callable[..., Outputs]:
    """Rows know nothing of each other."""

    def split(run: Callable[[Inputs], Outputs], inputs: Inputs, cut: int) -> Outputs:
        rest = inputs[rows[0]].shape[dim] - cut
        halves = [
            run(inputs | {n: inputs[n].narrow(dim, *part) for n in rows if n in inputs})[0]
            for part in ((0, cut), (cut, rest))
        ]
        return (torch.cat(halves, dim=dim),)

    return split


def _sum_in_two(run: Callable[[Inputs], Outputs], inputs: Inputs, cut: int) -> Outputs:
    """The state that enters the second half is the last one of the first."""
    sequences = ("x", "s", "reset")
    first = run(inputs | {name: inputs[name][:, :, :cut] for name in sequences})[0]
    rest = {name: inputs[name][:, :, cut:] for name in sequences}
    second = run(inputs | rest | {"s0": inputs["s"][:, :, cut - 1]})[0]
    return (first + second,)


def _gae_in_two(run: Callable[[Inputs], Outputs], inputs: Inputs, cut: int) -> Outputs:
    """λ times the advantage behind the cut counts as part of the value there."""
    second = run({name: x[:, cut:] for name, x in inputs.items()})
    first = {name: x[:, :cut].clone() for name, x in inputs.items()}
    goes_on = ~first["truncated"][:, -1]
    first["next_values"][:, -1] += goes_on * GAMMAS["gae_lambda"] * second[0][:, 0]
    return tuple(torch.cat(halves, dim=1) for halves in zip(run(first), second, strict=True))


def _returns_in_two(run: Callable[[Inputs], Outputs], inputs: Inputs, cut: int) -> Outputs:
    """What the second half returns is the value at the end of the first."""
    second = run({name: x[:, cut:] for name, x in inputs.items()})[0]
    first = {name: x[:, :cut].clone() for name, x in inputs.items()}
    last = first["next_values"][:, -1]
    first["next_values"][:, -1] = torch.where(first["truncated"][:, -1], last, second[:, 0])
    return (torch.cat([run(first)[0], second], dim=1),)


# dense_scan


def _dense_inputs(draw: Draw, B: int, T: int, N: int) -> Inputs:
    """A is 0.9 times an orthogonal matrix, so that states stay of order one."""
    A = torch.linalg.qr(draw.normal(N, N).double())[0] * 0.9 if N else draw.normal(0, 0)
    return {
        "u": draw.normal(B, T, N),
        "A": A.to(draw.dtype),
        "s0": draw.normal(B, N),
        "reset": draw.starts(B, T),
    }


def _dense_opcheck(reverse: bool, time_major: bool) -> tuple[Any, ...]:
    u, A, s0, reset = (
        x[None] for x in _dense_inputs(Draw(torch.float64, "random", 0), 3, 4, 5).values()
    )
    u = u.transpose(1, 2).contiguous().transpose(1, 2) if time_major else u
    initial = None if reverse else s0.requires_grad_()
    return (
        torch.ops.ssm_fast.dense_scan,
        (u.requires_grad_(), A.requires_grad_(), initial, reset, reverse),
    )


DENSE_SCAN = Op(
    name="dense_scan",
    call=dense_scan,
    loop=dense_scan_loop,
    inputs=_dense_inputs,
    differentiable=("u", "A", "s0"),
    resets=True,
    state="s0",
    groups=torch.stack,
    layout_of="u",
    split=_scan_in_two("s0", "u", "reset"),
    sizes=[
        (1, 1, 1),
        (2, 1, 64),
        (7, 9, 3),
        (5, 33, 63),
        (13, 17, 64),
        (3, 6, 65),
        (2, 5, 130),  # matrices that do not fit into registers
        (1, 4, 500),
        (60, 3, 300),
    ],
    small=((2, 4, 3), (2, 1, 3)),
    middle=(5, 9, 21),
    empty=[(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)],
    float32=[(6, 100, N) for N in (1, 8, 63, 64, 65, 128, 500)],
    # The last two are one row, which is cut into chunks of time.
    threads=[(37, 40, 63), (3, 9, 300), (1, 2111, 16), (1, 2048, 96)],
    opchecks={
        f"{sweep}-{layout}": lambda r=sweep == "reverse", t=layout == "time-major": _dense_opcheck(
            r, t
        )
        for sweep in ("forward", "reverse")
        for layout in ("batch-major", "time-major")
    },
)


# norm_scan


def _norm_inputs(draw: Draw, B: int, T: int, N: int) -> Inputs:
    return {
        "u": draw.normal(B, T, N),
        # Contracting, so that rounding errors do not grow with time.
        "A": draw.normal(N, N) * (0.5 / max(N, 1) ** 0.5),
        "weight": draw.normal(N),
        "bias": draw.normal(N),
        "s0": draw.normal(B, N),
        "reset": draw.starts(B, T),
    }


def _norm_opcheck(op: str) -> tuple[Any, ...]:
    u, A, weight, bias, s0, reset = (
        x[None] for x in _norm_inputs(Draw(torch.float64, "random", 0), 3, 4, 5).values()
    )
    s, n, rstd = torch.ops.ssm_fast.norm_scan(u, A, weight, bias, s0, reset, 1e-5, True)
    if op == "norm_scan_gradients":  # runs below autograd only
        return torch.ops.ssm_fast.norm_scan_gradients, (u, s, A, weight, n, rstd, reset)
    leaves = u, s, A, weight, n, rstd = [x.requires_grad_() for x in (u, s, A, weight, n, rstd)]
    arguments = {
        "norm_scan": (u, A, weight, bias, s0.requires_grad_(), reset, 1e-5, True),
        "norm_scan_tangent": (*leaves, s0, reset),
        "norm_scan_adjoint": (*leaves, reset),
    }[op]
    return getattr(torch.ops.ssm_fast, op), arguments


NORM_SCAN = Op(
    name="norm_scan",
    call=norm_scan,
    loop=norm_scan_loop,
    inputs=_norm_inputs,
    differentiable=("u", "A", "weight", "bias", "s0"),
    resets=True,
    state="s0",
    groups=torch.stack,
    layout_of="u",
    split=_scan_in_two("s0", "u", "reset"),
    sizes=[(1, 1, 1), (2, 1, 64), (7, 9, 3), (5, 33, 63), (13, 17, 64), (3, 6, 130)],
    small=((2, 4, 3), (2, 1, 3)),
    middle=(5, 9, 21),
    empty=[(0, 4, 3), (2, 0, 3), (0, 0, 3)],
    float32=[(6, 100, N) for N in (8, 63, 64, 65, 128)],
    threads=[(37, 40, 63)],
    opchecks={
        op: lambda op=op: _norm_opcheck(op)
        for op in ("norm_scan", "norm_scan_tangent", "norm_scan_adjoint", "norm_scan_gradients")
    },
)


# linear_scan


def _linear_scan_inputs(draw: Draw, B: int, T: int, C: int) -> Inputs:
    a = draw.normal(B, T, C)
    return {
        "a": a / (1 + a.abs()),  # inside the unit disc
        "b": draw.normal(B, T, C),
        "h0": draw.normal(B, C),
    }


def _a_of(select: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: inputs | {"a": select(inputs["a"])}


def _linear_scan_opcheck(reverse: bool, shift: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    a, b, h0 = _linear_scan_inputs(Draw(dtype, "none", 0), 3, 4, 5).values()
    initial = None if shift else h0.requires_grad_()
    return (
        torch.ops.ssm_fast.linear_scan,
        (a.requires_grad_(), b.requires_grad_(), initial, reverse, shift),
    )


LINEAR_SCAN = Op(
    name="linear_scan",
    call=linear_scan,
    loop=linear_scan_eager,
    inputs=_linear_scan_inputs,
    differentiable=("a", "b", "h0"),
    state="h0",
    layout_of="b",
    bitwise=False,  # chunks of time, or vectors over features, as the memory asks for
    dtypes=(torch.float64, torch.complex128),
    variants={
        "default": Variant(),
        "reverse": Variant({"reverse": True}),
        "a_of_channels": Variant(change=_a_of(lambda a: a[0, 0])),
        "a_of_steps": Variant(change=_a_of(lambda a: a[0, :, :1])),
        "a_of_rows-reverse": Variant({"reverse": True}, _a_of(lambda a: a[:, :1])),
    },
    split=_scan_in_two("h0", "a", "b"),
    sizes=[(1, 1, 1), (2, 7, 63), (5, 33, 3), (37, 50, 1)],
    small=((1, 3, 2), (2, 1, 2)),
    middle=(6, 9, 10),
    empty=[(0, 3, 1), (3, 0, 1), (2, 3, 0)],
    float32=[(33, 100, 7)],
    threads=[(3, 100, 999), (67, 1000, 1), (2, 50_000, 1)],  # the last in chunks of time
    opchecks={
        f"{sweep}-{'shifted-' if shift else ''}{dtype}".replace("torch.", ""): (
            lambda r=sweep == "reverse", s=shift, d=dtype: _linear_scan_opcheck(r, s, d)
        )
        for sweep in ("forward", "reverse")
        for shift in (False, True)
        for dtype in (torch.float64, torch.complex128)
    },
)


# output_norm


def _output_norm_inputs(draw: Draw, *shape: int) -> Inputs:
    H = shape[-1]
    return {
        "z": 2.0 * draw.normal(*shape) + 0.5,
        "weight": draw.normal(H),
        "bias": draw.normal(H),
        "residual": draw.normal(*shape),
    }


def _output_norm_opcheck(which: str) -> tuple[Any, ...]:
    inputs = _output_norm_inputs(Draw(torch.float32, "none", 0), 4, 8)
    z, weight, bias, residual = (x[None] for x in inputs.values())
    ops = torch.ops.ssm_fast
    if which == "plain":
        return ops.output_norm, (z, None, None, None, 1e-5, True, False)
    if which == "grad":
        y, mean, rstd = ops.output_norm(z, weight, bias, residual, 1e-5, True, True)
        return ops.output_norm_grad, (y, z, weight, bias, mean, rstd, True)
    leaves = [x.requires_grad_() for x in (z, weight, bias, residual)]
    return ops.output_norm, (*leaves, 1e-5, True, True)


OUTPUT_NORM = Op(
    name="output_norm",
    call=output_norm,
    loop=output_norm_written_out,
    inputs=_output_norm_inputs,
    differentiable=("z", "weight", "bias", "residual"),
    error=1e-6,
    variants={
        "-".join(parts) or "copy": Variant(
            {"tanh": "tanh" in parts},
            without(
                *(() if "norm" in parts else ("weight", "bias")),
                *(() if "residual" in parts else ("residual",)),
            ),
        )
        for parts in [
            ("norm", "tanh", "residual"),
            ("norm", "tanh"),
            ("norm", "residual"),
            ("norm",),
            ("tanh", "residual"),
            ("tanh",),
            ("residual",),
            (),
        ]
    },
    split=_rows_in_two(0, "z", "residual"),
    sizes=[(1, 2), (3, 5), (2, 7, 16), (65, 63), (9, 33, 128), (200, 130)],
    small=((3, 2, 5), (1, 5)),
    middle=(6, 5, 17),
    empty=[(0, 3), (2, 0)],
    float32=[(1, 2), (3, 5), (2, 7, 16), (65, 63), (9, 33, 128), (200, 130), (64, 64, 128)],
    threads=[(4000, 96)],
    opchecks={
        which: lambda which=which: _output_norm_opcheck(which) for which in ("all", "plain", "grad")
    },
)


# linear


def _linear_inputs(draw: Draw, G: int, M: int, I: int, O: int) -> Inputs:
    return {
        "x": draw.normal(G, M, I),
        "weight": draw.normal(G, O, I) / max(I, 1) ** 0.5,
        "bias": draw.normal(G, O),
        "add": draw.normal(G, M, O),
    }


def _linear_opcheck(op: str, tanh: bool) -> tuple[Any, ...]:
    x, weight, bias, cotangent = _linear_inputs(Draw(torch.float64, "none", 0), 2, 3, 4, 5).values()
    ops = torch.ops.ssm_fast
    y = ops.linear(x, weight, bias, None, tanh) if tanh else None
    arguments = {
        "linear": (x, weight, bias, None, tanh),
        "linear_grad": (cotangent, y, x, weight, True, True, False),
        "linear_tangent": (x, weight, x, None, bias, y, cotangent if tanh else None),
    }[op]
    return getattr(ops, op), arguments


_LINEAR_SIZES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 97, 17, 64),
    (1, 100, 63, 6),
    (1, 1500, 33, 65),
    (2, 700, 64, 128),
    (40, 2, 9, 130),
]

LINEAR = Op(
    name="linear",
    call=grouped_linear,
    loop=linear_by_groups,
    inputs=_linear_inputs,
    differentiable=("x", "weight", "bias", "add"),
    groups=torch.cat,
    error=1e-6,
    variants={
        "bias-tanh": Variant({"tanh": True}, without("add")),
        "bias": Variant(change=without("add")),
        "tanh": Variant({"tanh": True}, without("bias", "add")),
        "product": Variant(change=without("bias", "add")),
        "add": Variant(change=without("bias")),
    },
    split=_rows_in_two(1, "x", "add"),
    sizes=_LINEAR_SIZES,
    small=((1, 3, 5, 4), (2, 1, 2, 3)),
    middle=(2, 9, 5, 7),
    empty=[(1, 0, 3, 4), (1, 5, 3, 0), (2, 0, 3, 4), (1, 5, 0, 4)],
    float32=[*_LINEAR_SIZES, (1, 4096, 128, 64)],
    threads=[(3, 2000, 64, 128)],
    opchecks={
        f"{op}{'-tanh' if tanh else ''}": lambda op=op, tanh=tanh: _linear_opcheck(op, tanh)
        for op in ("linear", "linear_grad", "linear_tangent")
        for tanh in (False, True)
    },
)


# weight_grad


def _weight_grad_inputs(draw: Draw, G: int, B: int, T: int, N: int) -> Inputs:
    return {
        "x": draw.normal(G, B, T, N),
        "s": draw.normal(G, B, T, N),
        "s0": draw.normal(G, B, N),
        "reset": draw.starts(G, B, T),
    }


def _weight_grad(
    x: Tensor, s: Tensor, reset: Tensor, s0: Tensor | None = None, reverse: bool = False
) -> Tensor:
    return weight_grad(x, s, s0, reset, reverse)


def _weight_grad_loop(
    x: Tensor, s: Tensor, reset: Tensor, s0: Tensor | None = None, reverse: bool = False
) -> Tensor:
    return weight_grad_sum(x, s, s0, reset, reverse)


def _weight_grad_opcheck() -> tuple[Any, ...]:
    x, s, s0, reset = _weight_grad_inputs(Draw(torch.float64, "random", 0), 2, 3, 4, 5).values()
    leaves = [y.requires_grad_() for y in (x, s, s0)]
    return torch.ops.ssm_fast.weight_grad, (*leaves, reset, False)


WEIGHT_GRAD = Op(
    name="weight_grad",
    call=_weight_grad,
    loop=_weight_grad_loop,
    inputs=_weight_grad_inputs,
    differentiable=("x", "s", "s0"),
    resets=True,
    state="s0",
    groups=torch.cat,
    bitwise=False,  # a sum
    rows=1,
    error=1e-6,
    variants={
        "default": Variant(),
        "reverse": Variant({"reverse": True}, without("s0")),
    },
    split=_sum_in_two,
    sizes=[
        (1, 1, 1, 1),
        (2, 3, 1, 5),
        (3, 2, 97, 7),
        (1, 16, 100, 63),
        (1, 9, 200, 64),
        (1, 3, 7, 130),
        (40, 2, 9, 6),
    ],
    small=((2, 1, 3, 2), (1, 2, 1, 3)),
    middle=(2, 3, 9, 7),
    empty=[(1, 0, 4, 3), (1, 2, 4, 0)],  # the scans leave out a sequence of no steps
    float32=[(1, 16, 256, 64)],
    threads=[(1, 40, 200, 63)],
    opchecks={"weight_grad": _weight_grad_opcheck},
)


# gae and discounted_returns

GAMMAS = {"gamma": 0.97, "gae_lambda": 0.9}


def _rollout(draw: Draw, B: int, T: int) -> Inputs:
    """An episode that ends is over, was cut, or both."""
    rewards, values, next_values = (draw.normal(B, T) for _ in range(3))
    ends, over, cut = draw.starts(B, T), draw.coins(B, T), draw.coins(B, T)
    return {
        "rewards": rewards,
        "values": values,
        "next_values": next_values,
        "terminated": ends & over,
        "truncated": ends & (cut | ~over),
    }


def _rewards_only(draw: Draw, B: int, T: int) -> Inputs:
    return without("values")(_rollout(draw, B, T))


def _steps_first(inputs: Inputs) -> Inputs:
    return {name: x.T.contiguous() for name, x in inputs.items()}


_BY_DIM = {
    "dim=1": Variant({"dim": 1}),
    "dim=0": Variant({"dim": 0}, _steps_first),
    "dim=0-views": Variant({"dim": 0}, lambda inputs: {name: x.T for name, x in inputs.items()}),
}
_ROLLOUTS = [(1, 1), (1, 33), (3, 16), (16, 16), (37, 50), (1100, 5)]


def _by_row(
    definition: Callable[..., Any], inputs: Sequence[Tensor], dim: int, *discounts: float
) -> Tensor:
    """The definition of one trajectory, row by row."""
    by_input = [x.unbind(1 - dim) for x in inputs]
    found = [
        torch.from_numpy(definition(*(x.numpy() for x in row), *discounts))
        for row in zip(*by_input, strict=True)
    ]
    return torch.stack(found, dim=1 - dim)


def _gae(dim: int, **inputs: Tensor) -> Outputs:
    return gae(**inputs, **GAMMAS, dim=dim)


def _gae_loop(dim: int, **inputs: Tensor) -> Outputs:
    advantages = _by_row(gae_by_definition, list(inputs.values()), dim, *GAMMAS.values())
    return advantages, advantages + inputs["values"]


def _returns(dim: int, **inputs: Tensor) -> Tensor:
    return discounted_returns(**inputs, gamma=0.9, dim=dim)


def _returns_loop(dim: int, **inputs: Tensor) -> Tensor:
    return _by_row(returns_by_definition, list(inputs.values()), dim, 0.9)


def _returns_opcheck(op: str, inputs: Callable[..., Inputs], *discounts: float) -> tuple[Any, ...]:
    tensors = inputs(Draw(torch.float64, "random", 0), 3, 4).values()
    return getattr(torch.ops.ssm_fast, op), (*(x[..., None] for x in tensors), *discounts)


GAE = Op(
    name="gae",
    call=_gae,
    loop=_gae_loop,
    inputs=_rollout,
    resets=True,
    vmaps=False,
    layout_of="rewards",
    bitwise=False,  # chunks of time, or vectors over rows, as the memory asks for
    variants=_BY_DIM,
    split=_gae_in_two,
    sizes=_ROLLOUTS,
    small=((3, 7), (3, 1)),
    middle=(6, 19),
    empty=[(0, 3), (3, 0)],
    float32=[(37, 50)],
    threads=[(67, 1000), (2, 50_000)],
    opchecks={"gae": lambda: _returns_opcheck("gae", _rollout, 0.9, 0.8)},
)

DISCOUNTED_RETURNS = replace(
    GAE,
    name="discounted_returns",
    call=_returns,
    loop=_returns_loop,
    inputs=_rewards_only,
    split=_returns_in_two,
    opchecks={
        "discounted_returns": lambda: _returns_opcheck("discounted_returns", _rewards_only, 0.9)
    },
)


OPS = {
    op.name: op
    for op in (
        DENSE_SCAN,
        NORM_SCAN,
        LINEAR_SCAN,
        OUTPUT_NORM,
        LINEAR,
        WEIGHT_GRAD,
        GAE,
        DISCOUNTED_RETURNS,
    )
}
