from __future__ import annotations

import pytest
import torch
from references import relative_rms

from ssm_fast.ops.policy_step import Observations, PolicyStep, PolicyWeights, reference


def problem(B, I, H, N, L, K, norm=None, discrete=False, dtype=torch.float64, W=0):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        return scale * torch.randn(*shape, dtype=dtype, generator=generator)

    F = {"state": N, "output": H, None: None}[norm]
    layers = []
    for _ in range(L):
        layers += [draw(N, N), draw(N, H), draw(N), draw(H, N), draw(H, H)]
        layers += [None, None] if F is None else [draw(F), draw(F)]
    heads = [draw(H, I), draw(H), draw(K, H), draw(K), draw(1, H), draw(1)]
    network = []
    if W:
        network = [draw(W, I), draw(W, H), draw(W), draw(W, W), draw(W)]
        heads[4] = draw(1, W)
    weights = PolicyWeights(heads, None if discrete else draw(K), layers, network)
    x, state, noise = draw(B, I), draw(L, B, N), draw(B, K)
    return x, state, torch.rand(B, generator=generator) < 0.4, noise, weights


def policy_step(x, state, reset, noise, *options):
    return PolicyStep(*options)(x, state, reset, noise)


def assert_equal(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 7, 1, 2),
    (3, 17, 16, 15, 2, 6),
    (6, 8, 33, 20, 2, 1),
    (8, 17, 128, 64, 2, 6),
    (13, 4, 31, 65, 3, 16),
    (40, 27, 64, 32, 2, 8),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("norm", [None, "output", "state"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_reference(sizes, norm, dtype):
    x, state, reset, noise, weights = problem(*sizes, norm=norm, dtype=dtype)
    I = sizes[1]
    observations = Observations(torch.randn(I).double(), torch.rand(I).double(), 1e-8, 1.5)
    tolerance = 3e-6 if dtype == torch.float32 else 1e-12
    for arguments in (
        (x, state, reset, noise, weights, observations, norm == "state", True, 1e-5),
        (x, None, None, None, weights, None, norm == "state", False, 1e-5),
        (x, state, None, noise, weights, None, norm == "state", True, 1e-5),
    ):
        assert_equal(policy_step(*arguments), reference(*arguments), tolerance)


@pytest.mark.parametrize("W", [1, 16, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_critic_with_a_network_of_its_own(W, dtype):
    tolerance = 3e-6 if dtype == torch.float32 else 1e-12
    for sizes in SIZES:
        x, state, reset, noise, weights = problem(*sizes, norm="output", dtype=dtype, W=W)
        I = sizes[1]
        observations = Observations(torch.randn(I).double(), torch.rand(I).double(), 1e-8, 1.5)
        arguments = (x, state, reset, noise, weights, observations, False, True, 1e-5)
        assert_equal(policy_step(*arguments), reference(*arguments), tolerance)


def test_discrete_gives_logits_and_no_log_prob():
    x, state, reset, _, weights = problem(5, 4, 12, 10, 2, 3, discrete=True)
    arguments = (x, state, reset, None, weights, None, False, True, 1e-5)
    logits, log_prob, *_ = policy_step(*arguments)
    assert logits.shape == (5, 3)
    assert log_prob is None
    assert_equal(policy_step(*arguments), reference(*arguments), 1e-12)


def test_float32_error():
    arguments = problem(64, 17, 128, 64, 2, 6, norm="output")
    x, state, reset, noise, weights = arguments
    options = (None, False, True, 1e-5)
    single = policy_step(
        x.float(),
        state.float(),
        reset,
        noise.float(),
        PolicyWeights(
            [w.float() for w in weights.heads],
            weights.log_std.float(),
            [w.float() for w in weights.layers],
        ),
        *options,
    )
    for actual, expected in zip(single, reference(*arguments, *options), strict=True):
        assert relative_rms(actual, expected) <= 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 0.3, 1.0, 8.0, 30.0, 1e30])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 4e-7), (torch.float64, 8e-16)])
