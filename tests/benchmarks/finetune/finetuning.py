"""A tiny model with a tokenizer of its own, data files, and the command, for the tests of `train`."""

import json

import torch
from public_rows import ROWS, rows, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.__main__ import main

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def local_copies(folder, name, train=40, test=12):
    write(folder / f"{name}_train.jsonl", rows(name, 0, train))
    write(folder / f"{name}_test.jsonl", rows(name, 1000, test))
    return f"{name}={folder}"


def make_tokenizer(template=TEMPLATE):
    """A byte-level BPE of 400 tokens, trained on the rows above."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bare.train_from_iterator([json.dumps(row) for name in ROWS for row in rows(name, 0, 60)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def save_model(folder, vocabulary=400):
    """A Llama of one layer; its inner width is no multiple of 32, as that of the embedded model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=144,
        vocab_size=vocabulary, max_position_embeddings=192, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


SHORT = ["--steps", "4", "--warmup", "1", "--batch-size", "2", "--accumulation", "2", "--eval-examples", "6"]
FEW = [
    "--generate-examples",
    "2",
    "--max-new-tokens",
    "4",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--rank",
    "4",
]


def train(model, dataset, out, *arguments, status=0):
    """Run the command, short; returns the metrics."""
    command = [
        "train",
        "--model",
        str(model),
        "--dataset",
        str(dataset),
        "--out",
        str(out),
        *SHORT,
        *FEW,
        *arguments,
    ]
    assert main(command) == status
    path = out / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
