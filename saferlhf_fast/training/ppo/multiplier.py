"""The Lagrange multiplier λ of the constraint J_C ≤ d: how much the cost counts against the reward.

λ weighs the cost advantage in (A_r − λ·A_c)/(1 + λ). It rises while J_C, the mean cost of the last `window`
episodes of all ranks (episode_costs.py), is above the threshold d, and falls while J_C is below. λ is a 0-d
tensor on the device, so no step waits for the host. The file needs torch alone. In a loop of your own, before
the actor's update of each step::

    multiplier = LagrangeMultiplier(init=1.0, lr=0.1, max=5.0, threshold=0.0, device=cost_B.device)
    multiplier.update(cost_B)                # with several ranks: the costs of all, gathered, on each rank
    advantages = (A_r - multiplier.value * A_c) / (1 + multiplier.value)
    torch.save({"multiplier": multiplier.state_dict(), ...}, path)

Source: Dai et al. (2023), Safe RLHF, arXiv 2310.12773, section 3.3, and its reference implementation; for PID
Stooke et al. (2020), arXiv 2007.03964.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.kinds import shown
from .episode_costs import CostWindow

if TYPE_CHECKING:
    from ...config.sections import Multiplier


class LagrangeMultiplier:
    """log λ ← min(log λ + lr · λ · (J_C − d), log max): gradient ascent on log λ.

    The gradient of λ · (J_C − d) with respect to log λ is λ · (J_C − d). As long as the window holds no valid
    cost, λ and J_C stay as they are.

    Attributes:
        value: λ, a 0-d fp32 tensor on the device.
        mean_cost: J_C, a 0-d fp32 tensor on the device, in the cost model's units.
        steps: Number of updates so far.

    Source:
        Dai et al. (2023), Safe RLHF, arXiv 2310.12773, section 3.3; the rule of its reference implementation,
        PKU-Alignment/safe-rlhf.
    """

    def __init__(
        self,
        init: float = 1.0,
        lr: float = 0.1,
        max: float = 5.0,
        threshold: float = 0.0,
        window: int = 1024,
        delay: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Starts with λ = init and an empty window.

        Args:
            init: λ at the start, above 0 and at most `max`.
            lr: Step size of log λ, at least 0.
            max: Upper bound of λ, above 0; may be infinite.
            threshold: d, the mean cost that may not be exceeded, in the cost model's units.
            window: Number of episodes in J_C.
            delay: Number of updates during which λ keeps its first value.
            device: Device of λ and of the window.

        Raises:
            ValueError: If a setting is not of its kind or outside its bounds.
        """
        max = _number("max", max, above=0.0, finite=False)
        device = _device(device)
        self.log_value = torch.tensor(_number("init", init, above=0.0, most=max), device=device).log()
        self.log_max = torch.tensor(max, device=device).log()
        self.lr = _number("lr", lr, least=0.0)
        self.threshold, self.delay = _number("threshold", threshold), _steps(delay)
        self.window = CostWindow(window, device)
        self.steps = 0
        self.mean_cost = torch.zeros((), device=device)

    @property
    def value(self) -> torch.Tensor:
        """λ, a 0-d tensor on the device."""
        return self.log_value.exp()

    def update(self, costs_B: torch.Tensor) -> torch.Tensor:
        """Takes one step with the costs of the newest episodes; call it before the actor's update.

        Args:
            costs_B: [B] costs C of the newest episodes, of any float or integer dtype, on any device. With
                several ranks: the costs of all ranks, in the same order on each rank, so that λ stays the
                same everywhere (torch.distributed.all_gather_into_tensor). Costs that are not finite, or
                beyond ±1e6, are left out of J_C. No gradient flows back.

        Returns:
            λ after the step, a 0-d tensor on the device.

        Raises:
            ValueError: If costs_B is no tensor [B] of real numbers.
        """
        mean_cost, known = self.window.add(costs_B)
        self.mean_cost = torch.where(known, mean_cost, self.mean_cost)
        if self.steps >= self.delay:
            # log λ + lr · λ · (J_C − d)
            log_value = self.log_value + self.lr * self.value * (self.mean_cost - self.threshold)
            self.log_value = torch.where(known, torch.minimum(log_value, self.log_max), self.log_value)
        self.steps += 1
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: λ, J_C, the window, the counter, and the threshold.

        The threshold is state because it may have been computed from the starting policy's costs.
        """
        return _state(self, ("log_value", "mean_cost"))

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint; the device stays the same.

        Raises:
            ValueError: If the state is another rule's or damaged; then nothing changes.
        """
        _load(self, values, ("log_value", "mean_cost"))

    def __repr__(self) -> str:
        return _shown(self, ("lr",))


