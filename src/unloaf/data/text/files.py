"""Texts of a run: where they are read from, and which are held out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from unloaf.config import Config
from unloaf.data.in_memory import SPLIT_SEED
from unloaf.data.sets import Data
from unloaf.data.text.sequences import packed
from unloaf.files.writing import read_text
from unloaf.printable import printable

_LARGEST = 1 << 31  # bytes of a file
_SUFFIXES = (".txt", ".text", ".md", ".rst")
_FEW = 10  # texts: fewer are not held out as a whole, but the end of each of them
_TESTED = 0.1  # share of the default text that is for the test


class Tokenizer(Protocol):
    """From text to numbers."""

    @property
    def name(self) -> str:
        """Byte, or where it comes from."""
        ...

    @property
    def size(self) -> int:
        """How many tokens there are, as numbers from 0."""
        ...

    @property
    def end(self) -> int:
        """The token behind each text."""
        ...

    @property
    def pad(self) -> int:
        """The token that fills the last sequence."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of a text, the end not among them."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without the end."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """A token for each byte of UTF-8, and one for the end of a text, which fills sequences too.

    >>> tokenizer = ByteTokenizer()
    >>> list(tokenizer.encode("aé")), tokenizer.decode([97, 195, 169, 256]), tokenizer.size
    ([97, 195, 169], 'aé', 257)
    """

    name: str = "byte"
    size: int = 257
    end: int = 256
    pad: int = 256

    def encode(self, text: str) -> Sequence[int]:
        """Its bytes."""
        return text.encode("utf-8", errors="surrogatepass")

    def decode(self, tokens: Sequence[int]) -> str:
        """What is no UTF-8 is written as the sign of replacement."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class TextData(Data):
    """Sequences of tokens with their splits; what `Data` says of images is empty.

    Attributes:
        tokenizer: what a token is.
        seq_len: tokens of a sequence.
    """

    tokenizer: Any = None
    seq_len: int = 0
    unit: str = "sequences"


class _Texts(NamedTuple):
    """Texts of each split, and where they are from."""

    train: list[str]
    val: list[str] | None
    test: list[str]
    source: str
    notes: tuple[str, ...] = ()


def load_text(config: Config, tokenizer: Tokenizer) -> TextData:
    """Reads the texts that a configuration names, and packs their tokens into sequences.

    Where there is no validation split, whole texts are held out, always the same ones, or the end of each where there
    are few.

    Raises:
        ValueError: nothing is there, a file is no text, or the texts are shorter than one sequence.
    """
    texts = _default_texts() if config.data_dir is None else _read_texts(Path(config.data_dir), config)
    notes = list(texts.notes)
    train, val = texts.train, texts.val
    if val is None:
        train, val = _hold_out(train, config.val_fraction)
        what = f"{len(val)} of {len(texts.train)} texts are" if len(texts.train) >= _FEW else "the end of each text is"
        notes += [f"{what} held out for validation (--val-fraction {config.val_fraction:g})"] if val else []
    splits = {
        name: packed([_tokens(text, tokenizer) for text in some], config.seq_len, pad=tokenizer.pad, place=texts.source)
        for name, some in (("train", train), ("val", val), ("test", texts.test))
    }
    found = splits["train"].tokens
    if found < config.seq_len:
        raise ValueError(
            f"{printable(texts.source)} has {found} tokens to train on, less than one sequence of {config.seq_len}; "
            "give more text, or a smaller --seq-len"
        )
    counts = ", ".join(f"{split.tokens:,} {name}" for name, split in splits.items() if split.tokens)
    return TextData(
        name=config.dataset,
        num_classes=tokenizer.size,
        class_names=(),
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        mean=(),
        std=(),
        augment="none",
        pad=0,
        hflip=0.0,
        img_size=config.seq_len,
        train_img_size=config.seq_len,
        notes=(*notes, f"tokens ({tokenizer.name}): {counts}"),
        tokenizer=tokenizer,
        seq_len=config.seq_len,
    )


def _tokens(text: str, tokenizer: Tokenizer) -> torch.Tensor:
    return torch.tensor([*tokenizer.encode(text), tokenizer.end], dtype=torch.int32)


def default_text() -> dict[str, str]:
    """The help pages on topics of the language that come with Python, by name: other ones with another Python.

    >>> "assert" in default_text()
    True
    """
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def _default_texts() -> _Texts:
    rest, test = _hold_out([text for text in default_text().values() if text], _TESTED)
    return _Texts(rest, None, test, "pydoc_data.topics of Python")


