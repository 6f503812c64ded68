"""`gen2embed doctor MODEL`: sound models pass, and a fault put into a real model is found by the check for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gen2embed_mteb import Gen2Embed, cli
from gen2embed_mteb.inspection.model_checks import check_model

FINITE, APART, SIDES_DIFFER, LAST, LENGTHS, BATCH, PADDING, PREFIX, DRIFT = range(9)


def failed(model: Gen2Embed) -> list[int]:
    return [number for number, check in enumerate(check_model(model)) if not check.passed]


def loaded(directory: Any, **options: Any) -> Gen2Embed:
    return Gen2Embed(directory, device="cpu", model_kwargs={"dtype": torch.float32}, **options)


def shifted(model: Gen2Embed, by: Callable[[dict[str, Any]], Any]) -> Gen2Embed:
    """Shift the states that the model returns by what `by` makes of its arguments."""
    stock = model[0].model.forward

    def forward(**kwargs: Any) -> Any:
        output = stock(**kwargs)
        output.last_hidden_state = output.last_hidden_state + by(kwargs)
        return output

    model[0].model.forward = forward  # sentence-transformers calls it by name, so that a hook would not run
    return model


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "internvl", "llama"])
def test_sound_models_pass(tiny_dir: Any, family: str) -> None:
    checks = check_model(loaded(tiny_dir(family)))
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 9
    assert checks[DRIFT].found.startswith(("cosine 0.9", "cosine 1.0"))


def ramp(kwargs: dict[str, Any]) -> Any:
    """Something other than a multiple of the state, which normalisation would remove."""
    return torch.linspace(0, 30, 32).to(torch.get_default_dtype())


@pytest.mark.parametrize(
    ("by", "found"),
    [
        (lambda kwargs: float("nan"), {FINITE, APART, SIDES_DIFFER, BATCH, PADDING, PREFIX, DRIFT}),
        (lambda kwargs: 1e6 * ramp(kwargs), {APART, SIDES_DIFFER}),
        (lambda kwargs: ramp(kwargs) * (len(kwargs["input_ids"]) > 1), {BATCH, PREFIX, DRIFT}),
        (lambda kwargs: ramp(kwargs) * (not kwargs["attention_mask"][:, 0].all()), {PADDING}),
        (lambda kwargs: ramp(kwargs) * (kwargs.get("past_key_values") is not None), {PREFIX}),
    ],
    ids=["nan", "constant", "batch", "padding", "cache"],
)
def test_a_fault_is_found(tiny_dir: Any, by: Callable[[dict[str, Any]], Any], found: set[int]) -> None:
    model = loaded(tiny_dir("qwen3"))

    def masked(kwargs: dict[str, Any]) -> Any:
        if kwargs.get("attention_mask") is None:
            kwargs = {**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}
        return by(kwargs)

    assert set(failed(shifted(model, masked))) == found


def test_a_template_that_drops_the_prompt_or_ends_in_the_text(tiny_dir: Any) -> None:
    model = loaded(tiny_dir("qwen3"))
    texts = "{{ 'a ' }}{%- for part in message.content -%}{{ part.text }}{%- endfor -%}"
    model.processor.chat_template = f"{{%- for message in messages -%}}{texts}{{%- endfor -%}}"
    assert {SIDES_DIFFER, LAST} <= set(failed(model))


def test_a_prompt_that_treats_both_sides_alike_is_no_fault(tiny_dir: Any) -> None:
    assert failed(loaded(tiny_dir("llama"), prompt_mode="none")) == []


def test_the_command_prints_a_table_and_ends_with_its_verdict(
    tiny_dir: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny_dir("llama"))
    assert cli.main(["doctor", folder, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("✓") == 9
    assert printed.endswith(f"{folder}: all 9 checks passed\n")
    monkeypatch.setattr("gen2embed_mteb.inspection.model_checks.LEAST_COSINE", 1.1)
    assert cli.main(["doctor", folder, "--device", "cpu"]) == 2
    printed = capsys.readouterr().out
    assert printed.count("✗") == 1
    assert "encode in float32: --dtype float32" in printed
    assert printed.endswith(f"{folder}: 1 of 9 checks failed\n")
    assert cli.main(["doctor", "/no/such/folder"]) == 2
