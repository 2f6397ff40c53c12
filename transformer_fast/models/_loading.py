"""from_pretrained with errors that name the file, what came and what was wanted. Code in checkpoints is never run."""

import json
import os
import pathlib
import pickle
import re
import socket
import struct
import urllib.parse
import urllib.request
import warnings
import zipfile

import torch
from transformers import PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._self_check import runs_as_hugging_face

__all__ = ["LoadingErrors", "drop_trust", "explain_broken", "local_folder", "model_type_of", "need_hub"]

# Parts of a model that a checkpoint must have.
_BODY = "embeddings|encoder|decoder|transformer|shared|wte|wpe|h|ln_f|tokens_embed|positions_embed"
_ACTIVATIONS = ("hidden_act", "activation", "activation_function", "afn")  # its names in configurations
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def local_folder(name, kwargs: dict) -> pathlib.Path | None:
    """The folder of a checkpoint that is given by its path; None for a name on the hub."""
    folder = pathlib.Path(os.fspath(name)) / (kwargs.get("subfolder") or "")
    if folder.is_dir():
        return folder
    text = os.fspath(name)
    if not pathlib.Path(text).exists() and (text.startswith((".", "/", "~", "\\")) or text.count("/") > 1):
        raise FileNotFoundError(f"pretrained_model_name_or_path: there is no folder {text!r}")
    return None


def model_type_of(name, kwargs: dict) -> str | None:
    """model_type of a checkpoint's config.json; None where it has none (old checkpoints, adapters).

    Raises FileNotFoundError for a folder without config.json, ValueError for a broken one.
    """
    folder = local_folder(name, kwargs)
    if folder is None:
        need_hub(name, kwargs)
        config, _ = PreTrainedConfig.get_config_dict(name, **{k: kwargs[k] for k in _HUB if k in kwargs})
        return config.get("model_type")
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file() or kwargs.get("gguf_file"):
            return None
        raise FileNotFoundError(
            f"{file}: not found. A checkpoint folder holds config.json and model.safetensors; this one holds "
            f"{', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: wanted a JSON object, got {type(config).__name__}")
    return config.get("model_type")


def need_hub(name, kwargs: dict) -> None:
    """Raise OSError, at once and with advice, for a name on the hub that is not in the local cache while the hub cannot
    be reached. The hub's client would try for half a minute, and its error names neither."""
    import huggingface_hub

    text = os.fspath(name)
    known = {k: kwargs[k] for k in ("cache_dir", "revision") if kwargs.get(k)}
    try:
        found = huggingface_hub.try_to_load_from_cache(text, "config.json", **known)
    except (huggingface_hub.errors.HFValidationError, ValueError) as error:
        raise OSError(f"{text!r}: there is no such folder, and it is no name on the hub either ({error})") from None
    if isinstance(found, str):
        return
    if kwargs.get("local_files_only") or huggingface_hub.constants.HF_HUB_OFFLINE:
        why = "local_files_only=True" if kwargs.get("local_files_only") else "HF_HUB_OFFLINE is set"
    elif urllib.request.getproxies():
        return  # only the proxy can tell whether the hub can be reached
    else:
        host = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT)
        port = host.port or (80 if host.scheme == "http" else 443)
        try:
            socket.create_connection((host.hostname, port), timeout=5).close()
            return
        except OSError as error:
            why = f"{host.hostname} cannot be reached: {error}"
    raise OSError(
        f"{text!r}: there is no such folder, and the hub's copy is not in the cache and cannot be fetched ({why}). "
        f"Give the path of a checkpoint's folder, or run `hf download {text}` where there is a network"
    )


def drop_trust(kwargs: dict) -> None:
    """Remove trust_remote_code with a warning: code in a checkpoint is never run. The arguments of transformers 4 for
    TensorFlow and Flax raise ValueError with advice."""
    for name, what in (("from_tf", "TensorFlow's"), ("from_flax", "Flax's"), ("from_pt", "")):
        if kwargs.pop(name, False):
            raise ValueError(
                f"{name}: transformers 5 only has PyTorch models; "
                + (f"save {what} checkpoints as PyTorch's with transformers 4 first" if what else "leave it out")
            )
    if kwargs.get("trust_remote_code"):
        warnings.warn(
            "trust_remote_code=True has no effect: transformer_fast runs its own code only, never a checkpoint's",
            stacklevel=3,
        )
    if "trust_remote_code" in kwargs:
        kwargs["trust_remote_code"] = False


class LoadingErrors:
    """Adds errors to HF's from_pretrained where that is silent or unclear."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As HF's. Raises FileNotFoundError (no folder, no config.json), ValueError (another model_type, a truncated or
        corrupt file, a pickle that is more than tensors, shapes that differ, layers the checkpoint lacks)."""
        name, kind = pretrained_model_name_or_path, cls.config_class.model_type
        runs_as_hugging_face(cls)  # before HF enters the meta device, where a tiny model cannot be run
        if kwargs.get("weights_only") is False:
            raise ValueError("weights_only: wanted True (a checkpoint's pickled code is never run), got False")
        drop_trust(kwargs)
        how = kwargs.get("quantization_config")
        if not isinstance(how, (dict, QuantizationConfigMixin, type(None))):
            raise TypeError(f"quantization_config: wanted one such as transformer_fast.Int8Config(), got {how!r}")
        if name is not None and config is None:
            found = model_type_of(name, kwargs)
            if found not in (None, kind):
                raise ValueError(
                    f"{cls.__name__}: wanted a checkpoint with model_type {kind!r}, but config.json of {name} says "
                    f"{found!r}"
                )
        want_info = kwargs.pop("output_loading_info", False)
        if name is None:
            _check_state(kwargs.get("state_dict"), config)
            return super().from_pretrained(name, *model_args, config=config, **kwargs)
        try:
            model, info = super().from_pretrained(name, *model_args, config=config, output_loading_info=True, **kwargs)
        except Exception as error:
            _explain(error, cls, name, config, kwargs)
            raise
        scales = [key for key in info["unexpected_keys"] if key.endswith(".weight_scale")]
        if scales and getattr(model, "hf_quantizer", None) is None:
            raise ValueError(
                f"{name}: holds quantised weights ({scales[0]}, ...), but its config.json has no quantization_config "
                "that is known here"
            )
        if not (want_info or kwargs.get("ignore_mismatched_sizes") or kwargs.get("state_dict") is not None):
            _check_missing(model, name, info)
        return (model, info) if want_info else model


