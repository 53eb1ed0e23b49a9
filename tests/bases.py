"""Base models that a fresh process can build again, and a program that loads adapters onto them.

``python tests/bases.py CASES.pt`` reads a list of (base, folder of the base, folder of the adapter), and
writes what each model answers beside it.
"""

import sys
import warnings

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.block = inner

    def forward(self, x):
        x = torch.tanh(self.proj(x))
        return x if self.block is None else self.block(x)


class Nested(nn.Module):
    """Layers proj, block.proj and block.block.proj, whose names end in one another's, and a convolution."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 8)
        self.block = Block(Block())
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        images = torch.outer(x.flatten(), x.flatten())[None, None, :9, :9]
        return self.block(torch.tanh(self.proj(x))) + self.conv(images).mean()


def make(kind, folder):
    """The base model of a kind; Llamas come from ``folder``."""
    if kind == "nested":
        torch.manual_seed(7)
        return Nested()
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    extra = {}
    if kind == "4bit":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu" if extra else None, **extra)


def inputs(kind):
    generator = torch.Generator().manual_seed(5)
    if kind == "nested":
        return torch.randn(5, 6, generator=generator)
    return torch.randint(0, 48, (2, 12), generator=generator)


@torch.no_grad()
def answer(kind, model):
    out = model.eval()(inputs(kind))
    return out if isinstance(out, torch.Tensor) else out.logits.float()


def main(path):
    from peft import PeftModel

    warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
    warnings.filterwarnings(
        "ignore", message=".*kernels.*|.*gemm.*|.*float32.*quantiz.*|.*inputs will be cast.*"
    )
    answers = []
    for kind, base, adapter in torch.load(path):
        # An adapter that was trained in bf16 is compared in bf16; by default PEFT would load it as fp32.
        model = PeftModel.from_pretrained(make(kind, base), adapter, autocast_adapter_dtype=kind != "bf16")
        answers.append(answer(kind, model))
    torch.save(answers, f"{path}.answers")


if __name__ == "__main__":
    main(sys.argv[1])
