"""Rows with the fields that the public data have, and jsonl files of them."""

import json

ROWS = {
    "alpaca": {"instruction": "Name {n} birds.", "input": "", "output": "A wren and {n} owls."},
    "alpaca-gpt4": {"instruction": "Name {n} birds.", "input": "", "output": "A wren and {n} owls."},
    "boolq": {"question": "is {n} a prime number", "answer": "true"},
    "dolly": {
        "instruction": "What is {n}?",
        "context": "Numbers.",
        "response": "A number.",
        "category": "qa",
    },
    "gsm8k": {"question": "What is {n} + 1?", "answer": "{n} + 1 is <<{n}+1>>.\n#### {n}1"},
    "qnli": {"question": "Who has {n}?", "sentence": "Ann has {n}.", "label": 0},
}


def rows(name, start, count):
    return [
        {k: v.format(n=n) if isinstance(v, str) else v for k, v in ROWS[name].items()}
        for n in range(start, start + count)
    ]


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path
