"""Question answering, compared with answers computed by hand, by brute force over all spans, and by transformers'
search."""

import types

import pytest
import torch
import transformers
from transformers.modeling_outputs import QuestionAnsweringModelOutput
from transformers.pipelines.document_question_answering import select_starts_ends
from transformers.pipelines.pt_utils import KeyDataset

import transformer_fast

CONTEXT = "The capital of France is Paris, and the river there is the Seine."
LONG = " ".join(
    f"In the year {1000 + i} the capital of France was Paris, and the river was the Seine." for i in range(12)
)


def scored(pipe, starts: dict[str, float], ends: dict[str, float], otherwise=-5.0):
    """Make the model score each word piece by a table, so that answers can be computed by hand."""
    vocabulary = pipe.tokenizer.get_vocab()
    tables = []
    for given in (starts, ends):
        table = torch.full((len(vocabulary),), otherwise)
        for word, score in given.items():
            table[vocabulary[word]] = score
        tables.append(table)

    def forward(self, input_ids, **kwargs):
        return QuestionAnsweringModelOutput(start_logits=tables[0][input_ids], end_logits=tables[1][input_ids])

    pipe.model.forward = types.MethodType(forward, pipe.model)
    return pipe


@pytest.fixture
def pipe(checkpoint):
    return transformer_fast.pipeline("question-answering", checkpoint("ForQuestionAnswering"), device="cpu")


@pytest.mark.quick
def test_an_answer_by_hand(pipe):
    scored(pipe, {"paris": 10.0}, {"paris": 10.0})
    answer = pipe(question="What is the capital?", context=CONTEXT)
    assert set(answer) == {"score", "start", "end", "answer"}
    assert answer["answer"] == "Paris" == CONTEXT[answer["start"] : answer["end"]]
    # One piece has score 10, the other n have -5: [CLS] and the context's pieces.
    pieces = len(pipe.tokenizer(CONTEXT, add_special_tokens=False)["input_ids"])
    assert answer["score"] == pytest.approx((1 / (1 + pieces * torch.tensor(-15.0).exp().item())) ** 2, rel=1e-6)


def test_top_k_spans_and_their_order(pipe):
    scored(pipe, {"paris": 3.0, "river": 2.0}, {"paris": 3.0, "river": 2.0})
    answers = pipe(question="Which?", context=CONTEXT, top_k=3)
    assert [a["answer"] for a in answers][:2] == ["Paris", "Paris, and the river"]
    assert [a["score"] for a in answers] == sorted((a["score"] for a in answers), reverse=True)
    short = pipe(question="Which?", context=CONTEXT, top_k=2, max_answer_len=3)
    assert [a["answer"] for a in short] == ["Paris", "river"]
    assert pipe(question="Which?", context=CONTEXT, topk=2, max_answer_len=3) == short


@pytest.mark.quick
def test_no_answer(pipe):
    scored(pipe, {"[CLS]": 9.0, "paris": 5.0}, {"[CLS]": 9.0, "paris": 5.0})
    sure = pipe(question="Which?", context=CONTEXT)
    assert sure["answer"] == "Paris"
    none = pipe(question="Which?", context=CONTEXT, handle_impossible_answer=True)
    assert none["answer"] == "" and none["start"] == none["end"] == 0 and none["score"] > 0.9
    both = pipe(question="Which?", context=CONTEXT, handle_impossible_answer=True, top_k=2)
    assert [a["answer"] for a in both] == ["", "Paris"] and both[0]["score"] == none["score"]
    blank = pipe(question="Which?", context="   ")
    assert blank == {"score": pytest.approx(1.0), "start": 0, "end": 0, "answer": ""}


def test_words_are_not_cut(pipe):
    context = "It is riverparis that counts."
    pieces = pipe.tokenizer.tokenize("riverparis")
    assert len(pieces) > 1
    scored(pipe, {pieces[1]: 9.0}, {pieces[1]: 9.0})
    assert pipe(question="What?", context=context)["answer"] == "riverparis"
    cut = pipe(question="What?", context=context, align_to_words=False)["answer"]
    assert cut and cut in "riverparis" and len(cut) < len("riverparis")


def test_equal_answers_add_up(pipe):
    context = "Paris is Paris."
    scored(pipe, {"paris": 5.0}, {"paris": 5.0}, otherwise=-20.0)
    merged = pipe(question="Which?", context=context, top_k=2, max_answer_len=1)
    merged = merged if isinstance(merged, dict) else merged[0]
    assert merged["answer"] == "Paris" and merged["score"] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.quick
def test_long_contexts_are_read_in_windows(pipe):
    context = LONG + " Nobody knows Warsaw."
    scored(pipe, {"warsaw": 10.0}, {"warsaw": 10.0})
    answer = pipe(question="Where?", context=context)
    assert answer["answer"] == "Warsaw" == context[answer["start"] : answer["end"]]
    seen = [c["window"].tokens.offsets for c in pipe.preprocess({"question": "Where?", "context": context}, 7, 64, 32)]
    assert len(seen) > 5
    covered = set()
    for offsets in seen:
        covered.update(c for begin, end in offsets for c in range(begin, end))
    assert all(i in covered for i, c in enumerate(context) if not c.isspace())


