"""Extractive question answering: the span of a context that answers a question (Rajpurkar et al., "SQuAD", 2016; with
questions that have no answer, Rajpurkar et al., 2018)."""

import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.pipelines.base import ChunkPipeline

from ._lists import ListInputs

__all__ = ["QuestionAnsweringPipeline"]

_MAX_LENGTH, _STRIDE = 384, 128


@dataclass
class _Window:
    """A part of a context that fits the model. tokens: its encoding without padding; spans: bool (tokens,), True where
    an answer may begin or end; null: the position whose score means "no answer", or None."""

    context: str
    tokens: Any
    spans: torch.Tensor
    null: int | None


class QuestionAnsweringPipeline(ListInputs, ChunkPipeline):
    """answer = argmax over spans i <= j < i + max_answer_len of P(start = i) P(end = j).

    Call with question=..., context=..., a dict {"question", "context"}, a list, generator or dataset of such dicts, or
    lists for question and context (one context may serve several questions). A context longer than the model's
    window is read in windows that overlap by doc_stride tokens; probabilities are normalised within each window.

    The arguments are for the construction or for a call.

    Args:
        top_k: how many answers. Answers with the same text are merged, and their scores added.
        doc_stride: tokens that neighbouring windows share; default 128, at most half of max_seq_len.
        max_seq_len: tokens in a window, question included; default 384 or what the model takes.
        max_question_len: how many tokens of the question are read, default 64.
        max_answer_len: the largest number of tokens in an answer, default 15.
        handle_impossible_answer: allow the answer "", scored by the first token ([CLS]) as start and end; with several
            windows its lowest score is used.
        align_to_words: answers begin and end at words, default True.

    Returns:
        {"score": float, "start": int, "end": int, "answer": str} with context[start:end] == answer; with top_k above 1
        a list of them, best first; for several questions a list of these.

    Raises:
        ValueError: for an empty question or context, a missing key, or a value out of range.
        TypeError: for a tokenizer without character offsets.
    """

    default_input_names = "question,context"
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    list_batch_size = 16

    def __init__(self, *args, task: str = "question-answering", **kwargs):
        super().__init__(*args, task=task, **kwargs)
        if self.tokenizer is None or not self.tokenizer.is_fast:
            raise TypeError(
                "tokenizer: question-answering wants one with character offsets (a fast tokenizer), got "
                f"{type(self.tokenizer).__name__}"
            )

    def __call__(self, inputs: Any = None, *args, question=None, context=None, **kwargs):
        """See the class."""
        if question is not None or context is not None:
            if inputs is not None or args:
                raise ValueError("question, context: wanted by name or by position, got both")
            inputs = _paired(question, context)
        elif args:  # as in transformers 4: question, context, or several dicts
            inputs = _paired(inputs, *args) if isinstance(inputs, str) and len(args) == 1 else [inputs, *args]
        if inputs is None:
            raise ValueError("question, context: wanted both, got neither")
        if isinstance(inputs, (dict, list, tuple)) or hasattr(inputs, "question_text"):
            inputs = list(inputs) if isinstance(inputs, (list, tuple)) else inputs
            examples = [_example(x) for x in (inputs if isinstance(inputs, list) else [inputs])]
            inputs = examples[0] if len(examples) == 1 else examples
        elif not isinstance(inputs, (Dataset, types.GeneratorType)):
            if not isinstance(inputs, Iterable) or isinstance(inputs, str):
                raise ValueError(
                    "inputs: wanted a dict with question and context, or a list, generator or dataset of them, got "
                    f"{type(inputs).__name__}"
                )
            inputs = (x for x in inputs)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        padding: Any = None,
        topk: int | None = None,
        top_k: int | None = None,
        doc_stride: int | None = None,
        max_answer_len: int | None = None,
        max_seq_len: int | None = None,
        max_question_len: int | None = None,
        handle_impossible_answer: bool | None = None,
        align_to_words: bool | None = None,
    ):
        """padding has no effect (windows are padded when batched); topk is the name of top_k in transformers 4."""
        counts = {
            "top_k": topk if top_k is None else top_k,
            "doc_stride": doc_stride,
            "max_answer_len": max_answer_len,
            "max_seq_len": max_seq_len,
            "max_question_len": max_question_len,
        }
        given = {name: value for name, value in counts.items() if value is not None}
        for name, value in given.items():
            least = 0 if name == "doc_stride" else 1
            if value < least:
                raise ValueError(f"{name}: wanted at least {least}, got {value}")
        flags = {"handle_impossible_answer": handle_impossible_answer, "align_to_words": align_to_words}
        found = {name: given.pop(name) for name in ("top_k", "max_answer_len") if name in given}
        return given, {}, found | {name: value for name, value in flags.items() if value is not None}

    def preprocess(self, example, doc_stride=None, max_question_len=64, max_seq_len=None):
        """Yield the windows of one example."""
        example, tokenizer = _example(example), self.tokenizer
        length = min(tokenizer.model_max_length, _MAX_LENGTH) if max_seq_len is None else max_seq_len
        stride = min(length // 2, _STRIDE) if doc_stride is None else doc_stride
        question = tokenizer(example["question"], add_special_tokens=False, return_offsets_mapping=True)
        offsets = question["offset_mapping"][:max_question_len]
        text = example["question"][: offsets[-1][1]] if offsets else example["question"]
        room = length - len(offsets) - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= stride:
            raise ValueError(
                f"doc_stride: wanted less than the {room} tokens of context in a window (max_seq_len {length} less the "
                f"question's {len(offsets)} and special tokens), got {stride}"
            )
        first = tokenizer.padding_side == "right"  # the question comes first, as in training of models that pad so
        encoded = tokenizer(
            text if first else example["context"],
            example["context"] if first else text,
            truncation="only_second" if first else "only_first",
            max_length=length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        names = [name for name in tokenizer.model_input_names if name in encoded]
        for i, tokens in enumerate(encoded.encodings):
            ids = torch.tensor(tokens.ids)
            null = (ids == tokenizer.cls_token_id).nonzero() if tokenizer.cls_token_id is not None else ids[:0]
            spans = torch.tensor([which == int(first) for which in tokens.sequence_ids])
            window = _Window(example["context"], tokens, spans, int(null[0]) if len(null) else None)
            inputs = {name: torch.tensor([encoded[name][i]]) for name in names}
            yield {"is_last": i == len(encoded.encodings) - 1, "window": window, **inputs}

    def _forward(self, inputs):
        known = {name: inputs[name] for name in self.tokenizer.model_input_names if name in inputs}
        output = self.model(**known)
        return {
            "start": output.start_logits,
            "end": output.end_logits,
            "window": inputs["window"],
            "is_last": inputs["is_last"],
        }

    def postprocess(
        self, outputs, top_k=1, handle_impossible_answer=False, max_answer_len=15, align_to_words=True, **kwargs
    ):
        answers = self._answers(outputs, top_k, handle_impossible_answer, max_answer_len, align_to_words)
        self._advance()
        return answers[0] if len(answers) == 1 else answers

    def _answers(self, outputs, top_k, handle_impossible_answer, max_answer_len, align_to_words) -> list[dict]:
        found: dict[str, dict] = {}
        least_null = float("inf")
        candidates = 2 * top_k + 10 if align_to_words else top_k  # aligned to words, several may become equal
        for output in outputs:
            window = output["window"]
            n = len(window.spans)
            part = slice(-n, None) if self.tokenizer.padding_side == "left" else slice(n)
            start, end = (_probabilities(output[name][0][part], window) for name in ("start", "end"))
            if window.null is not None:
                least_null = min(least_null, float(start[window.null] * end[window.null]))
            for i, j, score in _best_spans(start, end, window.spans, candidates, max_answer_len):
                begin, stop = _characters(window.tokens, i, j, align_to_words)
                answer = window.context[begin:stop]
                same = found.get(answer.lower())
                if same is None:
                    found[answer.lower()] = {"score": score, "start": begin, "end": stop, "answer": answer}
                else:
                    same["score"] += score
        answers = list(found.values())
        if handle_impossible_answer or not answers:
            score = least_null if least_null <= 1 else 0.0
            answers.append({"score": score, "start": 0, "end": 0, "answer": ""})
        return sorted(answers, key=lambda answer: -answer["score"])[:top_k]


def _paired(question, context) -> list[dict]:
    if isinstance(question, str) and isinstance(context, str):
        return [{"question": question, "context": context}]
    if isinstance(question, (list, tuple)) and isinstance(context, str):
        context = [context] * len(question)
    if isinstance(question, (list, tuple)) and isinstance(context, (list, tuple)):
        if len(question) != len(context):
            raise ValueError(f"question, context: wanted as many of each, got {len(question)} and {len(context)}")
        return [{"question": q, "context": c} for q, c in zip(question, context)]
    came = ", ".join(type(x).__name__ for x in (question, context))
    raise ValueError(f"question, context: wanted both as text or lists of text, got {came}")


def _example(item) -> dict[str, str]:
    """The dict {"question", "context"} of one input."""
    if hasattr(item, "question_text") and hasattr(item, "context_text"):  # transformers 4's SquadExample
        item = {"question": item.question_text, "context": item.context_text}
    if not isinstance(item, dict):
        raise ValueError(f"inputs: wanted a dict with question and context, got {type(item).__name__}")
    for name in ("question", "context"):
        if name not in item:
            raise ValueError(f"{name}: is missing from {sorted(item)}")
        if not isinstance(item[name], str) or not item[name]:
            got = "an empty string" if item[name] == "" else type(item[name]).__name__
            raise ValueError(f"{name}: wanted text, got {got}")
    return {"question": item["question"], "context": item["context"]}


def _probabilities(logits: torch.Tensor, window: _Window) -> torch.Tensor:
    """Softmax in float64 over the context and the position that means "no answer"."""
    allowed = window.spans.clone()
    if window.null is not None:
        allowed[window.null] = True
    if not allowed.any():
        return torch.zeros(len(allowed), dtype=torch.float64)
    return logits.double().masked_fill(~allowed, -torch.inf).softmax(0)


def _best_spans(
    start: torch.Tensor, end: torch.Tensor, spans: torch.Tensor, count: int, longest: int
) -> list[tuple[int, int, float]]:
    """The `count` likeliest (first token, last token, score), best first."""
    longest = min(longest, len(start))
    start, end = start * spans, end * spans
    # scores[i, l]: the span from i to i + l; 0 where it begins or ends outside the context
    scores = start[:, None] * torch.nn.functional.pad(end, (0, longest - 1)).unfold(0, longest, 1)
    best = scores.flatten().topk(min(count, scores.numel()))
    return [
        (place // longest, place // longest + place % longest, score)
        for score, place in zip(best.values.tolist(), best.indices.tolist())
        if score > 0
    ]


def _characters(tokens, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """The character range of tokens first..last in the context."""
    begin, end = tokens.offsets[first][0], tokens.offsets[last][1]
    if align_to_words:
        which = tokens.sequence_ids[first]
        words = tokens.token_to_word(first), tokens.token_to_word(last)
        if None not in words:
            at = [tokens.word_to_chars(word, which) for word in words]
            begin, end = (at[0][0] if at[0] else begin), (at[1][1] if at[1] else end)
    return int(begin), int(end)
