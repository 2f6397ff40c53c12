"""`from transformers import X` also works with this package's name, for every X."""

import os
import pickle
import subprocess
import sys

import pytest
import transformers

import transformer_fast as tf

PIPELINES = {name for name in tf.__all__ if name.endswith("Pipeline")}


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names_of_transformers_are_its_own_where_we_have_none():
    from transformer_fast import BertConfig, BertTokenizer, ErnieModel, Trainer, set_seed

    for ours, name in (
        (BertConfig, "BertConfig"), (BertTokenizer, "BertTokenizer"), (ErnieModel, "ErnieModel"),
        (Trainer, "Trainer"), (set_seed, "set_seed"),
    ):  # fmt: skip
        assert ours is getattr(transformers, name) and not tf.is_ours(ours)
    assert pickle.loads(pickle.dumps(ErnieModel)) is ErnieModel


def test_every_model_and_pipeline_that_is_ours_comes_first():
    for name in set(tf.__all__) - {"__version__"}:
        if hasattr(transformers, name) or name in PIPELINES:
            assert tf.is_ours(getattr(tf, name)), name


def test_is_ours_takes_objects_too():
    config = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    ours = tf.BertModel(transformers.BertConfig(**config))
    assert tf.is_ours(ours) and tf.is_ours(tf.layer_norm)
    assert not tf.is_ours(transformers.BertModel(transformers.BertConfig(**config))) and not tf.is_ours(3)

    class Mine(tf.BertModel):
        pass

    assert not tf.is_ours(Mine)


@pytest.mark.parametrize(
    "name, today",
    [
        ("AutoModelWithLMHead", "AutoModelForCausalLM, AutoModelForMaskedLM or AutoModelForSeq2SeqLM"),
        ("TFAutoModelForSequenceClassification", "AutoModelForSequenceClassification (there are no TensorFlow"),
        ("FlaxBertModel", "BertModel (there are no Flax"),
        ("TFAutoModelForVision2Seq", "AutoModelForImageTextToText"),
        ("ViTFeatureExtractor", "ViTImageProcessor"),
        ("AdamW", "torch.optim.AdamW"),
    ],
)
def test_dropped_names_say_what_to_use_today(name, today):
    with pytest.raises(ImportError) as error:
        exec(f"from transformer_fast import {name}")
    assert f"{name}: transformers {transformers.__version__} does not have it any more; use {today}" in str(error.value)


def test_names_given_in_the_place_of_dropped_ones_exist():
    from transformer_fast import handed_on

    for today in handed_on._GONE.values():
        first = today.split(",")[0].split("(")[0].split(" ")[0]
        if first[0].isupper() or first.startswith("is_"):
            assert hasattr(transformers, first), today


def test_names_that_never_were():
    with pytest.raises(AttributeError, match=r"neither transformer_fast nor transformers .* 'BertModle'; .*BertModel"):
        tf.BertModle  # noqa: B018
    with pytest.raises(ImportError, match="BertModle"):
        exec("from transformer_fast import BertModle")
    assert not hasattr(tf, "_BertModel")


@pytest.mark.quick
def test_nothing_is_imported_before_a_name_needs_it():
    code = (
        "import sys, transformer_fast as tf; from transformer_fast import verify, demo, is_ours, layer_norm; dir(tf); "
        "hasattr(tf, '__wrapped__'); assert not is_ours(sys) and is_ours(layer_norm); "
        "print('transformers' in sys.modules, 'BertTokenizer' in dir(tf)); tf.set_seed; "
        "print('transformers' in sys.modules, 'BertTokenizer' in dir(tf))"
    )
    assert _python(code).splitlines() == ["False False", "True True"]


def test_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; import transformer_fast as tf; tf.layer_norm\n"
        "try: tf.set_seed\n"
        "except AttributeError as error: print(error)"
    )
    assert "has no attribute 'set_seed' (transformers might have: pip install 'transformers>=5.17,<5.25')" in _python(
        code
    )


@pytest.mark.parametrize("name", ["AutoModel", "BertModel", "pipeline", "AutoTokenizer", "Trainer"])
def test_import_without_transformers_says_what_to_install(name):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        f"try: from transformer_fast import {name}\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert _python(code).strip() == (
        f"transformer_fast.{name} needs transformers, which is not installed: pip install 'transformers>=5.17,<5.25'"
    )


OLD = """
import importlib.util, pathlib, sys, tempfile
folder = tempfile.mkdtemp()
package = pathlib.Path(folder, "transformers")
package.mkdir()
(package / "__init__.py").write_text("__version__ = '4.57.1'; AutoTokenizer = 3; __path__ = []")
sys.path.insert(0, folder)
import transformers
sys.modules["transformers.modeling_utils"] = transformers
import transformer_fast as tf
"""


@pytest.mark.parametrize(
    "code",
    [
        "from transformer_fast import AutoModel",
        "tf.BertModel",
        "from transformer_fast import pipeline",
        "import torch; tf.accelerate(torch.nn.Linear(2, 2))",
        "from transformer_fast.verify import verify; verify('folder')",
    ],
)
def test_an_old_transformers_is_named(code):
    said = _python(f"{OLD}try: {code}\nexcept (ImportError, ValueError) as error: print(error)").splitlines()[-1]
    wanted = "transformer_fast needs transformers>=5.17,<5.25, and 4.57.1 is installed: pip install --upgrade"
    assert f": {wanted} 'transformers>=5.17,<5.25'" in said


def test_import_without_another_package_says_what_to_install():
    code = (
        "import sys; sys.modules['tqdm'] = None\n"
        "try: from transformer_fast import layer_features\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert (
        _python(code).strip() == "transformer_fast.layer_features needs tqdm, which is not installed: pip install tqdm"
    )


def test_star_import_is_this_package_alone():
    scope = {}
    exec("from transformer_fast import *", scope)
    assert scope["BertModel"] is tf.BertModel and "Trainer" not in scope
