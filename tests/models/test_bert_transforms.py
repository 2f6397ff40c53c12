"""BERT where tensor values cannot be read: traced, exported, on meta, in inference mode, in torch.func."""

import copy

import pytest
import torch
from numerics import GRADIENT, assert_as_accurate, pooled

import transformer_fast


@pytest.fixture
def case(bert_config, pair, make_mask, ids):
    """(our BertModel, ids, a ragged mask, the same with other rows)."""
    ours, _, _ = pair("BertModel", bert_config())
    mask = make_mask("right")
    return ours, ids, mask, mask.flip(0)


def _at_tokens(out, mask):
    return out[mask.bool()]


@pytest.mark.parametrize("how", ["export", "trace"])
def test_a_recorded_graph_is_right_for_other_masks(how, case):
    model, ids, mask, other = case
    model.requires_grad_(False)
    with torch.no_grad():
        if how == "export":
            run = torch.export.export(model, (ids, mask)).module()
        else:
            run = torch.jit.trace(lambda i, m: model(i, m).last_hidden_state, (ids, mask))
        for m in (mask, other):
            found, wanted = run(ids, m), model(ids, m).last_hidden_state
            found = found if torch.is_tensor(found) else found["last_hidden_state"]
            torch.testing.assert_close(_at_tokens(found, m), _at_tokens(wanted, m))


@pytest.mark.quick
def test_shapes_without_values(bert_config, ids):
    with torch.device("meta"):
        model = transformer_fast.BertModel(bert_config())
    out = model(ids.to("meta"), attention_mask=torch.ones_like(ids, device="meta"))
    assert out.last_hidden_state.is_meta and out.last_hidden_state.shape == (*ids.shape, 48)


def test_a_model_made_in_inference_mode(bert_config, ids):
    with torch.inference_mode():
        model = transformer_fast.BertModel(bert_config()).eval()
        first = model(ids).last_hidden_state
        assert torch.equal(model(ids).last_hidden_state, first)


def test_gradients_by_torch_func(case):
    model, ids, mask, _ = case
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        out = torch.func.functional_call(model, parameters, (ids, mask))
        return _at_tokens(out.last_hidden_state, mask).square().sum()

    found = torch.func.grad(loss)(parameters)
    _at_tokens(model(ids, mask).last_hidden_state, mask).square().sum().backward()
    wide = copy.deepcopy(model).double()
    wide.zero_grad()
    _at_tokens(wide(ids, mask).last_hidden_state, mask).square().sum().backward()
    truth = {name: p.grad for name, p in wide.named_parameters() if p.grad is not None}
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_as_accurate(*(pooled(g, truth) for g in (found, truth, plain)), GRADIENT)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": torch.ones(2, 5)}, "input_ids: wanted an int32 or int64 tensor, got torch.float32"),
        ({"input_ids": [[1, 2]]}, "input_ids: wanted an int32 or int64 tensor, got list"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, "input_ids: wanted at least one position"),
        ({"inputs_embeds": torch.ones(2, 5, 47)}, r"inputs_embeds: wanted \(batch, length, 48\), got \(2, 5, 47\)"),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "token_type_ids": torch.zeros(2, 4, dtype=torch.long)},
            r"token_type_ids: wanted shape \(2, 5\), got \(2, 4\)",
        ),
        (
            {"input_ids": torch.ones(2, 5, dtype=torch.long), "position_ids": torch.zeros(3, 5, dtype=torch.long)},
            r"position_ids: wanted shape \(2, 5\), got \(3, 5\)",
        ),
    ],
)
def test_bad_input_is_named(arguments, message, bert_config):
    model = transformer_fast.BertModel(bert_config()).eval()
    with pytest.raises((TypeError, ValueError), match=message):
        model(**arguments)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("model.safetensors.index.json", b"{", "index of weights is not valid JSON"),
        ("pytorch_model.bin", b"junk", "pytorch_model.bin: is truncated or corrupt"),
        ("config.json", b'{"model_type": "bert", "hidden_act": "nope"}', "hidden_act 'nope' is unknown"),
    ],
)
def test_broken_files_are_named(file, content, message, bert_config, tmp_path):
    transformer_fast.BertModel(bert_config()).save_pretrained(tmp_path)
    if file != "config.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        transformer_fast.BertModel.from_pretrained(tmp_path)
