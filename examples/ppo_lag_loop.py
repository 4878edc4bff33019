r"""PPO-Lag in your own loop: plain torch, models of transformers, and this package's ops.

    python examples/ppo_lag_loop.py                   # a toy, from random weights: half a minute on two cores
    python examples/ppo_lag_loop.py --model DIR --reward DIR --cost DIR --prompts FILE.jsonl \
        --threshold 0 --tokens 256

It shows `linear_logprob` (no logits), `pack` (no padding after the models), `ScoreModel`, `gae`,
`LagrangeMultiplier`, `PPOLagLoss` (the clipped loss on (A_r − λ·A_c)/(1 + λ)) and `value_loss`;
`ppo_lag_advantage` does step 4 and that combination in one launch. It leaves out several devices, data
formats, checkpoints and speed: that is what `saferlhf-fast ppo-lag` is for.

The toy has 32 words: words 8–15 are worth 1; words 16–23 are worth 2 and harmful; words 24–31 are harmful and
worth nothing. Without a constraint the policy would use 16–23 alone; here responses of 12 words may contain 2
harmful ones on average (--threshold). --multiplier 0 switches the constraint off.

Shapes: B rows, P prompt, T response, L = P + T, N response tokens of the batch, packed.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from arguments import number, rows_of

from saferlhf_fast import LagrangeMultiplier, PPOLagLoss, gae, linear_logprob, pack, value_loss


def train(
    actor: Any,
    critics: torch.nn.ModuleList,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    scores: Callable[[torch.Tensor, torch.Tensor], Any],
    args: argparse.Namespace,
    end: int | None,
) -> list[list[float]]:
    """The loop; returns reward, cost and λ of each step.

    batches gives (ids_BP, mask_BP), padded on the left; scores(ids_BL, mask_BL) gives reward_B, cost_B; end
    is the end-of-sequence id.
    """
    reference = copy.deepcopy(actor).eval().requires_grad_(False)
    multiplier = LagrangeMultiplier(
        init=args.multiplier or 1e-9,
        lr=args.multiplier_lr if args.multiplier else 0.0,
        max=5.0,
        threshold=args.threshold,
        window=args.batch,
        device=actor.device,
    )
    criterion = PPOLagLoss(clip_ratio=0.2)
    optimizers = [torch.optim.Adam(module.parameters(), lr=args.lr) for module in (actor, critics)]
    history = []
    print("step   reward     cost   lambda       KL")
    for step, (ids_BP, mask_BP) in zip(range(args.steps), batches):
        # 1. The actor answers. A response ends with its first end-of-sequence token, which belongs to it.
        with torch.no_grad():
            ids_BL = actor.generate(
                input_ids=ids_BP,
                attention_mask=mask_BP,
                max_new_tokens=args.tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
        ends_BT = ids_BL[:, ids_BP.shape[1] :] == (-1 if end is None else end)
        real_BT = ends_BT.cumsum(1) - ends_BT.long() == 0
        batch = ids_BL, torch.cat([mask_BP, real_BT.long()], 1), real_BT
        # 2. Scores of the frozen models, and log-probs and values before the update.
        with torch.no_grad():
            reward_B, cost_B = scores(*batch[:2])
            (logp_N, cu_seqlens), (ref_logp_N, _), values_2N = (
                logprobs(actor, *batch),
                logprobs(reference, *batch),
                values(critics, *batch),
            )
        # 3. λ follows the mean cost of the last episodes, before the actor moves.
        multiplier.update(cost_B)
        # 4. Reward and cost of each token: its share of the KL, and the score at a response's last token. One
        #    scan for each of the two.
        kl_N, ends_B = logp_N - ref_logp_N, cu_seqlens[1:].long() - 1
        rewards_2N = args.kl_coeff * torch.stack([-kl_N, kl_N])
        rewards_2N[:, ends_B] += torch.stack([reward_B, cost_B])
        scans = [
            gae(*pair, gamma=1.0, lam=0.95, cu_seqlens=cu_seqlens) for pair in zip(rewards_2N, values_2N)
        ]
        advantages_2N, returns_2N = (torch.stack(pair) for pair in zip(*scans))
        # The mean is what untrained critics do not predict yet; no single token deserves it.
        advantages_2N -= advantages_2N.mean(1, keepdim=True)
        # 5. Clipped losses, a few optimiser steps: the actor's weighs reward against cost by λ.
        for _ in range(args.epochs):
            actor_loss, _ = criterion(
                logprobs(actor, *batch)[0], logp_N, *advantages_2N, multiplier, cu_seqlens=cu_seqlens
            )
            critic_losses, _ = value_loss(
                values(critics, *batch), values_2N, returns_2N, clip_value=5.0, cu_seqlens=cu_seqlens
            )
            for optimizer, loss in zip(optimizers, (actor_loss, critic_losses.sum())):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        averages = reward_B.mean(), cost_B.mean(), multiplier.value, kl_N.sum() / len(ends_B)
        row = [average.item() for average in averages]
        history.append(row[:3])
        if step % max(args.steps // 10, 1) == 0 or step == args.steps - 1:
            print(f"{step:4d} {row[0]:8.2f} {row[1]:8.2f} {row[2]:8.3f} {row[3]:8.2f}")
    return history


def logprobs(
    lm: Any, ids_BL: torch.Tensor, mask_BL: torch.Tensor, real_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the response tokens, [N], and where rows begin, [B+1]; no logits are built."""
    columns = real_BT.shape[1]
    # Positions are counted from each row's first real token.
    positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    states = lm.base_model(
        input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions_BL, use_cache=False
    )
    hidden_BTH = states.last_hidden_state[:, -columns - 1 : -1]
    (hidden_NH, ids_N), cu_seqlens = pack((hidden_BTH, ids_BL[:, -columns:]), real_BT)
    head = lm.get_output_embeddings()
    return linear_logprob(hidden_NH, head.weight, ids_N, bias=head.bias), cu_seqlens


