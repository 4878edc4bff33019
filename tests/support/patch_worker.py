"""Run in two processes by test_patch_transformers_guest.py: a patched model under DDP and under ZeRO-3,
beside an unpatched one.

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/support/patch_worker.py

Prints a JSON object of rank 0: the largest difference of a gradient under DDP, both models' losses under
ZeRO-3.
"""

import copy
import json

import deepspeed
import torch
from patch_kit import make, random_batch

from saferlhf_fast.integrations.transformers import patch_model

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
}


def distributed(models, inputs):
    for model in models:
        torch.nn.parallel.DistributedDataParallel(model)(**inputs, num_items_in_batch=7).loss.backward()
    theirs, ours = (list(model.parameters()) for model in models)
    return max((a.grad - b.grad).abs().max().item() for a, b in zip(theirs, ours, strict=True))


def sharded(model, inputs):
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    losses = []
    for _ in range(3):
        output = engine(**inputs)
        losses.append(output.loss.item())
        engine.backward(output.loss)
        engine.step()
    return losses


def main():
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    ids, mask, labels = random_batch(11)
    labels[0, -1] = ids[0, -1]
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    model = make()
    # a rank without any label
    lonely = {**inputs, "labels": torch.full_like(labels, -100)} if rank == 1 else inputs
    said = {
        "gap": distributed((copy.deepcopy(model), patch_model(copy.deepcopy(model))), lonely),
        "theirs": sharded(copy.deepcopy(model), inputs),
        "ours": sharded(patch_model(copy.deepcopy(model)), inputs),
    }
    if rank == 0:
        print(json.dumps(said))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
