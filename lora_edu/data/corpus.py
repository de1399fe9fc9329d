"""Real text that every reader has, read at run time: text → token ids, split without leaks.

Three corpora: *code* (the standard library's source), *reference* (numpy's and matplotlib's docstrings), *manual*
(Python's language manual as `pydoc` ships it). Nothing here trains, downloads or ships text.
"""

import ast
import hashlib
import inspect
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from tokenizers import Tokenizer

from lora_edu.data.shipped import data_file
from lora_edu.paths import expanded, user_folder, write_atomically

NAMES = ("code", "reference", "manual")
SPLITS = ("train", "validation", "test")
END = "<|end|>"  # stands after every document
RUN = 13  # words; a held-out text that shares a run this long with training has leaked (GPT-3, appendix C)

# Folders of the standard library that are tests, data or tables, or that distributors package apart, so that
# not every reader has them.
_LEFT_OUT = frozenset(
    """test tests site-packages dist-packages pydoc_data idlelib tkinter lib2to3 distutils ensurepip turtledemo
    encodings __pycache__ __phello__ lib-dynload""".split()  # noqa: SIM905
)
_SHARES = {"code": (0.03, 0.05), "reference": (0.04, 0.08), "manual": (0.10, 0.20)}  # validation, test
_SHORTEST = 200  # characters; shorter docstrings are mostly one-liners
_FORMAT = 1  # raise when the reading or the split changes: it invalidates cached token ids


@dataclass(frozen=True)
class Corpus:
    """Token ids of one corpus. `train`, `validation`, `test`: 1-D int64 tensors, documents one after another.

    `bytes`: UTF-8 bytes of each split's text (for bits a byte); `documents`: how many documents or, in held-out
    splits, pieces of documents each split has; `cut`: words taken out of each held-out split because training
    has the same run of 13 words, beside the words it had.
    """

    name: str
    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    tokenizer: Tokenizer = field(repr=False)
    bytes: dict[str, int]
    documents: dict[str, int]
    cut: dict[str, tuple[int, int]]

    def bits_per_byte(self, nats: float, split: str = "test") -> float:
        """Loss in nats a token → bits a byte of text: comparable across tokenizers."""
        return nats * len(getattr(self, split)) / self.bytes[split] / float(np.log(2))


def load_corpus(name: str) -> Corpus:
    """The corpus called "code", "reference" or "manual", as token ids; the second call on a machine reads a cache.

    Splits are by file (code, reference) or by group of overlapping topics (manual) and depend on names only, so
    they survive another version of Python, numpy or matplotlib. Passages of a held-out text that share a run of
    13 words with *any* of the three training texts are cut out of it.
    Raises ValueError for another name and FileNotFoundError where the library's source is not installed.
    """
    if name not in NAMES:
        raise ValueError(f'a corpus is called "code", "reference" or "manual"; got {name!r}')
    tokenizer_path = data_file("tokenizer.json")
    tokenizer = load_tokenizer(tokenizer_path)
    cache = user_folder("cache") / f"corpus_{_fingerprint(tokenizer_path)}.safetensors"
    stored = _read_cache(cache)
    if stored is None:
        stored = _tokenise_all(tokenizer)
        write_atomically(cache, save_safetensors(*stored))
    tensors, facts = stored
    about = json.loads(facts[name])
    ids = {split: tensors[f"{name}.{split}"].long() for split in SPLITS}
    cut = {split: tuple(pair) for split, pair in about["cut"].items()}
    return Corpus(
        name, **ids, tokenizer=tokenizer, bytes=about["bytes"], documents=about["documents"], cut=cut
    )


def load_tokenizer(path: Path | None = None) -> Tokenizer:
    """The course's byte-level BPE tokenizer (10 000 tokens, trained on the training splits of code and reference)."""
    return Tokenizer.from_file(str(path or data_file("tokenizer.json")))


def load_package(package: str) -> dict[str, torch.Tensor]:
    """Split → token ids of one package's part of the reference text: "numpy" or "matplotlib".

    The splits are those of the whole; what is held out shares no run of 13 words with any training text.
    Raises ValueError for another name.
    """
    if package not in ("numpy", "matplotlib"):
        raise ValueError(f'the reference text is of "numpy" and "matplotlib"; got {package!r}')
    seen = np.unique(np.concatenate([_runs(_words(t)) for name in NAMES for t in split_texts(name)["train"]]))
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for key, text in read_documents("reference"):
        if key.startswith(f"{package}/"):
            split = split_name(key.partition("#")[0], *_SHARES["reference"])
            texts[split] += [text] if split == "train" else _cut(text, seen)[0]
    tokenizer = load_tokenizer()
    end = tokenizer.token_to_id(END)
    return {
        split: torch.tensor(
            [i for e in tokenizer.encode_batch(each, add_special_tokens=False) for i in (*e.ids, end)]
        )
        for split, each in texts.items()
    }


