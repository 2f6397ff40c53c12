"""ELMo, compared with a reference written from the paper for the published file format; files, heads, tokens,
training."""

import json
import shutil

import h5py
import pytest
import torch
from numerics import GRADIENT, assert_as_accurate, pooled

import transformer_fast as tf
from transformer_fast.models.elmo import ElmoTokenizer

PROJECTION, CELL, LAYERS, CHARACTERS, WIDTH = 6, 10, 2, 20, 5
FILTERS = [[1, 4], [2, 5], [3, 7]]
TOTAL = sum(n for _, n in FILTERS)
SENTENCES = [["The", "cat", "sat"], ["Don’t", "panic", "!", "The", "incomprehensibilities", "are", "cat"], ["Naïve"]]


def options(**lstm):
    return {
        "lstm": {
            "use_skip_connections": True, "projection_dim": PROJECTION, "cell_clip": 3, "proj_clip": 3, "dim": CELL,
            "n_layers": LAYERS, **lstm,
        },
        "char_cnn": {
            "activation": "relu", "filters": FILTERS, "n_highway": 2, "embedding": {"dim": WIDTH}, "n_characters": 262,
            "max_characters_per_token": CHARACTERS,
        },
    }  # fmt: skip


def datasets():
    """Weights in bilm-tf's format: matrices (in, out), gates i, g, f, o."""
    g = torch.Generator().manual_seed(2)

    def draw(*shape, size=0.5):
        return torch.randn(shape, generator=g) * size

    found = {"char_embed": draw(261, WIDTH), "CNN_proj/W_proj": draw(TOTAL, PROJECTION), "CNN_proj/b_proj": draw(6)}
    for i, (width, number) in enumerate(FILTERS):
        found |= {f"CNN/W_cnn_{i}": draw(1, width, WIDTH, number), f"CNN/b_cnn_{i}": draw(number)}
    for i in range(2):
        for name in ("carry", "transform"):
            found |= {f"CNN_high_{i}/W_{name}": draw(TOTAL, TOTAL), f"CNN_high_{i}/b_{name}": draw(TOTAL)}
    for direction in range(2):
        for i in range(LAYERS):
            cell = f"RNN_{direction}/RNN/MultiRNNCell/Cell{i}/LSTMCell"
            found |= {f"{cell}/W_0": draw(2 * PROJECTION, 4 * CELL, size=0.7), f"{cell}/B": draw(4 * CELL)}
            found |= {f"{cell}/W_P_0": draw(CELL, PROJECTION, size=0.7)}
    return found


def write(folder, given_options=None, given=None):
    """(options.json, weights.hdf5)."""
    folder.mkdir(exist_ok=True)
    (folder / "options.json").write_text(json.dumps(given_options or options()))
    with h5py.File(folder / "weights.hdf5", "w") as file:
        for name, t in (given or datasets()).items():
            file[name] = t.numpy()
    return folder / "options.json", folder / "weights.hdf5"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("elmo"))


# ---- the reference: one sentence, one word, one step at a time ---------------------------------------
def characters_of(word):
    """Section 3.4 and bilm-tf's Vocabulary: 258 word 259 260 ..., each plus 1."""
    inner = [word] if isinstance(word, int) else list(word.encode())[: CHARACTERS - 2]
    ids = [258, *inner, 259]
    return [i + 1 for i in ids + [260] * (CHARACTERS - len(ids))]


def word_vector(w, ids):
    x = w["char_embed"][[i - 1 for i in ids]]  # (characters, WIDTH)
    found = []
    for i, (width, _) in enumerate(FILTERS):
        kernel, bias = w[f"CNN/W_cnn_{i}"][0], w[f"CNN/b_cnn_{i}"]
        windows = [torch.einsum("kd,kdn->n", x[at : at + width], kernel) + bias for at in range(len(x) - width + 1)]
        found.append(torch.stack(windows).amax(0).clamp(min=0))
    x = torch.cat(found)
    for i in range(2):
        gate = (x @ w[f"CNN_high_{i}/W_carry"] + w[f"CNN_high_{i}/b_carry"]).sigmoid()
        x = gate * (x @ w[f"CNN_high_{i}/W_transform"] + w[f"CNN_high_{i}/b_transform"]).clamp(min=0) + (1 - gate) * x
    return x @ w["CNN_proj/W_proj"] + w["CNN_proj/b_proj"]