def _check_state(state: dict | None, config) -> None:
    scales = [key for key in state or () if key.endswith(".weight_scale")]
    if scales and getattr(config, "quantization_config", None) is None:
        raise ValueError(
            f"state_dict: holds quantised weights ({scales[0]}, ...), but the configuration has no quantization_config"
        )


def _check_missing(model, name, info: dict) -> None:
    """ValueError where weights of the body are missing. Heads, poolers, new cross-attention and sinusoids may be absent
    from a checkpoint (HF warns). Nothing is checked with output_loading_info=True."""
    body = re.compile(rf"^(?:{model.base_model_prefix}\.)?(?:{_BODY})\.(?!.*(?:crossattention|ln_cross_attn))")
    missing = sorted(k for k in info["missing_keys"] if body.match(k) and not _is_sinusoid(model, k))
    if missing:
        extra = sorted(info["unexpected_keys"])
        came = f"; it holds others, such as {', '.join(extra[:3])}" if extra else ""
        raise ValueError(
            f"{name}: the checkpoint lacks {len(missing)} weights that config.json asks for: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}{came}. Pass ignore_mismatched_sizes=True to start them at random"
        )


def _is_sinusoid(model, name: str) -> bool:
    return "Sinusoidal" in type(model.get_submodule(name.rpartition(".")[0])).__name__


class MismatchedShapes(ValueError, RuntimeError):
    """Weights whose shapes are not the configuration's. A ValueError like this package's other errors, and a
    RuntimeError like HF's."""


def explain_broken(error: Exception, name, folder: pathlib.Path | None) -> None:
    """Raise ValueError that names the file in place of `error`, where a truncated or corrupt file made it."""
    kind = type(error).__name__
    if kind == "SafetensorError" or isinstance(error, (EOFError, zipfile.BadZipFile)):
        file, reason = _broken(folder), str(error)
        raise ValueError(f"{file or name}: is truncated or corrupt ({reason}); download or save it again") from error
    if isinstance(error, json.JSONDecodeError):
        raise ValueError(f"{name}: its index of weights is not valid JSON ({error})") from error
    if isinstance(error, struct.error) or (isinstance(error, RuntimeError) and "central directory" in str(error)):
        reason = str(error).split(". ")[0]
        raise ValueError(f"{_binary(folder) or name}: is truncated or corrupt ({reason})") from error
    if kind.startswith("StrictDataclass"):
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'config.json' if folder else name}: {reason}") from error
    if isinstance(error, pickle.UnpicklingError) or "ignore_mismatched_sizes" in str(error):
        return  # another check reports it, with the contents of the file
    for file in sorted(folder.glob("pytorch_model*.bin")) if folder else ():
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception as unreadable:  # zipfile, pickle and torch raise many types for unreadable bytes
            raise ValueError(f"{file}: is truncated or corrupt ({unreadable})") from error


def _explain(error: Exception, cls, name, config, kwargs) -> None:
    """Raise a clearer error in place of `error`, or return if it is clear enough."""
    folder = local_folder(name, kwargs)
    explain_broken(error, name, folder)
    if isinstance(error, KeyError) and folder is not None:
        config = config or cls.config_class.from_pretrained(folder)
        for name in _ACTIVATIONS:
            found = getattr(config, name, None)
            if found is not None and (error.args[:1] == (found,) or f"function {found} not found" in str(error)):
                raise ValueError(f"{folder / 'config.json'}: {name} {found!r} is unknown") from error
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (it refers to {found.group(1)})" if found else ""
        raise ValueError(
            f"{_binary(folder) or name}: is corrupt or holds more than tensors{what}; code in a checkpoint is never run"
        ) from error
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        raise MismatchedShapes(
            f"{name}: shapes in the checkpoint differ from config.json's: {_mismatch(cls, folder, config, kwargs)}. "
            "Pass ignore_mismatched_sizes=True to start those at random"
        ) from error


def _broken(folder: pathlib.Path | None) -> pathlib.Path | None:
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")) if folder else ():
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return file
    return _binary(folder)


def _binary(folder: pathlib.Path | None) -> pathlib.Path | None:
    return next(iter(sorted(folder.glob("pytorch_model*.bin"))), None) if folder else None


def _mismatch(cls, folder: pathlib.Path | None, config, kwargs: dict) -> str:
    """The first weight whose shape differs, from the files' headers."""
    from safetensors import safe_open

    if folder is None:
        return "see the report above"
    if config is None:
        config, _ = cls.config_class.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
    with torch.device("meta"):
        model = cls(config)
    prefix = f"{cls.base_model_prefix}."
    wanted = {k.removeprefix(prefix): tuple(v.shape) for k, v in model.state_dict().items()}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                shape = tuple(handle.get_slice(key).get_shape())
                want = wanted.get(key.removeprefix(prefix), shape)
                if want != shape:
                    return f"{key} is {shape} in {file.name}, wanted {want}"
    return "see the report above"
