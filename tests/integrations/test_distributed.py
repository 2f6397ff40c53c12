"""Data parallel and fully sharded training of each family: two processes have the gradients of one process on both
halves of a batch, and a model sharded by FSDP2 uses the fast path."""

import datetime
import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from compat_families import BATCH, make_config, make_inputs
from numerics import GRADIENT, assert_as_accurate, pooled
from torch import nn

import transformer_fast as tf
from transformer_fast.models import _layer
from transformer_fast.models._layer import Layer

WORLD, WAIT = 2, datetime.timedelta(minutes=5)
_DECODER = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
DECODERS = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "MistralForCausalLM": ("MistralConfig", {"sliding_window": 4}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 8}),
    "Gemma2ForCausalLM": ("Gemma2Config", {"head_dim": 8, "sliding_window": 4}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {}),
    "PhiForCausalLM": ("PhiConfig", {}),
    "OPTForCausalLM": ("OPTConfig", {"ffn_dim": 48, "dropout": 0.0}),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
}
IDS = {"vocab_size": 61, "pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
OURS = {
    "TransformerForConditionalGeneration": ("TransformerConfig", {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "dropout": 0.0,
    }),
    "AttentionRNNForConditionalGeneration": ("AttentionRNNConfig", {
        "embedding_size": 16, "hidden_size": 32, "dropout": 0.0,
    }),
}  # fmt: skip
FAMILIES = [
    "BertForSequenceClassification", "DistilBertForMaskedLM", "AlbertForMaskedLM", "RobertaForMaskedLM",
    "ElectraForMaskedLM", "MPNetForMaskedLM", "ModernBertForMaskedLM", "GPT2LMHeadModel", "OpenAIGPTLMHeadModel",
    "BartForConditionalGeneration", "MarianMTModel", "T5ForConditionalGeneration", *DECODERS, *OURS,
]  # fmt: skip


def make_model(name: str):
    torch.manual_seed(0)
    if name in DECODERS:
        config_class, settings = DECODERS[name]
        return getattr(tf, name)(getattr(transformers, config_class)(**_DECODER | settings)).train()
    if name in OURS:
        config_class, settings = OURS[name]
        return getattr(tf, name)(getattr(tf, config_class)(**IDS | settings)).train()
    return getattr(tf, name)(make_config(name)).train()


def batch(name: str, rank: int) -> dict:
    """This process's rows of one batch with padding."""
    like = "GPT2LMHeadModel" if name in DECODERS else "BartForConditionalGeneration" if name in OURS else name
    inputs = make_inputs(like)
    rows = slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
    return {key: value[rows] for key, value in inputs.items()}


def one_process(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = make_model(name).to(dtype)
    sum(model(**batch(name, rank)).loss for rank in range(WORLD)).div(WORLD).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def data_parallel(name: str, rank: int) -> dict[str, torch.Tensor]:
    model = nn.parallel.DistributedDataParallel(make_model(name), find_unused_parameters=True)
    model(**batch(name, rank)).loss.backward()
    return {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}


def layers_of(model) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, Layer)]


def shard(model, *apart: list[nn.Module]):
    """Shard each layer with its wrapper, then the lists of modules, then the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    wrappers = [m for m in model.modules() if hasattr(m, "checkpoint_fn")]
    for module in [*(wrappers or layers_of(model)), *apart, model]:
        fully_shard(module, mesh=mesh)
    return model


def whole_gradients(model, inputs: dict) -> dict[str, torch.Tensor]:
    model(**inputs).loss.backward()
    named = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in model.named_parameters()}
    return {n: p.grad.full_tensor() for n, p in named.items() if p.grad is not None}


def fully_sharded(name: str, rank: int) -> dict[str, torch.Tensor]:
    return whole_gradients(shard(make_model(name)), batch(name, rank))


def words_apart(name: str, rank: int) -> dict[str, torch.Tensor]:
    """Units as in accelerate: the token embedding and the weights tied to it are one unit, BERT's embeddings another.
    torch refuses that if a third module has one of their parameters."""
    model = make_model(name)
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = [words] if head is None else [words, head]
    own = {id(p) for module in apart for p in module.parameters()}
    others = [m for m in model.modules() if m not in apart and own & {id(p) for p in m._parameters.values()}]
    units = [apart]
    if hasattr(model.base_model, "embeddings"):
        units.append([model.base_model.embeddings])
    if model.base_model is not model:
        units.append([model.base_model])
    if others:
        units.clear()
    return whole_gradients(shard(model, *units), batch(name, rank))


def computed_again(name: str, rank: int) -> dict[str, torch.Tensor]:
    """Layers in torch's checkpoint wrapper, which keeps no activations for backward."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = make_model(name)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Layer))
    return whole_gradients(shard(model), batch(name, rank))