class PIDMultiplier:
    """λ = clip(K_p·e + I + K_d·max(0, Δe), 0, max), I = clip(init + K_i·Σe, 0, max), e = J_C − d.

    The integral I is bounded like λ itself, so it does not wind up while λ is at its bound. As long as the
    window holds no valid cost, λ and J_C stay as they are.

    Attributes:
        value: λ, a 0-d fp32 tensor on the device.
        mean_cost: J_C, a 0-d fp32 tensor on the device, in the cost model's units.
        steps: Number of updates so far.

    Source:
        Stooke et al. (2020), Responsive Safety in Reinforcement Learning by PID Lagrangian Methods,
        arXiv 2007.03964.
    """

    def __init__(
        self,
        init: float = 0.0,
        kp: float = 0.1,
        ki: float = 0.01,
        kd: float = 0.01,
        max: float = 5.0,
        threshold: float = 0.0,
        window: int = 1024,
        delay: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Starts with λ = I = init and an empty window.

        Args:
            init: λ and I at the start, 0 … max.
            kp: K_p, gain of the error e, at least 0.
            ki: K_i, gain of the sum of errors, at least 0.
            kd: K_d, gain of a rise of the error, at least 0.
            max: Upper bound of λ and of I, above 0; may be infinite.
            threshold: d, the mean cost that may not be exceeded, in the cost model's units.
            window: Number of episodes in J_C.
            delay: Number of updates during which λ keeps its first value.
            device: Device of λ and of the window.

        Raises:
            ValueError: If a setting is not of its kind or outside its bounds.
        """
        self.max = _number("max", max, above=0.0, finite=False)
        device = _device(device)
        self.integral = torch.tensor(_number("init", init, least=0.0, most=self.max), device=device)
        self.value = self.integral.clone()
        self.last_error: torch.Tensor | None = None
        self.kp = _number("kp", kp, least=0.0)
        self.ki = _number("ki", ki, least=0.0)
        self.kd = _number("kd", kd, least=0.0)
        self.threshold, self.delay = _number("threshold", threshold), _steps(delay)
        self.window = CostWindow(window, device)
        self.steps = 0
        self.mean_cost = torch.zeros((), device=device)

    def update(self, costs_B: torch.Tensor) -> torch.Tensor:
        """Takes one step with the costs of the newest episodes; call it before the actor's update.

        Args:
            costs_B: [B] costs C of the newest episodes of all ranks; see `LagrangeMultiplier.update`.

        Returns:
            λ after the step, a 0-d tensor on the device.

        Raises:
            ValueError: If costs_B is no tensor [B] of real numbers.
        """
        mean_cost, known = self.window.add(costs_B)
        self.mean_cost = torch.where(known, mean_cost, self.mean_cost)
        if self.steps >= self.delay:
            error = self.mean_cost - self.threshold
            last = torch.full_like(error, float("nan")) if self.last_error is None else self.last_error
            change = (error - last).clamp(min=0).nan_to_num()  # NaN: there is no earlier error
            integral = (self.integral + self.ki * error).clamp(0.0, self.max)
            value = (self.kp * error + integral + self.kd * change).clamp(0.0, self.max)
            self.integral = torch.where(known, integral, self.integral)
            self.value = torch.where(known, value, self.value)
            self.last_error = torch.where(known, error, last)
        self.steps += 1
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: λ, integral, last error, J_C, the window, the counter, the threshold."""
        return _state(self, ("integral", "value", "last_error", "mean_cost"))

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint; the device stays the same.

        Raises:
            ValueError: If the state is another rule's or damaged; then nothing changes.
        """
        _load(self, values, ("integral", "value", "last_error", "mean_cost"))

    def __repr__(self) -> str:
        return _shown(self, ("kp", "ki", "kd"))


MultiplierRule = LagrangeMultiplier | PIDMultiplier


def _number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    finite: bool = True,
) -> float:
    """A setting as a float; ValueError for one that is no number or outside its bounds."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (least <= number <= most and (above == -math.inf or number > above)) or (
        finite and math.isinf(number)
    ):
        bounds = [
            f" {word} {bound:g}"
            for word, bound in (("at least", least), ("above", above), ("at most", most))
            if math.isfinite(bound)
        ]
        raise ValueError(
            f"{name}: expected a {'finite ' * finite}number{' and'.join(bounds)}, got {shown(value)}"
        )
    return number


