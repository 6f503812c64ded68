"""A template that does not end, writes without end, or writes another text each time is refused when it is tried."""

from __future__ import annotations

import sys

import pytest
import small_templates

from gen2embed_mteb.embedder.chat_formats import limits
from gen2embed_mteb.embedder.chat_formats.chat_format import ChatFormat
from gen2embed_mteb.embedder.chat_formats.detection import detect
from gen2embed_mteb.embedder.chat_formats.limits import TemplateLimitError, check_length, limited_lines
from gen2embed_mteb.errors import Gen2EmbedError

LONG = "{%- for a in range(99999) -%}{%- for b in range(99999) -%}BODY{%- endfor -%}{%- endfor -%}"
MACRO = "{%- macro again(n) -%}{%- for a in range(9) -%}{%- if n -%}{{ again(n - 1) }}{%- endif -%}{%- endfor -%}"
MACRO += "{%- endmacro -%}{{ again(30) }}"


@pytest.mark.parametrize("loop", [LONG.replace("BODY", ""), LONG.replace("BODY", "xxxxxxxx"), MACRO])
def test_a_loop_that_is_too_long_is_stopped(loop):
    with pytest.raises(TemplateLimitError, match="runs more than 200000 lines or 5 seconds for one turn"):
        detect(loop + small_templates.PARTS)


def test_slow_lines_are_stopped_by_their_time(monkeypatch):
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.2)
    slow = "{%- for a in range(99999) -%}{{ (range(99999) | list | length) * 0 }}{%- endfor -%}"
    with pytest.raises(TemplateLimitError, match=r"0\.2 seconds"):
        detect(slow + small_templates.PARTS)


def test_a_text_without_end_is_refused():
    with pytest.raises(TemplateLimitError, match="writes 1000"):
        detect("y" * 1_000_000 + small_templates.PARTS)
    check_length("y" * limits.MAX_CHARACTERS)
    # What is not written does not count.
    assert detect("{#" + "y" * 1_000_000 + "#}" + small_templates.PARTS).chat_format == ChatFormat()


def test_the_limit_is_that_of_one_rendering_and_of_templates_alone(monkeypatch):
    monkeypatch.setattr(limits, "MAX_LINES", 10)
    with limited_lines():
        assert sum(number for number in range(1000)) == 499500


def test_the_debugger_s_trace_is_put_back():
    def trace(frame, event, argument):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(ZeroDivisionError), limited_lines():
            _ = 1 / 0
        found = sys.gettrace()
    finally:
        sys.settrace(before)
    assert found is trace


@pytest.mark.parametrize("place", ["{{ range(9) | random }}", "{{ '<think></think>' ~ (range(9) | random) }}"])
@pytest.mark.parametrize("first", [True, False])
def test_a_template_that_draws_lots_is_refused(place, first):
    """Vectors would change from call to call."""
    template = place + small_templates.PARTS if first else small_templates.PARTS + place
    with pytest.raises(Gen2EmbedError, match=r"another text each time|the ending is another"):
        detect(template)
