"""A changed model has the results of Hugging Face's with the same change; a stock model uses the fast path."""

import copy
import functools
import pickle

import accelerate
import pytest
import torch
import transformers
from numerics import assert_as_accurate
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune

import transformer_fast
from transformer_fast.models._stock import why_hf_forward, why_hf_loop

SIZES = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "BertForSequenceClassification": lambda: transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **SIZES
    ),
    "DistilBertForMaskedLM": lambda: transformers.DistilBertConfig(
        dim=32, n_layers=2, n_heads=4, hidden_dim=48, **SIZES
    ),
    "AlbertForMaskedLM": lambda: transformers.AlbertConfig(
        embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **SIZES
    ),
    "ModernBertForMaskedLM": lambda: transformers.ModernBertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, local_attention=4, **SIZES
    ),
    "MPNetForMaskedLM": lambda: transformers.MPNetConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **SIZES
    ),
    "ElectraForPreTraining": lambda: transformers.ElectraConfig(
        embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **SIZES
    ),
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=40, **SIZES),
    # relu: HF creates this family's other activations at import, and a second import of transformers replaces their
    # classes.
    "OpenAIGPTLMHeadModel": lambda: transformers.OpenAIGPTConfig(
        afn="relu",
        n_embd=32, n_layer=2, n_head=4, n_positions=40, **SIZES
    ),
    "BartForConditionalGeneration": lambda: transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40, decoder_start_token_id=2, **SIZES
    ),
    "MarianMTModel": lambda: transformers.MarianConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40, decoder_start_token_id=2, **SIZES
    ),
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=40, **SIZES
    ),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **SIZES
    ),
}  # fmt: skip
LAYERS = {
    "BertForSequenceClassification": "bert.encoder.layer", "DistilBertForMaskedLM": "distilbert.transformer.layer",
    "ModernBertForMaskedLM": "model.layers", "AlbertForMaskedLM": "albert.encoder.albert_layer_groups",
    "MPNetForMaskedLM": "mpnet.encoder.layer", "ElectraForPreTraining": "electra.encoder.layer",
    "GPT2LMHeadModel": "transformer.h",
    "OpenAIGPTLMHeadModel": "transformer.h", "LlamaForCausalLM": "model.layers",
    "BartForConditionalGeneration": "model.encoder.layers",
    "MarianMTModel": "model.decoder.layers", "T5ForConditionalGeneration": "decoder.block",
}  # fmt: skip
ENCODER_DECODERS = ("BartForConditionalGeneration", "MarianMTModel", "T5ForConditionalGeneration")


@functools.cache
def _weights(name: str):
    torch.manual_seed(0)
    model = getattr(transformers, name)(CONFIGS[name]())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.05))
    return model.state_dict()


def make(name: str, kind: type | None = None, library=transformer_fast):
    model = (kind or getattr(library, name))(CONFIGS[name]())
    model.load_state_dict(_weights(name))
    return model.eval()


def inputs(name: str, masked: bool = True) -> dict:
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if masked:
        found["attention_mask"][1, 5:] = 0
    return found | ({"decoder_input_ids": ids[:, :4]} if name in ENCODER_DECODERS else {})


def same(name: str, change, masked: bool = True):
    """Our model with the change is as close to float64 as HF's with it; and `change` has an effect."""
    call = inputs(name, masked)
    found = []
    for library, dtype in ((transformer_fast, None), (transformers, torch.float64), (transformers, None)):
        model = make(name, library=library)
        model = change(model) or model
        found.append(model.to(dtype or torch.float32)(**call)[0])
        if library is transformer_fast:
            changed = model
    keep = slice(None)
    if masked and found[0].dim() == 3 and name not in ENCODER_DECODERS:
        keep = call["attention_mask"].bool()
    assert_as_accurate(*(out[keep] for out in found))
    return changed


def _put(path: str, module):
    def change(model):
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, module() if isinstance(module, type) else module)

    return change


