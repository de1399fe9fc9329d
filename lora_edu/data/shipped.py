"""The repository's data/ by name, each file checked against MANIFEST.json before it is used.

Nothing here makes data: `lora_edu.recording` does.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors

from lora_edu.data.runs import SHORT
from lora_edu.paths import REPOSITORY, expanded, repository

_BACK = "`git checkout -- data` brings it back, or `make data` makes it anew"


def data_folder() -> Path:
    """The folder of the shipped data: the repository's data/, or what LORA_EDU_DATA names."""
    return expanded(os.environ.get("LORA_EDU_DATA") or REPOSITORY / "data")


def use_folder(folder: Path) -> None:
    """Read shipped files of this process from another folder."""
    os.environ["LORA_EDU_DATA"] = str(folder)


def manifest(folder: Path | None = None) -> dict:
    """MANIFEST.json as a dictionary: files (name → sha256, bytes, how made), losses, versions, command.

    Raises FileNotFoundError or ValueError where it is missing or no JSON.
    """
    path = (folder or data_folder()) / "MANIFEST.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path.is_relative_to(REPOSITORY):
            repository()  # says so where the package was installed without it
        raise FileNotFoundError(f"{path} is missing: {_BACK}; LORA_EDU_DATA names another folder") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {_BACK}") from None


def data_file(name: str) -> Path:
    """The path of a shipped file, after its size and checksum were found right.

    Raises KeyError for a name that is not shipped, FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    folder = data_folder()
    files = manifest(folder)["files"]
    if name not in files:
        raise KeyError(f"{name!r} is no shipped file; there are: {', '.join(sorted(files))}")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"data/{name} is missing (looked in {folder}): {_BACK}")
    about = path.stat()
    _check(path, about.st_size, about.st_mtime_ns, files[name]["bytes"], files[name]["sha256"])
    return path


@cache
def _check(path: Path, size: int, changed: int, expected_size: int, expected_sha256: str) -> None:
    if size != expected_size:
        raise ValueError(
            f"data/{path.name} is damaged: {size} bytes, MANIFEST.json says {expected_size}. {_BACK}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected_sha256:
        raise ValueError(
            f"data/{path.name} is damaged: sha256 {digest[:12]}…, MANIFEST.json says {expected_sha256[:12]}…. {_BACK}"
        )


def load_checkpoint(name: str, dtype: torch.dtype | None = torch.float32) -> dict[str, torch.Tensor]:
    """A shipped checkpoint as a state dict, by name without ending ("base", "reference_seed_0", …), sorted by name.

    dtype: what floating-point tensors are turned into; None leaves them as stored (half precision).
    """
    tensors = load_safetensors(data_file(f"{name}.safetensors").read_bytes())
    # safetensors keeps no order, and two checkpoints are often gone through side by side
    return {key: tensors[key] if dtype is None else tensors[key].to(dtype) for key in sorted(tensors)}


def check_all() -> Iterator[tuple[str, bool, str]]:
    """(name, whether it is right, what is wrong or its size) for every file of the manifest."""
    for name in manifest()["files"]:
        try:
            yield name, True, f"{data_file(name).stat().st_size:,} bytes"
        except (OSError, ValueError) as error:
            yield name, False, str(error)


def load_sweeps(**settings) -> list[dict]:
    """The rows of data/sweeps.json, recorded tuning runs: those with the given settings (`method="lora"`, `rank=8`, …).

    `lora_edu.recording` made them, data/runs.py says what the settings are; losses are in nats a token.
    Raises KeyError for a setting that no row has.
    """
    rows = _sweeps()["rows"]
    if unknown := set(settings) - set(rows[0]):
        raise KeyError(f"no setting is called {sorted(unknown)}; a row has {', '.join(rows[0])}")
    return [row for row in rows if all(row[key] == value for key, value in settings.items())]


def load_base_losses() -> dict[str, dict[str, float]]:
    """Text ("reference", "reference/10", "manual", "planted") → the untuned base's losses, named as in a row."""
    return _sweeps()["base"]


def load_analysis() -> dict:
    """What `lora_edu.recording.analysis` found in the weights of the recorded runs: spectra, subspaces, intruders."""
    return _sweeps()["analysis"]