def _hold_out(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    """Texts in a fixed random order until they are this share, by letters; of few texts the end of each."""
    if not share:
        return texts, []
    if len(texts) < _FEW:
        cuts = [round(len(text) * (1 - share)) for text in texts]
        ends = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
        return [text[:cut] for text, cut in zip(texts, cuts, strict=True)], [end for end in ends if end]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    wanted, held = share * sum(map(len, texts)), set[int]()
    for index in order:
        if wanted <= 0:
            break
        held.add(index)
        wanted -= len(texts[index])
    kept = [text for index, text in enumerate(texts) if index not in held]
    return kept, [text for index, text in enumerate(texts) if index in held]


def _read_texts(place: Path, config: Config) -> _Texts:
    if place.is_file():
        return _Texts([_read(place)], None, [], str(place))
    if not place.is_dir():
        raise ValueError(f"data_dir {printable(place)} is neither a file nor a folder; give that of the texts")
    saved = (place / "dataset_dict.json").is_file() or (place / "dataset_info.json").is_file()
    opened = _saved_splits if saved else _folder_splits
    found, notes = opened(place)
    train = found.pop(config.train_split, None)
    if train is None:
        train = found.pop("", None)
    if not train:
        there = ", ".join(sorted(filter(None, found))) or f"no file of {', '.join(_SUFFIXES)} with text in it"
        raise ValueError(
            f"{printable(place)}: no text to train on; expected files of {', '.join(_SUFFIXES)}, in it or in its "
            f"folder {config.train_split}; there is {there}"
        )
    if config.val_split is not None and config.val_split not in found:
        raise ValueError(f"{printable(place)} has no split {config.val_split}; it has {', '.join(sorted(found))}")
    val = found.get(config.val_split or "val") or (None if config.val_split else found.get("validation"))
    return _Texts(train, val, found.get("test", []) if config.val_split != "test" else [], str(place), notes)


def _folder_splits(place: Path) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """The texts of the folders train, val, validation and test or, where there is no train, of all files under ""."""
    names = [name for name in ("train", "val", "validation", "test") if (place / name).is_dir()]
    roots = {name: place / name for name in names} if "train" in names else {"": place}
    left, found = 0, dict[str, list[str]]()
    for name, root in roots.items():
        files = [
            Path(folder) / file
            for folder, folders, files in os.walk(root)
            if not _skip_hidden(folders)
            for file in sorted(files)
            if not file.startswith(".")
        ]
        texts = [file for file in files if file.suffix.lower() in _SUFFIXES]
        left += len(files) - len(texts)
        found[name] = [text for text in map(_read, texts) if text.strip()]
    notes = (f"{left} files are left alone: they are none of {', '.join(_SUFFIXES)}",) if left else ()
    return found, notes


def _skip_hidden(folders: list[str]) -> bool:
    """Takes hidden folders out of those that are walked into, and sorts the others; always False."""
    folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
    return False


def _read(file: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        text = read_text(file, limit=_LARGEST)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{printable(file)} is no text: byte {error.start} is not UTF-8; take it out, or convert it "
            "(iconv -f latin1 -t utf-8)"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(file)} cannot be read: {error}") from error
    if "\0" in text:
        raise ValueError(f"{printable(file)} is no text: byte {text.encode().index(0)} is 0; take it out")
    return text


def _saved_splits(place: Path) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Texts that Hugging Face's `datasets` saved, in a column of the name text."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{printable(place)} is a data set of Hugging Face's `datasets`; pip install 'unloaf[hf]'"
        ) from error
    try:
        found: Any = datasets.load_from_disk(str(place))
    except Exception as error:  # whatever the library raises at files that are damaged
        raise ValueError(f"{printable(place)} cannot be read: {' '.join(str(error).split())[:200]}") from error
    splits = dict(found) if isinstance(found, dict) else {"": found}
    for name, rows in splits.items():
        if "text" not in rows.column_names:
            raise ValueError(
                f"{printable(place / name)} has the columns {', '.join(rows.column_names)}; the text must be in one "
                "called text: dataset.rename_column(..., 'text').save_to_disk(...)"
            )
    return {name: [text for text in rows["text"] if text and text.strip()] for name, rows in splits.items()}, ()
