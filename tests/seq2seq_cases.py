"""Encoder-decoder families compared with Hugging Face's: tiny configurations, ragged inputs, labels for each head."""

import torch
import transformers
from hf_models import exact_norms

VOCABULARY, WIDTH, BATCH, SOURCE, TARGET = 99, 48, 12, 13, 9
PAD, END = 0, 1
_BART = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "max_position_embeddings": 32,
    "dropout": 0.0, "init_std": 0.15, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "d_model": WIDTH, "d_kv": 10, "d_ff": 80, "num_layers": 2, "num_heads": 3, "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "decoder_start_token_id": PAD,
}  # fmt: skip
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "num_labels": 4}
VARIANTS = {
    "T5": ("T5", {}),
    "T5 v1.1": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "Bart": ("Bart", {}),
    "Marian": ("Marian", {"scale_embedding": True, "activation_function": "swish"}),
    "MBart": ("MBart", {"scale_embedding": True}),
    "Pegasus": ("Pegasus", {}),
    "M2M100": ("M2M100", {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "attention_dropout": 0.0}),
    "MT5": ("MT5", {}),
    "UMT5": ("UMT5", {}),
}
HEADS = {
    "T5": ["Model", "ForConditionalGeneration", "EncoderModel", "ForSequenceClassification", "ForTokenClassification",
           "ForQuestionAnswering"],
    "Bart": ["Model", "ForConditionalGeneration", "ForSequenceClassification", "ForQuestionAnswering", "ForCausalLM"],
    "Marian": ["Model", "MTModel", "ForCausalLM"],
    "Pegasus": ["Model", "ForConditionalGeneration", "ForCausalLM"],
    "M2M100": ["Model", "ForConditionalGeneration"],
    "MBart": ["Model", "ForConditionalGeneration", "ForSequenceClassification", "ForQuestionAnswering", "ForCausalLM"],
}  # fmt: skip
HEADS["MT5"] = HEADS["UMT5"] = HEADS["T5"]
CASES = [(variant, head) for variant, (family, _) in VARIANTS.items() for head in HEADS[family]]
GENERATORS = [("T5", "ForConditionalGeneration"), ("T5 v1.1", "ForConditionalGeneration"),
              ("Bart", "ForConditionalGeneration"), ("Marian", "MTModel"),
              ("MBart", "ForConditionalGeneration"), ("Pegasus", "ForConditionalGeneration"),
              ("M2M100", "ForConditionalGeneration"), ("MT5", "ForConditionalGeneration"),
              ("UMT5", "ForConditionalGeneration")]  # fmt: skip


def seq2seq_config(variant: str, **changes):
    family, own = VARIANTS[variant]
    values = _COMMON | (_T5 if "T5" in family else _BART) | own | changes
    return getattr(transformers, f"{family}Config")(**values)


def make_models(pair, variant: str, head: str, dtype=torch.float32, **changes):
    """(ours, HF's, HF's entirely in float64) with the same random weights."""
    changes = ({"num_labels": 2} if head == "ForQuestionAnswering" else {}) | changes
    models = pair(VARIANTS[variant][0] + head, seq2seq_config(variant, **changes), dtype)
    exact_norms(models[2])
    return models


def ragged(kind: str, length: int, batch: int = BATCH) -> torch.Tensor | None:
    """A mask (batch, length). kind: the padding: "none", "right", "left" or "holes"."""
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        real = (length, 1, 8, 4, length - 2, 6)[row % 6]
        if kind == "right":
            mask[row, real:] = 0
        elif kind == "left":
            mask[row, : length - real] = 0
        else:  # holes
            mask[row, 1:-1] = (torch.rand(length - 2) < real / length).long()
    return mask


