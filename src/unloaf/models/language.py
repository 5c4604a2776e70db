"""Causal language models of transformers: by configuration, from a folder or a GGUF file. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.data.text.files import ByteTokenizer, Tokenizer
from unloaf.errors import in_one_line
from unloaf.models.hf import check_size, config_class
from unloaf.models.offline import is_of_hub, offline
from unloaf.passes import logits_of
from unloaf.printable import printable
from unloaf.stages import evaluating

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
# Of the largest logit: by how much those of a text alone may differ from those of the same text in a packed sequence.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Source:
    """Where a model is described: a file or folder, or a class of transformers.

    Attributes:
        place: the folder, or the file config.json; None for a class.
        gguf: the name of the GGUF file in that folder, if it is one.
        name: of the class.
    """

    place: Path | None
    gguf: str | None = None
    name: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What transformers is told of it."""
        return {"local_files_only": True} | ({"gguf_file": self.gguf} if self.gguf else {})


def source_of(model: str) -> Source:
    """What the name of a model means.

    Raises:
        ValueError: a folder without a description of a model, or with several.

    >>> source_of("hf/LlamaConfig")
    Source(place=None, gguf=None, name='LlamaConfig')
    """
    bare = model.removeprefix("hf/")
    place = Path(bare)
    if place.is_file() and place.suffix == ".gguf":
        return Source(place.parent, place.name)
    if place.is_file():
        return Source(place)
    if place.is_dir():
        if (place / "config.json").is_file():
            return Source(place)
        files = sorted(file.name for file in place.glob("*.gguf"))
        if len(files) == 1:
            return Source(place, files[0])
        many = f"has several GGUF files, {', '.join(files[:3])}" if files else "has neither config.json nor a GGUF file"
        raise ValueError(f"model {printable(model)}: the folder {many}; give the one, or hf/FOLDER/FILE.gguf")
    if "/" in bare or place.suffix in (".json", ".gguf"):
        raise ValueError(f"model {printable(model)}: there is no such file or folder")
    return Source(None, name=bare)


@dataclass(frozen=True, eq=False)
class OwnTokenizer:
    """The tokenizer that comes with a model; see `Tokenizer`."""

    own: Any
    name: str
    size: int
    end: int
    pad: int

    def encode(self, text: str) -> list[int]:
        """With what the tokenizer puts in front of a text, but for the end."""
        tokens: list[int] = self.own(text, add_special_tokens=True, verbose=False)["input_ids"]
        return tokens[:-1] if tokens and tokens[-1] == self.end else tokens

    def decode(self, tokens: Any) -> str:
        """Without special tokens."""
        return self.own.decode(list(tokens), skip_special_tokens=True)