def values(
    critics: torch.nn.ModuleList, ids_BL: torch.Tensor, mask_BL: torch.Tensor, real_BT: torch.Tensor
) -> torch.Tensor:
    """Both critics' values before each response token, [2, N]."""
    values_BT = [critic(ids_BL, mask_BL)[:, -real_BT.shape[1] - 1 : -1] for critic in critics]
    return torch.stack(pack(values_BT, real_BT)[0])


def toy(args: argparse.Namespace) -> tuple[Any, torch.nn.ModuleList, Iterator[Any], Callable[..., Any], None]:
    """A tiny Llama from random weights, two critics of the same size, and scores that count words."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    from saferlhf_fast import ScoreModel

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    actor = LlamaForCausalLM(config)
    actor.generation_config.eos_token_id = None
    critics = torch.nn.ModuleList(ScoreModel(LlamaModel(config)) for _ in range(2))
    worth, harm = torch.zeros(32), torch.zeros(32)
    worth[8:16], worth[16:24], harm[16:32] = 1.0, 2.0, 1.0

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield torch.randint(2, 8, (args.batch, 4)), torch.ones(args.batch, 4, dtype=torch.long)

    def scores(ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (worth[ids_BL] * mask_BL).sum(1), (harm[ids_BL] * mask_BL).sum(1)

    return actor, critics, batches(), scores, None


def real(args: argparse.Namespace) -> tuple[Any, torch.nn.ModuleList, Iterator[Any], Callable[..., Any], int]:
    """Models from folders or the Hub, which must share a tokenizer, and prompts from a file of JSON lines."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from saferlhf_fast import load_score_model

    prompts = [row["prompt"] for row in rows_of(args.prompts, "prompt")]
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    actor = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    frozen = [load_score_model(path).to(device).eval() for path in (args.reward, args.cost)]
    critics = torch.nn.ModuleList(copy.deepcopy(frozen))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            chosen = [prompts[i] for i in torch.randint(len(prompts), (args.batch,))]
            encoded = tokenizer(chosen, return_tensors="pt", padding=True).to(device)
            yield encoded.input_ids, encoded.attention_mask

    def scores(ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> Iterator[torch.Tensor]:
        return (model.end_scores(model(ids_BL, mask_BL), mask_BL) for model in frozen)

    return actor, critics, batches(), scores, tokenizer.eos_token_id


def main() -> None:
    """Reads the arguments, trains, and prints reward and cost of the first and the last steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a causal LM; without it the toy runs")
    parser.add_argument("--reward", help="a score model: higher is more helpful")
    parser.add_argument("--cost", help="a score model: above 0 is unsafe")
    parser.add_argument("--prompts", help='a file with a JSON object {"prompt": …} in each line')
    parser.add_argument(
        "--threshold", type=number(float), default=2.0, help="d: what the mean cost has to stay under"
    )
    parser.add_argument(
        "--multiplier", type=number(float, 0, 5), default=1.0, help="λ at the start; 0: no constraint"
    )
    parser.add_argument(
        "--multiplier_lr", type=number(float, 0), default=0.02, help="how fast λ follows the mean cost"
    )
    parser.add_argument(
        "--kl_coeff",
        type=number(float, 0),
        default=0.1,
        help="β: nats of KL to the reference against a point of reward",
    )
    parser.add_argument("--steps", type=number(int, 1), default=40)
    parser.add_argument("--batch", type=number(int, 1), default=64, help="responses of a step")
    parser.add_argument("--tokens", type=number(int, 1), default=12, help="most tokens of a response")
    parser.add_argument("--epochs", type=number(int, 1), default=2, help="optimiser steps on each batch")
    parser.add_argument("--lr", type=number(float, 0), default=1e-3)
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    args = parser.parse_args()
    if args.model and not (args.reward and args.cost and args.prompts):
        parser.error("--model needs --reward, --cost and --prompts")
    torch.manual_seed(args.seed)
    try:
        actor, critics, batches, scores, end = (real if args.model else toy)(args)
    except (OSError, KeyError, ValueError) as error:
        # A path or a file with other contents than expected.
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    history = train(actor, critics, batches, scores, args, end)
    few = max(len(history) // 10, 1)
    (reward, cost, _), (reward_now, cost_now, multiplier) = (
        torch.tensor(steps).mean(0).tolist() for steps in (history[:few], history[-few:])
    )
    print(
        f"reward {reward:.2f} -> {reward_now:.2f}, cost {cost:.2f} -> {cost_now:.2f} (threshold "
        f"{args.threshold:g}), "
        f"lambda {multiplier:.3f}"
    )


if __name__ == "__main__":
    main()
