"""Every causal LM and encoder of transformers at tiny size, and what it gives for sequences alone."""

import torch

SMALL = dict(
    hidden_size=32,
    n_embd=32,
    d_model=32,
    dim=32,
    num_hidden_layers=2,
    n_layer=2,
    num_layers=2,
    n_layers=2,
    decoder_layers=2,
    encoder_layers=2,
    intermediate_size=48,
    ffn_dim=48,
    n_inner=48,
    d_ff=48,
    hidden_dim=48,
    decoder_ffn_dim=48,
    encoder_ffn_dim=48,
    num_attention_heads=4,
    n_head=4,
    n_heads=4,
    decoder_attention_heads=4,
    encoder_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=96,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    n_group=1,
    topk_group=1,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    sliding_window=16,
    attention_chunk_size=16,
    attention_window=16,
    local_attention=16,
    first_k_dense_replace=1,
    initializer_range=0.2,
    rotary_dim=4,
    embedding_size=32,
    embed_dim=32,
    word_embed_proj_dim=32,
    max_position_embeddings=512,
    n_positions=512,
)
ATTEMPTS = ({"head_dim", "rotary_dim"}, {"rotary_dim"}, set())
"""Settings left out in each attempt to build a model."""
CHANGES = {
    "recurrent_gemma": {"num_hidden_layers": 3},
    "jamba": {"num_hidden_layers": 8},
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 5, "vocab_size_per_layer_input": 96},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gptj": {"head_dim": 8, "rotary_dim": 4},
    "reformer": {"is_decoder": True},
    "xlstm": {"num_heads": 4},
    "helium": {"head_dim": 8},
}
"""What some model types need to be tiny."""
MOST_PARAMETERS = 20_000_000
LENGTHS = (40, 7, 23, 64, 8)
"""Tokens of the sequences: beyond the windows, chunks and indices above, and below them."""


def config_of(kind, left_out=frozenset(), **changes):
    """A tiny configuration of a model type, with all its kinds of layers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    text = CONFIG_MAPPING[kind]().get_text_config()
    known = text.to_dict() | {name: 0 for name in getattr(text, "attribute_map", {})}
    settings = {k: v for k, v in SMALL.items() if k in known and k not in left_out}
    if left_out and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = 4
    if isinstance(known.get("layer_types"), list):
        kinds = list(dict.fromkeys(known["layer_types"]))
        count = max(2, len(kinds))
        layers = [k for k in settings if k in ("num_hidden_layers", "n_layer", "num_layers")]
        settings.update(dict.fromkeys(layers, count), layer_types=(kinds * count)[:count])
    changes = CHANGES.get(kind, {}) | changes
    if "num_hidden_layers" in changes and "layer_types" not in changes:
        settings.pop("layer_types", None)
    return type(text)(**settings | changes)


def randomize(model):
    """Parts that a new model has at zero do something too."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dtype.is_floating_point and p.numel() and p.abs().max() == 0:
                p.normal_(0, 0.1)
    return model.eval().float()


def build(auto, kind, **changes):
    """A tiny model that runs; the first failure where none does."""
    failures = []
    for left_out in ATTEMPTS:
        try:
            config = config_of(kind, left_out, **changes)
            with torch.device("meta"):
                count = sum(p.numel() for p in auto.from_config(config).parameters())
            if count > MOST_PARAMETERS:  # parts with configurations of their own
                raise ValueError(f"{count} parameters are not tiny")
            torch.manual_seed(0)
            model = randomize(auto.from_config(config))
            with torch.no_grad():
                model(input_ids=torch.tensor([[3, 4, 5]]))
            return model
        except Exception as error:  # whatever an architecture raises at sizes that it cannot have
            failures.append(error)
    raise failures[0]


def sequences(vocabulary, lengths=LENGTHS, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=draw).tolist() for n in lengths]


def in_order(rows):
    """Places of the rows by length: rotary factors that grow remember the longest sequence so far."""
    return sorted(range(len(rows)), key=lambda i: len(rows[i]))


@torch.no_grad()
def logp_alone(lm, rows):
    """Log-probs of each sequence by itself, by plain transformers."""
    made = {}
    for i in in_order(rows):
        logits = lm(input_ids=torch.tensor([rows[i]])).logits[0].float()
        made[i] = logits[:-1].log_softmax(-1).gather(1, torch.tensor(rows[i][1:])[:, None])[:, 0]
    return torch.cat([made[i] for i in range(len(rows))])


@torch.no_grad()
def hidden_alone(backbone, rows):
    made = {
        i: backbone(input_ids=torch.tensor([rows[i]])).last_hidden_state[0].float() for i in in_order(rows)
    }
    return torch.cat([made[i] for i in range(len(rows))])


def form_name(form):
    return "packed" if form.packs else "padded" if form.pads else "by length"
