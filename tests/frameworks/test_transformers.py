"""Hugging Face's Trainer gives the weights of a plain loop, bit for bit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import fastlars


@pytest.fixture(scope="module")
def batches(page: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """The Trainer's batches, which it shuffles."""
    trainer, fed = page["make_trainer"](), []
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append({name: kwargs[name].clone() for name in ("input_ids", "labels")}),
        with_kwargs=True,
    )
    trainer.train()
    assert len(fed) == 80
    return fed


def plain_loop(
    page: dict[str, Any],
    batches: list[dict[str, torch.Tensor]],
    lrs: tuple[float, float],
    trust_coefficient: float,
    warmup_from: int = 1,
) -> tuple[torch.nn.Module, list[tuple[dict[str, float], dict[str, float]]]]:
    """The page's training in plain torch, with groups, schedule, accumulation and clipping written out.

    Returns the model, and the trust ratios and relative steps of each step.
    """
    model = page["make_model"]()
    adapted = [p for name, p in model.named_parameters() if p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1]
    groups = [{"params": adapted, "weight_decay": 1e-4}, {"params": rest}]
    optimizer = fastlars.LARS(groups, lr=0.0, momentum=0.9, trust_coefficient=trust_coefficient)
    seen = []
    for step in range(40):
        factor = (step + warmup_from) / 4 if step < 4 else (1 + math.cos(math.pi * ((step - 4) / 36))) / 2
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad()
        for batch in batches[2 * step : 2 * step + 2]:
            (model(**batch).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ratios = optimizer.trust_ratios()
        with optimizer.relative_steps() as steps:
            optimizer.step()
        seen.append((ratios, steps))
    return model, seen


def assert_same(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    for (name, p), (_, q) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("name", ["trainer", "resumed", "simple"])
def test_it_learns(page: dict[str, Any], name: str) -> None:
    model, tokens = page[name].model.eval(), page["tokens"]
    loss = [m(input_ids=tokens, labels=(tokens[:, 0] >= 16).long()).loss.item() for m in (page["make_model"](), model)]
    assert loss[0] > 0.6 and loss[1] < 0.4


def test_a_finished_optimizer_and_resume_are_the_plain_loop(page: dict[str, Any], batches: Any) -> None:
    model, _ = plain_loop(page, batches, (8.0, 0.1), 0.001)
    assert_same(page["trainer"].model, model)
    assert_same(page["resumed"].model, model)


def test_the_resumed_run_did_half_of_the_steps(page: dict[str, Any]) -> None:
    """A run that started from the beginning would end with the same weights."""
    logged = {entry["step"] for entry in page["resumed"].state.log_history if "loss" in entry}
    saved = json.loads(Path("bert/checkpoint-20/trainer_state.json").read_text(encoding="utf-8"))
    assert saved["global_step"] == 20 and logged == {10, 20, 30, 40}
    steps = []
    trainer = page["make_trainer"]()
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs)
    trainer.train(resume_from_checkpoint="bert/checkpoint-20")
    assert len(steps) == 20


def test_the_numbers_logged_are_those_of_the_plain_loop(page: dict[str, Any], batches: Any) -> None:
    _, seen = plain_loop(page, batches, (8.0, 0.1), 0.001)
    logged = {entry["step"]: entry for entry in page["trainer"].state.log_history if "loss" not in entry}
    logged.pop(40)  # the Trainer's summary
    assert list(logged) == [0, 10, 20, 30]
    named = list(page["make_model"]().named_parameters())
    adapted, rest = ([name for name, p in named if (p.ndim == 2) == kind] for kind in (True, False))
    for step, entry in logged.items():
        ratios, steps = seen[step]
        expected = {f"trust_ratio/{name}": ratio for name, ratio in zip(adapted, ratios.values(), strict=True)}
        expected |= {f"relative_step/{name}": moved for name, moved in zip(adapted + rest, steps.values(), strict=True)}
        assert {key: value for key, value in entry.items() if "/" in key} == expected
        assert all(entry[f"relative_step/{name}"] > 0 for name in adapted)


def test_class_and_options_adapt_what_the_trainer_decays(page: dict[str, Any]) -> None:
    adapted, rest = page["simple"].optimizer.param_groups
    assert [p.ndim for p in rest["params"]] == len(rest["params"]) * [1] and rest["weight_decay"] == 0
    assert [p.ndim for p in adapted["params"]] == len(adapted["params"]) * [2] and adapted["weight_decay"] == 1e-4
    assert adapted["trust_coefficient"] == 0.08 and adapted["initial_lr"] == rest["initial_lr"] == 0.1


def test_class_and_options_are_the_plain_loop(page: dict[str, Any], batches: Any) -> None:
    """With the Trainer's schedule, whose warm-up starts at 0."""
    model, _ = plain_loop(page, batches, (0.1, 0.1), 0.08, warmup_from=0)
    assert_same(page["simple"].model, model)


def test_without_decay_lars_says_that_it_adapts_nothing(page: dict[str, Any]) -> None:
    arguments = page["arguments"]("undecayed")
    arguments.weight_decay = 0.0
    trainer = Trainer(
        page["make_model"](),
        arguments,
        train_dataset=page["dataset"],
        optimizer_cls_and_kwargs=(fastlars.LARS, {"lr": 1}),
    )
    with pytest.raises(UserWarning, match="LARS adapts no parameter"):
        trainer.train()
