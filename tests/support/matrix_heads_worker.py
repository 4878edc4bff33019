"""Run by test_matrix_heads.py in two processes under ZeRO-3: new heads, and score models saved and loaded.

    torchrun … matrix_heads_worker.py BASE FOLDER OUT

BASE: a causal LM of hidden size WIDTH
FOLDER: where the score model is saved
OUT: gets JSON {name: number or bool}
"""

import json
import os
import sys

import torch

from saferlhf_fast.config.stages import Engine, Optimizer
from saferlhf_fast.models.packing import end_row, pack_sequences
from saferlhf_fast.models.score_checkpoint import save_score_model
from saferlhf_fast.models.score_model import ScoreHead, load_score_model, score_model_from_backbone
from saferlhf_fast.models.tokenizer import load_tokenizer
from saferlhf_fast.runtime import deepspeed_config, engine

SEQUENCES = [[1, 9, 8, 7, 12], [1, 5, 6], [1, 11, 10, 9, 8, 7, 6, 5]]
ZERO_3 = Engine(
    zero_stage=3, precision="fp32", config={"zero_optimization": {"stage3_param_persistence_threshold": 0}}
)
RATE = Optimizer(learning_rate=1e-2, warmup_ratio=0.0, schedule="constant")


def spread(name, head):
    """Standard deviation of the weights of a sharded head, and whether all ranks have the same weights."""
    with engine.gathered(head, True):
        weight = head.weight.detach().clone()
    weights = engine.gather_objects(weight.tolist())
    return {
        f"{name}: std": weight.std().item(),
        f"{name}: same on all ranks": all(other == weights[0] for other in weights),
    }


def drawn_in_place(base):
    """Draws a head that is sharded from its construction on, so that its weight is empty at that moment.

    Each rank draws with a seed of its own.
    """
    import deepspeed

    model = score_model_from_backbone(base)
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config.settings(ZERO_3, None)):
        model.score = ScoreHead(model.score.weight.shape[1])
    empty = model.score.weight.numel() == 0
    torch.manual_seed(100 + engine.rank())
    model.init_head()
    return {"in place: empty": empty, **spread("in place", model.score)}


def scores(model):
    """The scores of SEQUENCES."""
    packed = pack_sequences(SEQUENCES, [end_row(len(ids)) for ids in SEQUENCES], engine.device())
    with torch.no_grad():
        return model(packed).tolist()


def main(base, folder, out):
    engine.start(ZERO_3, 0)
    results = drawn_in_place(base)
    # As in the stages: a reward model with a new head, and a critic of two heads.
    torch.manual_seed(5)
    score = load_score_model(base, new_head=True)
    two_heads = load_score_model(base, new_head=True)
    two_heads.add_head()
    critic = engine.Engine(two_heads, RATE, ZERO_3, 10)
    trained = engine.Engine(score, RATE, ZERO_3, 10)
    results["sharded"] = all(p.numel() < p.ds_numel for p in trained.module.parameters())
    results |= spread("new", trained.module.score) | spread("two heads", critic.module.score)
    packed = pack_sequences(SEQUENCES, [end_row(len(ids)) for ids in SEQUENCES], engine.device())
    for _ in range(2):
        trained.backward(trained(packed).square().sum() / engine.world_size())
        trained.step()
    trained.train(False)
    before = scores(trained)
    tokenizer = load_tokenizer(base)
    with trained.gathered():
        if engine.rank() == 0:
            save_score_model(folder, trained.module, tokenizer, kind="reward")
    engine.barrier()
    results["reloaded, gathered"] = scores(load_score_model(folder).eval()) == before
    for frozen in ("sharded", "replicated"):
        cfg = Engine(zero_stage=3, precision="fp32", frozen=frozen, config=ZERO_3.config)
        frozen_model = engine.Frozen(load_score_model(folder), cfg)
        results[f"reloaded, {frozen}"] = scores(frozen_model) == before
    trained_again = engine.Engine(load_score_model(folder), RATE, ZERO_3, 10).train(False)
    results["reloaded, trained on"] = scores(trained_again) == before
    results["moved"] = before != scores(engine.Frozen(load_score_model(base, new_head=True), ZERO_3))
    if engine.rank() == 0:
        with open(out, "w") as file:
            json.dump(results, file)
    engine.finish()
    os._exit(0)  # the results are written; the end of gloo's threads is not tested here


if __name__ == "__main__":
    main(*sys.argv[1:])
