"""A transformers model, unchanged: Qwen3 with its eager attention, compiled, explained and checked against eager.

    python examples/transformers_qwen3.py

The model is built from a small configuration with random weights; nothing is downloaded.
"""

from __future__ import annotations

import sys

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import attncompiler


def make_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        head_dim=32, attn_implementation="eager",
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def main() -> int:
    model = make_model()
    tokens = torch.randint(0, 512, (2, 300))
    padding = torch.ones(2, 300, dtype=torch.long)
    padding[1, :40] = 0  # the second text is shorter: padded on the left

    with torch.no_grad():
        print(attncompiler.explain(model, input_ids=tokens, attention_mask=padding))
        expected = model(input_ids=tokens, attention_mask=padding).logits
        compiled = torch.compile(model, backend="attncompiler")
        found = compiled(input_ids=tokens, attention_mask=padding).logits
    error = (found - expected)[padding.bool()].abs().max().item()
    print(f"\nlargest difference from eager: {error:.1e}")
    return 0 if error < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
