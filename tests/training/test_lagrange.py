"""λ: the steps of the reference implementation, written out by hand, and properties for any costs."""

import math

import pytest
import torch

from saferlhf_fast import LagrangeMultiplier, PIDMultiplier

pytestmark = pytest.mark.numeric


def test_steps_follow_the_reference_formula():
    multiplier = LagrangeMultiplier(init=1.0, lr=0.1, max=5.0, threshold=0.5, window=4, delay=1)
    batches = [[1.0, 2.0], [3.0, 4.0], [-6.0, -2.0], [0.5, 0.5]]
    log_value, history = 0.0, []
    for step, batch in enumerate(batches):
        history = (history + batch)[-4:]
        if step >= 1:
            log_value += 0.1 * math.exp(log_value) * (sum(history) / len(history) - 0.5)
            log_value = min(log_value, math.log(5.0))
        value = multiplier.update(torch.tensor(batch))
        assert value.shape == () and math.isclose(value.item(), math.exp(log_value), rel_tol=1e-6)
        assert math.isclose(multiplier.mean_cost.item(), sum(history) / len(history), rel_tol=1e-6)


def test_value_stays_at_or_under_max_and_above_zero():
    multiplier = LagrangeMultiplier(init=1.0, lr=5.0, max=5.0, threshold=0.0, window=2, delay=0)
    for cost in [1e4, 1e4, -1e2]:
        assert 0 <= multiplier.update(torch.full((2,), cost)).item() <= 5.0 * (1 + 1e-6)


def test_nonfinite_costs_are_left_out_of_the_mean():
    multiplier = LagrangeMultiplier(window=4)
    multiplier.update(torch.tensor([1.0, float("nan"), float("inf"), 3.0]))
    assert multiplier.mean_cost.item() == 2.0 and math.isfinite(multiplier.value.item())


@pytest.mark.parametrize("rule", [LagrangeMultiplier, PIDMultiplier])
def test_lambda_does_not_move_before_the_first_cost(rule):
    """Without a cost there is no mean; a mean of 0 would raise λ when the threshold is below 0."""
    without_costs = (torch.zeros(0), torch.full((3,), float("nan")), torch.full((2,), 1e9))
    multiplier, fresh = (rule(init=1.0, threshold=-4.0, window=2) for _ in range(2))
    for costs in without_costs:
        assert multiplier.update(costs).item() == 1.0 and multiplier.mean_cost.item() == 0.0
    restored = rule(init=1.0, threshold=-4.0, window=2)
    restored.load_state_dict(multiplier.state_dict())
    costs = torch.tensor([-1.0, -2.0])
    # the first cost counts as if it were the first update
    expected = fresh.update(costs)
    assert torch.equal(multiplier.update(costs), expected) and torch.equal(restored.update(costs), expected)
    assert expected.item() > 1.0 and multiplier.mean_cost.item() == -1.5
    # now the window has no valid cost
    assert torch.equal(multiplier.update(without_costs[1]), expected) and multiplier.mean_cost.item() == -1.5


def test_an_update_without_a_cost_gives_the_next_one_no_derivative():
    multiplier, fresh = (PIDMultiplier(init=0.5, kp=0.0, ki=0.0, kd=0.01, threshold=4.0) for _ in range(2))
    multiplier.update(torch.zeros(0))
    assert (
        multiplier.update(torch.full((2,), 9.0)).item() == fresh.update(torch.full((2,), 9.0)).item() == 0.5
    )


def test_an_empty_batch_updates_lambda_from_the_costs_of_the_window():
    multiplier = LagrangeMultiplier(window=4, lr=0.5)
    value = multiplier.update(torch.ones(2)).item()
    assert multiplier.update(torch.zeros(0)).item() == pytest.approx(value * math.exp(0.5 * value))


def test_one_batch_larger_than_the_window_keeps_its_newest_costs():
    multiplier = LagrangeMultiplier(window=2)
    multiplier.update(torch.tensor([9.0, 9.0, 1.0, 3.0]))
    assert multiplier.mean_cost.item() == 2.0


def test_exponential_rule_refuses_zero():
    with pytest.raises(ValueError, match="above 0"):
        LagrangeMultiplier(init=0.0)


def test_pid_steps_equal_values_computed_by_hand():
    pid = PIDMultiplier(init=0.2, kp=0.5, ki=0.1, kd=2.0, max=5.0, threshold=0.0, window=1)
    assert math.isclose(pid.update(torch.tensor([1.0])).item(), 0.5 * 1 + (0.2 + 0.1 * 1), rel_tol=1e-6)
    assert math.isclose(pid.update(torch.tensor([1.5])).item(), 0.75 + 0.45 + 2.0 * 0.5, rel_tol=1e-6)
    # the cost falls, so there is no derivative
    assert math.isclose(pid.update(torch.tensor([0.5])).item(), 0.25 + 0.5 + 0.0, rel_tol=1e-6)
    assert pid.update(torch.tensor([-100.0])).item() == 0.0


