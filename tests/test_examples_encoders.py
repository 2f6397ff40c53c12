"""The examples on encoders and GPT-2, shortened and with a tiny random checkpoint: what they print, save and draw."""

import importlib.util
import pathlib
import random
import re
import sys
import types

import pytest
import torch
import transformers
from tokenizers import BertWordPieceTokenizer

import transformer_fast as tf

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny BERT with a WordPiece tokenizer trained on the examples' own data."""
    folder = tmp_path_factory.mktemp("checkpoint")
    made = BertWordPieceTokenizer()
    files = [str(EXAMPLES / "data" / name) for name in ("entities.conll", "questions.json", "reviews.tsv")]  # English
    made.train(files, vocab_size=600, show_progress=False)
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    made.save(str(folder / "tokenizer.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), model_max_length=256,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def load(monkeypatch):
    """An example as a module."""

    def start(name: str):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return start


@pytest.fixture
def run(checkpoint, load, tmp_path, capsys):
    """Run an example's main with arguments; (its result, what it printed, its output folder)."""

    def start(name: str, *arguments: str):
        module = load(name)
        given = ["--checkpoint", str(checkpoint), "--output", str(tmp_path), *arguments]
        return module.main(module.parse(given)), capsys.readouterr().out, tmp_path

    return start


def is_picture(path: pathlib.Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_sentence_features(run):
    results, printed, folder = run("sentence_features")
    assert len(results) == 12 and all(0 <= value <= 1 for value in results.values())
    assert max(results.values()) > 0.6  # words alone tell praise from complaint
    assert "BertModel, 4 layers; 300 reviews" in printed and printed.count("accuracy") == 12
    assert is_picture(folder / "sentence_features.png")


@pytest.mark.parametrize("flags", [[], ["--freeze"]], ids=["both", "freeze"])
def test_finetune_classifier(flags, run):
    results, printed, folder = run("finetune_classifier", "--limit", "60", "--epochs", "2", *flags)
    assert list(results) == (["pooler and head"] if flags else ["all weights", "pooler and head"])
    assert "1,122 of" in printed  # the pooler's 32 x 32 weights and 32 biases, the head's 2 x 32 and 2
    frequent = re.search(r"accuracy on 20 held-out reviews \(always the more frequent class: ([.\d]+)%\)", printed)
    assert 50 <= float(frequent[1]) < 100
    for (way, (before, after)), name in zip(reversed(results.items()), ("frozen", "model")):
        assert f"  {way:16} {before:.1%} -> {after:.1%}\n" in printed
        model = tf.AutoModelForSequenceClassification.from_pretrained(folder / name)
        assert model.config.id2label == {0: "negative", 1: "positive"}
    assert is_picture(folder / "learning_curve.png")


def test_frozen_weights_stay(checkpoint, run):
    _, _, folder = run("finetune_classifier", "--limit", "48", "--epochs", "1", "--freeze")
    was = tf.AutoModelForSequenceClassification.from_pretrained(checkpoint).state_dict()
    now = tf.AutoModelForSequenceClassification.from_pretrained(folder / "frozen").state_dict()
    changed = {name for name in was if not torch.equal(was[name], now[name])}
    assert changed == {name for name in was if name.startswith(("bert.pooler.", "classifier."))}


def test_name_tagging(run):
    share, printed, folder = run("name_tagging", "--limit", "120", "--epochs", "6", "--lr", "5e-3")
    assert f"{share:.1%} of" in printed and share > 0.75
    assert is_picture(folder / "name_tagging.png")
    assert tf.AutoModelForTokenClassification.from_pretrained(folder / "model").config.label2id["B-PER"] == 1


def test_reading_answers(run):
    results, printed, folder = run("reading_answers", "--steps", "6", "--batch-size", "8", "--test", "8")
    assert list(results) == ["alone", "joined"]
    for (exact, f1), where in zip(results.values(), ("on single biographies", "on one text of")):
        assert 0 <= exact <= f1 <= 1
        line = next(line for line in printed.splitlines() if f"8 held-out questions {where}" in line)
        assert f"{exact:.1%} answered exactly, F1 {f1:.1%}" in line
    tokens = int(printed.split("one text of ")[1].split()[0])
    assert tokens > 600 and printed.count("characters") == 6  # more than a window
    assert "Where was Marie Curie born?" in printed
    assert is_picture(folder / "reading_answers.png")
    assert (folder / "model" / "model.safetensors").is_file()


def test_answers_are_where_the_data_say(load):
    module = load("reading_answers")
    rows = module.read(module.DATA)
    assert len(rows) == 800
    rng = random.Random(0)
    for row in rows:
        assert row["context"][row["start"] :].startswith(row["answer"])
        joined = module.join(row, [other["context"] for other in rng.sample(rows, 3)], rng)
        assert joined["context"][joined["start"] :].startswith(row["answer"]) and row["context"] in joined["context"]
    places = {module.join(rows[0], ["One.", "Two."], rng)["context"].index(rows[0]["context"]) for _ in range(50)}
    assert places == {0, len("One. "), len("One. Two. ")}


def test_windows_point_at_the_answer_or_at_the_first_token(checkpoint, load):
    module, rng = load("reading_answers"), random.Random(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    rows = module.read(module.DATA)
    others = [row["context"] for row in rows if row["context_id"] > 90][::8]
    for row in rows[:240:16]:
        batch = module.encode([module.join(row, others, rng)], tokenizer)
        assert len(batch["input_ids"]) > 4 and batch["input_ids"].shape[1] == module.WINDOW
        spans = zip(batch["input_ids"], batch["start_positions"], batch["end_positions"])
        found = [tokenizer.decode(ids[i : j + 1]).replace(" ", "") if i else None for ids, i, j in spans]
        assert set(found) == {row["answer"].lower().replace(" ", ""), None}
        assert sum(answer is not None for answer in found) <= 3  # windows share less than half
    for lives in range(4):
        chosen = module.sample(rows, tokenizer, 12, lives, rng)
        assert {len(value) for value in chosen.values()} == {12}


def test_f1_counts_shared_words(load):
    f1 = load("reading_answers").f1
    assert f1("New Delhi", "new delhi") == 1 and f1("", "Delhi") == 0
    assert f1("in New Delhi", "Delhi") == 2 * 1 / (3 + 1)


def test_pretrain_new_language(run):
    (before, after), printed, folder = run("pretrain_new_language", "--steps", "40", "--lr", "5e-3")
    assert f"loss of 21 held-out sentences: {before:.3f} -> {after:.3f}, perplexity" in printed
    assert after < 0.95 * before
    assert is_picture(folder / "pretrain_new_language.png")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = tf.BertForMaskedLM.from_pretrained(folder / "model")
    assert model.config.vocab_size == len(tokenizer) == len(model.get_output_embeddings().bias)
    assert tokenizer("La ĉevalo kuras.").tokens()[:2] == ["[CLS]", "la"]
    assert "[UNK]" not in tokenizer("La ĉevalo kuras.").tokens()


def test_new_vocabulary_keeps_the_shared_embeddings(checkpoint, load):
    example = load("pretrain_new_language")
    known, held_out = example.read(example.DATA)
    assert len(known) + len(held_out) == 162 and not set(known) & set(held_out)
    for question in example.QUESTIONS:  # with no word filled in is it a sentence of the file
        parts = re.compile(r"\w+".join(map(re.escape, question.split("[MASK]"))))
        assert not any(map(parts.fullmatch, known + held_out))
    old, new = transformers.AutoTokenizer.from_pretrained(checkpoint), example.build_tokenizer(known, 300)
    model = tf.BertForMaskedLM.from_pretrained(checkpoint)
    was = model.get_input_embeddings().weight.detach().clone()
    shared = set(old.get_vocab()) & set(new.get_vocab())
    assert example.replace_vocabulary(model, old, new) == len(shared) < len(new)
    now = model.get_input_embeddings().weight
    for token, i in new.get_vocab().items():
        expected = was[old.get_vocab()[token]] if token in shared else was.mean(0)
        assert torch.equal(now[i], expected)
    assert model.get_output_embeddings().weight is now


@pytest.mark.parametrize("installed", [False, True])
def test_looking_at_attention(installed, run, monkeypatch):
    calls = []

    def head_view(attention, tokens, html_action):
        calls.append((attention, tokens, html_action))
        return types.SimpleNamespace(data=f"<div>view {len(calls)}</div>")

    # None in sys.modules makes the import fail
    bertviz = types.SimpleNamespace(head_view=head_view) if installed else None
    monkeypatch.setitem(sys.modules, "bertviz", bertviz)
    sentences = ["Was the film <good>?", "It put half the room to sleep."]
    strongest, printed, folder = run("looking_at_attention", "--layer", "1", "--sentences", *sentences)
    assert "BertModel: 4 layers of 2 heads; 2 sentences" in printed
    for place, (layer, head, share) in strongest.items():
        assert f"layer {layer} head {head:2} attends most to {place:16}  {share:.0%}" in printed
        assert 0 <= layer < 4 and 0 <= head < 2 and 0 < share < 1
    assert is_picture(folder / "looking_at_attention.png")
    page = folder / "looking_at_attention.html"
    assert page.exists() == installed and ("install bertviz" in printed) == (not installed)
    if installed:
        text = page.read_text(encoding="utf-8")
        assert "<h3>Was the film &lt;good&gt;?</h3>\n<div>view 1</div>" in text and "<div>view 2</div>" in text
        for attention, tokens, action in calls:
            assert action == "return" and len(attention) == 4 and tokens[-1] in "?."
            assert all(layer.shape == (1, 2, len(tokens), len(tokens)) for layer in attention)
            torch.testing.assert_close(torch.stack(attention).sum(-1), torch.ones(4, 1, 2, len(tokens)))


def test_habits(load):
    before = torch.diag(torch.ones(4), -1)
    before[0, 0] = 1.0
    itself, separator = torch.eye(5), torch.zeros(5, 5)
    separator[:, -1] = 1.0
    found = load("looking_at_attention").habits(
        (torch.stack([before, itself])[None], torch.stack([itself, separator])[None])
    )
    assert found["the token before"].tolist() == [[1, 0], [0, 0]]
    assert torch.equal(found["the token itself"], torch.tensor([[0.2, 1.0], [1.0, 0.2]]))
    assert torch.equal(found["the first token"], torch.tensor([[0.25, 0.0], [0.0, 0.0]]))
    assert found["the separator"].tolist() == [[0, 0], [0, 1]]


def test_text_generation(load, tmp_path, capsys):
    example = load("text_generation")
    arguments = ["--vocabulary", "400", "--size", "32", "--layers", "2", "--steps", "30", "--batch-size", "4"]
    arguments += ["--lr", "1e-2", "--new-tokens", "12", "--beams", "3", "--output", str(tmp_path)]
    found = example.main(example.parse(arguments))
    printed = capsys.readouterr().out
    first, last, held_out = map(
        float, re.search(r"loss ([.\d]+) -> ([.\d]+), of held-out texts ([.\d]+)", printed).groups()
    )
    assert last < 0.8 * first and held_out < 0.8 * first
    assert 1 <= int(re.search(r"kept from step (\d+) of 30", printed)[1]) <= 30
    assert list(found) == ["greedy", "sampled", "3 beams"]
    for way, texts in found.items():
        for text, beginning in zip(texts, example.BEGINNINGS, strict=True):
            assert text.startswith(beginning) and f"{way:8} {text!r}" in printed
    assert is_picture(tmp_path / "text_generation.png")
    model = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    batch = tokenizer(example.END + example.BEGINNINGS[0], return_tensors="pt")
    with torch.no_grad():  # the saved weights are the best on the held-out texts
        loss = model(**example.encode(example.read(example.DATA)[1], tokenizer)).loss
    assert f"{loss:.3f}" == f"{held_out:.3f}"
    ids = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == found["greedy"][0]


def test_lives_are_learned_whole(load):
    example = load("text_generation")
    known, held_out = example.read(example.DATA)
    assert len(known) == 90 and len(held_out) == 10
    tokenizer = example.build_tokenizer(known, 400)
    batch = example.encode(known[:3], tokenizer)
    for ids, mask, labels, life in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], known):
        assert tokenizer.decode(ids[mask]) == example.END + life + example.END
        assert torch.equal(labels[mask][1:], ids[mask][1:]) and (labels[~mask] == -100).all()
        assert labels[mask][0] == -100  # nothing comes before the first token


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_arguments(name, load, capsys, tmp_path, monkeypatch):
    """--help explains every option and shows its default; output goes where git does not look; errors are said."""
    monkeypatch.chdir(tmp_path)
    example = load(name)
    required = ["--input", "texts", "--output", "vectors"] if name == "embed_many" else []
    parsed = example.parse(required)
    if name not in ("embed_many", "serve_models"):  # which are told where, or write nothing
        assert parsed.output == pathlib.Path("example_output") / name
    ignored = (EXAMPLES.parent / ".gitignore").read_text().split() if (EXAMPLES.parent / ".git").exists() else None
    assert ignored is None or "example_output/" in ignored
    with pytest.raises(SystemExit):
        example.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option, value in vars(parsed).items():
        if (name, option) == ("serve_models", "names"):  # made of --embed, --classify and --generate
            continue
        flag = f"--{option.replace('_', '-')}"
        assert re.search(rf"{flag}( (\[[^]]*\]|[A-Z_{{][^ ]*( \[[^]]*\])?))? [a-z]", text), f"{flag} has no help"
        if type(value) in (int, float):
            assert re.search(rf"\(default: {value}[,)]", text) or f"default {value}" in text, flag
    if hasattr(parsed, "checkpoint"):
        with pytest.raises(SystemExit) as error:
            example.parse([*required, "--checkpoint", "./nosuch"])
        assert error.value.code == 2 and "there is no folder './nosuch'" in capsys.readouterr().err


def test_transformer_classifier(load, tmp_path, capsys):
    module = load("transformer_classifier")
    before, after = module.main(module.parse(["--output", str(tmp_path), "--epochs", "8"]))
    assert before < 0.75 < after
    assert f"{before:.1%} -> {after:.1%}" in capsys.readouterr().out
    for name in ("learning_curve.png", "heads.png", "positions.png"):
        assert is_picture(tmp_path / name)
    model = module.Classifier(20, 8, 2, 0.0).eval()
    row = torch.randint(1, 20, (1, 6))
    padded = torch.nn.functional.pad(row, (0, 3))  # padding changes nothing
    torch.testing.assert_close(model(padded)[0], model(row)[0])


def test_ulmfit(run):
    short = ["--limit", "30", "--pretrain", "1", "--adapt", "3", "--classify", "3", "--draws", "1", "--labels", "16"]
    scores, printed, folder = run("ulmfit", *short, "--size", "16")
    assert list(scores) == ["from nothing", "ULMFiT", "MiniLM, fine-tuned"]
    assert (
        all(0 <= score <= 1 for score in scores.values()) and f"ULMFiT               {scores['ULMFiT']:.1%}" in printed
    )
    before, after = (
        float(n) for n in re.search(r"held-out reviews: ([\d.]+) -> ([\d.]+) after adaptation", printed).groups()
    )
    assert after < 0.9 * before  # the reviews' words are learned
    assert is_picture(folder / "ulmfit.png")
    model = tf.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert type(model) is tf.AWDLSTMForSequenceClassification and model.config.id2label == {
        0: "negative",
        1: "positive",
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.decode(tokenizer("Great value!")["input_ids"]).startswith("[END] ")