def run_lstm(w, cell, vectors, clip):
    """The LSTM of Sak et al. (2014) in TensorFlow's layout, forget_bias 1."""
    h, c, out = vectors[0].new_zeros(PROJECTION), vectors[0].new_zeros(CELL), []
    for x in vectors:
        i, g, f, o = (torch.cat((x, h)) @ w[f"{cell}/W_0"] + w[f"{cell}/B"]).chunk(4)
        c = (f + 1).sigmoid() * c + i.sigmoid() * g.tanh()
        c = c.clamp(-clip, clip) if clip else c
        h = (o.sigmoid() * c.tanh()) @ w[f"{cell}/W_P_0"]
        h = h.clamp(-clip, clip) if clip else h
        out.append(h)
    return out


def reference(w, sentence, clip=3.0, skip=True):
    """Hidden states (layers + 1, words, 2 * PROJECTION)."""
    words = [word_vector(w, characters_of(word)) for word in [256, *sentence, 257]]
    layers, ahead, back = [[torch.cat((x, x)) for x in words]], words, words
    for i in range(LAYERS):
        name = f"RNN/MultiRNNCell/Cell{i}/LSTMCell"
        outs = run_lstm(w, f"RNN_0/{name}", ahead, clip), run_lstm(w, f"RNN_1/{name}", back[::-1], clip)[::-1]
        if i and skip:
            outs = [[a + b for a, b in zip(*pair)] for pair in zip(outs, (ahead, back))]
        ahead, back = outs
        layers.append([torch.cat(pair) for pair in zip(ahead, back)])
    return torch.stack([torch.stack(layer[1:-1]) for layer in layers])


def references(dtype, **how):
    w = {name: t.to(dtype).requires_grad_() for name, t in datasets().items()}
    return w, [reference(w, sentence, **how) for sentence in SENTENCES]


def flat(states, mask):
    """Hidden states (layers + 1, words of all sentences, D)."""
    return torch.stack([s[mask] for s in states])


@pytest.mark.parametrize("clip, skip", [(3.0, True), (None, False), (0.4, True)], ids=str)
def test_is_the_papers(clip, skip, tmp_path):
    given = options(cell_clip=clip, proj_clip=clip, use_skip_connections=skip)
    model = tf.ElmoModel.from_allennlp(*write(tmp_path, given))
    batch = ElmoTokenizer(CHARACTERS)(SENTENCES, is_split_into_words=True, padding=True, return_tensors="pt")
    out = model(batch["input_ids"], output_hidden_states=True)
    mask = batch["attention_mask"].bool()
    g = torch.Generator().manual_seed(1)
    results = {}
    for name, dtype in (("truth", torch.float64), ("plain", torch.float32)):
        w, states = references(dtype, clip=clip, skip=skip)
        states = torch.cat(states, 1)
        cotangent = torch.randn(states.shape, generator=g.manual_seed(1))
        names = [n for n in w if "Cell" in n or "proj" in n]
        grads = torch.autograd.grad((states * cotangent.to(dtype)).sum(), [w[n] for n in names])
        results[name] = states.detach(), dict(zip(names, grads))
    ours = flat(out.hidden_states, mask)
    (ours * cotangent).sum().backward()
    assert_as_accurate(ours.detach(), results["truth"][0], results["plain"][0])
    assert torch.equal(out.last_hidden_state, out.hidden_states[-1]) and out.last_hidden_state[~mask].eq(0).all()
    found = {"CNN_proj/W_proj": model.embeddings.projection.weight.grad.t()}
    found["CNN_proj/b_proj"] = model.embeddings.projection.bias.grad
    for i, layer in enumerate(model.layers):
        for direction, cell in enumerate((layer.forward_lstm, layer.backward_lstm)):
            name = f"RNN_{direction}/RNN/MultiRNNCell/Cell{i}/LSTMCell"
            i_, f, g_, o = torch.cat((cell.weight_ih.grad, cell.weight_hh.grad), 1).chunk(4)
            found[f"{name}/W_0"] = torch.cat((i_, g_, f, o)).t()
            i_, f, g_, o = cell.bias.grad.chunk(4)
            found[f"{name}/B"] = torch.cat((i_, g_, f, o))
            found[f"{name}/W_P_0"] = cell.weight_hr.grad.t()
    truth = results["truth"][1]
    assert_as_accurate(pooled(found, truth), pooled(truth, truth), pooled(results["plain"][1], truth), GRADIENT)


