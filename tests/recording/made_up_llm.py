"""Rows of a language model that nobody tuned, as data/llm.json would have them: losses can be worked out by hand."""

from lora_edu.docstrings import END

UNTUNED = 3.6  # nats a token; full tuning ends at 2.6, so that a loss is read as a share of one nat
FUNCTIONS = [
    {"module": "m.py", "name": f"C.f{i}", "summary": f"Return the {i}th thing.", "tokens": 8}
    | ({"source": f"def f{i}(self):\n    return self.things[{i}]\n"} if i % 3 == 0 else {})
    for i in range(9)
]


def row(method, size, rate, loss, trained, seed=0):
    answers = [f"{method} {size or ''} writes {place}.{END}" for place in range(2)] + ["on and on"]
    about = {"task": "docstrings", "method": method, "size": size, "rate": rate, "steps": 24, "seed": seed}
    found = {"validation": loss, "test": loss, "cut_on": loss, "trained": trained, "answers": answers}
    return about | found


def cut(losses, whole):
    return {"whole": whole, "cut": {str(r): loss for r, loss in losses.items()}}


ROWS = [
    row("none", None, None, UNTUNED, 0) | {"steps": None, "seed": None},
    row("none NF4", None, None, 3.7, 0) | {"steps": None, "seed": None},
    *(row("full", None, rate, loss, 134_515_008) for rate, loss in ((1e-4, 2.6), (5e-5, 2.7))),
    row("full", None, 2e-4, 2.8, 134_515_008) | cut({0: 3.7, 1: 3.4, 2: 3.3, 8: 3.0, 64: 2.85}, 2.8),
    row("full", None, 2.5e-5, 3.1, 134_515_008) | cut({0: 3.55, 1: 3.35, 2: 3.25, 8: 3.2, 64: 3.1}, 3.1),
    row("full", None, 2.5e-5, 3.2, 134_515_008, 1) | cut({1: 3.4, 8: 3.3, 64: 3.2}, 3.2),
    *(
        row("lora", r, rate, loss + (0.1 if r == 1 else 0), 305_280 * r)
        for r in (1, 8)
        for rate, loss in ((1e-3, 2.9), (2e-3, 2.7), (4e-3, 3.0))
    ),
    row("lora", 4, 2e-3, 2.75, 305_280 * 4),
    *(row("lora", 8, 2e-3, 2.7 + seed / 10, 305_280 * 8, seed) for seed in (1, 2)),
    row("lora MLP", 8, 2e-3, 2.8, 1_000_000),
]
