"""vLLM over HTTP, against a replacement with its routes; vLLM in this process, against a replacement module.

vLLM itself is not run; the meaning of a request follows the source of vLLM 0.33.
"""

import sys
import types
from pathlib import Path

import generation_kit
import pytest
import torch
from generation_server import serving

from saferlhf_fast.config.stages import Sampling
from saferlhf_fast.errors import UserError
from saferlhf_fast.rollout.engines import open_generator, vllm_server

pytestmark = pytest.mark.numeric

ENDS = [2, 5]
ALL = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(vllm_server, "PAUSE", 0.0)


def generator_of(lm, server, **sampling):
    settings = Sampling(engine="vllm-server", server=server.address, **sampling)
    return open_generator(generation_kit.actor(lm), generation_kit.tokenizer(), ENDS, settings)


def expected(lm, prompts, seeds, limits, **sampling):
    return [
        generation_kit.naive(lm, p, s, n, ENDS, Sampling(**sampling))
        for p, s, n in zip(prompts, seeds, limits)
    ]


@pytest.mark.parametrize("settings", [{}, ALL])
def test_responses_are_in_order_and_sampled_with_the_weights_of_the_trainer(settings):
    """The server starts with weights that differ from those of the trainer."""
    lm, other = generation_kit.llama(0), generation_kit.llama(1)
    prompts, seeds, limits = generation_kit.prompts(9), list(range(9)), [6, 3, 9, 1, 7, 2, 8, 4, 5]
    with serving(other) as server:
        generator = generator_of(lm, server, **settings)
        responses = generator.generate(prompts, seeds, limits)
        for response, (ids, logp, ended) in zip(responses, expected(lm, prompts, seeds, limits, **settings)):
            assert (response.ids, response.ended) == (ids, ended)
            assert response.logp == pytest.approx(logp, rel=1e-5)
        assert len(server.bodies("/collective_rpc")) == 1 and len(server.bodies("/v1/completions")) == 9
        generator.close()


def test_after_a_refresh_the_next_rollout_uses_the_new_weights():
    lm = generation_kit.llama(0)
    prompts, seeds, limits = generation_kit.prompts(3), [1, 2, 3], [8] * 3
    with serving(generation_kit.llama(1)) as server:
        generator = generator_of(lm, server)
        before = generator.generate(prompts, seeds, limits)
        with torch.no_grad():
            lm.lm_head.weight += 0.5 * torch.randn(
                lm.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
            )
        # without a refresh the server keeps its weights
        assert [r.ids for r in generator.generate(prompts, seeds, limits)] == [r.ids for r in before]
        generator.refresh()
        after = generator.generate(prompts, seeds, limits)
        assert (
            [r.ids for r in after]
            == [ids for ids, *_ in expected(lm, prompts, seeds, limits)]
            != [r.ids for r in before]
        )
        paths = [path for path, _ in server.requests]
        assert paths.index("/reset_prefix_cache") == paths.index("/collective_rpc") + 1
        folder = Path(server.bodies("/collective_rpc")[0]["kwargs"]["weights_path"])
        assert folder.is_dir()
        generator.close()
        assert not folder.exists()


