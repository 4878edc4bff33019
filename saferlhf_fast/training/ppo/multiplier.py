"""The Lagrange multiplier λ: how hard the cost is weighed, adapted so that the mean cost meets the threshold
d.

λ multiplies the cost advantage in (A_r − λ·A_c)/(1 + λ). J_C is the mean cost of the last `window` episodes
of all ranks. Both rules keep λ on the device as a 0-d tensor, so that no step waits for the host. They need
torch alone; in a loop
of one's own, before the actor's update of each step::

    multiplier = LagrangeMultiplier(init=1.0, lr=0.1, max=5.0, threshold=0.0, device=cost_B.device)
    multiplier.update(cost_B)                    # with several ranks: all their costs, gathered, on each of them
    advantages = (A_r - multiplier.value * A_c) / (1 + multiplier.value)
    torch.save({"multiplier": multiplier.state_dict(), ...}, path)

Source: Safe RLHF (arXiv 2310.12773), section 3.3 and the reference implementation; PID: Stooke et al. (2020),
arXiv 2007.03964.
"""

import math
from numbers import Real

import torch

LARGEST_VALID_SCORE = 1e6


class CostWindow:
    """Mean of the last `window` episode costs, kept on the device.

    Costs that are not `mask_invalid_scores` are left out.
    """

    def __init__(self, window, device):
        if isinstance(window, bool) or not (isinstance(window, int) and window >= 1):
            raise ValueError(f"window: expected a number of episodes >= 1, got {window!r}")
        self.costs = torch.zeros(window, device=device)
        self.kept = torch.zeros((), device=device)  # how many of `costs` are filled, from the end

    def add(self, costs_B):
        """costs_B: [B] costs of the newest episodes, of all ranks -> (J_C, whether there is any cost in it),
        0-d tensors.
        """
        if not isinstance(costs_B, torch.Tensor) or costs_B.dim() != 1:
            got = (
                f"shape {list(costs_B.shape)}"
                if isinstance(costs_B, torch.Tensor)
                else type(costs_B).__name__
            )
            raise ValueError(f"costs: expected a tensor [B], one cost for each episode, got {got}")
        if (
            costs_B.dtype.is_complex
            or costs_B.dtype == torch.bool
            or costs_B.is_meta
            and not self.costs.is_meta
        ):
            raise ValueError(
                f"costs: expected real numbers, on a device with values, got {costs_B.dtype} on "
                f"{costs_B.device}"
            )
        # The newest stand last; the others become NaN holes that the mean below does not count.
        fresh = mask_invalid_scores(costs_B.detach())
        self.costs = torch.cat([self.costs, fresh.to(self.costs.device)])[-self.costs.numel() :]
        self.kept = (self.kept + costs_B.numel()).clamp(max=self.costs.numel())
        age = torch.arange(self.costs.numel(), 0, -1, device=self.costs.device)
        use = (age <= self.kept) & ~torch.isnan(self.costs)
        return torch.where(use, self.costs, 0.0).sum() / use.sum().clamp(min=1), use.any()

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"costs": self.costs, "kept": self.kept}

    def load_state_dict(self, values: dict) -> None:
        """From a checkpoint."""
        self.costs, self.kept = (values[name].to(self.costs.device) for name in ("costs", "kept"))


