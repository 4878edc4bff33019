"""Stage evaluate: how helpful and how harmful a policy is by its score models, on given prompts.

saferlhf-fast evaluate model=DIR prompts=FILE reward=DIR cost=DIR
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.sections import PAIR
from ..data.examples import prompt_examples
from ..models.causal_lm import load_causal_lm
from ..models.folders import refuse_short_context
from ..models.policy import Policy
from ..models.tokenizer import load_tokenizer, spare_rows
from ..rollout.batch import end_tokens
from ..rollout.engines import open_generator
from ..rollout.roles import Roles
from ..rollout.sample_and_score import sample_and_score, summary_of
from ..rollout.scorers import load_scorer
from ..runtime import console, disk, engine
from ..runtime.run_folder import finish_run, open_run
from ..runtime.run_state import is_ours, read_settings
from ..training.anomalies import SPARE_LIMIT, warn_spare_mass
from .statistics import interval_text, summarise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..config.stages import EvaluateConfig


def evaluate(cfg: "EvaluateConfig", restart: bool = False) -> dict[str, Any]:
    """Runs the stage evaluate: samples one response for each prompt and scores it.

    With `output` it writes evaluation.json and samples.jsonl. Every rank must call it.

    Args:
        cfg: Settings of the stage.
        restart: As in `run_folder.open_run`.

    Returns:
        95 % intervals of what was measured, as `statistics.summarise` gives them, `data`, counts of the
        prompts, and where rows of the head have no token `spare_mass`, the probability that sampling cut.

    Raises:
        UserError: If settings, models or data do not fit together.
    """
    engine.start(cfg.engine, cfg.seed)
    tokenizer = load_tokenizer(cfg.model, trust_remote_code=cfg.trust_remote_code)
    longest = cfg.sampling.prompt_limit(cfg.max_length)
    prompts, report = prompt_examples(cfg.prompts, tokenizer, cfg.template, longest, cfg.seed)
    roles = load_evaluation_roles(cfg, tokenizer)
    folder = open_run("evaluate", cfg, restart) if cfg.output else None
    rows = sample_and_score(roles, prompts, cfg, cfg.seed)
    columns = (
        [row[name] for row in rows] if rows[0][name] is not None else None for name in (*PAIR, "kl", "length")
    )
    summary = {**summarise(*columns), "data": report.as_dict()}
    mass = summary_of(rows).get("spare_mass")
    if mass is not None:
        summary["spare_mass"] = mass
        if mass > SPARE_LIMIT:
            warn_spare_mass(f"{cfg.model}: ", mass)
    if engine.rank() == 0:
        _show(summary, rows[: cfg.show])
        if folder is not None:
            disk.write_text(folder / "evaluation.json", json.dumps(summary, indent=1))
            disk.write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if folder is not None:
        finish_run(folder, summary)
    return summary


def load_evaluation_roles(cfg: "EvaluateConfig", tokenizer: "PreTrainedTokenizerBase") -> Roles:
    """Loads what an EvaluateConfig names: the policy, its reference and the scorers, those that are given.

    Args:
        cfg: Settings of the stage. Without `reference`, the model that the policy was trained from is the
            reference, where that is known.
        tokenizer: The policy's tokenizer.
    """

    def policy(path: str) -> engine.Frozen:
        lm = load_causal_lm(
            path, tokenizer=tokenizer, trust_remote_code=cfg.trust_remote_code, allow_pickle=cfg.allow_pickle
        )
        refuse_short_context(path, lm.config, cfg.max_length, "max_length")
        return engine.Frozen(Policy(lm, cfg.engine.packing, spare_rows(tokenizer, lm)), cfg.engine)

    actor, reference = policy(cfg.model), cfg.reference or start_of(cfg.model)
    if reference is None:
        console.say(
            f"no KL: {cfg.model} is no model of a run here; reference= names the policy to compare it with"
        )
    ends = end_tokens(tokenizer, actor.module.lm, cfg.template)
    return Roles(
        tokenizer,
        ends,
        actor,
        policy(reference) if reference else None,
        {name: load_scorer(spec, tokenizer, cfg)[0] for name, spec in cfg.scorers().items()},
        generator=open_generator(actor, tokenizer, ends, cfg.sampling),
    )


def start_of(model: str) -> str | None:
    """The folder of the model that a run of this package trained `model` from; None where there is none."""
    folder = Path(model).expanduser().parent
    settings = read_settings(folder) if is_ours(folder) else {}
    start = settings.get("model")
    return start if isinstance(start, str) and Path(start).expanduser().is_dir() else None


def _show(summary: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    table = [
        [name, interval_text(value), value["n"]]
        for name, value in summary.items()
        if isinstance(value, dict) and "mean" in value
    ]
    console.result_table("evaluation", ["measure", "mean (95 % interval)", "n"], table)
    console.sample_table(samples)
