"""Pairs of text for pre-training: next-sentence prediction (BERT) and sentence order prediction (ALBERT).

transformers' own collator adds the masking; it takes these pairs directly:

>>> pairs = sentence_pairs(documents, tokenizer)
>>> batch = transformers.DataCollatorForLanguageModeling(tokenizer)(pairs[:8])
>>> model = transformer_fast.BertForPreTraining(config)
>>> loss = model(**batch).loss
"""

import random
from collections.abc import Iterator, Sequence

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

__all__ = ["sentence_pairs"]

_LABELS = {"next_sentence": "next_sentence_label", "sentence_order": "sentence_order_label"}


def sentence_pairs(
    documents: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: str = "next_sentence",
    max_length: int = 128,
    short_probability: float = 0.1,
    seed: int = 0,
) -> list[dict]:
    """Make pairs of segments (A, B) from documents. The result is the same for the same seed.

    Args:
        documents: a list of documents, each a list of sentences.
        tokenizer: a fast tokenizer.
        objective: "next_sentence": B follows A (label 0) or, half the time, comes from another document (label 1); the
            label's key is next_sentence_label. "sentence_order": B follows A (0) or they are swapped (1); the key is
            sentence_order_label. Sentences that a random B replaces are used in the next pair.
        max_length: maximum number of tokens of a pair, special tokens included.
        short_probability: fraction of the pairs that are made shorter, down to two tokens of text, so that models see
            short pairs too.
        seed: seed of the random draws.

    Returns:
        A list of dicts with "input_ids", "token_type_ids" and "special_tokens_mask" (lists of int) and the label (int).

    Raises:
        ValueError: for an unknown objective, next_sentence with fewer than two documents, or a max_length that is too
            small.
        TypeError: if the tokenizer is not a fast one, or if the documents are not lists of sentences.

    Source:
        Devlin et al., "BERT", 2019, appendix A.2; Lan et al., "ALBERT", 2020, section 3.1.

    Examples:
        >>> import transformer_fast
        >>> from transformer_fast.demo import locate
        >>> tokenizer = transformer_fast.AutoTokenizer.from_pretrained(locate())
        >>> documents = [["It rained.", "They stayed in."], ["Ships sailed.", "None came back."]]
        >>> sorted(transformer_fast.sentence_pairs(documents, tokenizer)[0])
        ['input_ids', 'next_sentence_label', 'special_tokens_mask', 'token_type_ids']
    """
    if objective not in _LABELS:
        raise ValueError(f"objective: wanted {' or '.join(map(repr, _LABELS))}, got {objective!r}")
    if not tokenizer.is_fast:
        raise TypeError(f"tokenizer: wanted a fast one, got {type(tokenizer).__name__}")
    if isinstance(documents, str) or any(isinstance(document, str) for document in documents):
        raise TypeError("documents: wanted a list of documents, each a list of sentences, got text in place of a list")
    tokens = [[found for s in document if len(found := _encode(tokenizer, s))] for document in documents]
    tokens = [document for document in tokens if document]
    if objective == "next_sentence" and len(tokens) < 2:
        raise ValueError(f"documents: next_sentence needs at least 2 with text, got {len(tokens)}")
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 2:
        raise ValueError(f"max_length: wanted at least {max_length - room + 2}, got {max_length}")
    draw = random.Random(seed)
    pairs = []
    for number in range(len(tokens)):
        for a, b, label in _document_pairs(tokens, number, room, short_probability, objective, draw):
            both = tokenizer.backend_tokenizer.post_process(a, b)
            row = {"input_ids": both.ids, "token_type_ids": both.type_ids}
            pairs.append({**row, "special_tokens_mask": both.special_tokens_mask, _LABELS[objective]: label})
    return pairs


def _encode(tokenizer, text: str) -> Encoding:
    return tokenizer(text, add_special_tokens=False).encodings[0]


def _document_pairs(tokens, number: int, room: int, short: float, objective: str, draw) -> Iterator[tuple]:
    document = tokens[number]
    at = 0
    while at < len(document):
        goal = draw.randint(2, room) if draw.random() < short else room
        chunk: list = []
        size = 0
        while at < len(document) and (size < goal or not chunk):
            chunk.append(document[at])
            size += len(document[at])
            at += 1
        cut = draw.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
        a, rest = Encoding.merge(chunk[:cut]), chunk[cut:]
        label = int(draw.random() < 0.5)
        if objective == "next_sentence" and (label or not rest):
            label, at = 1, at - len(rest)  # the replaced sentences are used again
            b = _elsewhere(tokens, number, goal - len(a), draw)
        elif not rest:
            continue  # a single sentence has no order
        else:
            b = Encoding.merge(rest)
            a, b = (b, a) if label else (a, b)
        yield (*_fitted(a, b, goal, draw), label)


def _elsewhere(tokens, number: int, goal: int, draw) -> Encoding:
    """Sentences from a random place in another document, at least `goal` tokens if there are as many."""
    other = draw.randrange(len(tokens) - 1)
    document = tokens[other + (other >= number)]
    found, size = [], 0
    for sentence in document[draw.randrange(len(document)) :]:
        found.append(sentence)
        size += len(sentence)
        if size >= goal:
            break
    return Encoding.merge(found)


def _fitted(a: Encoding, b: Encoding, room: int, draw) -> tuple[Encoding, Encoding]:
    """Truncate a and b to `room` tokens together: the longer one loses tokens, at its beginning or end at random."""
    lost = {"a": [0, 0], "b": [0, 0]}  # at the beginning, at the end
    left = {"a": len(a), "b": len(b)}
    while left["a"] + left["b"] > room:
        longer = "a" if left["a"] > left["b"] else "b"
        left[longer] -= 1
        lost[longer][draw.random() < 0.5] += 1
    for encoding, (beginning, end) in ((a, lost["a"]), (b, lost["b"])):
        size = len(encoding) - beginning
        encoding.truncate(size, direction="left")
        encoding.truncate(size - end, direction="right")
    return a, b