class LagrangeMultiplier:
    """log λ += lr · λ · (J_C − d), log λ ≤ log max: the reference implementation's rule.

    init: λ at the start, > 0 · lr: step size · max: upper bound of λ · threshold: d, in the cost model's
    units · window: episodes in J_C · delay: steps for which λ stays as it is · device: where λ lives.
    Attributes: `value`, λ, and `mean_cost`, J_C, both 0-d fp32 tensors on the device; `steps`, updates so
    far. As long as the window holds no cost at all, λ and J_C stay as they are. ValueError for what cannot be
    a setting, and for costs that are no tensor [B].
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
        max = _number("max", max, above=0.0, finite=False)
        self.log_value = torch.tensor(_number("init", init, above=0.0, most=max), device=device).log()
        self.log_max = torch.tensor(max, device=device).log()
        self.lr, self.threshold, self.delay = (
            _number("lr", lr, least=0.0),
            _number("threshold", threshold),
            _steps(delay),
        )
        self.window = CostWindow(window, device)
        self.steps = 0
        self.mean_cost = torch.zeros((), device=device)

    @property
    def value(self) -> torch.Tensor:
        """λ, a 0-d tensor on the device."""
        return self.log_value.exp()

    def update(self, costs_B: torch.Tensor) -> torch.Tensor:
        """One step with the newest episodes' costs, [B] in any float or integer dtype, on any device -> λ.

        Of all ranks, in the same order on each, so that λ stays the same everywhere
        (torch.distributed.all_gather_into_tensor). Costs that are not finite, or beyond ±1e6, are left out of
        the mean; no gradient is kept.
        """
        mean_cost, known = self.window.add(costs_B)
        self.mean_cost = torch.where(known, mean_cost, self.mean_cost)
        if self.steps >= self.delay:
            moved = self.log_value + self.lr * self.value * (self.mean_cost - self.threshold)
            self.log_value = torch.where(known, torch.minimum(moved, self.log_max), self.log_value)
        self.steps += 1
        return self.value

    def state_dict(self) -> dict:
        """For a checkpoint: λ, the window, the counter; the threshold, which may have been taken from the
        starting policy.
        """
        return _state(self, ("log_value", "mean_cost"))

    def load_state_dict(self, values: dict) -> None:
        """From a checkpoint; the device stays this one's.

        ValueError, and nothing changes, for another rule's state.
        """
        _load(self, values, ("log_value", "mean_cost"))

    def __repr__(self):
        return _shown(self, ("lr",))


class PIDMultiplier:
    """λ = clip(K_p·e + I + K_d·max(0, Δe), 0, max), I = clip(init + K_i·Σe, 0, max), e = J_C − d.

    init: λ and the integral at the start, 0 … max · kp, ki, kd: gains, ≥ 0 · the rest, the attributes and the
    errors as in `LagrangeMultiplier`. The integral is bounded like λ itself, so it does not wind up while λ
    is at its bound.
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
        self.max = _number("max", max, above=0.0, finite=False)
        self.integral = torch.tensor(_number("init", init, least=0.0, most=self.max), device=device)
        self.value = self.integral.clone()
        self.last_error = None
        self.kp, self.ki, self.kd = (
            _number(name, gain, least=0.0) for name, gain in (("kp", kp), ("ki", ki), ("kd", kd))
        )
        self.threshold, self.delay = _number("threshold", threshold), _steps(delay)
        self.window = CostWindow(window, device)
        self.steps = 0
        self.mean_cost = torch.zeros((), device=device)

    def update(self, costs_B: torch.Tensor) -> torch.Tensor:
        """One step with the newest episodes' costs of all ranks, [B] -> λ; as in `LagrangeMultiplier`."""
        mean_cost, known = self.window.add(costs_B)
        self.mean_cost = torch.where(known, mean_cost, self.mean_cost)
        if self.steps >= self.delay:
            error = self.mean_cost - self.threshold
            last = torch.full_like(error, float("nan")) if self.last_error is None else self.last_error
            change = (error - last).clamp(min=0).nan_to_num()  # NaN: no error yet to compare with
            integral = (self.integral + self.ki * error).clamp(0.0, self.max)
            value = (self.kp * error + integral + self.kd * change).clamp(0.0, self.max)
            self.integral, self.value = (
                torch.where(known, integral, self.integral),
                torch.where(known, value, self.value),
            )
            self.last_error = torch.where(known, error, last)
        self.steps += 1
        return self.value

    def state_dict(self) -> dict:
        """For a checkpoint: λ, its integral and last error, the window, the counter, the threshold."""
        return _state(self, ("integral", "value", "last_error", "mean_cost"))

    def load_state_dict(self, values: dict) -> None:
        """From a checkpoint; the device stays this one's.

        ValueError, and nothing changes, for another rule's state.
        """
        _load(self, values, ("integral", "value", "last_error", "mean_cost"))

    def __repr__(self):
        return _shown(self, ("kp", "ki", "kd"))


