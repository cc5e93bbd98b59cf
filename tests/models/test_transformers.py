"""Models of transformers with their eager attention, tiny, with random weights: one for each way of writing it, eval and train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import attncompiler

SMALL = {"attn_implementation": "eager"}
LLAMA = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **SMALL,
}  # fmt: skip
BERT = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, **SMALL,
}  # fmt: skip

# name: (configuration, model, number of its attentions)
MODELS: Mapping[str, tuple[Any, Any, int]] = {
    "qwen3: grouped heads, rotary": (tf.Qwen3Config(**LLAMA, head_dim=16), tf.Qwen3ForCausalLM, 2),
    "llama": (tf.LlamaConfig(**LLAMA), tf.LlamaForCausalLM, 2),
    "mistral: sliding window": (tf.MistralConfig(**LLAMA, sliding_window=8), tf.MistralForCausalLM, 2),
    "gemma2: soft cap": (tf.Gemma2Config(**LLAMA, head_dim=16, sliding_window=8), tf.Gemma2ForCausalLM, 2),
    "gpt_oss: sinks": (
        tf.GptOssConfig(**LLAMA, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=8),
        tf.GptOssForCausalLM, 2,
    ),
    "opt": (
        tf.OPTConfig(
            vocab_size=64, hidden_size=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            word_embed_proj_dim=64, dropout=0.0, **SMALL,
        ), tf.OPTForCausalLM, 2,
    ),
    "gpt2": (
        tf.GPT2Config(
            vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            **SMALL,
        ), tf.GPT2LMHeadModel, 2,
    ),
    "bloom: ALiBi by baddbmm": (
        tf.BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4, **SMALL), tf.BloomForCausalLM, 2,
    ),
    "bert: both directions": (
        tf.BertConfig(**BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), tf.BertForMaskedLM, 2,
    ),
    "t5: learned relative positions, cross attention": (
        tf.T5Config(
            vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0,
            **SMALL,
        ), tf.T5ForConditionalGeneration, 6,
    ),
    "whisper: audio": (
        tf.WhisperConfig(
            vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=32, max_target_positions=32, num_mel_bins=8,
            pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.0, **SMALL,
        ), tf.WhisperForConditionalGeneration, 3,
    ),
    "vit: images": (
        tf.ViTConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
            hidden_dropout_prob=0.0, **SMALL,
        ), tf.ViTModel, 2,
    ),
    "swin: shifted windows": (
        tf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4, drop_path_rate=0.0,
            hidden_dropout_prob=0.0, **SMALL,
        ), tf.SwinModel, 2,
    ),
}  # fmt: skip
END_TO_END = [name for name in MODELS if name.split(":")[0] in ("qwen3", "opt", "t5", "gemma2", "gpt_oss")]


def build(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    config, model_class, _ = MODELS[name]
    model = model_class(config)
    if name.startswith(("vit", "swin")):
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}
    tokens = torch.randint(3, 64, (2, 24))
    if "audio" in name:
        return model, {"input_features": torch.randn(2, 8, 64), "decoder_input_ids": tokens[:, :12]}
    padding = torch.ones(2, 24, dtype=torch.long)
    padding[1, :5] = 0
    inputs = {"input_ids": tokens, "attention_mask": padding}
    return model, inputs | ({"decoder_input_ids": tokens[:, :12]} if name.startswith("t5") else {})


def output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs, **({} if "pixel_values" in inputs else {"use_cache": False}))[0]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_eval(name: str) -> None:
    model, inputs = build(name)
    model.eval()
    with torch.no_grad():
        explanation = attncompiler.explain(lambda: output(model, inputs))
        assert len(explanation.regions) == MODELS[name][2], explanation
        assert not explanation.missed, explanation
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="attncompiler", options={"inner": "aot_eager"})
        torch.testing.assert_close(output(compiled, inputs), output(model, inputs), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_train(name: str) -> None:
    model, inputs = build(name)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, backend="attncompiler", options={"inner": "aot_eager"})
    found, expected = (
        torch.autograd.grad(output(m, inputs).square().mean(), parameters, allow_unused=True) for m in (compiled, model)
    )
    for ours, eager in zip(found, expected, strict=True):
        if ours is not None and eager is not None:  # a compiled graph gives zeros for what eager does not reach
            torch.testing.assert_close(ours, eager, atol=1e-5 + 1e-4 * eager.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("name", END_TO_END)
def test_no_break_and_no_recompile_of_ours(name: str) -> None:
    """Batches of other lengths: as many graphs and breaks as with eager behind Dynamo."""

    def graphs(backend: Any) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        model, inputs = build(name)
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(model.eval(), backend=counter)
        with torch.no_grad():
            for length in (24, 20, 17):
                output(compiled, {key: t[:, :length] for key, t in inputs.items()})
        return counter.frame_count, sum(counters["graph_break"].values())

    ours = torch._dynamo.lookup_backend("attncompiler")
    assert graphs(lambda gm, x, **_: ours(gm, x, options={"inner": "eager"})) == graphs("eager")