def split_texts(name: str) -> dict[str, list[str]]:
    """Split → texts, before the leak is mended: whole documents, split by file or group."""
    documents = read_documents(name)
    if name == "manual":
        return _split_by_group(documents)
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for key, text in documents:
        texts[split_name(key.partition("#")[0], *_SHARES[name])].append(text)
    return texts


def clean_splits() -> dict[str, tuple[dict[str, list[str]], dict[str, tuple[int, int]]]]:
    """Corpus name → (split → texts, split → (words cut, words before)), with no leak left.

    A held-out text is cut where it shares a run of 13 words with a training text of any corpus: what is left
    are pieces of it, each without such a run.
    """
    texts = {name: split_texts(name) for name in NAMES}
    seen = np.unique(np.concatenate([_runs(_words(t)) for name in NAMES for t in texts[name]["train"]]))
    result = {}
    for name in NAMES:
        splits, cut = {"train": texts[name]["train"]}, {}
        for split in SPLITS[1:]:
            pieces, before, lost = [], 0, 0
            for text in texts[name][split]:
                kept, words, gone = _cut(text, seen)
                pieces += kept
                before, lost = before + words, lost + gone
            splits[split], cut[split] = pieces, (lost, before)
        result[name] = (splits, cut)
    return result


def shared_runs(held_out: Iterable[str], training: Iterable[str]) -> int:
    """How many runs of 13 words of the held-out texts stand in the training texts too: 0 where nothing leaks."""
    seen = np.unique(np.concatenate([np.empty(0, np.uint64), *(_runs(_words(t)) for t in training)]))
    return int(sum(_found(_runs(_words(t)), seen).sum() for t in held_out))


def read_documents(name: str) -> list[tuple[str, str]]:
    """(key, text) of every document, in the order of the keys; a key is `path` or `path#object`."""
    return {"code": _read_code, "reference": _read_reference, "manual": _read_manual}[name]()


def _read_code() -> list[tuple[str, str]]:
    return [(key, _read_text(path)) for key, path in _code_files()]


def _read_reference() -> list[tuple[str, str]]:
    documents, seen = [], set()
    for key, path in _package_files():
        for number, text in enumerate(_docstrings(_read_text(path))):
            if len(text) >= _SHORTEST and text not in seen:
                seen.add(text)
                documents.append((f"{key}#{number}", text))
    return documents


def _read_manual() -> list[tuple[str, str]]:
    path = _library() / "pydoc_data" / "topics.py"
    _must_exist(path)
    for node in ast.parse(_read_text(path)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "topics":
            return sorted(ast.literal_eval(node.value).items())
    raise ValueError(f"{path} has no dictionary called topics: this Python's manual has another form")


def _docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, and those handed to numpy's add_newdoc."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add_newdoc":
            for part in (part for argument in node.args for part in ast.walk(argument)):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield inspect.cleandoc(part.value)


def _code_files() -> list[tuple[str, Path]]:
    root = _library()
    _must_exist(root / "os.py")
    return [
        (key, path) for key, path in _python_files(root, _LEFT_OUT) if not path.name.startswith("_sysconfig")
    ]


def _package_files() -> list[tuple[str, Path]]:
    files = []
    for package in ("numpy", "matplotlib"):
        root = _folder(package)
        _must_exist(root / "__init__.py")
        files += [
            (f"{package}/{key}", path)
            for key, path in _python_files(root, {"tests", "testing", "__pycache__"})
        ]
    return files


def _python_files(root: Path, left_out: Iterable[str]) -> list[tuple[str, Path]]:
    """(path below root with forward slashes, path) of the .py files, sorted, without the folders left out."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(d for d in below if d not in left_out and not d.startswith("config-"))
        found += [Path(folder) / name for name in names if name.endswith(".py")]
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def _library() -> Path:
    return _folder("stdlib")


def _folder(package: str) -> Path:
    """Where a package's source lies; LORA_EDU_CORPUS names a folder with copies to read instead."""
    other = os.environ.get("LORA_EDU_CORPUS")
    if other and (expanded(other) / package).is_dir():
        return expanded(other) / package
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    return Path(find_spec(package).origin).parent


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: this Python comes without its library's source, which the course reads as text. "
            "Use a Python from python.org or conda, or your system's full package (Debian: libpython3-stdlib)."
        )


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")