def _number(name, value, *, least=-math.inf, above=-math.inf, most=math.inf, finite=True):
    """A setting as a float; ValueError for one that is no number, or not within its bounds."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    real = isinstance(value, Real) and not isinstance(value, bool) and not (finite and math.isinf(value))
    if not (real and least <= value <= most and (above == -math.inf or value > above)):
        bounds = [
            f" {word} {bound:g}"
            for word, bound in (("at least", least), ("above", above), ("at most", most))
            if math.isfinite(bound)
        ]
        raise ValueError(f"{name}: expected a {'finite ' * finite}number{' and'.join(bounds)}, got {value!r}")
    return float(value)


def _steps(delay):
    if isinstance(delay, bool) or not (isinstance(delay, int) and delay >= 0):
        raise ValueError(f"delay: expected a number of steps >= 0, got {delay!r}")
    return delay


def _shown(multiplier, gains):
    """How a multiplier prints: λ, J_C and its settings (this waits for the device)."""
    settings = {name: getattr(multiplier, name) for name in (*gains, "threshold", "delay", "steps")}
    return (
        f"{type(multiplier).__name__}(value={multiplier.value.item():.4g}, "
        f"mean_cost={multiplier.mean_cost.item():.4g}, "
        f"window={multiplier.window.costs.numel()}, "
        + ", ".join(f"{name}={v:g}" for name, v in settings.items())
        + ")"
    )


def _state(multiplier, names):
    return {
        "values": {name: getattr(multiplier, name) for name in names},
        "window": multiplier.window.state_dict(),
        "steps": multiplier.steps,
        "threshold": multiplier.threshold,
    }


def _load(multiplier, state, names):
    """Takes over a state of `_state` with these names of values, or changes nothing and says why: ValueError."""
    rule = type(multiplier).__name__
    _refuse_other_keys(f"{rule}: state", state, ("values", "window", "steps", "threshold"))
    values, window = state["values"], state["window"]
    _refuse_other_keys(f"{rule}: state of values", values, names)
    _refuse_other_keys(f"{rule}: state of the window", window, ("costs", "kept"))
    for name, value in {**values, **window}.items():
        dims = 1 if name == "costs" else 0
        if value is None and name == "last_error":  # there was no error yet
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


def _refuse_other_keys(name, given, expected):
    if not isinstance(given, dict) or given.keys() != set(expected):
        got = ", ".join(map(str, given)) or "none" if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{name}: expected {', '.join(expected)}, got {got}")


def make_multiplier(cfg, threshold, device):
    """The rule that a Multiplier config names, for threshold d."""
    common = {
        "init": cfg.init,
        "max": cfg.max,
        "threshold": threshold,
        "window": cfg.window,
        "delay": cfg.delay,
        "device": device,
    }
    if cfg.rule == "pid":
        return PIDMultiplier(kp=cfg.kp, ki=cfg.ki, kd=cfg.kd, **common)
    return LagrangeMultiplier(lr=cfg.lr, **common)


def suggestion(costs_B, setting="multiplier.threshold_quantile"):
    """One line about thresholds for a policy whose episode costs are costs_B, to print before PPO-Lag;
    setting: what to type.
    """
    quantiles = torch.quantile(
        costs_B.float(), torch.tensor([0.1, 0.25, 0.5], device=costs_B.device)
    ).tolist()
    unsafe = (costs_B > 0).float().mean().item()
    return (
        f"costs of the starting policy: mean {costs_B.float().mean().item():.2f}, {unsafe:.0%} above 0; "
        f"quantiles "
        f"10 % {quantiles[0]:.2f}, 25 % {quantiles[1]:.2f}, 50 % {quantiles[2]:.2f}. A threshold is within "
        f"reach "
        f"near the lower quantiles: {setting}=0.25 takes {quantiles[1]:.2f}"
    )


def mask_invalid_scores(score_B):
    """Scores with NaN in place of those that no working score model gives (beyond ±1e6, infinite ones
    included); None: None.
    """
    if score_B is None:
        return None
    score_B = score_B.float()  # first: the most negative integer is its own abs()
    return score_B.where(score_B.abs() <= LARGEST_VALID_SCORE, float("nan"))