def _device(device: object) -> torch.device:
    """A device as torch has it; ValueError for one that torch does not know."""
    try:
        if isinstance(device, (str, torch.device)):
            return torch.device(device)
    except RuntimeError:
        pass  # torch's message lists every kind of device
    raise ValueError(f"device: expected a device or its name, as 'cpu' or 'cuda:0', got {shown(device)}")


def _steps(delay: int) -> int:
    """A number of steps as it is; ValueError for anything else."""
    if isinstance(delay, bool) or not (isinstance(delay, int) and delay >= 0):
        raise ValueError(f"delay: expected a number of steps >= 0, got {shown(delay)}")
    return delay


def _shown(multiplier: MultiplierRule, gains: tuple[str, ...]) -> str:
    """How a multiplier prints: λ, J_C and its settings. This waits for the device."""
    settings = {name: getattr(multiplier, name) for name in (*gains, "threshold", "delay", "steps")}
    return (
        f"{type(multiplier).__name__}(value={multiplier.value.item():.4g}, "
        f"mean_cost={multiplier.mean_cost.item():.4g}, "
        f"window={multiplier.window.costs.numel()}, "
        + ", ".join(f"{name}={v:g}" for name, v in settings.items())
        + ")"
    )


def _state(multiplier: MultiplierRule, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "values": {name: getattr(multiplier, name) for name in names},
        "window": multiplier.window.state_dict(),
        "steps": multiplier.steps,
        "threshold": multiplier.threshold,
    }


def _load(multiplier: MultiplierRule, state: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Takes a state that `_state` made with these names; ValueError, and no change, for any other state."""
    rule = type(multiplier).__name__
    _check_keys(f"{rule}: state", state, ("values", "window", "steps", "threshold"))
    values, window = state["values"], state["window"]
    _check_keys(f"{rule}: state of values", values, names)
    _check_keys(f"{rule}: state of the window", window, ("costs", "kept"))
    for name, value in {**values, **window}.items():
        dims = 1 if name == "costs" else 0
        if value is None and name == "last_error":  # no error has been measured yet
            continue
        if (
            not isinstance(value, torch.Tensor)
            or value.dim() != dims
            or not value.dtype.is_floating_point
            or value.is_meta
        ):
            got = (
                f"{value.dtype} {list(value.shape)} on {value.device}"
                if isinstance(value, torch.Tensor)
                else repr(value)
            )
            raise ValueError(
                f"{rule}: state: {name}: expected a floating point tensor {'[window]' if dims else '[]'}, "
                f"got {got}"
            )
    if not len(window["costs"]):
        raise ValueError(f"{rule}: state: costs: expected a window of 1 episode or more, got none")
    try:
        steps, threshold = _steps(state["steps"]), _number("threshold", state["threshold"])
    except ValueError as error:
        raise ValueError(f"{rule}: state: {str(error).replace('delay', 'steps', 1)}") from None
    device = multiplier.mean_cost.device
    for name, value in values.items():
        setattr(multiplier, name, None if value is None else value.to(device))
    multiplier.window.load_state_dict(window)
    multiplier.steps, multiplier.threshold = steps, threshold


def _check_keys(name: str, given: object, expected: tuple[str, ...]) -> None:
    """Raises ValueError unless `given` is a dict with exactly the expected keys."""
    if not isinstance(given, dict) or given.keys() != set(expected):
        got = ", ".join(map(str, given)) or "none" if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{name}: expected {', '.join(expected)}, got {got}")


def make_multiplier(cfg: "Multiplier", threshold: float, device: torch.device | str) -> MultiplierRule:
    """The rule that a Multiplier config names.

    Args:
        cfg: Rule, gains, bounds, window and delay.
        threshold: d. It is not read from `cfg`, which may name a quantile of the starting policy's costs.
        device: Device of λ.
    """
    if cfg.rule == "pid":
        return PIDMultiplier(
            cfg.init, cfg.kp, cfg.ki, cfg.kd, cfg.max, threshold, cfg.window, cfg.delay, device
        )
    return LagrangeMultiplier(cfg.init, cfg.lr, cfg.max, threshold, cfg.window, cfg.delay, device)
