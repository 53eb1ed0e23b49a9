"""Rows of public instruction data as a prompt and its answer, in Alpaca's sections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
Texts = tuple[str, str]  # prompt, answer

_TASK = "Below is an instruction that describes a task"
_PREAMBLE = f"{_TASK}. Write a response that appropriately completes the request.\n\n"
_PREAMBLE_WITH_INPUT = (
    f"{_TASK}, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


def sections(instruction: str, given: str = "", heading: str = "Input") -> str:
    """A prompt: the instruction, a section with what is given if there is any, and the response's heading."""
    middle = f"### {heading}:\n{given.strip()}\n\n" if given.strip() else ""
    return f"### Instruction:\n{instruction.strip()}\n\n{middle}### Response:\n"


def as_message(prompt: str) -> str:
    """What a chat model is asked instead of Alpaca's sections: their text without the headings around it.

    A section with what is given follows the instruction as a paragraph of its own.
    """
    _, found, rest = prompt.partition("### Instruction:\n")
    if not found or not rest.endswith("\n\n### Response:\n"):
        return prompt
    return re.sub(r"\n\n### (?:Input|Context):\n", "\n\n", rest.removesuffix("\n\n### Response:\n"), count=1)


def alpaca(row: Row) -> Texts:
    """Alpaca's own prompt, with its opening sentences."""
    preamble = _PREAMBLE_WITH_INPUT if row["input"].strip() else _PREAMBLE
    return preamble + sections(row["instruction"], row["input"]), row["output"].strip()


def dolly(row: Row) -> Texts:
    """Instruction, context where there is one, response."""
    return sections(row["instruction"], row["context"], "Context"), row["response"].strip()


def gsm8k(row: Row) -> Texts:
    """The question; the answer is the worked solution, its last line `#### number` included."""
    return sections(row["question"]), row["answer"].strip()


def boolq(row: Row) -> Texts:
    """The question, after its passage where the copy has one (the hub's has); the answer is Yes or No."""
    instruction = f"Answer the question with Yes or No.\n{row['question'].strip()}?".replace("??", "?")
    return sections(instruction, row.get("passage", "")), _label(
        row, "answer", {"true": "Yes", "false": "No"}
    )


def qnli(row: Row) -> Texts:
    """Question and sentence; the answer says whether the sentence answers the question (GLUE's label 0)."""
    given = f"Question: {row['question'].strip()}\nSentence: {row['sentence'].strip()}"
    labels = {"0": "Yes", "entailment": "Yes", "1": "No", "not_entailment": "No"}
    return sections("Does the sentence answer the question? Answer with Yes or No.", given), _label(
        row, "label", labels
    )


def _label(row: Row, field: str, names: dict[str, str]) -> str:
    value = str(row[field]).lower()
    if value not in names:
        raise ValueError(f"{field} is {row[field]!r}, not one of {', '.join(names)}")
    return names[value]
