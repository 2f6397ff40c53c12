"""Encoder families compared with Hugging Face's: tiny configurations, labels for each head, comparison of outputs."""

import torch
import transformers
from numerics import GRADIENT, OUTPUT, assert_as_accurate

VOCABULARY, WIDTH, BATCH, LENGTH = 99, 48, 12, 13
_COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "initializer_range": 0.15, "num_labels": 4}
_BERT = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_CONFIGS = {
    "Bert": _BERT,
    "DistilBert": {
        "dim": WIDTH, "n_layers": 2, "n_heads": 3, "hidden_dim": 80, "dropout": 0.0, "attention_dropout": 0.0,
        "qa_dropout": 0.0, "seq_classif_dropout": 0.0,
    },
    "Albert": {
        "hidden_size": WIDTH, "embedding_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
        "intermediate_size": 80, "classifier_dropout_prob": 0.0,
    },
    "Roberta": _BERT,
    "XLMRoberta": _BERT,
    "Camembert": _BERT,
    "Electra": _BERT | {"embedding_size": 24, "summary_last_dropout": 0.0},
    "MPNet": _BERT,
    "DebertaV2": _BERT | {  # HF rounds sqrt(3 D) to float32, in float64 too: a square
        "num_attention_heads": 4, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 6,
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 2,
    },
    "ModernBert": {
        "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
        "local_attention": 6, "global_attn_every_n_layers": 2, "global_rope_theta": 100.0, "local_rope_theta": 10.0,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    },
}  # fmt: skip
WITHOUT_POOLER = ("DistilBert", "Electra", "ModernBert", "DebertaV2")
WITHOUT_SEGMENTS = ("DistilBert", "MPNet", "ModernBert")
HEADS = {
    "Model": ("last_hidden_state", "pooler_output"),
    "ForPreTraining": ("prediction_logits", "seq_relationship_logits", "loss"),
    "ForMaskedLM": ("logits", "loss"),
    "ForNextSentencePrediction": ("logits", "loss"),
    "ForSequenceClassification": ("logits", "loss"),
    "ForTokenClassification": ("logits", "loss"),
    "ForQuestionAnswering": ("start_logits", "end_logits", "loss"),
}


def encoder_config(family: str, **changes):
    """A tiny configuration without dropout."""
    return getattr(transformers, f"{family}Config")(**(_COMMON | _CONFIGS[family] | changes))


def outputs_of(name: str) -> tuple[str, ...]:
    """The outputs of a class that are compared."""
    family, head = split(name)
    if head == "Model" and family in WITHOUT_POOLER:
        return ("last_hidden_state",)
    if name == "AlbertForPreTraining":
        return ("prediction_logits", "sop_logits", "loss")
    if name == "ElectraForPreTraining":
        return ("logits", "loss")
    return HEADS[head]


def split(name: str) -> tuple[str, str]:
    """'AlbertForMaskedLM' -> ('Albert', 'ForMaskedLM')."""
    family = next(f for f in sorted(_CONFIGS) if name.startswith(f))
    return family, name.removeprefix(family)


def config_for(name: str, **changes):
    family, head = split(name)
    two = head == "ForQuestionAnswering" or name == "AlbertForPreTraining"
    return encoder_config(family, **({"num_labels": 2} if two else {}), **changes)


def segments_for(name: str, shape) -> dict:
    return {} if split(name)[0] in WITHOUT_SEGMENTS else {"token_type_ids": torch.randint(0, 2, shape)}


def labels_for(name: str, mask: torch.Tensor | None, shape) -> dict:
    batch, length = shape
    family, head = split(name)
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
    if head in ("ForNextSentencePrediction", "ForSequenceClassification"):
        return {"labels": torch.randint(0, 2, (batch,))}
    if head == "ForQuestionAnswering":
        return {"start_positions": torch.randint(0, 4, (batch,)), "end_positions": torch.randint(0, length, (batch,))}
    if head == "Model":
        return {}
    if name == "ElectraForPreTraining":
        return {"labels": torch.randint(0, 2, shape)}
    labels = torch.randint(0, 4, shape).masked_fill(~real | (torch.rand(shape) < 0.4), -100)
    labels[0, 0] = 1
    pair = {"Bert": "next_sentence_label", "Albert": "sentence_order_label"}
    extra = {pair[family]: torch.randint(0, 2, (batch,))} if head == "ForPreTraining" else {}
    return {"labels": labels, **extra}


