"""attn_implementation="transformer_fast" is registered in both orders of import, and nothing is imported early."""

import subprocess
import sys

import pytest

KNOWN = (
    "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as a;"
    "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as m;"
    "assert 'transformer_fast' in a and 'transformer_fast' in m;"
)
MODEL = (
    "from transformers import BertConfig, BertModel; import torch;"
    "c = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8);"
    "c._attn_implementation = 'transformer_fast'; print(BertModel(c)(torch.ones(1, 3, dtype=torch.long))[0].shape);"
)


@pytest.mark.parametrize(
    "code",
    [
        "import transformer_fast, sys; assert 'transformers' not in sys.modules; import transformers, inspect;"
        + MODEL
        + KNOWN
        + "import transformers.modeling_utils as u; assert 'class PreTrainedModel' in inspect.getsource(u);",
        "import transformers.modeling_utils, transformer_fast;" + KNOWN,
        "import transformer_fast, sys, transformers.modeling_utils;"
        "[sys.modules.pop(n) for n in list(sys.modules) if n.split('.')[0] == 'transformers'];" + KNOWN,
    ],
    ids=["ours first", "theirs first", "theirs imported again"],
)
def test_order_of_imports(code):
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("registers", [False, True])
def test_a_transformers_that_is_too_old_still_imports(tmp_path, registers):
    """Also transformers 4.57, which has an attention interface, but not what the rest of this package needs."""
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '4.57.1'")
    (package / "modeling_utils.py").write_text("loaded = True")
    if registers:
        (package / "masking_utils.py").write_text(
            "sdpa_mask = None\nclass AttentionMaskInterface:\n    register = lambda *_: print('registered')\n"
        )
        with (package / "modeling_utils.py").open("a") as file:
            file.write("\nclass AttentionInterface:\n    register = lambda *_: print('registered')\n")
    code = "import transformer_fast, transformers.modeling_utils as u; assert u.loaded"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert not done.stdout  # nothing is registered with a release whose masks are not those that the tests know
    assert done.returncode == 0 and "and 4.57.1 is installed: pip install --upgrade" in done.stderr, done.stderr