def make_inputs(head: str, kind: str, decoder_kind: str | None = None) -> dict:
    """input_ids and masks. decoder_kind None: no decoder mask, and no decoder_input_ids if the head makes them
    itself."""
    ids, mask = torch.randint(3, VOCABULARY, (BATCH, SOURCE)), ragged(kind, SOURCE)
    if head == "ForSequenceClassification":
        # The same number of end tokens per row: the last token of each row is one.
        last = torch.full((BATCH,), SOURCE - 1) if mask is None else (mask * torch.arange(SOURCE)).argmax(1)
        ids[torch.arange(BATCH), last] = END
    call = {"input_ids": ids, "attention_mask": mask}
    if head in ("Model", "ForConditionalGeneration", "MTModel"):
        call["decoder_input_ids"] = torch.randint(3, VOCABULARY, (BATCH, TARGET))
        call["decoder_attention_mask"] = None if decoder_kind is None else ragged(decoder_kind, TARGET)
    return call


def make_labels(head: str, call: dict) -> dict:
    if head == "ForSequenceClassification":
        return {"labels": torch.randint(0, 4, (BATCH,))}
    if head == "ForQuestionAnswering":
        return {name: torch.randint(0, SOURCE, (BATCH,)) for name in ("start_positions", "end_positions")}
    if head in ("Model", "EncoderModel"):
        return {}
    prefix = "decoder_" if "decoder_input_ids" in call else ""
    shape, mask = call[f"{prefix}input_ids"].shape, call[f"{prefix}attention_mask"]
    labels = torch.randint(0, 4, shape).masked_fill(torch.rand(shape) < 0.4, -100)
    labels[0, -1] = 1
    return {"labels": labels if mask is None else labels.masked_fill(mask == 0, -100)}


def real_parts(output, call: dict) -> dict[str, torch.Tensor]:
    """The outputs to compare, at positions that are not padding; a loss is joined with its scores."""
    encoder, decoder = call["attention_mask"], call.get("decoder_attention_mask")
    found = {}
    for name in output:
        value = output[name]
        if not isinstance(value, torch.Tensor):
            continue
        mask = decoder if "decoder_input_ids" in call and not name.startswith("encoder") else encoder
        if mask is not None and value.dim() >= 2 and value.shape[:2] == mask.shape:
            value = value[mask.bool()]
        found[name] = value.flatten()
    return found


def collect(models, head: str, kind: str, decoder_kind: str | None, batches: int = 3, **options) -> list[dict]:
    """real_parts of each model's outputs over a few batches: the largest error of one batch depends on chance."""
    collected: list[dict] = [{} for _ in models]
    for _ in range(batches):
        call = make_inputs(head, kind, decoder_kind)
        call |= make_labels(head, call)
        with torch.no_grad():
            outputs = [m(**call, **options) for m in models]
        assert list(outputs[0].keys()) == list(outputs[1].keys())
        for found, output in zip(collected, outputs):
            for name, part in real_parts(output, call).items():
                found.setdefault(name, []).append(part)
    merged = [{name: torch.cat(parts) for name, parts in found.items()} for found in collected]
    for found in merged:  # the error of one number depends on chance
        if "loss" in found:
            scores = next(found[name] for name in ("logits", "start_logits") if name in found)
            found["loss"] = torch.cat((found["loss"], scores))
    return merged


def gradients_of(model, head: str, call: dict, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of every module, with weight and bias joined, from the loss or a random cotangent if there is
    none."""
    model.train().zero_grad()  # dropout is 0 in the configuration
    output = model(**call)
    loss = output.get("loss")
    if loss is None:
        states = output[0]
        mask = call["attention_mask"] if head == "EncoderModel" else call["decoder_attention_mask"]
        loss = (states * weights[:, : states.shape[1]].to(states.dtype))[mask.bool()].sum()
    loss.backward()
    found: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.setdefault(name.rpartition(".")[0], []).append(parameter.grad.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


def generate(model, kind: str = "left", **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    ids, mask = torch.randint(3, VOCABULARY, (4, 7), generator=generator), ragged(kind, 7, 4)
    settings = {"max_new_tokens": 8, "do_sample": False} | options
    return model.generate(ids, attention_mask=mask, **settings)