@pytest.mark.quick
def test_clipping_is_on(files):
    """The weights of these tests reach the bounds, so the comparison with the reference includes clipped values."""
    w, clipped = references(torch.float64, clip=0.4)
    _, free = references(torch.float64, clip=None)
    assert not torch.allclose(clipped[1], free[1])


@pytest.mark.quick
def test_padding_and_neighbours_change_nothing(files):
    model, tokenizer = tf.ElmoModel.from_allennlp(*files), ElmoTokenizer(CHARACTERS)
    batch = tokenizer(SENTENCES, is_split_into_words=True, padding=True, return_tensors="pt")
    together = model(batch["input_ids"]).last_hidden_state
    for i, sentence in enumerate(SENTENCES):
        alone = model(**tokenizer([sentence], is_split_into_words=True, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(together[i, : len(sentence)], alone[0])
    left = torch.zeros_like(batch["input_ids"])
    left[0, -3:] = batch["input_ids"][0, :3]
    torch.testing.assert_close(model(left[:1]).last_hidden_state[0, -3:], together[0, :3])


# ---- tokens ----------------------------------------------------------------------------------------------
@pytest.mark.quick
def test_words_are_bytes_with_marks():
    tokenizer = ElmoTokenizer(CHARACTERS)
    for word in ("cat", "Naïve", "incomprehensibilities"):
        assert tokenizer.encode_word(word) == characters_of(word)
    assert tokenizer.bounds == (characters_of(256), characters_of(257))
    assert tokenizer.tokenize("It isn't well-known (yet).") == ["It", "isn't", "well-known", "(", "yet", ")", "."]
    batch = tokenizer(["A b.", ""], padding="max_length", max_length=5, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 5, CHARACTERS) and batch["attention_mask"].sum(1).tolist() == [3, 0]
    one = tokenizer("A b.")
    assert len(one["input_ids"]) == 3 and tokenizer(["A b."])["input_ids"] == [one["input_ids"]]
    assert tokenizer("A b.", truncation=True, max_length=2)["attention_mask"] == [1, 1]
    rows = [dict(tokenizer("A b."), labels=1), dict(tokenizer("A"), labels=0)]
    collated = tf.DataCollatorWithPadding(tokenizer)(rows)
    assert collated["input_ids"].shape == (2, 3, CHARACTERS) and collated["labels"].tolist() == [1, 0]


# ---- the files ---------------------------------------------------------------------------------------------
@pytest.mark.quick
def test_saves_as_safetensors(files, tmp_path):
    model = tf.ElmoModel.from_allennlp(*files)
    model.save_pretrained(tmp_path)
    ElmoTokenizer(CHARACTERS).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = tf.AutoModel.from_pretrained(tmp_path)
    assert type(again) is tf.ElmoModel and again.config.filters == FILTERS and again.config.hidden_size == 12
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    assert ElmoTokenizer.from_pretrained(tmp_path).max_characters_per_token == CHARACTERS
    (tmp_path / "elmo_tokenizer.json").unlink()
    assert ElmoTokenizer.from_pretrained(tmp_path).max_characters_per_token == CHARACTERS
    head = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(head) is tf.ElmoForSequenceClassification
    assert all(torch.equal(t, head.elmo.state_dict()[n]) for n, t in model.state_dict().items())
    assert head.scalar_mix.gamma == 1 and head.scalar_mix.weights.eq(0).all()


def drop(path):
    return lambda found: {n: t for n, t in found.items() if n != path}


@pytest.mark.parametrize(
    "change, message",
    [
        (drop("CNN_high_1/W_carry"), r"weights.hdf5: wanted a dataset CNN_high_1/W_carry of shape \(16, 16\)"),
        (lambda f: f | {"CNN/b_cnn_1": torch.zeros(4)}, r"CNN/b_cnn_1: wanted shape \(5,\) by the options, got \(4,\)"),
        (lambda f: f | {"char_embed": torch.zeros(260, WIDTH)}, r"char_embed: wanted shape \(261, 5\).*262 for bytes"),
        (lambda f: f | {"CNN_proj/b_proj": torch.zeros(6, dtype=torch.int)}, "CNN_proj/b_proj: wanted floating-point"),
        (lambda f: f | {"RNN_0/RNN/MultiRNNCell/Cell2/LSTMCell/B": torch.zeros(40)},
         "holds 1 datasets that the options do not ask for: RNN_0/RNN/MultiRNNCell/Cell2"),
        (lambda f: {f"elmo/{n}": t for n, t in f.items()}, "wanted a dataset char_embed .* file has elmo/CNN/W_cnn_0"),
    ],
)  # fmt: skip
def test_other_layouts(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tf.ElmoModel.from_allennlp(*write(tmp_path, given=change(datasets())))


def edited(path, value):
    found = options()
    *groups, last = path.split(".")
    inner = found
    for name in groups:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return found


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("lstm.dim", None, "options.json: wanted lstm.dim, which is not there"),
        ("lstm.dim", "10", "options.json: lstm.dim: wanted an integer, got '10'"),
        ("lstm.n_layers", True, "lstm.n_layers: wanted an integer, got True"),
        ("lstm.use_skip_connections", 1, "use_skip_connections: wanted true or false, got 1"),
        ("char_cnn.filters", [[1, 4], [2]], r"char_cnn.filters: wanted a list of \[width, number\]"),
        ("char_cnn", None, "wanted char_cnn.filters, which is not there"),
        ("char_cnn.activation", "gelu", "char_activation: wanted 'relu' or 'tanh', got 'gelu'"),
        ("char_cnn.n_characters", 60, "num_characters: wanted at least 262, got 60"),
        # Options that contradict the weights.
        ("lstm.n_layers", 1, "holds 6 datasets that the options do not ask for: RNN_0"),
        ("lstm.n_layers", 3, "wanted a dataset RNN_0/RNN/MultiRNNCell/Cell2/LSTMCell/W_0"),
        ("lstm.projection_dim", 8, r"CNN_proj/W_proj: wanted shape \(16, 8\) by the options, got \(16, 6\)"),
        ("char_cnn.filters", FILTERS[:2], r"CNN_high_0/W_carry: wanted shape \(9, 9\) by the options, got \(16, 16\)"),
    ],
)
def test_other_options(path, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tf.ElmoModel.from_allennlp(*write(tmp_path, edited(path, value)))


def test_files_that_cannot_be_read(files, tmp_path, monkeypatch):
    there, weights = files
    with pytest.raises(FileNotFoundError):
        tf.ElmoModel.from_allennlp(there, tmp_path / "nothing.hdf5")
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut.hdf5: is not an HDF5 file, or is truncated"):
        tf.ElmoModel.from_allennlp(there, cut)
    broken = tmp_path / "options.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"options.json: is not valid JSON"):
        tf.ElmoModel.from_allennlp(broken, weights)
    with pytest.raises(ValueError, match="cell_size: cannot be changed"):
        tf.ElmoModel.from_allennlp(there, weights, cell_size=12)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match="needs h5py, not installed here: pip install h5py"):
        tf.ElmoModel.from_allennlp(there, weights)


def test_words_have_no_embeddings_to_resize():
    model = tf.ElmoModel(tf.ElmoConfig(filters=FILTERS, projection_size=6, cell_size=10))
    with pytest.raises(NotImplementedError, match="resize_token_embeddings: words are embedded by their bytes"):
        model.resize_token_embeddings(50)


# ---- calls --------------------------------------------------------------------------------------------------
IDS = torch.tensor([[characters_of("cat"), characters_of("sat")]])


@pytest.mark.parametrize(
    "call, error, message",
    [
        ((IDS.float(),), TypeError, "input_ids: wanted an int64 tensor, got torch.float32"),
        ((IDS[0],), ValueError, r"input_ids: wanted shape \(batch, words, 20\) of characters, got \(2, 20\)"),
        ((IDS[..., :10],), ValueError, r"wanted shape \(batch, words, 20\) of characters, got \(1, 2, 10\)"),
        ((IDS + 5,), ValueError, r"input_ids: wanted values in \[0, 262\) \(config.num_characters\), got .*266"),
        ((IDS * 0,), ValueError, r"input_ids: wanted at least one word, got none in shape \(1, 2, 20\)"),
        ((IDS[:, :0],), ValueError, r"wanted at least one word, got none in shape \(1, 0, 20\)"),
        ((IDS, torch.ones(1, 3)), ValueError, r"attention_mask: wanted shape \(batch, words\) = \(1, 2\)"),
        ((IDS * torch.tensor([1, 0])[None, :, None], torch.ones(1, 2)), ValueError, "input_ids have no characters"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message, files):
    with pytest.raises(error, match=message):
        tf.ElmoModel.from_allennlp(*files)(*call)


@pytest.mark.quick
def test_empty_words_and_sentences(files):
    model, tokenizer = tf.ElmoForSequenceClassification.from_allennlp(*files, num_labels=2), ElmoTokenizer(CHARACTERS)
    with pytest.raises(ValueError, match="words: wanted at least one character in each, got ''"):
        tokenizer([["cat", ""]], is_split_into_words=True)
    batch = tokenizer(["A cat.", "", "Sat"], padding=True, return_tensors="pt")
    logits = model(**batch).logits
    assert torch.equal(logits[1], model.classifier.bias)
    torch.testing.assert_close(logits[2:], model(batch["input_ids"][2:]).logits)
    with pytest.raises(ValueError, match="texts: number 1 has no tokens"):
        tf.layer_features(model, ["A cat.", ""], tokenizer)


# ---- heads, features, training --------------------------------------------------------------------------------
def test_heads_mix_the_layers(files):
    model = tf.ElmoForTokenClassification.from_allennlp(*files, num_labels=3)
    torch.nn.init.normal_(model.scalar_mix.weights), torch.nn.init.constant_(model.scalar_mix.gamma, 1.7)
    batch = ElmoTokenizer(CHARACTERS)(SENTENCES, is_split_into_words=True, padding=True, return_tensors="pt")
    out = model(**batch, output_hidden_states=True)
    weights = model.scalar_mix.weights.softmax(0)
    mixed = 1.7 * sum(w * h for w, h in zip(weights, out.hidden_states))
    torch.testing.assert_close(out.logits, mixed @ model.classifier.weight.t() + model.classifier.bias)
    pooled_model = tf.ElmoForSequenceClassification.from_allennlp(*files, num_labels=3)
    pooled_model.load_state_dict(model.state_dict())
    means = torch.stack([mixed[i, : len(s)].mean(0) for i, s in enumerate(SENTENCES)])
    found = pooled_model(**batch, labels=torch.tensor([0, 2, 1]))
    torch.testing.assert_close(found.logits, means @ model.classifier.weight.t() + model.classifier.bias)
    found.loss.backward()
    assert pooled_model.scalar_mix.weights.grad.abs().min() > 0
    assert pooled_model.elmo.embeddings.characters.weight.grad.abs().sum() > 0


def test_pipelines_take_its_tokenizer(files):
    """A batch of ragged texts has the results of the single texts."""
    model = tf.ElmoForSequenceClassification.from_allennlp(*files, num_labels=3).eval()
    tokenizer, texts = ElmoTokenizer(CHARACTERS), ["The cat sat.", "Panic!", "A dog."]
    found = tf.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)(texts, batch_size=3)
    for text, scores in zip(texts, found):
        wanted = model(**tokenizer([text], return_tensors="pt")).logits.softmax(-1)[0]
        by_label = {s["label"]: s["score"] for s in scores}
        torch.testing.assert_close(torch.tensor([by_label[f"LABEL_{i}"] for i in range(3)]), wanted.detach())
    features = tf.pipeline("feature-extraction", model=model.elmo, tokenizer=tokenizer)(texts[0])
    wanted = model.elmo(**tokenizer([texts[0]], return_tensors="pt"))[0]
    torch.testing.assert_close(torch.tensor(features), wanted.detach())


def test_layer_features(files):
    model, tokenizer = tf.ElmoModel.from_allennlp(*files), ElmoTokenizer(CHARACTERS)
    texts = ["The cat sat.", "Panic!"]
    states = [model(**tokenizer([t], return_tensors="pt"), output_hidden_states=True).hidden_states for t in texts]
    found = tf.layer_features(model, texts, tokenizer, layers=[0, -1], pooling="mean", batch_size=2)
    wanted = torch.stack([torch.cat((s[0][0], s[-1][0]), -1).mean(0) for s in states])
    torch.testing.assert_close(found, wanted.detach())
    each = tf.layer_features(model, texts, tokenizer)
    torch.testing.assert_close(each[1], states[1][-1][0].detach())


def test_two_way_language_model(files):
    """Each word is predicted from the forward state before it and the backward state after it; training lowers the
    loss."""
    torch.manual_seed(0)
    model = tf.ElmoForPreTraining.from_allennlp(*files, vocab_size=11, dropout=0.0)
    batch = ElmoTokenizer(CHARACTERS)(SENTENCES, is_split_into_words=True, padding=True, return_tensors="pt")
    words = {word: i for i, word in enumerate(sorted({w for s in SENTENCES for w in s}))}
    labels = torch.full(batch["attention_mask"].shape, -100)
    for i, sentence in enumerate(SENTENCES):
        labels[i, : len(sentence)] = torch.tensor([words[w] for w in sentence])
    labels[0, 1] = -100
    out = model(**batch, labels=labels)
    w = datasets()
    losses = {"ahead": [], "back": []}
    for i, sentence in enumerate(SENTENCES):
        vectors = [word_vector(w, characters_of(word)) for word in [256, *sentence, 257]]
        ahead, back = vectors, vectors
        for layer in range(LAYERS):
            name = f"RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            before = ahead, back
            ahead = run_lstm(w, f"RNN_0/{name}", ahead, 3.0)
            back = run_lstm(w, f"RNN_1/{name}", back[::-1], 3.0)[::-1]
            if layer:
                ahead, back = ([a + b for a, b in zip(*pair)] for pair in zip((ahead, back), before))
        for at in range(len(sentence)):
            if labels[i, at] >= 0:
                for name, state in (("ahead", ahead[at]), ("back", back[at + 2])):  # the marks are at 0 and at the end
                    losses[name].append(torch.nn.functional.cross_entropy(model.lm_head(state), labels[i, at]))
    for found, name in ((out.forward_loss, "ahead"), (out.backward_loss, "back")):
        torch.testing.assert_close(found, torch.stack(losses[name]).mean())
    torch.testing.assert_close(out.loss, (out.forward_loss + out.backward_loss) / 2)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=3e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * out.loss


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.zeros(1, 3, dtype=torch.long), r"labels: wanted shape \(1, 2\), got \(1, 3\)"),
        (torch.full((1, 2), -100), "labels: wanted at least one word to score"),
        (torch.full((1, 2), 11), r"labels: wanted values in \[0, 11\) \(config.vocab_size\)"),
    ],
)
def test_bad_labels(labels, message, files):
    with pytest.raises(ValueError, match=message):
        tf.ElmoForPreTraining.from_allennlp(*files, vocab_size=11)(IDS, labels=labels)
    with pytest.raises(ValueError, match="vocab_size: wanted the number of words"):
        tf.ElmoForPreTraining.from_allennlp(*files)


def test_a_new_model_and_a_wrong_folder(files, tmp_path):
    config = tf.ElmoConfig(filters=FILTERS, projection_size=6, cell_size=10, max_characters_per_token=CHARACTERS)
    model = tf.ElmoModel(config)
    assert model.layers[0].forward_lstm.bias[10:20].eq(1).all() and model(IDS).last_hidden_state.isfinite().all()
    model.save_pretrained(tmp_path)
    shutil.copy(files[1], tmp_path / "weights.hdf5")
    with pytest.raises(ValueError, match="ElmoModel: wanted a checkpoint with model_type 'elmo'.*'bert'"):
        found = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(found | {"model_type": "bert"}))
        tf.ElmoModel.from_pretrained(tmp_path)
