"""Every way of saving writes the whole model: the storage of parameters is like that of Hugging Face's."""

import copy
import pickle

import accelerate
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_model

import transformer_fast as tf
from transformer_fast.generation import set_weight_storage

pytestmark = pytest.mark.quick
CONFIGS = {
    "bert": ("BertForSequenceClassification", transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
    "bart": ("BartForConditionalGeneration", transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=40, max_position_embeddings=40)),
    "t5": ("T5ForConditionalGeneration", transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)),
}  # fmt: skip


def used(family, folder):
    """A loaded model after a training step, a forward in inference mode and, if it can generate, a generation."""
    torch.manual_seed(0)
    name, config = CONFIGS[family]
    getattr(transformers, name)(config).save_pretrained(folder)
    model = getattr(tf, name).from_pretrained(folder)
    ids = torch.randint(3, 96, (2, 7))
    labels = torch.tensor([0, 1]) if family == "bert" else ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(ids, labels=labels).loss.backward()
    optimizer.step()
    model.eval()
    with torch.inference_mode():
        model(ids, labels=labels)
    if family != "bert":
        set_weight_storage(model, torch.float32)
        model.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))
    return model


def layout(model):
    """The storage of the parameters: shape, strides, offset and size of the storage, and which of them share one."""
    first = {}
    for name, p in model.named_parameters():
        first.setdefault(p.untyped_storage().data_ptr(), name)
    storages = {n: p.untyped_storage() for n, p in model.named_parameters()}
    return {
        n: (p.shape, p.stride(), p.storage_offset(), storages[n].nbytes(), first[storages[n].data_ptr()])
        for n, p in model.named_parameters()
    }


def accelerate_model(model, folder):
    accelerate.Accelerator(cpu=True).save_model(model, folder)
    return load_file(folder / "model.safetensors")


def accelerate_state(model, folder):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(folder)
    return load_file(folder / "model.safetensors")


def hub_model(model, folder):
    from huggingface_hub import save_torch_model

    save_torch_model(model, folder, max_shard_size="20KB")
    return {k: v for part in folder.glob("*.safetensors") for k, v in load_file(part).items()}


def safetensors_model(model, folder):
    save_model(model, str(folder / "model.safetensors"))
    return load_file(folder / "model.safetensors")


def shards(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return {k: v for part in folder.glob("*.safetensors") for k, v in load_file(part).items()}


def torch_file(model, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    size = sum(p.nbytes for p in model.parameters())
    assert (folder / "model.pt").stat().st_size < size + 100_000  # a view of a larger storage would save all of it
    return torch.load(folder / "model.pt")


def distributed_checkpoint(model, folder):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    checkpoint.save(get_model_state_dict(model), checkpoint_id=folder, no_dist=True)
    found = {k: torch.full_like(v, torch.nan) for k, v in get_model_state_dict(model).items()}
    checkpoint.load(found, checkpoint_id=folder, no_dist=True)
    return found


def pickled(model, folder):
    return pickle.loads(pickle.dumps(model)).state_dict()


SAVERS = [
    accelerate_model, accelerate_state, hub_model, safetensors_model, shards, torch_file, distributed_checkpoint,
    pickled,
]  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_every_saver_writes_every_tensor(family, tmp_path):
    model = used(family, tmp_path / "start")
    state = model.state_dict()
    for save in SAVERS:
        folder = tmp_path / save.__name__
        folder.mkdir()
        found = save(model, folder)
        for name, value in state.items():
            kept = found.get(name)
            if kept is None:  # one of several tied tensors is enough: HF ties them at loading
                tied = [k for k, v in state.items() if v.data_ptr() == value.data_ptr()]
                kept = next((found[k] for k in tied if k in found), None)
            assert kept is not None, f"{save.__name__}: {name} is missing"
            assert torch.equal(kept, value), f"{save.__name__}: {name} differs"


@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_lie_as_those_of_hugging_face(family, tmp_path):
    """After training, inference, generation, .to(), deepcopy and pickling."""
    model = used(family, tmp_path)
    theirs = layout(getattr(transformers, CONFIGS[family][0]).from_pretrained(tmp_path))
    mapped = {n: (*about[:2], about[4]) for n, about in layout(model).items()}  # a mapped file is one storage
    assert {n: (*about[:2], about[4]) for n, about in theirs.items()} == mapped
    for change in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), torch.nn.Module.bfloat16):
        ours = change(model)
        ids = torch.randint(3, 96, (2, 7))
        with torch.no_grad():
            ours(ids, **({} if family == "bert" else {"labels": ids}))
        for name, (shape, _, offset, size, _) in layout(ours).items():
            assert offset == 0 and size == shape.numel() * ours.dtype.itemsize, name


def test_peft_writes_every_adapter_and_what_it_was_merged_into(tmp_path):
    model = used("bert", tmp_path / "start")
    lora = peft.LoraConfig(r=4, target_modules=["query", "key", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    ids = torch.randint(3, 96, (2, 7))
    adapted.eval()(ids)
    adapted.save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 12
    merged = adapted.merge_and_unload()
    merged(ids)
    save_model(merged, str(tmp_path / "merged.safetensors"))
    found = load_file(tmp_path / "merged.safetensors")
    assert found.keys() == merged.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in merged.state_dict().items())