def test_tanh_over_its_range(scale, dtype, error):
    # One layer whose output is tanh of the features handed on, beside torch in float64.
    H = 64
    x = scale * torch.randn(8, H, dtype=dtype)
    identity, zero = torch.eye(H, dtype=dtype), torch.zeros(H, H, dtype=dtype)
    weights = PolicyWeights(
        [identity, None, identity, None, zero[:1], None],
        None,
        [zero, zero, None, zero, zero, None, None],
    )
    action, *_ = policy_step(x, None, None, None, weights, None, False, True, 1e-5)
    expected = torch.tanh(x.double())
    assert float(((action - expected) / expected).abs().max()) <= error


def test_nan_and_infinity_stay_in_their_row():
    x, state, _, noise, weights = problem(7, 5, 20, 9, 2, 3, norm="output")
    clean = policy_step(x, state, None, noise, weights, None, False, True, 1e-5)
    x[2, 1], state[1, 5, 3] = torch.nan, torch.inf
    spoilt = policy_step(x, state, None, noise, weights, None, False, True, 1e-5)
    rows = [0, 1, 3, 4, 6]
    for before, after in zip(clean[:3], spoilt[:3], strict=True):
        assert torch.equal(before[rows], after[rows])
        assert not torch.isfinite(after[[2, 5]]).any()


def test_a_reset_hides_a_nan_in_the_state():
    x, state, reset, noise, weights = problem(7, 5, 20, 9, 2, 3)
    state[:, reset] = torch.nan
    for result in policy_step(x, state, reset, noise, weights, None, False, True, 1e-5):
        assert torch.isfinite(result).all()


def test_rows_are_bitwise_independent_of_batch_and_threads():
    x, state, reset, noise, weights = problem(53, 17, 64, 48, 2, 6, norm="output")
    options = (weights, None, False, True, 1e-5)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(policy_step(x, state, reset, noise, *options))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    for b in range(0, 53, 7):
        row = slice(b, b + 1)
        alone = policy_step(x[row], state[:, row], reset[row], noise[row], *options)
        for part, whole in zip(alone[:3], results[0][:3], strict=True):
            assert torch.equal(part, whole[row])
        assert torch.equal(alone[3], results[0][3][:, row])


def test_empty_batch():
    x, state, reset, noise, weights = problem(0, 5, 20, 9, 2, 3)
    action, log_prob, value, next_state = policy_step(
        x, state, reset, noise, weights, None, False, True, 1e-5
    )
    assert action.shape == (0, 3)
    assert log_prob.shape == value.shape == (0,)
    assert next_state.shape == (2, 0, 9)


@pytest.mark.parametrize("B", [1, 3, 8, 11])
@pytest.mark.parametrize("norm", [None, "output", "state"])
@pytest.mark.parametrize("discrete", [False, True])
def test_groups_equal_a_call_each(B, norm, discrete):
    G, options = 3, (None, norm == "state", True, 1e-5)
    problems = [problem(B, 5, 20, 9, 2, 3, norm, discrete) for _ in range(G)]
    for g, (x, state, _, noise, weights) in enumerate(problems):
        for tensor in (x, state, noise, *weights.heads, *weights.layers, weights.log_std):
            if tensor is not None:
                tensor.add_(0.1 * g)

    def stacked(tensors):
        return None if tensors[0] is None else torch.stack(list(tensors))

    x, state, reset, noise, weights = zip(*problems, strict=True)
    noise = [None] * G if discrete else noise
    grouped = PolicyWeights(
        [stacked(w) for w in zip(*(w.heads for w in weights), strict=True)],
        stacked([w.log_std for w in weights]),
        [stacked(w) for w in zip(*(w.layers for w in weights), strict=True)],
    )
    actual = policy_step(
        torch.cat(x),
        torch.cat(state, 1),
        torch.cat(reset),
        None if discrete else torch.cat(noise),
        grouped,
        *options,
        G,
    )
    arguments = zip(x, state, reset, noise, weights, strict=True)
    alone = [policy_step(*one, *options) for one in arguments]
    for i, (whole, parts) in enumerate(zip(actual, zip(*alone, strict=True), strict=True)):
        if whole is None:
            assert parts[0] is None
        else:
            assert torch.equal(whole, torch.cat(parts, 1 if i == 3 else 0))
