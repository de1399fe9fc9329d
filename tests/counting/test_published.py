"""Figures in print: which are reproduced, and that the others say why not."""

from lora_edu import counting


def test_published_counts_are_reproduced_or_the_reason_is_given():
    rows = counting.published_counts()
    assert all(row.reproduced or row.note for row in rows)
    found = {(row.source, row.what): row for row in rows}
    for source, what, equal in [
        ("the study note", "10 000 × 100, r = 8", True),
        ("LoRA paper, table 2", "RoBERTa base, r = 8", True),
        ("LoRA paper, table 2", "RoBERTa large, r = 8", True),
        ("LoRA paper, table 2", "DeBERTa-XXL, r = 8", False),
        ("LoRA code, examples/NLU", "DeBERTa-XXL, r = 16", True),
        ("LoRA paper, table 3", "GPT-2 M, r = 4", False),
        ("LoRA paper, table 3", "GPT-2 L, r = 4", False),
        ("LoRA paper, table 4", "GPT-3, r = 1", True),
        ("LoRA paper, table 4", "GPT-3, r = 8", True),
        ("LoRA paper, §4.2", "GPT-3's adapter, r = 4, 16 bits", False),
        ("LoRA paper, §4.2", "… over the adapter", False),
    ]:
        assert found[source, what].reproduced is equal
    assert found["LoRA paper, table 3", "GPT-2 M, r = 4"].ours == "0.39 M"
    assert found["LoRA paper, table 3", "GPT-2 L, r = 4"].ours == "0.74 M"
    assert found["LoRA paper, §4.2", "… over the adapter"].ours == "9 272-fold"
    lines = counting.published_table().splitlines()
    assert len(lines) == 1 + len(rows) + sum(not row.reproduced for row in rows)
    assert max(map(len, lines)) <= 100