def test_pid_integral_does_not_wind_up():
    pid = PIDMultiplier(kp=0.0, ki=1.0, kd=0.0, max=2.0, window=1)
    for _ in range(50):
        pid.update(torch.tensor([10.0]))
    assert pid.value.item() == 2.0
    pid.update(torch.tensor([-1.0]))
    assert pid.value.item() == 1.0


@pytest.mark.parametrize("rule", [LagrangeMultiplier, PIDMultiplier])
def test_a_multiplier_saved_with_torch_save_resumes_bit_for_bit(rule, tmp_path):
    costs = [torch.tensor([1.0, -2.0]), torch.tensor([3.0]), torch.tensor([0.5, 0.5, 4.0]), torch.tensor([])]
    uninterrupted, interrupted, resumed = (rule(init=0.5, window=5, delay=1) for _ in range(3))
    for batch in costs[:2]:
        uninterrupted.update(batch), interrupted.update(batch)
    torch.save(interrupted.state_dict(), tmp_path / "multiplier.pt")
    resumed.load_state_dict(torch.load(tmp_path / "multiplier.pt", weights_only=True))
    assert repr(resumed) == repr(interrupted)
    for batch in costs[2:]:
        assert torch.equal(uninterrupted.update(batch), resumed.update(batch)) and torch.equal(
            uninterrupted.mean_cost, resumed.mean_cost
        )


def test_costs_of_any_dtype_give_the_same_lambda_without_a_gradient():
    costs = torch.tensor([0.5, 1.5], requires_grad=True)
    kinds = (costs * 1, costs.detach().double(), costs.detach().bfloat16())
    values = [LagrangeMultiplier(window=2).update(kind) for kind in kinds]
    assert all(
        torch.equal(value, values[0]) and not value.requires_grad and value.dtype == torch.float32
        for value in values
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LagrangeMultiplier(window=0), "window: expected a number of episodes >= 1, got 0"),
        (lambda: PIDMultiplier(window=2.5), "window: .* got 2.5"),
        (lambda: LagrangeMultiplier(window=True), "window: .* got True"),
        (lambda: LagrangeMultiplier(max=float("nan")), "max: expected a number above 0, got nan"),
        (
            lambda: LagrangeMultiplier(init=6.0),
            "init: expected a finite number above 0 and at most 5, got 6.0",
        ),
        (lambda: LagrangeMultiplier(lr=-1), "lr: expected a finite number at least 0, got -1"),
        (lambda: LagrangeMultiplier(lr=float("nan")), "lr: .* got nan"),
        (lambda: LagrangeMultiplier(lr=float("inf")), "lr: .* got inf"),
        (lambda: LagrangeMultiplier(lr="0.1"), "lr: .* got '0.1'"),
        (lambda: LagrangeMultiplier(lr=True), "lr: .* got True"),
        (lambda: LagrangeMultiplier(delay=True), "delay: .* got True"),
        (lambda: LagrangeMultiplier(threshold=float("nan")), "threshold: expected a finite number, got nan"),
        (lambda: LagrangeMultiplier(delay=-1), "delay: expected a number of steps >= 0, got -1"),
        (lambda: PIDMultiplier(delay=1.5), "delay: .* got 1.5"),
        (lambda: PIDMultiplier(init=-1), "init: expected a finite number at least 0 and at most 5, got -1"),
        (lambda: PIDMultiplier(init=float("nan")), "init: .* got nan"),
        (lambda: PIDMultiplier(init=6), "init: .* got 6"),
        (lambda: PIDMultiplier(max=0), "max: expected a number above 0, got 0"),
        (lambda: PIDMultiplier(max=-2.0), "max: .* got -2"),
        (lambda: PIDMultiplier(kp=-0.1), "kp: .* got -0.1"),
        (lambda: PIDMultiplier(ki=float("nan")), "ki: .* got nan"),
        (lambda: PIDMultiplier(kd=float("inf")), "kd: .* got inf"),
        (
            lambda: LagrangeMultiplier().update(torch.ones(2, 1)),
            r"a tensor \[B\], one cost for each episode, got shape \[2, 1\]",
        ),
        (lambda: LagrangeMultiplier().update(torch.tensor(1.0)), r"got shape \[\]"),
        (lambda: PIDMultiplier().update([1.0]), "got list"),
        (
            lambda: LagrangeMultiplier().update(torch.ones(2) * 1j),
            "costs: expected real numbers, .* got torch.complex64 on cpu",
        ),
        (
            lambda: LagrangeMultiplier().update(torch.ones(2).bool()),
            "costs: expected real numbers, .* got torch.bool on cpu",
        ),
        (
            lambda: PIDMultiplier().update(torch.ones(2, device="meta")),
            "on a device with values, got torch.float32 on meta",
        ),
    ],
)
def test_invalid_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_integer_costs_are_accepted_and_extreme_ones_are_left_out():
    multiplier = LagrangeMultiplier(window=4)
    multiplier.update(torch.tensor([-(2**63), 2**63 - 1, 1, 3]))
    assert multiplier.mean_cost.item() == 2.0 and multiplier.value.item() > 1.0
    assert LagrangeMultiplier().update(torch.tensor([-128, 0], dtype=torch.int8)).item() < 1.0
    assert LagrangeMultiplier(device="meta").update(torch.ones(2, device="meta")).is_meta


