"""The raw data sets: what their rows look like, and how a row becomes messages, or plain text.

Facts (file names, senders, labels, prompt texts) of six of them are those of the published recipe, so that the rows
which both accept are equal: same ``dataset`` label, same ``id``, same messages in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from router_tuning.data.acceptance import Content, Reject, conversation, json_type

Row = Mapping[str, object]
Converter = Callable[[Row], Content]

_HUMAN_AND_GPT = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"}
_WITH_SYSTEM = {**_HUMAN_AND_GPT, "system": "system"}
_WITH_BARD = {**_HUMAN_AND_GPT, "bard": "assistant", "system": "system"}


@dataclass(frozen=True)
class Format:
    """A raw data set.

    ``label`` is the published name that rows carry, ``raw_file`` the published file, ``columns`` the fields that are
    read, and ``convert`` maps a row (a parsed JSON object) to its checked content or raises :class:`Reject`.
    """

    label: str
    raw_file: str
    columns: tuple[str, ...]
    convert: Converter


def _conversation(senders: Mapping[str, str], filtered: Mapping[str, str]) -> Converter:
    """Rows ``{"conversations": [{"from", "value"}, …]}``; ``filtered``: senders whose rows are left out, and why."""

    def convert(row: Row) -> Content:
        turns = _field(row, "conversations", list)
        try:
            messages = [{"role": senders[turn["from"]], "content": turn["value"]} for turn in turns]
        except (KeyError, TypeError):
            raise _fault(turns, senders, filtered) from None
        return conversation(messages)

    return convert


def _fault(turns: list, senders: Mapping[str, str], filtered: Mapping[str, str]) -> Reject:
    """What keeps turns from being a conversation."""
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            return Reject("wrong_type", f"turn {number} is {json_type(turn)}, not an object")
        sender = _field(turn, "from", str, f"turn {number}: ")
        if sender in filtered:
            return Reject(filtered[sender], f"turn {number} is from {sender!r}")
        if sender not in senders:
            return Reject("unknown_sender", f"turn {number} is from {sender!r}; known: {', '.join(senders)}")
        _field(turn, "value", str, f"turn {number}: ")
    raise AssertionError("sound turns are converted")


def _field(holder: Row, key: str, kind: type, where: str = "") -> object:
    if key not in holder:
        raise Reject("missing_field", f"{where}no {key!r}")
    if not isinstance(holder[key], kind):
        wanted = json_type(kind())
        raise Reject("wrong_type", f"{where}{key!r} is {json_type(holder[key])}, not {wanted}")
    return holder[key]


def _pair(question: str, answer: str) -> Converter:
    """Rows of a question and an answer: one exchange."""

    def convert(row: Row) -> Content:
        user, assistant = _field(row, question, str), _field(row, answer, str)
        return _exchange(user, assistant)

    return convert


def _exchange(user: str, assistant: str) -> Content:
    return conversation([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])


def _text(row: Row) -> Content:
    """A document as it is."""
    text = _field(row, "text", str)
    if not text.strip():
        raise Reject("empty_turn", "'text' is blank")
    return {"prompt": "", "completion": text}


def _alpaca(row: Row) -> Content:
    """Instruction and output; an input that is not the empty string follows the instruction on a line of its own."""
    instruction, output = _field(row, "instruction", str), _field(row, "output", str)
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise Reject("wrong_type", f"'input' is {json_type(given)}, not a string")
    user = f"{instruction}\nInput: {given}\n" if given else instruction
    return _exchange(user, output)


_TURNS, _MATH, _CODE = ("conversations",), ("query", "response"), ("instruction", "output")

FORMATS = {
    "vicuna_sharegpt": Format(
        "ShareGPT_Vicuna_unfiltered",
        "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json",
        _TURNS,
        _conversation(_WITH_BARD, {"bing": "bing_sender"}),
    ),
    "evol_instruct": Format(
        "WizardLM_evol_instruct_V2_143k",
        "WizardLM_evol_instruct_V2_143k.json",
        _TURNS,
        _conversation(_HUMAN_AND_GPT, {"bing": "bing_sender", "system": "system_turn"}),
    ),
    "slim_orca": Format("SlimOrca", "oo-labeled_correct.gpt4.sharegpt.jsonl", _TURNS, _conversation(_WITH_SYSTEM, {})),
    "meta_math_qa": Format("MetaMathQA", "MetaMathQA-395K.json", _MATH, _pair(*_MATH)),
    "evol_code_alpaca": Format("evol_codealpaca_v1", "train.jsonl", _CODE, _pair(*_CODE)),
    "alpaca": Format("alpaca", "alpaca_data.json", ("instruction", "input", "output"), _alpaca),
    "c4": Format("c4", "c4-train.00000-of-01024.json", ("text",), _text),
}
"""The data sets by folder name: the six published ones, and plain text."""