def _position(key: str) -> float:
    """A number in [0, 1) that depends on the key only."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def split_name(key: str, validation: float, test: float) -> str:
    """ "train", "validation" or "test", by shares; it depends on the key only."""
    position = _position(key)
    return "test" if position < test else "validation" if position < test + validation else "train"


def _split_by_group(documents: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Topics that share a run of 13 words stay together; the largest group is for training."""
    parent = list(range(len(documents)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    owner: dict[int, int] = {}
    for i, (_, text) in enumerate(documents):
        for run in _runs(_words(text)).tolist():
            parent[root(i)] = root(owner.setdefault(run, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(documents)):
        groups.setdefault(root(i), []).append(i)
    largest = max(groups.values(), key=lambda group: sum(len(documents[i][1]) for i in group))
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for group in groups.values():
        split = "train" if group is largest else split_name(documents[group[0]][0], *_SHARES["manual"])
        texts[split] += [documents[i][1] for i in group]
    return texts


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


_HASHES: dict[str, int] = {}


def _runs(words: list[str]) -> np.ndarray:
    """A 64-bit hash for each run of 13 words, in order: (max(0, words − 12),) uint64."""
    if len(words) < RUN:
        return np.empty(0, np.uint64)
    for word in words:
        if word not in _HASHES:
            _HASHES[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
    ids = np.array([_HASHES[word] for word in words], np.uint64)
    runs = np.zeros(len(words) - RUN + 1, np.uint64)
    for offset in range(RUN):  # a polynomial hash: wraps around modulo 2⁶⁴
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + len(runs)]
    return runs


def _found(runs: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Which of the runs are among those seen; `seen` is sorted (np.isin would sort it again for every text)."""
    if not len(seen):
        return np.zeros(len(runs), bool)
    return seen[np.searchsorted(seen, runs).clip(max=len(seen) - 1)] == runs


def _cut(text: str, seen: np.ndarray) -> tuple[list[str], int, int]:
    """(pieces of the text without a run that was seen, words before, words cut)."""
    spans = [match.span() for match in re.finditer(r"\w+", text)]
    runs = _runs([text[a:b] for a, b in spans])
    leaked = np.zeros(len(spans), bool)
    for start in np.flatnonzero(_found(runs, seen)):
        leaked[start : start + RUN] = True
    pieces, begin = [], 0
    for i in np.flatnonzero(leaked):
        pieces.append(text[begin : spans[i][0]])
        begin = spans[i][1]
    pieces.append(text[begin:])
    return [piece for piece in pieces if len(_words(piece)) >= RUN], len(spans), int(leaked.sum())


def _tokenise_all(tokenizer: Tokenizer) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(“name.split” → int16 token ids, name → facts as JSON) of the three corpora."""
    end = tokenizer.token_to_id(END)
    tensors, facts = {}, {}
    for name, (splits, cut) in clean_splits().items():
        for split, texts in splits.items():
            encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
            ids = np.fromiter((i for e in encoded for i in (*e.ids, end)), np.int16)
            tensors[f"{name}.{split}"] = torch.from_numpy(ids)
        counts = {split: len(texts) for split, texts in splits.items()}
        sizes = {split: sum(len(text.encode()) for text in texts) for split, texts in splits.items()}
        facts[name] = json.dumps({"bytes": sizes, "documents": counts, "cut": cut})
    return tensors, facts


def _fingerprint(tokenizer_path: Path) -> str:
    """Changes with the tokenizer and with any file that is read."""
    digest = hashlib.sha256(f"{_FORMAT}".encode() + tokenizer_path.read_bytes())
    manual = _library() / "pydoc_data" / "topics.py"
    _must_exist(manual)
    for key, path in [*_code_files(), *_package_files(), ("manual", manual)]:
        about = path.stat()
        digest.update(f"{key} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _read_cache(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """None where there is no cache or it is damaged: it is made again."""
    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        return load_safetensors(data), json.loads(data[8 : 8 + length])["__metadata__"]
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