@pytest.mark.quick
@pytest.mark.parametrize("name", CONFIGS)
def test_stock(name):
    """Constructed, copied, pickled, loaded, with other embeddings, fewer layers or another dtype."""
    model = make(name)
    model(**inputs(name))
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    again.resize_token_embeddings(101, mean_resizing=False)
    again.to(torch.bfloat16).requires_grad_(False).train()
    if again.supports_gradient_checkpointing:
        again.gradient_checkpointing_enable()
    again.enable_input_require_grads()
    for m in (model, again):
        assert not why_hf_forward(m)
    if hasattr(model, "generate") and name != "BertForSequenceClassification":
        assert not why_hf_loop(model)
    if name != "AlbertForMaskedLM":
        layers = model.get_submodule(LAYERS[name])
        del layers[1:]
        assert not why_hf_forward(model)


class _Half(nn.Module):
    def forward(self, x, *args, **kwargs):
        return x * 0.5


class _Attention(nn.Module):
    def forward(self, x, *args, **kwargs):
        return x * 0.5, None


CHANGES = {
    "another activation": _put("bert.encoder.layer.0.intermediate.intermediate_act_fn", nn.ReLU),
    "another gelu": _put("bert.encoder.layer.0.intermediate.intermediate_act_fn", nn.GELU("tanh")),
    "another attention": _put("bert.encoder.layer.1.attention", _Attention),
    "another norm": _put("bert.encoder.layer.1.output.LayerNorm", _Half),
    "another pooler activation": _put("bert.pooler.activation", nn.ReLU),
    "another dropout": _put("bert.encoder.layer.0.output.dropout", _Half),
    "another classifier": _put("classifier", nn.Sequential(nn.ReLU(), nn.Linear(32, 2)).double().float().eval()),
    "another embedding": _put("bert.embeddings.word_embeddings", type("Even", (nn.Embedding,), {
        "__init__": lambda self: nn.Embedding.__init__(self, 97, 32, _weight=torch.linspace(-1, 1, 3104).view(97, 32)),
        "forward": lambda self, ids: nn.Embedding.forward(self, ids // 2 * 2)})),
    "a scale": lambda m: setattr(m.bert.encoder.layer[0].attention.self, "scaling", 0.9),
    "a method": lambda m: setattr(m.bert.encoder.layer[0], "feed_forward_chunk", lambda x: x * 0.5),
    "a forward": lambda m: setattr(m.bert.pooler, "forward", lambda x: x[:, 1]),
    "a hook": lambda m: m.bert.encoder.register_forward_hook(
        lambda module, args, out: type(out)(last_hidden_state=out[0] * 0.5)) and None,
    "a hook before": lambda m: m.bert.encoder.layer[1].attention.output.register_forward_pre_hook(
        lambda module, args: (args[0] * 0.5, args[1])) and None,
    "a parametrisation": lambda m: parametrize.register_parametrization(
        m.bert.encoder.layer[0].attention.self.query, "weight", _Half()) and None,
    "pruned weights": lambda m: prune.l1_unstructured(m.bert.pooler.dense, "weight", 0.5) and None,
    "a compiled layer": lambda m: m.bert.encoder.layer.__setitem__(
        1, torch.compile(m.bert.encoder.layer[1], backend="eager")),
    "a layer compiled in place": lambda m: m.bert.encoder.layer[1].compile(backend="eager"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed(change):
    torch.manual_seed(2)
    model = same("BertForSequenceClassification", CHANGES[change])
    assert why_hf_forward(model)


def test_wrapped_for_checkpointing():
    """torch's checkpoint wrapper only recomputes a layer in backward."""

    def wrap(model):
        model.bert.encoder.layer[0] = checkpoint_wrapper(model.bert.encoder.layer[0])

    model = same("BertForSequenceClassification", wrap)
    assert not why_hf_forward(model)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("masked", [False, True])
def test_hooked_layers(name, masked):
    """Hooks on every module fire as often and with the same shapes as in transformers' own models."""
    seen, handles = [], []

    def change(model):
        shapes = {}
        while handles:  # activations of OpenAI GPT are the same modules in all models
            handles.pop().remove()
        for path, module in model.named_modules():
            if path:

                def hook(module, args, out, path=path):
                    shapes.setdefault(path, []).append([t.shape for t in (*args, out) if isinstance(t, torch.Tensor)])

                handles.append(module.register_forward_hook(hook))
        seen.append(shapes)

    same(name, change, masked)
    ours, _, theirs = seen
    assert ours == theirs and ours
    for handle in handles:
        handle.remove()


@pytest.mark.quick
def test_hooks_of_all_modules():
    model, seen = make("GPT2LMHeadModel"), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(**inputs("GPT2LMHeadModel"))
        assert model.transformer.h[0].attn in seen and "all modules" in why_hf_forward(model)
    finally:
        handle.remove()
    assert not why_hf_forward(model)


@pytest.mark.quick
def test_a_change_is_taken_back():
    model = make("BertForSequenceClassification")
    call = inputs("BertForSequenceClassification")
    before = model(**call).logits
    handle = model.bert.embeddings.register_forward_hook(lambda module, args, out: out * 0.5)
    assert not torch.allclose(model(**call).logits, before)
    handle.remove()
    assert torch.equal(model(**call).logits, before) and not why_hf_forward(model)
    dropout, model.dropout = model.dropout, nn.Identity()
    assert "dropout" in why_hf_forward(model) and not why_hf_forward(model.bert)
    model.dropout = dropout
    assert not why_hf_forward(model)


@pytest.mark.quick
def test_outputs_collected_by_transformers_leave_a_model_stock():
    model = make("BertForSequenceClassification")
    handle = model.bert.embeddings.register_forward_hook(lambda *_: None)
    out = model(**inputs("BertForSequenceClassification"), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2  # collected by hooks that are not removed
    handle.remove()
    assert not why_hf_forward(model)


@pytest.mark.quick
def test_layers_called_as_transformers_calls_them():
    """encoder(embeddings(x)) and layer(h), with manual gradient checkpointing: the recomputation is the same."""
    bert, theirs = (make("BertForSequenceClassification", library=lib).bert for lib in (transformer_fast, transformers))
    x = inputs("BertForSequenceClassification")["input_ids"]
    h, other = bert.embeddings(x), theirs.embeddings(x)
    torch.testing.assert_close(bert.encoder(h)[0], theirs.encoder(other)[0])
    a, b = (t.detach().requires_grad_() for t in (h, other))
    torch.utils.checkpoint.checkpoint(bert.encoder.layer[0], a, use_reentrant=False).square().sum().backward()
    theirs.encoder.layer[0](b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    mask = torch.rand(3, 1, 9, 9) > 0.3
    torch.testing.assert_close(bert.encoder.layer[0](h, mask), theirs.encoder.layer[0](other, mask))
    assert bert.encoder.layer[0].attention.self.config is bert.config and bert.config._attn_implementation == "sdpa"


def test_attention_in_the_forward_of_transformers_is_ours(monkeypatch):
    from transformer_fast.integrations import huggingface

    calls, run = [], huggingface.attention_forward
    model = make("T5ForConditionalGeneration")
    model.encoder.block[0].layer[1].register_forward_hook(lambda *_: None)

    def counted(*args, **kwargs):
        calls.append(args[0])
        return run(*args, **kwargs)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "transformer_fast", counted)
    model(**inputs("T5ForConditionalGeneration"))
    assert len(calls) == 2  # the encoder's; the decoder is stock and uses the fast path


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("how", ["offloaded", "sharded", "quantised"])
def test_libraries_that_change_models(name, how, tmp_path):
    """accelerate's offloading, FSDP2 of layers (T5 reads its table outside of them), torch's dynamic quantisation."""
    if how == "sharded":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        out = []
        for library in (transformer_fast, transformers):
            model = make(name, library=library)
            if how == "offloaded":
                accelerate.cpu_offload(model, execution_device="cpu")
            elif how == "sharded":
                for layer in model.get_submodule(LAYERS[name]):
                    fully_shard(layer)
                fully_shard(model)
            else:
                model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
            out.append(model(**inputs(name, False))[0].detach())
            if library is transformer_fast:
                assert bool(why_hf_forward(model)) == (how != "sharded")
                if how == "offloaded" and name != "BertForSequenceClassification":
                    model.generate(inputs(name)["input_ids"], max_new_tokens=2)
    finally:
        if how == "sharded":
            torch.distributed.destroy_process_group()
    double = make(name, library=transformers).double()(**inputs(name, False))[0]
    assert_as_accurate(out[0], double, out[1])


def test_sharded_where_the_fast_path_does_not_call(tmp_path):
    """A sharded container that only Hugging Face's forward calls, and a user's hook on a layer sharded by FSDP2."""
    name = "BertForSequenceClassification"
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        container, hooked = make(name), make(name)
        fully_shard(container.bert.encoder)
        fully_shard(container)
        fully_shard(hooked.bert.encoder.layer[1])
        seen = []
        hooked.bert.encoder.layer[1].register_forward_hook(lambda *_: seen.append(True))
        assert why_hf_forward(container) == (
            "bert.encoder is sharded by FSDP2 on its own, and the fast path does not call it"
        )
        assert why_hf_forward(hooked) == "bert.encoder.layer.1 has a forward hook"
        out = [model(**inputs(name, False))[0].detach() for model in (container, hooked)]
        assert seen
    finally:
        torch.distributed.destroy_process_group()
    theirs = make(name, library=transformers)
    plain = theirs(**inputs(name, False))[0].detach()
    double = theirs.double()(**inputs(name, False))[0]
    for logits in out:
        assert_as_accurate(logits, double, plain)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("changed", [False, True])
def test_compile_in_one_graph(name, changed):
    torch._dynamo.reset()  # earlier compilations count towards its limit
    model = make(name)
    if changed:
        model.get_submodule(LAYERS[name])[0].register_forward_hook(lambda *_: None)
    call = inputs(name)
    keep = slice(None) if name != "GPT2LMHeadModel" else call["attention_mask"].bool()
    found = torch.compile(model, backend="eager", fullgraph=True)(**call)[0][keep]
    torch.testing.assert_close(found, model(**call)[0][keep])


# ---- generation ---------------------------------------------------------------------------------------
def _subclass(library, name, **methods):
    return type("Changed", (getattr(library, name),), methods)


def _low(base):
    def forward(self, *args, **kwargs):
        out = base.forward(self, *args, **kwargs)
        out.logits[..., 50:] = -1e9
        return out

    return {"forward": forward}


def _longer(base):
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        found = base.prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
        ids = "decoder_input_ids" if self.config.is_encoder_decoder else "input_ids"
        return {**found, ids: found[ids] // 2 * 2}

    return {"prepare_inputs_for_generation": prepare_inputs_for_generation}


def _forgetting(base):
    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        found = base._update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs)
        if found.get("attention_mask") is not None and not self.config.is_encoder_decoder:
            found["attention_mask"] = found["attention_mask"].clone()
            found["attention_mask"][:, 1] = 0
        return found

    return {"_update_model_kwargs_for_generation": _update_model_kwargs_for_generation}


GENERATORS = [
    "GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "LlamaForCausalLM", "BartForConditionalGeneration",
    "T5ForConditionalGeneration",
]  # fmt: skip


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("make_methods", [_low, _longer, _forgetting])
def test_overridden_methods_are_used_at_every_step(name, make_methods):
    tokens = []
    for library in (transformer_fast, transformers):
        methods = make_methods(getattr(library, name))
        model = make(name, _subclass(library, name, **methods)).double()
        plain = make(name, library=library).double()
        for method, function in methods.items():
            if method != "forward":
                setattr(plain, method, functools.partial(function, plain))  # on an instance
        call = {"inputs": inputs(name)["input_ids"]}
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        tokens += [m.generate(**call, **options).tolist() for m in (model, plain)]
    assert tokens[0] == tokens[2] and tokens[1] == tokens[3]
    assert why_hf_loop(make(name, _subclass(transformer_fast, name, **make_methods(getattr(transformer_fast, name)))))


@pytest.mark.parametrize("name", GENERATORS)
def test_generate_with_a_changed_layer(name):
    """Hooks fire at every step; compiled layers work."""
    tokens, fired = [], []
    for library in (transformer_fast, transformers):
        model = make(name, library=library).double()
        path = LAYERS[name].replace("encoder", "decoder")
        layers, count = model.get_submodule(path), []
        layers[0].register_forward_hook(lambda module, args, out, count=count: count.append(1))
        layers[1] = torch.compile(layers[1], backend="eager")
        ids = inputs(name)["input_ids"]
        tokens.append(model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).tolist())
        fired.append(len(count))
    assert tokens[0] == tokens[1] and fired[0] == fired[1] == 4


@pytest.mark.quick
def test_replaced_class(monkeypatch):
    """A replaced forward of a transformers class takes effect."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    model, call = make("GPT2LMHeadModel"), inputs("GPT2LMHeadModel")
    before = model(**call).logits
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, x: x * 0)
    assert "GPT2MLP" in why_hf_loop(model) and not torch.allclose(model(**call).logits, before)