def real_rows(t: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    rows = mask is not None and t.dim() >= 2 and t.shape[:2] == mask.shape
    return t[mask.bool()] if rows else t


def compare(ours, theirs, truth, mask, names):
    for name in names:
        parts = [real_rows(output[name], mask) for output in (ours, truth, theirs)]
        if name == "loss":  # the error of one number depends on chance: it is compared together with its scores
            parts = [torch.cat((p.view(-1), real_rows(o[names[0]], mask).flatten()))
                     for p, o in zip(parts, (ours, truth, theirs))]  # fmt: skip
        assert_as_accurate(*parts, OUTPUT, name)


def compare_over_batches(models, name: str, make_mask, kind: str) -> None:
    """Compare outputs and losses of (ours, theirs, truth) over four batches: the largest error of one batch's few
    scores depends on chance."""
    names = outputs_of(name)
    collected: list[dict] = [{} for _ in models]
    for _ in range(4):
        ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH))
        mask = make_mask(kind)
        call = {**segments_for(name, ids.shape), **labels_for(name, mask, ids.shape)}
        with torch.no_grad():
            outputs = [m(ids, attention_mask=mask, **call) for m in models]
        assert list(outputs[0].keys()) == list(outputs[1].keys())
        for found, output in zip(collected, outputs):
            for key in names:
                found.setdefault(key, []).append(real_rows(output[key], mask).flatten())
    compare(*({k: torch.cat(v) for k, v in found.items()} for found in collected), None, names)


def compare_gradients_over_batches(models, name: str, make_mask, kind: str) -> None:
    """Compare the gradients of (ours, theirs, truth), module by module, over four batches: the largest error of one
    batch's few bias, norm or table gradients depends on chance."""
    collected: list[dict] = [{} for _ in models]
    for _ in range(4):
        ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH))
        mask = make_mask(kind)
        call = labels_for(name, mask, ids.shape)
        weights = torch.randn(*ids.shape, WIDTH, dtype=torch.float64)
        draw = [_gradients_of(m, ids, mask, call, weights) for m in models]
        assert draw[0].keys() == draw[1].keys()
        for found, gradients in zip(collected, draw):
            for module, gradient in gradients.items():
                found.setdefault(module, []).append(gradient)
    ours, theirs, truth = ({m: torch.stack(parts) for m, parts in found.items()} for found in collected)
    for module in theirs:
        assert_as_accurate(ours[module], truth[module], theirs[module], GRADIENT, module)


def _gradients_of(model, ids, mask, call, weights):
    model.train().zero_grad()  # dropout is 0 in the configuration
    output = model(ids, attention_mask=mask, **call)
    if "loss" in output:
        loss = output.loss
    else:
        loss = (output[0] * weights.to(output[0].dtype))[mask.bool()].sum()
        loss = loss + (output.pooler_output.sum() if "pooler_output" in output else 0)
    loss.backward()
    return by_module(model)


def by_module(model):
    # Weight and bias of a module are compared together, because the gradients of some biases are only rounding: softmax
    # does not change if the same vector is added to every key.
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.setdefault(name.rpartition(".")[0], []).append(parameter.grad.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


def compare_with_checkpointing(ours, truth, reentrant: bool, inputs: dict) -> None:
    """Loss and gradients where the layers run again in the backward pass, dropout included. inputs: with labels."""
    results = []
    for model, checkpointing in ((truth, False), (ours, False), (ours, True)):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        loss = model(**inputs).loss
        loss.backward()
        results.append([loss.detach().view(1).to(model.dtype), *by_module(model).values()])
    for expected, plain, again in zip(*results):
        assert_as_accurate(again, expected, plain, GRADIENT)
