"""The estimate of memory: what makes it smaller, what is refused, and the tables of docs/scaling.md."""

import sys

import pytest
import torch
from helpers import ROOT, error_line, needs_peft

sys.path.insert(0, str(ROOT / "benchmarks"))

import memory as tables
from harness.memory import refuse_too_large

from harness import data
from harness.options import RunConfig


@needs_peft
def test_the_documented_tables_are_what_the_code_computes():
    documented = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    for line in [*tables.parts_table(), *tables.cards_table()]:
        assert line in documented


@needs_peft
def test_the_optimizer_and_lora_decide_what_is_held_for_each_weight():
    """Bytes for each parameter on a GPU: AdamW 4 + 4 + 8 + 2 of autocast's copy, SGD 4 + 4 + 2, LoRA's base 2."""
    n = sum(p.numel() for p in tables.empty_model("1.5B", 0).parameters())
    held = {}
    for way, options in tables.WAYS.items():
        held[way] = tables.estimate("1.5B", **options)["weights, gradients, optimizer"] * 2**30 / n
    assert held["AdamW"] == pytest.approx(18) and held["SGD"] == pytest.approx(10)
    adapters = sum(p.numel() for p in tables.empty_model("1.5B", 32).parameters() if p.requires_grad)
    assert held["LoRA"] == pytest.approx(2 + 18 * adapters / n)


@needs_peft
def test_a_card_is_never_filled_beyond_what_is_free():
    for name in tables.MODELS:
        for way in tables.WAYS.values():
            for card in tables.CARDS:
                options = tables.options_that_fit(name, way, card)
                if options is not None:
                    fixed, rollout, update = tables.estimate(name, **way, **options).values()
                    assert fixed + max(rollout, update) <= card - tables.RESERVED


@pytest.mark.parametrize("estimate, words, missing", [
    ((30, 1, 1), ("--model", "--optimizer sgd", "--lora-rank"), "--rollout-rows"),
    ((20, 9, 1), ("--rollout-rows", "--lora-rank"), "--token-budget"),
    ((20, 1, 9), ("--token-budget", "--gradient-checkpointing", "--lora-rank"), "--rollout-rows"),
])  # fmt: skip
def test_the_refusal_names_what_needs_less(estimate, words, missing, capsys):
    parts = dict(
        zip(("weights, gradients, optimizer", "rollout", "update"), [n * 2**30 for n in estimate], strict=True)
    )
    with pytest.raises(SystemExit) as stop:
        refuse_too_large(RunConfig(), parts, free=24 * 2**30)
    message = error_line(capsys)
    assert stop.value.code == 2 and all(word in message for word in words) and missing not in message
    refuse_too_large(RunConfig(), parts, free=40 * 2**30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_do_not_fit_are_refused_in_one_line(dtype, toy, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(SystemExit) as stop:
        data.load_model(str(toy), torch.device("cpu"), dtype=dtype)
    message = error_line(capsys)
    assert stop.value.code == 2 and "--model" in message
    assert ("--lora-rank" in message) == (dtype == torch.float32)  # with LoRA they are in bf16 already


def test_the_refusal_does_not_name_what_is_in_use_already(capsys):
    for cfg, word in (
        (RunConfig(lora_rank=8), "--lora-rank"),
        (RunConfig(optimizer="sgd"), "--optimizer"),
        (RunConfig(gradient_checkpointing=True), "--gradient-checkpointing"),
    ):
        for estimate in ((9, 0, 0), (0, 9, 0), (0, 0, 9)):
            with pytest.raises(SystemExit):
                refuse_too_large(cfg, dict(zip("abc", estimate, strict=True)), free=1)
            assert word not in error_line(capsys)
