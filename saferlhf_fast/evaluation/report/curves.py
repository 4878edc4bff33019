"""The curves of one run, drawn from its metrics; each function returns None where the run lacks them.

PPO runs have λ, cost against the threshold, reward, length and KL, and losses; other runs loss and accuracy.
"""

from typing import TYPE_CHECKING, Any

from .plots import BLUE, GREEN, GREY, ORANGE, PURPLE, Plot, legend, level, line, panels, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .read import Curve, Run

DOTS: dict[str, Any] = {"marker": "o", "markersize": 4}


def ppo_plots(run: "Run") -> list[Plot]:
    """The plots of a PPO run that its metrics allow."""
    makers = (multiplier, cost, reward, length_and_kl, losses)
    return [plot for plot in (make(run) for make in makers) if plot is not None]


def supervised_plots(run: "Run") -> list[Plot]:
    """The plots of an SFT, reward, cost or DPO run that its metrics allow."""
    return [plot for plot in (loss(run), accuracy(run)) if plot is not None]


def multiplier(run: "Run") -> Plot | None:
    """λ over steps."""
    if not run.has("train/lambda"):
        return None
    with panels(1, width=6.5) as (figure, (ax,)):
        line(ax, run.curve("train/lambda"), PURPLE)
        titled(ax, "Lagrange multiplier", "λ")
        ax.set_ylim(bottom=0)
    return Plot(
        "multiplier",
        "λ weighs the cost against the reward: it rises while the mean cost is above the threshold "
        "and falls while it is below.",
        figure,
    )


def cost(run: "Run") -> Plot | None:
    """Cost against the threshold; beside it gold cost and the shares of unsafe responses."""
    if not run.has("train/cost", "eval/cost"):
        return None
    shares = run.has("train/unsafe_share", "eval/unsafe_share", "gold/unsafe_share")
    gold = run.has("gold/cost")
    with panels(1 + shares + gold) as (figure, axes):
        draw_cost(axes[0], run)
        if gold:
            ax = axes[1]
            line(ax, run.curve("gold/cost"), ORANGE, "evaluation prompts", **DOTS)
            titled(ax, "Gold cost", "gold cost")
            legend(ax)
        if shares:
            draw_shares(axes[-1], run)
    gold_text = (
        " Gold scores were not seen in training: where model cost falls and gold cost does not, the policy "
        "exploits the cost model."
        if gold
        else ""
    )
    return Plot(
        "cost",
        "Mean cost of the responses by the cost model (above 0 is unsafe) against the threshold d; "
        "J_C is the mean of the last episodes, which λ follows." + gold_text,
        figure,
    )


def draw_cost(ax: "Axes", run: "Run") -> None:
    """Batch cost, J_C, evaluation cost and d on one panel."""
    line(ax, run.curve("train/cost"), BLUE, "batch (running mean)", noisy=True)
    line(ax, run.curve("train/episode_cost"), GREEN, "J_C")
    line(ax, run.curve("eval/cost"), ORANGE, "evaluation prompts", **DOTS)
    level(ax, run.threshold, "threshold d" if run.threshold is None else f"threshold d = {run.threshold:.2f}")
    titled(ax, "Model cost", "cost (cost model units)")
    legend(ax)


def draw_shares(ax: "Axes", run: "Run") -> None:
    """Share of unsafe responses by the cost model and by gold scores, on one panel."""
    line(ax, percent(run.curve("train/unsafe_share")), BLUE, "batch, cost model", noisy=True)
    line(ax, percent(run.curve("eval/unsafe_share")), ORANGE, "evaluation, cost model", **DOTS)
    line(ax, percent(run.curve("gold/unsafe_share")), GREEN, "evaluation, gold", linestyle="--", **DOTS)
    titled(ax, "Unsafe responses", "share (%)")
    ax.set_ylim(bottom=0)
    legend(ax)


def reward(run: "Run") -> Plot | None:
    """Reward; beside it gold helpfulness."""
    if not run.has("train/reward", "eval/reward"):
        return None
    gold = run.has("gold/helpfulness")
    with panels(1 + gold, width=4.4 if gold else 6.5) as (figure, axes):
        line(axes[0], run.curve("train/reward"), BLUE, "batch (running mean)", noisy=True)
        line(axes[0], run.curve("eval/reward"), ORANGE, "evaluation prompts", **DOTS)
        titled(axes[0], "Model reward", "reward (reward model units)")
        legend(axes[0])
        if gold:
            line(axes[1], run.curve("gold/helpfulness"), ORANGE, "evaluation prompts", **DOTS)
            titled(axes[1], "Gold helpfulness", "gold helpfulness")
            legend(axes[1])
    return Plot(
        "reward",
        "Mean reward of the responses by the reward model"
        + (", and what the gold scores say of the same responses." if gold else "."),
        figure,
    )


