"""Translation with mBART and NLLB and their own tokenizers, trained here: source and target language are passed."""

import json

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import transformer_fast

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
SHORT = {"max_new_tokens": 7, "num_beams": 2}
# family: (tokenizer class, algorithm, how it is trained, model class, configuration class, three languages)
FAMILIES = {
    "mbart": ("MBartTokenizer", models.Unigram, trainers.UnigramTrainer, "MBartForConditionalGeneration",
              "MBartConfig", ("en_XX", "ro_RO", "de_DE")),
    "nllb": ("NllbTokenizer", models.BPE, trainers.BpeTrainer, "M2M100ForConditionalGeneration", "M2M100Config",
             ("eng_Latn", "fra_Latn", "deu_Latn")),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def checkpoint(request, texts, tmp_path):
    """(folder, transformers' tokenizer and model, languages)."""
    kind, algorithm, trainer, model_class, config_class, languages = FAMILIES[request.param]
    made = Tokenizer(algorithm())
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    unknown = {"unk_token": "<unk>"} if algorithm is models.Unigram else {}
    options = {"vocab_size": 150, "special_tokens": SPECIAL, "show_progress": False, **unknown}
    made.train_from_iterator(texts * 5, trainer(**options))
    state = json.loads(made.to_str())["model"]
    if algorithm is models.BPE:
        pieces = {"vocab": state["vocab"], "merges": [tuple(pair) for pair in state["merges"]]}
    else:
        pieces = {"vocab": [tuple(piece) for piece in state["vocab"]]}
    tokenizer = getattr(transformers, kind)(**pieces, model_max_length=128)
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in sizes.items()}
    config = getattr(transformers, config_class)(
        vocab_size=len(tokenizer), d_model=32, max_position_embeddings=128, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, decoder_start_token_id=2, init_std=0.4, forced_eos_token_id=None, **sizes,
    )  # fmt: skip
    transformers.set_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    for source in (tokenizer, model):
        source.save_pretrained(tmp_path)
    return tmp_path, tokenizer, model, languages


def by_hand(tokenizer, model, text: str, source: str, target: str) -> tuple[str, list[int]]:
    tokenizer.src_lang = source
    inputs = tokenizer(text, return_tensors="pt")
    assert tokenizer.convert_tokens_to_ids(source) in inputs["input_ids"][0]
    code = tokenizer.convert_tokens_to_ids(target)
    (ids,) = model.generate(**inputs, forced_bos_token_id=code, **SHORT)
    assert ids[1] == code
    return tokenizer.decode(ids, skip_special_tokens=True), ids.tolist()


def test_languages_reach_tokenizer_and_decoder(checkpoint, texts):
    folder, tokenizer, model, (english, other, third) = checkpoint
    pipe = transformer_fast.pipeline("translation", folder, device="cpu", src_lang=english, tgt_lang=other, **SHORT)
    assert type(pipe.model).__module__.startswith("transformer_fast.") and type(pipe.tokenizer) is type(tokenizer)
    wanted = [by_hand(tokenizer, model, text, english, other) for text in texts[:4]]
    answers = [{"translation_text": text} for text, _ in wanted]
    assert len({text for text, _ in wanted}) > 1
    assert pipe(texts[0]) == answers[:1] and pipe(texts[:4]) == answers and pipe(texts[:4], batch_size=1) == answers
    for source, target in ((english, third), (third, english)):
        (found,) = pipe(texts[1], src_lang=source, tgt_lang=target, return_tensors=True)
        assert found["translation_token_ids"].tolist() == by_hand(tokenizer, model, texts[1], source, target)[1]


def test_no_language_to_translate_to(checkpoint, texts):
    pipe = transformer_fast.pipeline("translation", checkpoint[0], device="cpu")
    with pytest.raises(ValueError, match="tgt_lang: .* wants a language"):
        pipe(texts[0])