@pytest.mark.parametrize("impossible", [False, True])
@pytest.mark.parametrize("stride, length", [(8, 40), (None, None), (16, 64)])
def test_as_transformers_span_search(pipe, impossible, stride, length):
    """A random model over windows: scores and positions equal those of transformers' search in each window."""
    question, top = "what is the river there?", 4
    found = pipe(
        question=question, context=LONG, doc_stride=stride, max_seq_len=length, top_k=top, align_to_words=False,
        handle_impossible_answer=impossible, max_answer_len=6,
    )  # fmt: skip
    encoded = pipe.tokenizer(
        question, LONG, truncation="only_second", max_length=length or 64, stride=32 if stride is None else stride,
        return_overflowing_tokens=True, return_offsets_mapping=True, padding=True, return_tensors="pt",
    )  # fmt: skip
    offsets = encoded.pop("offset_mapping")
    encoded.pop("overflow_to_sample_mapping")
    theirs = transformers.BertForQuestionAnswering.from_pretrained(pipe.model.config._name_or_path)
    with torch.no_grad():
        output = theirs(**encoded)
    expected, null = {}, 1000000
    for i in range(len(offsets)):
        p_mask = [[0 if t == 1 or j == 0 else 1 for j, t in enumerate(encoded.sequence_ids(i))]]
        starts, ends, scores, null = select_starts_ends(
            output.start_logits[i : i + 1].numpy(), output.end_logits[i : i + 1].numpy(), p_mask,
            encoded["attention_mask"][i : i + 1].numpy(), null, top, impossible, 6,
        )  # fmt: skip
        for s, e, score in zip(starts, ends, scores):
            text = LONG[offsets[i, s, 0] : offsets[i, e, 1]]
            at = expected.setdefault(text.lower(), [0.0, int(offsets[i, s, 0]), int(offsets[i, e, 1])])
            at[0] += score
    ranked = sorted(([*v, k] for k, v in expected.items()), reverse=True)
    ranked = sorted([*ranked, [null, 0, 0, ""]], reverse=True) if impossible else ranked
    for answer, (score, start, end, text) in zip(found, ranked[:top]):
        assert answer["score"] == pytest.approx(float(score), rel=1e-3)
        assert (answer["start"], answer["end"], answer["answer"].lower()) == (start, end, text)


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_give_what_single_questions_give(pipe, texts, side):
    pipe.tokenizer.padding_side = side
    if side == "left":  # here BERT's own scores depend on the padding, through its positions
        words = pipe.tokenizer.get_vocab()
        scored(pipe, *({word: score.item() for word, score in zip(words, torch.randn(len(words)))} for _ in range(2)))
    try:
        examples = [{"question": "where is the river?", "context": text} for text in [*texts, LONG]]
        alone = [pipe(example) for example in examples]
        for batched in (
            pipe(examples, batch_size=5),
            pipe(examples),
            list(pipe(e for e in examples)),
            list(pipe(KeyDataset([{"x": e} for e in examples], "x"))),
            pipe(question=["where is the river?"] * len(examples), context=[e["context"] for e in examples]),
        ):
            assert [a["answer"] for a in batched] == [a["answer"] for a in alone]
            assert [a["score"] for a in batched] == pytest.approx([a["score"] for a in alone], rel=1e-3)
        assert pipe([examples[0]]) == alone[0]
    finally:
        pipe.tokenizer.padding_side = "right"


def test_one_context_for_several_questions(pipe):
    many = pipe(question=["who?", "where?"], context=CONTEXT)
    assert many == [pipe("who?", CONTEXT), pipe({"question": "where?", "context": CONTEXT})]
    old = types.SimpleNamespace(question_text="who?", context_text=CONTEXT)
    assert pipe(old) == many[0]


@pytest.mark.parametrize(
    "call, message",
    [
        ({}, "question, context: wanted both, got neither"),
        ({"question": "who?"}, "question, context: wanted both as text"),
        ({"question": "", "context": "x"}, "question: wanted text, got an empty string"),
        ({"question": "who?", "context": ""}, "context: wanted text, got an empty string"),
        ({"inputs": {"question": "who?"}}, r"context: is missing from \['question'\]"),
        ({"inputs": [{"question": "who?", "context": None}]}, "context: wanted text, got NoneType"),
        ({"inputs": "who?"}, "inputs: wanted a dict with question and context"),
        ({"question": ["a", "b"], "context": ["c"]}, "wanted as many of each, got 2 and 1"),
        ({"question": "who?", "context": "x", "top_k": 0}, "top_k: wanted at least 1, got 0"),
        ({"question": "who?", "context": "x", "max_answer_len": 0}, "max_answer_len: wanted at least 1, got 0"),
        ({"question": "who?", "context": "x", "max_seq_len": 20, "doc_stride": 18}, "doc_stride: wanted less than the"),
    ],
)
def test_bad_input(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_nothing_gives_nothing(pipe):
    assert pipe([]) == []


def test_a_long_question_is_cut(pipe):
    question = "who " * 80
    assert pipe(question=question, context=CONTEXT, max_question_len=5) == pipe("who " * 5, CONTEXT)