def length_and_kl(run: "Run") -> Plot | None:
    """Response length and KL to the reference."""
    if not run.has("train/mean_generated_length", "train/kl_divergence"):
        return None
    with panels(2) as (figure, axes):
        line(axes[0], run.curve("train/max_generated_length"), GREY, "longest of the batch", linewidth=1)
        line(axes[0], run.curve("train/mean_generated_length"), BLUE, "mean (running)", noisy=True)
        titled(axes[0], "Response length", "tokens")
        axes[0].set_ylim(bottom=0)
        legend(axes[0])
        line(axes[1], run.curve("train/kl_divergence"), BLUE, "batch (running mean)", noisy=True)
        line(axes[1], run.curve("eval/kl"), ORANGE, "evaluation prompts", **DOTS)
        titled(axes[1], "KL to the reference policy", "nats per response")
        legend(axes[1])
    return Plot(
        "length_kl", "How long responses are, and how far the policy has moved from its start.", figure
    )


def losses(run: "Run") -> Plot | None:
    """Losses of actor and critics, and the supervised loss where there is one."""
    kinds = [
        ("train/actor_loss", "Actor loss", "clipped policy loss"),
        ("train/reward_critic_loss", "Reward critic loss", "½ · squared error"),
        ("train/cost_critic_loss", "Cost critic loss", "½ · squared error"),
        ("train/ptx_loss", "PTX loss", "nats per token"),
    ]
    kinds = [kind for kind in kinds if run.has(kind[0])]
    if not kinds:
        return None
    columns = 2 if len(kinds) in (2, 4) else min(3, len(kinds))
    with panels(columns, rows=-(-len(kinds) // columns)) as (figure, axes):
        for ax, (name, title, unit) in zip(axes, kinds):
            line(ax, run.curve(name), BLUE, noisy=True)
            titled(ax, title, unit)
    return Plot("losses", "Losses of what is trained: values faint, running mean strong.", figure)


def loss(run: "Run") -> Plot | None:
    """Training and evaluation loss of a supervised stage, gradient norm and learning rate."""
    if not run.has("train/loss", "eval/loss"):
        return None
    extra = [
        (name, title)
        for name, title in (("train/grad_norm", "Gradient norm"), ("train/lr", "Learning rate"))
        if run.has(name)
    ]
    with panels(1 + len(extra)) as (figure, axes):
        line(axes[0], run.curve("train/loss"), BLUE, "training (running mean)", noisy=True)
        line(axes[0], run.curve("eval/loss"), ORANGE, "evaluation", **DOTS)
        titled(axes[0], "Loss", "nats per token" if run.stage == "sft" else "loss")
        legend(axes[0])
        for ax, (name, title) in zip(axes[1:], extra):
            line(ax, run.curve(name), GREY, noisy=name == "train/grad_norm")
            titled(ax, title, {"train/grad_norm": "L2 norm", "train/lr": "learning rate"}[name])
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    return Plot("loss", "Loss over steps; values faint, running mean strong.", figure)


def accuracy(run: "Run") -> Plot | None:
    """Pair and sign accuracy of a score model, or of DPO's implied reward."""
    kinds = [
        ("accuracy", "Pair accuracy"),
        ("accuracy_sign", "Sign accuracy"),
        ("reward_accuracy", "Pair accuracy"),
    ]
    kinds = [(key, title) for key, title in kinds if run.has(f"train/{key}", f"eval/{key}")]
    if not kinds:
        return None
    with panels(len(kinds), width=4.4 if len(kinds) > 1 else 6.5) as (figure, axes):
        for ax, (key, title) in zip(axes, kinds):
            draw_accuracy(ax, run, key, title)
    return Plot(
        "accuracy",
        "Share of pairs that are ranked as annotated, and of responses whose sign (above 0 is unsafe) "
        "is right; 50 % is chance for pairs."
        if len(kinds) > 1
        else "Share of pairs that are ranked as annotated; 50 % is chance.",
        figure,
    )


def draw_accuracy(ax: "Axes", run: "Run", key: str, title: str) -> None:
    """Draws one accuracy, of training and evaluation, and its baseline where there is one.

    Args:
        ax: The panel.
        run: The run.
        key: Name of the metric, without train/ or eval/.
        title: Title of the panel.
    """
    line(ax, percent(run.curve(f"train/{key}")), BLUE, "training (running mean)", noisy=True)
    line(ax, percent(run.curve(f"eval/{key}")), ORANGE, "evaluation", **DOTS)
    baseline = run.summary.get(f"baseline/{key}")
    if baseline is not None:
        level(ax, 100 * baseline, f"TF-IDF baseline, {100 * baseline:.0f} %", GREEN)
    titled(ax, title, "%")
    ax.set_ylim(min(40, ax.get_ylim()[0]), 101)
    ticks = [tick for tick in range(0, 101, 10) if tick >= ax.get_ylim()[0]]
    legend(ax)
    ax.set_yticks(ticks)


def percent(curve: "Curve") -> "Curve":
    """A curve of shares in per cent."""
    return curve[0], [100 * value for value in curve[1]]