def checkpointed(name: str, rank: int) -> dict[str, torch.Tensor]:
    """With Hugging Face's gradient_checkpointing_enable."""
    model = make_model(name)
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return whole_gradients(shard(model), batch(name, rank))


WAYS = {
    "data parallel": data_parallel, "fully sharded": fully_sharded, "words apart": words_apart,
    "computed again": computed_again, "checkpointed": checkpointed,
}  # fmt: skip


def uses(name: str, rank: int, model) -> dict:
    """Calls without gradients: planning from a sharded table, and a cache."""
    inputs = {k: v for k, v in batch(name, rank).items() if "label" not in k}
    model.eval()
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
        written = model.generate(inputs["input_ids"][:, :3], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    attentions = output.decoder_attentions if "T5" in name else output.attentions
    return {"logits": output.logits, "attentions": torch.stack(attentions), "written": written.shape[1]}


def reentrant(name: str, rank: int) -> dict[str, torch.Tensor]:
    model = make_model(name)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return whole_gradients(shard(model), batch(name, rank))


USED = ["GPT2LMHeadModel", "T5ForConditionalGeneration", "LlamaForCausalLM"]


class Counted:
    """Counts how often our stack computes a layer."""

    def __init__(self):
        self.calls, self._run, _layer.transformer_layer = 0, _layer.transformer_layer, self

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self._run(*args, **kwargs)


def work(rank: int, rendezvous: str, result: str) -> None:
    torch.set_num_threads(1)
    place = {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": WORLD}
    dist.init_process_group("gloo", timeout=WAIT, **place)
    found, counted = {}, Counted()
    runs = {(name, way): functools.partial(run, name, rank) for name in FAMILIES for way, run in WAYS.items()}
    runs |= {(name, "uses"): lambda name=name: uses(name, rank, shard(make_model(name))) for name in USED}
    runs |= {(name, "explained"): lambda name=name: {"said": tf.explain(shard(make_model(name)))} for name in FAMILIES}
    runs["reentrant"] = lambda: reentrant("T5ForConditionalGeneration", rank)
    for key, run in runs.items():
        counted.calls = 0
        try:
            found[key] = run()
        except Exception as error:  # in both processes
            found[key] = f"{type(error).__name__}: {error}"
        found[key, "calls"] = counted.calls
    if rank == 0:
        torch.save(found, result)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch was built without torch.distributed's gloo backend")
    folder = tmp_path_factory.mktemp("gradients")
    mp.spawn(work, (str(folder / "rendezvous"), str(folder / "found.pt")), nprocs=WORLD)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(found, name):
    alone, truth = one_process(name, torch.float32), one_process(name, torch.float64)
    count = len(layers_of(make_model(name)))
    for way in WAYS:
        gradients = found[name, way]
        assert not isinstance(gradients, str), f"{way}: {gradients}"
        assert gradients.keys() == alone.keys(), way
        assert_as_accurate(*(pooled(g, truth) for g in (gradients, truth, alone)), GRADIENT, name=way)
        assert found[(name, way), "calls"] >= count, f"{way}: {found[name, 'explained']}"


@pytest.mark.parametrize("name", FAMILIES)
def test_explained(found, name):
    said = found[name, "explained"]
    assert not isinstance(said, str), said
    lines = [line for line in said["said"].splitlines()[1:] if "generate:" not in line]
    assert lines and all(": the fast path" in line for line in lines), said["said"]
    if "generate:" in said["said"]:
        assert "transformers' own loop" in said["said"].splitlines()[-1], said["said"]


def test_table_that_reentrant_checkpointing_would_lose(found):
    assert "wanted use_reentrant=False for T5 under FSDP2, got True" in str(found["reentrant"])


@pytest.mark.parametrize("name", USED)
def test_uses(found, name):
    sharded = found[name, "uses"]
    assert not isinstance(sharded, str), sharded
    truth, plain = (uses(name, 0, make_model(name).to(dtype)) for dtype in (torch.float64, torch.float32))
    assert sharded["written"] == plain["written"]
    for part in ("logits", "attentions"):
        assert_as_accurate(sharded[part], truth[part], plain[part], name=part)
