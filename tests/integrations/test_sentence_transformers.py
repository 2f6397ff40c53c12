"""sentence-transformers' models made fast in place: the same embeddings, scores and gradients."""

import copy
import importlib.util

import pytest
import torch
import transformers as hf
from encoder_cases import encoder_config
from numerics import GRADIENT, OUTPUT, assert_as_accurate, pooled

import transformer_fast
from transformer_fast.demo.checkpoint import load_sentences, locate

if importlib.util.find_spec("sentence_transformers") is None:
    pytest.skip("sentence-transformers is not installed: see CONTRIBUTING.md", allow_module_level=True)
import datasets
import sentence_transformers as st

TEXTS = [*load_sentences()[:10], "Short.", ""]
PAIRS = list(zip(TEXTS, reversed(TEXTS)))
FAST = "transformer_fast.{}".format


@pytest.fixture
def minilm():
    return st.SentenceTransformer(str(locate()), device="cpu")


@pytest.fixture
def small(tmp_path):
    """small("RobertaForMaskedLM") returns the folder of a tiny random model with MiniLM's tokenizer."""

    def make(name: str, **changes) -> str:
        family = name.partition("For")[0].removesuffix("Model")
        config = encoder_config(family, vocab_size=30522, max_position_embeddings=160, pad_token_id=0, **changes)
        getattr(hf, name)(config).save_pretrained(tmp_path)
        hf.AutoTokenizer.from_pretrained(locate()).save_pretrained(tmp_path)
        return str(tmp_path)

    return make


def made_fast(model, path: str, name: str):
    report = transformer_fast.accelerate(model, verbose=False)
    assert report.swapped == {path: FAST(name)} and not report.left
    assert "the fast path" in transformer_fast.explain(model)
    return report


def truth_of(model):
    return copy.deepcopy(model).double()


def embeddings(model, **options) -> torch.Tensor:
    return torch.as_tensor(model.encode(TEXTS, **options))


def test_the_real_model(minilm):
    def tokens(model):
        return torch.cat(model.encode(TEXTS, output_value="token_embeddings"))

    truth = truth_of(minilm)
    wanted, wanted_tokens = embeddings(minilm), tokens(minilm)
    report = made_fast(minilm, "0.model", "BertModel")
    assert_as_accurate(embeddings(minilm, batch_size=5), embeddings(truth, convert_to_tensor=True), wanted)
    assert_as_accurate(tokens(minilm), tokens(truth), wanted_tokens)
    report.undo()
    assert torch.equal(embeddings(minilm), wanted)


def test_encoded_by_other_processes(minilm):
    truth, wanted = embeddings(truth_of(minilm), convert_to_tensor=True), embeddings(minilm)
    made_fast(minilm, "0.model", "BertModel")
    pool = minilm.start_multi_process_pool(["cpu"])  # the model is pickled for the process
    try:
        found = embeddings(minilm, pool=pool)
    finally:
        minilm.stop_multi_process_pool(pool)
    assert_as_accurate(found, truth, wanted)


@pytest.mark.parametrize("family", ["Roberta", "MPNet", "Electra"])
@torch.no_grad()
def test_kinds_of_pooling(family, small):
    """No pooling reads the zeros at padding."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    model = st.SentenceTransformer(modules=[Transformer(small(f"{family}Model"))], device="cpu")
    kinds = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    poolings = [Pooling(model[0].get_embedding_dimension(), kind) for kind in kinds]

    def pooled_by_each(transformer):
        states = transformer(dict(batch))
        return torch.stack([pool(dict(states))["sentence_embedding"] for pool in poolings])

    batch, truth = model.preprocess(TEXTS), truth_of(model)
    wanted = pooled_by_each(model[0])
    made_fast(model, "0.model", f"{family}Model")
    found, exact = pooled_by_each(model[0]), pooled_by_each(truth[0])
    for kind, *parts in zip(kinds, found, exact, wanted):
        assert_as_accurate(*parts, name=kind)


@pytest.mark.parametrize("family", ["Roberta", "Bert"])
def test_cross_encoder(family, small):
    model = st.CrossEncoder(small(f"{family}ForSequenceClassification", num_labels=1), device="cpu")
    truth, wanted = (m.predict(PAIRS, convert_to_tensor=True) for m in (truth_of(model), model))
    made_fast(model, "0.model", f"{family}ForSequenceClassification")
    assert_as_accurate(model.predict(PAIRS, batch_size=5, convert_to_tensor=True), truth, wanted)
    ranked = model.rank(TEXTS[0], TEXTS, top_k=3)
    assert len(ranked) == 3


def test_sparse_encoder(small):
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    transformer = Transformer(small("DistilBertForMaskedLM"), transformer_task="fill-mask")
    model = st.SparseEncoder(modules=[transformer, SpladePooling()], device="cpu")
    truth, wanted = (m.encode(TEXTS).to_dense() for m in (truth_of(model), model))
    made_fast(model, "0.model", "DistilBertForMaskedLM")
    found = model.encode(TEXTS, batch_size=5).to_dense()
    assert found.shape == (len(TEXTS), 30522)
    assert_as_accurate(found, truth, wanted)


def test_gradients_of_a_loss_of_theirs(small):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder, found, lines = small("RobertaModel"), [], load_sentences()
    for kind in ("ours", "theirs", "truth"):
        transformer = Transformer(folder)
        model = st.SentenceTransformer(modules=[transformer, Pooling(48, "mean")], device="cpu")
        if kind == "ours":
            made_fast(model, "0.model", "RobertaModel")
        elif kind == "truth":
            model.double()
        model.train()  # dropout is 0
        loss_of, losses, gradients = MultipleNegativesRankingLoss(model), [], {}
        for draw in range(4):  # the error of a single loss depends on chance
            model.zero_grad()
            loss = loss_of([model.preprocess(lines[i : i + 5]) for i in (10 * draw, 10 * draw + 5)], None)
            loss.backward()
            losses.append(loss.detach())
            gradients |= {(draw, n): p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((torch.stack(losses), gradients))
    ours, theirs, truth = found
    assert ours[1].keys() == theirs[1].keys()
    assert_as_accurate(ours[0], truth[0], theirs[0], OUTPUT)
    flat = [pooled(gradients, truth[1]) for _, gradients in found]
    assert_as_accurate(flat[0], flat[2], flat[1], GRADIENT)


def test_trainer(small, tmp_path):
    """Training has the same result as with transformers' model, and saved files load again."""
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    data = datasets.Dataset.from_dict({"a": TEXTS[:4], "b": TEXTS[2:6], "label": [0.0, 1.0] * 2})
    folder, losses = small("MPNetModel"), []
    for name in ("theirs", "ours"):
        model = st.SentenceTransformer(modules=[Transformer(folder), Pooling(48, "mean")], device="cpu")
        if name == "ours":
            made_fast(model, "0.model", "MPNetModel")
        arguments = st.SentenceTransformerTrainingArguments(
            str(tmp_path / name), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
            logging_steps=1, learning_rate=1e-3, seed=3, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = st.SentenceTransformerTrainer(model, arguments, data, loss=CosineSimilarityLoss(model))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    model.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert type(again[0].model) is hf.MPNetModel
    assert_as_accurate(embeddings(model), embeddings(truth_of(again), convert_to_tensor=True), embeddings(again))