def tokenizer_of(model: str, kind: str) -> Tokenizer:
    """The tokenizer of a run: "byte", "model" for the model's own, or "auto" for that where there is one.

    Raises:
        ValueError: there is none, it cannot be read, or it has no token for the end of a text.
    """
    source = source_of(model)
    folder = source.place if source.place is None or source.place.is_dir() else source.place.parent
    there = folder is not None and (source.gguf or any((folder / name).is_file() for name in _TOKENIZERS))
    if kind == "byte" or (kind == "auto" and not there):
        return ByteTokenizer()
    if not there or folder is None:
        raise ValueError(f"tokenizer model: {printable(model)} comes without one; give --tokenizer byte, or its folder")
    import transformers

    try:
        with offline():
            own: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **source.options)
    except Exception as error:  # whatever transformers raises at files that it does not understand
        raise ValueError(f"the tokenizer in {printable(folder)} cannot be read ({in_one_line(error)})") from error
    end = own.eos_token_id
    if end is None:
        raise ValueError(
            f"the tokenizer in {printable(folder)} has no token for the end of a text (eos_token), which keeps texts "
            "apart; set it in tokenizer_config.json, or give --tokenizer byte"
        )
    pad = end if own.pad_token_id is None else own.pad_token_id
    return OwnTokenizer(own, folder.name, len(own), end, pad)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer as transformers' AutoTokenizer reads it, also that of bytes.

    >>> import tempfile, transformers
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tokenizer(Path(folder), ByteTokenizer())
    ...     own = transformers.AutoTokenizer.from_pretrained(folder)
    >>> own("aé").input_ids, own.eos_token_id, own.decode([97, 195, 169])
    ([97, 195, 169], 256, 'aé')
    """
    own = tokenizer.own if isinstance(tokenizer, OwnTokenizer) else _byte_level(tokenizer)
    own.save_pretrained(folder)


def _byte_level(tokenizer: Tokenizer) -> Any:
    """Byte-level BPE without a merge, in which the number of a token is that of its byte."""
    import tokenizers
    import transformers
    from tokenizers import decoders, pre_tokenizers

    # The letters that stand for bytes: printable ones for themselves, the others from 256 on, in their order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    vocabulary = {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}
    end = "<|end|>"
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary | {end: tokenizer.end}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    model.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    )


def build_language_model(
    model: str, tokenizer: Tokenizer, *, seq_len: int, arguments: Mapping[str, Any], pretrained: bool
) -> nn.Module:
    """A causal language model with fresh weights, drawn by torch's global generator, or with those of its folder.

    Args:
        model: hf/FOLDER, hf/FILE.json, hf/FILE.gguf, or a class with its default values such as hf/LlamaConfig.
        tokenizer: what it is to read. A network with fresh weights that reads bytes gets their vocabulary.
        seq_len: tokens that it must take.
        arguments: entries of its configuration.
        pretrained: take the weights that lie there.

    Raises:
        ValueError: there is no such model, it is no causal language model, it takes fewer tokens, or has a smaller
            vocabulary.
    """
    import transformers

    source = source_of(model)
    try:
        with offline():
            config = _config(transformers, source, dict(arguments))
            if not pretrained:
                _fit_vocabulary(config, tokenizer, arguments)
            _check_sizes(config, tokenizer, seq_len)
            mapping = transformers.AutoModelForCausalLM._model_mapping
            if type(config) not in mapping:
                raise ValueError(f"transformers has no causal language model for {type(config).__name__}")
            build: Any = mapping[type(config)]
            if pretrained:
                return _with_own_weights(build, config, source)
            check_size(build, config)
            return build(config)
    except ValueError as error:
        raise ValueError(f"model {printable(model)}: {error}") from error
    except ImportError as error:
        raise ValueError(f"model {printable(model)}: {in_one_line(error)}") from error
    except Exception as error:  # whatever a class raises at settings that it was not made for
        raise ValueError(f"model {printable(model)}: cannot be built so ({in_one_line(error)})") from error


def _config(transformers: Any, source: Source, arguments: dict[str, Any]) -> Any:
    if source.place is None:
        kind = config_class(transformers, source.name)
        _check_known(kind(), arguments)
        return kind(**arguments)
    try:
        kind = transformers.AutoConfig.from_pretrained(source.place, trust_remote_code=False, **source.options)
    except Exception as error:  # whatever transformers raises at a file that it does not understand
        if is_of_hub(error):
            raise
        raise ValueError(f"its configuration cannot be read ({in_one_line(error)})") from error
    _check_known(kind, arguments)
    return type(kind).from_dict(kind.to_dict() | arguments) if arguments else kind


def _check_known(config: Any, arguments: Mapping[str, Any]) -> None:
    for name in arguments:
        if not hasattr(config, name):
            raise ValueError(f"model_kwargs {name}: {type(config).__name__} has no such entry")


def _with_own_weights(build: Any, config: Any, source: Source) -> nn.Module:
    if source.place is None or not source.place.is_dir():
        raise ValueError("it has no weights; give a folder with weights, or leave out --pretrained")
    auto: Any = build
    if source.gguf:
        import transformers

        auto = transformers.AutoModelForCausalLM
    options = source.options | {"dtype": torch.float32, "output_loading_info": True}
    network, report = auto.from_pretrained(source.place, config=config, **options)
    missing = [name for name in report["missing_keys"] if name not in (network._tied_weights_keys or ())]
    if missing:
        raise ValueError(f"the folder lacks {len(missing)} of its weights, {sorted(missing)[0]} for one")
    return network


def _fit_vocabulary(config: Any, tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> None:
    """A fresh network that reads bytes has their vocabulary; of other tokenizers its configuration speaks."""
    if not isinstance(tokenizer, ByteTokenizer):
        return
    if "vocab_size" not in arguments:
        config.vocab_size = tokenizer.size
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.end


def _check_sizes(config: Any, tokenizer: Tokenizer, seq_len: int) -> None:
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise ValueError(f"{type(config).__name__} has no vocabulary of its own (vocab_size): it is no language model")
    if vocabulary < tokenizer.size:
        raise ValueError(
            f"its vocabulary has {vocabulary} tokens, the tokenizer ({tokenizer.name}) {tokenizer.size}; give the "
            "tokenizer that belongs to it"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and seq_len > context:
        raise ValueError(f"seq_len {seq_len}: it takes {context} tokens at most; give --seq-len {context} or less")


@torch.no_grad()
def check_language_model(model: nn.Module, name: str) -> None:
    """Raises ValueError unless a token's prediction depends on the tokens before it in its own text alone.

    Two texts in one sequence are compared with each of them alone. So a network that sees what it is to predict, and
    one that looks across the border of texts, are found before they are trained.
    """
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    device = next(model.parameters()).device
    tokens = torch.arange(1, 13, device=device).mul(5).remainder(vocabulary)[None]
    places = torch.cat([torch.arange(7), torch.arange(5)]).to(device)[None]

    def logits(part: slice) -> Tensor:
        inputs = {"input_ids": tokens[:, part], "position_ids": places[:, part], "use_cache": False}
        return logits_of(model(**inputs))

    with evaluating(model):
        try:
            both = logits(slice(None))
            first, second = logits(slice(0, 5)), logits(slice(7, None))
        except TypeError as error:
            raise ValueError(f"model {printable(name)}: cannot be given positions ({in_one_line(error)})") from error
    largest = float(both.abs().max())
    for alone, packed, what in (
        (first, both[:, :5], "its prediction depends on tokens that come later: it is not causal"),
        (second, both[:, 7:], "it looks across the border of two texts in a sequence, whatever their positions say"),
    ):
        if not float((alone - packed).abs().max()) <= _ROUNDING * max(largest, 1e-6):
            raise ValueError(f"model {printable(name)}: {what}; give another model, such as hf/LlamaConfig")


def head_of(model: nn.Module) -> nn.Linear | None:
    """The linear layer behind the final norm, if the logits of the model are its output and nothing else is made of it.

    Where they are capped or scaled, as Gemma 2 does, it is None: the losses then need the logits of all positions.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear):
        return None
    seen: list[Any] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        device = head.weight.device
        tokens = torch.arange(4, device=device)[None].remainder(head.out_features)
        with evaluating(model), torch.no_grad():
            logits = logits_of(model(input_ids=tokens, use_cache=False))
    finally:
        handle.remove()
    return head if len(seen) == 1 and torch.equal(seen[0], logits) else None