def load_regimes(**settings) -> list[dict]:
    """The rows of data/regimes.json with the given settings (`task="far"`, `method="full"`, `seed=0`, …).

    A row of full tuning: task ("far": code → docstrings; "near": docstrings → docstrings of other files), method, rate,
    steps, seed, seconds; before, after: held-out loss in nats a token; cut: rank → loss with every ΔW cut to it;
    one_kind_cut: kind → rank → loss with that kind alone cut; spectra: kind → size (‖ΔW‖/‖W_o‖), rank_90, stable,
    effective, energy_8 (means over layers) and sigma (σ/‖ΔW‖ of the middle layer). A row of LoRA has a rank, before
    and after, both None where the rate was too large and the run blew up. `lora_edu.recording.regimes` made them.
    """
    rows = json.loads(data_file("regimes.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in settings.items())]


def load_methods(**settings) -> list[dict]:
    """The rows of data/methods.json with the given settings (`task="far"`, `method="lora"`, `steps=100`, `seed=0`, …).

    A row: task ("far" and "near" as in `load_regimes`), method, size (r, m or k; None where there is none), rate,
    steps, seed; trained and stored, numbers; validation, test, code: nats a token (None where the rate was too large
    and the run blew up); training, the mean of the last 20 steps. The row of method "none" is the model before tuning.
    `lora_edu.recording.methods` made them; `lora_edu.data.runs` finds the tuned ones (`tuned_method`, `tuned_rate`).
    """
    rows = json.loads(data_file("methods.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in settings.items())]


def load_variants(**settings) -> list[dict]:
    """The rows of data/variants.json with the given settings (`task="far"`, `method="dora"`, `size=4`, `seed=0`, …),
    and before them the rows of LoRA in 100 steps on the same matrices that `load_methods` has.

    A row is one of `load_methods`; size is the rank, of AdaLoRA the mean rank at the end. AdaLoRA's has `ranks` too,
    layer → rank. "lora, alpha 4" and "rslora, alpha 2" are LoRA with s = 4/r and 2/√r; everything else has s = 1. Of
    "lora+" `rate` is A's, B's is 16 times that. `lora_edu.recording.variants` made them.
    """
    rows = json.loads(data_file("variants.json").read_text(encoding="utf-8"))["rows"]
    rows = load_methods(method="lora", steps=SHORT) + rows
    return [row for row in rows if all(row.get(key) == value for key, value in settings.items())]


def load_encoder_runs(**settings) -> list[dict]:
    """The rows of data/encoder.json with the given settings (`method="lora"`, `size=8`, `seed=0`, …): a sentence
    encoder tuned to find functions of the standard library.

    A row: task, method ("lora" on all matrices, "lora attention", "lora MLP", "lora words", "full"; "none": untuned;
    "bm25"), size (r), rate, steps, seed, trained (numbers), validation (nats a query; None where it blew up). Of tuned
    rows "all", "quarter" and "pool_500", what they find of the test pairs, and "ranks", the place of each. Of full
    tuning at a gentle and a steep rate "cut": r → the same with every ΔW cut to it, on a quarter of the test pairs;
    "one_kind_cut", "spectra" and "sizes".
    `lora_edu.recording.encoder` made them; `lora_edu.data.runs` finds the tuned ones.
    """
    rows = json.loads(data_file("encoder.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in settings.items())]


def load_encoder_spectra() -> dict[str, dict[str, torch.Tensor]]:
    """Name of a run of `load_encoder_runs` that was cut → matrix → its singular values, largest first."""
    return _spectra("encoder_spectra.safetensors")


def load_llm_runs(**settings) -> list[dict]:
    """The rows of data/llm.json with the given settings (`method="lora"`, `size=8`, `seed=0`, …): a language model
    tuned to write the first line of a function's docstring.

    A row: task, method ("lora" on all linear layers, "lora attention", "lora MLP", "lora table", "lora NF4" on a
    quantised base, "full"; "none": untuned, "none NF4": untuned and quantised), size (r), rate, steps, seed, trained
    (numbers), validation (nats a token of the answer; None where it blew up). Of tuned rows "test" and "nats" (those of
    each answer), "cut_on" (the loss of every second answer), "prose" and "code" (nats a token of other text), "chrf",
    "imperative" and "answers", what it writes. Of full tuning at a gentle and a steep rate "whole" and "cut": the loss
    of every second answer, r → that with every ΔW cut to it; "one_kind_cut", "spectra" and "sizes". Of some
    "intruders": what scaling them changes.
    `lora_edu.recording.llm` made them; `lora_edu.data.runs` finds the tuned ones.
    """
    return [row for row in _llm()["rows"] if all(row.get(key) == value for key, value in settings.items())]


def load_llm_functions() -> list[dict]:
    """The functions that `load_llm_runs` was tested on, in the order of "nats": module, name, summary, tokens (of the
    answer); of every third one, in the order of "answers", the source."""
    return _llm()["functions"]


def load_llm_memory() -> list[dict]:
    """Memory of two training steps by base ("float32", "bfloat16", "NF4") and method: file, loaded, peak, in bytes."""
    return _llm()["memory"]


def load_llm_spectra() -> dict[str, dict[str, torch.Tensor]]:
    """Name of a run of `load_llm_runs` that was cut → matrix → its singular values, largest first."""
    return _spectra("llm_spectra.safetensors")


def _llm() -> dict:
    return json.loads(data_file("llm.json").read_text(encoding="utf-8"))


def _spectra(file: str) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, sigma in load_safetensors(data_file(file).read_bytes()).items():
        run, _, matrix = key.rpartition("/")
        found.setdefault(run, {})[matrix] = sigma.float()
    return found


def load_deltas() -> dict:
    """What `lora_edu.recording.deltas` found after short tunings: "another text", "planted with labels"."""
    return json.loads(data_file("deltas.json").read_text(encoding="utf-8"))


def load_mixtures() -> dict:
    """Two adapters mixed on the base (data/mixtures.json): "adapters" (text → name), "prompt", and "rows".

    A row: "weights" (text → weight of the adapter tuned to it), "losses" (text → nats a token, on `tokens` tokens
    of it) and "text", what the model writes after the prompt. `lora_edu.recording.mixtures` made them.
    """
    return json.loads(data_file("mixtures.json").read_text(encoding="utf-8"))


def _sweeps() -> dict:
    return json.loads(data_file("sweeps.json").read_text(encoding="utf-8"))


def adapter_folder(name: str) -> Path:
    """The folder of a shipped adapter ("reference_r8", …), files checked; `lora_edu.lora.load_adapter` reads it."""
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        path = data_file(f"adapters/{name}/{file}")
    return path.parent