def state_of(multiplier):
    """Every attribute of a multiplier and of its window, in a form that can be compared."""
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in {**vars(multiplier), **vars(multiplier.window), "window": None}.items()
    }


@pytest.mark.parametrize(
    ("rule", "change", "message"),
    [
        (
            PIDMultiplier,
            lambda state: LagrangeMultiplier(init=3.0).state_dict(),
            "PIDMultiplier: state of values: expected integral, value, last_error, mean_cost, got log_value, "
            "mean_cost",
        ),
        (
            LagrangeMultiplier,
            lambda state: PIDMultiplier().state_dict(),
            "LagrangeMultiplier: state of values: expected log_value, mean_cost, got integral, value, "
            "last_error, mean_cost",
        ),
        (
            LagrangeMultiplier,
            lambda state: {**state, "values": {"lr": None}},
            "expected log_value, mean_cost, got lr",
        ),
        (
            LagrangeMultiplier,
            lambda state: {**state, "values": {}},
            "expected log_value, mean_cost, got none",
        ),
        (
            LagrangeMultiplier,
            lambda state: {"values": {"lr": None}},
            "LagrangeMultiplier: state: expected values, window, steps, threshold, got values",
        ),
        (
            LagrangeMultiplier,
            lambda state: {**state, "lr": 1.0},
            "state: expected .* got values, window, steps, threshold, lr",
        ),
        (LagrangeMultiplier, lambda state: None, "state: expected values, .* got NoneType"),
        (
            PIDMultiplier,
            lambda state: {**state, "window": {"costs": torch.zeros(2)}},
            "state of the window: expected costs, kept, got costs",
        ),
        (
            PIDMultiplier,
            lambda state: {**state, "window": {"costs": torch.zeros(0), "kept": torch.tensor(0.0)}},
            "state: costs: expected a window of 1 episode or more, got none",
        ),
        (
            PIDMultiplier,
            lambda state: {**state, "window": {"costs": [1.0], "kept": torch.tensor(0.0)}},
            r"state: costs: expected a floating point tensor \[window\], got \[1.0\]",
        ),
        (
            PIDMultiplier,
            lambda state: {**state, "values": {**state["values"], "value": None}},
            r"state: value: expected a floating point tensor \[\], got None",
        ),
        (
            LagrangeMultiplier,
            lambda state: {**state, "values": {**state["values"], "log_value": torch.zeros(2)}},
            r"state: log_value: expected a floating point tensor \[\], got torch.float32 \[2\] on cpu",
        ),
        (
            LagrangeMultiplier,
            lambda state: {**state, "steps": -1},
            "state: steps: expected a number of steps >= 0, got -1",
        ),
        (
            LagrangeMultiplier,
            lambda state: {**state, "threshold": "0"},
            "state: threshold: expected a finite number, got '0'",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(rule, change, message):
    multiplier = rule(init=2.0, threshold=0.5, window=4)
    multiplier.update(torch.tensor([1.0, 4.0]))
    before = state_of(multiplier)
    with pytest.raises(ValueError, match=message) as caught:
        multiplier.load_state_dict(change(rule().state_dict()))
    assert state_of(multiplier) == before and "\n" not in str(caught.value)


def test_settings_may_be_tensors_integers_and_infinity():
    multiplier = LagrangeMultiplier(
        init=torch.tensor(2.0), lr=0, max=float("inf"), threshold=torch.tensor([-1.5])
    )
    assert multiplier.update(torch.ones(1)).item() == pytest.approx(2.0) and multiplier.threshold == -1.5


def test_repr_shows_values_and_settings():
    multiplier = LagrangeMultiplier(init=2.0, lr=0.5, threshold=-1.0, window=8, delay=3)
    assert repr(multiplier) == (
        "LagrangeMultiplier(value=2, mean_cost=0, window=8, lr=0.5, threshold=-1, delay=3, steps=0)"
    )
