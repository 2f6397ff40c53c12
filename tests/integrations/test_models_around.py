"""accelerate on models of transformers that contain one of this package's families, or attention that is not behind the
interface: the same results as before, in float64."""

import copy

import pytest
import torch
import transformers as hf
from hf_models import exact_norms
from numerics import assert_as_accurate
from transformers.models.pegasus_x import modeling_pegasus_x  # noqa: F401  found by its configuration

import transformer_fast

IDS = torch.randint(3, 61, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(8) < torch.tensor([8, 5, 3])[:, None]).long()
TARGETS = torch.randint(3, 61, (3, 5), generator=torch.Generator().manual_seed(1))
SPECIAL = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = SPECIAL | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40,
                  "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
GPT = SPECIAL | {"n_embd": 32, "n_layer": 1, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BART = SPECIAL | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                  "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "dropout": 0.0,
                  "max_position_embeddings": 40, "decoder_start_token_id": 2}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
          "image_size": 16, "patch_size": 8}  # fmt: skip


def _accelerated(model):
    """(the accelerated model, the model itself, the report), with the same random weights, in float64."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    theirs = model.double().eval()
    ours = copy.deepcopy(theirs)
    return ours, theirs, transformer_fast.accelerate(ours, verbose=False)


@pytest.mark.parametrize("decoder", [hf.BertConfig(**BERT), hf.GPT2Config(**GPT), hf.BartConfig(**BART)], ids=type)
def test_losses_of_encoder_decoders_whose_start_token_is_the_padding_token(decoder):
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**BERT), copy.deepcopy(decoder))
    config.pad_token_id = config.decoder_start_token_id = 0
    ours, theirs, report = _accelerated(hf.EncoderDecoderModel(config))
    assert {"encoder", "decoder"} <= report.swapped.keys()
    labels = TARGETS.masked_fill(TARGETS % 4 == 0, -100)
    found = []
    for model in (ours, theirs):
        out = model(IDS, attention_mask=MASK, labels=labels)
        out.loss.backward()
        found.append({"loss": out.loss, "logits": out.logits} | {k: p.grad for k, p in model.named_parameters()})
    for name, wanted in found[1].items():
        if wanted is not None:
            torch.testing.assert_close(found[0][name], wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_a_model_around_ours_reads_padding():
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**SPECIAL, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                   intermediate_size=40),
        vision_config=hf.CLIPVisionConfig(**VISION), image_token_index=60,
    )  # fmt: skip
    ours, theirs, report = _accelerated(hf.LlavaForConditionalGeneration(config))
    assert report.swapped["model.language_model"] == "transformer_fast.LlamaModel"
    call = {"input_ids": IDS, "attention_mask": MASK}
    exact = exact_norms(copy.deepcopy(theirs))
    assert_as_accurate(*(m(**call).logits.detach() for m in (ours.float(), exact, theirs.float())))
    assert "padding too" in transformer_fast.explain(ours)
    assert "padding too" not in transformer_fast.explain(transformer_fast.restore(ours))


@pytest.mark.parametrize("make", [
    lambda: hf.PegasusXForConditionalGeneration(hf.PegasusXConfig(**BART, block_size=4, num_global_tokens=2)),
    lambda: hf.BigBirdPegasusForConditionalGeneration(hf.BigBirdPegasusConfig(**BART, attention_type="original_full")),
    lambda: hf.GitForCausalLM(hf.GitConfig(**BERT, vision_config=VISION)),
], ids=["is_causal=False", "written into the encoder", "written into the text layers"])  # fmt: skip
def test_models_without_sdpa(make):
    ours, theirs, _ = _accelerated(make())
    call = {"input_ids": IDS, "attention_mask": MASK}
    if theirs.config.is_encoder_decoder:
        call["decoder_input_ids"] = TARGETS
    torch.testing.assert_close(*(m(**call).logits for m in (ours, theirs)))
    for model in (ours, theirs):
        model.set_attn_implementation("transformer_fast" if model is ours else "eager")
    torch.testing.assert_close(*(m(**call).logits for m in (ours, theirs)))