def test_adapters_are_merged_into_the_weights_in_the_configured_folder(tmp_path):
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        generation_kit.llama(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts, seeds, limits = generation_kit.prompts(3), [1, 2, 3], [8] * 3
    with serving(generation_kit.llama(1)) as server:
        generator = generator_of(wrapped, server, server_weights=str(tmp_path / "shared"))
        responses = generator.generate(prompts, seeds, limits)
        generator.close()
    assert [r.ids for r in responses] == [ids for ids, *_ in expected(wrapped, prompts, seeds, limits)]
    assert (tmp_path / "shared" / "weights" / "config.json").exists()


def test_a_request_has_the_settings_of_sampling():
    lm = generation_kit.llama()
    with serving(lm) as server:
        generator = generator_of(lm, server, temperature=0.5, top_p=0.9, stop=["yes", "no"])
        generator.generate([[7, 8, 9]], [2**63 + 11], [4])
        (body,) = server.bodies("/v1/completions")
        generator.close()
    assert (
        body["model"] == "tiny"
        and body["prompt"] == [7, 8, 9]
        and body["max_tokens"] == 4
        and body["seed"] == 11
    )
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (
        0.5,
        0.9,
        0,
        1.0,
    )
    assert body["stop"] == ["yes", "no"] and body["stop_token_ids"] == ENDS and body["ignore_eos"]
    assert body["logprobs"] == 0 and body["return_token_ids"]
    with serving(lm) as stand:  # an end mark of several tokens is a stop text
        settings = Sampling(engine="vllm-server", server=stand.address, stop=["yes"])
        generator = open_generator(
            generation_kit.actor(lm), generation_kit.tokenizer(), [*ENDS, "[[END>>"], settings
        )
        generator.generate([[7, 8, 9]], [1], [4])
        (body,) = stand.bodies("/v1/completions")
        generator.close()
    assert body["stop"] == ["yes", "[[END>>"] and body["stop_token_ids"] == ENDS


def test_a_request_to_a_busy_server_is_repeated():
    lm = generation_kit.llama()
    prompts, seeds, limits = generation_kit.prompts(2), [1, 2], [5, 5]
    with serving(lm) as server:
        generator = generator_of(lm, server)
        generator.refresh()
        server.failing = 3
        responses = generator.generate(prompts, seeds, limits)
        generator.close()
        assert [r.ids for r in responses] == [ids for ids, *_ in expected(lm, prompts, seeds, limits)]
        assert len(server.bodies("/v1/completions")) == 5


def test_a_missing_server_is_an_error_of_one_line():
    with serving(generation_kit.llama()) as server:
        address = server.address
    with pytest.raises(UserError) as caught:
        open_generator(
            generation_kit.actor(generation_kit.llama()),
            None,
            ENDS,
            Sampling(engine="vllm-server", server=address),
        )
    line = str(caught.value)
    assert line.startswith(f"sampling.server: {address}: no answer (") and "\n" not in line
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve" in line


def test_a_request_that_the_server_refuses_is_not_repeated():
    lm = generation_kit.llama()
    with serving(lm) as server:
        generator = generator_of(lm, server)
        generator.refresh()
        with pytest.raises(UserError, match="answered 400: .*maximum context length is 200 tokens"):
            generator.generate([[5, 6]], [0], [201])
        assert len(server.bodies("/v1/completions")) == 1
        generator.close()


def test_a_server_with_raw_log_probs_is_refused():
    lm = generation_kit.llama()
    with serving(lm, mode="raw_logprobs") as server:
        generator_of(lm, server).close()  # at temperature 1 both modes give the same log-probs
        with pytest.raises(
            UserError, match="expected a server with --logprobs-mode processed_logprobs, got raw_logprobs"
        ):
            generator_of(lm, server, temperature=0.7)


def test_a_server_out_of_development_mode_cannot_take_weights():
    lm = generation_kit.llama()
    with serving(lm) as server:
        server.development = False
        generator = generator_of(lm, server)
        with pytest.raises(UserError, match="/collective_rpc answered 404: .*VLLM_SERVER_DEV_MODE=1"):
            generator.generate([[5, 6]], [0], [3])
        generator.close()


def test_without_vllm_the_error_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    actor = generation_kit.actor(generation_kit.llama())
    with pytest.raises(
        UserError, match=r"sampling.engine: vllm cannot be imported .*expected: pip install 'vllm>="
    ):
        open_generator(actor, generation_kit.tokenizer(), ENDS, Sampling(engine="vllm"))


class LLM:
    """The used part of the class of vLLM: a tiny model that loses its weights while it sleeps."""

    instances = []

    def __init__(self, model, **settings):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        self.settings, self.calls, self.lm, self.asleep = settings, [], None, set()
        self.blank = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        assert len(AutoTokenizer.from_pretrained(model)) == generation_kit.VOCABULARY
        LLM.instances.append(self)

    def sleep(self, level):
        assert level == 2
        self.asleep, self.lm = {"weights", "kv_cache"}, None

    def wake_up(self, tags):
        self.asleep -= set(tags)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights" and "weights" not in self.asleep
        self.blank.load_state_dict({name: tensor.clone() for name, tensor in kwargs["weights_iterator"]})
        self.lm = self.blank.eval()

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def generate(self, prompts, parameters, use_tqdm):
        assert not self.asleep and self.lm is not None
        answers = []
        for prompt, p in zip(prompts, parameters):
            sampling = Sampling(
                temperature=p.temperature,
                top_p=p.top_p,
                top_k=p.top_k,
                repetition_penalty=p.repetition_penalty,
            )
            ids, logp, ended = generation_kit.naive(
                self.lm, prompt["prompt_token_ids"], p.seed, p.max_tokens, p.stop_token_ids, sampling
            )
            logprobs = [{token: types.SimpleNamespace(logprob=x), -1: None} for token, x in zip(ids, logp)]
            output = types.SimpleNamespace(
                token_ids=tuple(ids), logprobs=logprobs, finish_reason="stop" if ended else "length"
            )
            answers.append(types.SimpleNamespace(outputs=[output]))
        return answers


def test_vllm_in_this_process_sleeps_between_rollouts_and_uses_the_current_weights(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=types.SimpleNamespace)
    )
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    lm = generation_kit.llama()
    generator = open_generator(
        generation_kit.actor(lm), generation_kit.tokenizer(), ENDS, Sampling(engine="vllm", **ALL)
    )
    llm = LLM.instances[-1]
    assert llm.asleep == {"weights", "kv_cache"} and llm.settings["logprobs_mode"] == "processed_logprobs"
    prompts, seeds, limits = generation_kit.prompts(5), list(range(5)), [6, 3, 9, 1, 7]
    first = [r.ids for r in generator.generate(prompts, seeds, limits)]
    assert llm.asleep == {"weights", "kv_cache"} and llm.calls == ["reset"]
    with torch.no_grad():
        lm.lm_head.weight += 0.5 * torch.randn(
            lm.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    generator.refresh()
    responses = generator.generate(prompts, seeds, limits)
    for response, (ids, logp, ended) in zip(responses, expected(lm, prompts, seeds, limits, **ALL)):
        assert (response.ids, response.ended) == (ids, ended) and response.logp == pytest.approx(
            logp, rel=1e-5
        )
    assert first != [r.ids for r in responses] and generator.generate([], [], []) == []
    generator.close()
