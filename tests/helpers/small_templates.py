"""Small chat templates of our own, one for each way in which published templates differ."""

_TURNS = """
{%- for message in messages -%}
{{ '<' ~ message['role'] ~ '>' }}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '</>' }}
{%- endfor -%}"""
_ANSWER = "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
PARTS = _TURNS + _ANSWER
"""System text and user's turn as a list of parts."""

STRING_SYSTEM = PARTS.replace(
    "{%- if message['content'] is string",
    "{%- if message['role'] == 'system' -%}{{ message['content'] }}{%- elif message['content'] is string",
)
"""The system text as a string: a list would be printed as Python prints it (as in GLM-4.1V)."""

STRINGS = (
    "{%- for message in messages -%}{{ '<' ~ message['role'] ~ '>' ~ message['content'] ~ '</>' }}{%- endfor -%}"
    + _ANSWER
)
"""Everything as a string (as in most models of text alone)."""

RAISES_ON_SYSTEM = (
    "{%- for message in messages -%}{%- if message['role'] == 'system' -%}"
    "{{ raise_exception('no system role') }}{%- endif -%}{%- endfor -%}" + PARTS
)
"""No system role: it raises (as in Gemma 2)."""

STRINGS_RAISE_ON_SYSTEM = (
    "{%- for message in messages -%}{%- if message['role'] == 'system' -%}"
    "{{ raise_exception('no system role') }}{%- endif -%}{%- endfor -%}" + STRINGS
)

DROPS_SYSTEM = "{%- set messages = messages | rejectattr('role', 'equalto', 'system') | list -%}" + PARTS
"""No system role: it is left out without a word."""

SAYS_SYSTEM_TWICE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{ messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'] }}"
    "{%- endif -%}" + PARTS
)
"""The system text is said twice (as in LLaVA-NeXT with Vicuna)."""

OWN_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' -%}{{ '<system>You are a helpful assistant.</>' }}{%- endif -%}" + PARTS
)
"""It says a system text of its own where none is given (as in Qwen2-VL)."""

THINKS = (
    _TURNS
    + "{%- if add_generation_prompt -%}{{ '<assistant>' }}"
    + "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think></think>' }}"
    + "{%- else -%}{{ '<think>' }}{%- endif -%}{%- endif -%}"
)
"""The answer begins with an open reasoning, unless `enable_thinking` is false (as in Qwen3.5)."""

ALWAYS_THINKS = _TURNS + "{%- if add_generation_prompt -%}{{ '<assistant><think>' }}{%- endif -%}"

TRIMS = PARTS.replace("{{ part['text'] }}", "{{ part['text'] | trim }}")
"""Every text is trimmed (as in Gemma 3)."""

DATED = "{{ '<date>' ~ strftime_now('%d %b %Y') ~ ' ' ~ strftime_now('%Y-%m-%d') ~ '</>' }}" + PARTS
"""It writes today's date (as in Llama 3.2)."""

DATED_ALONE = (
    "{%- if messages[0]['role'] != 'system' -%}{{ '<system>Today is ' ~ strftime_now('%A, %-d %B %Y') ~ '</>' }}"
    "{%- endif -%}" + PARTS
)
"""It writes today's date only where no system text is given (as in Mistral 3)."""

IMAGES_FIRST = (
    "{%- for message in messages -%}{{ '<' ~ message['role'] ~ '>' }}"
    "{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>\n' }}{%- endfor -%}"
    "{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{ part['text'] ~ ' ' }}"
    "{%- endfor -%}{{ '</>' }}{%- endfor -%}" + _ANSWER
)
"""Images are moved before the text (as in LLaVA)."""

NUMBERED = PARTS.replace(
    "{%- for part in message['content'] -%}",
    "{%- set count = namespace(value=0) -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set count.value = count.value + 1 -%}{%- endif -%}",
).replace("{{ '<image>' }}", "{{ 'Picture ' ~ count.value ~ ': <image>' }}")
"""Images are numbered (as in Qwen-VL and Phi-3.5-V)."""

COUNTED_FIRST = (
    "{%- set count = namespace(value=0) -%}{%- for message in messages -%}{%- if message['content'] is not string -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
    "{%- set count.value = count.value + 1 -%}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{%- for number in range(count.value) -%}"
    "{{ ('Image ' ~ (number + 1) if count.value > 1 else '') ~ '<image>' }}{%- endfor -%}"
) + RAISES_ON_SYSTEM.replace("{{ '<image>' }}", "")
"""Images stand before everything, and are numbered if there are several (as in Molmo 2)."""

IMAGES_LAST = (
    "{%- for message in messages -%}{{ '<' ~ message['role'] ~ '>' }}"
    "{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{ part['text'] }}{%- endfor -%}"
    "{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{ '<image>' }}{%- endfor -%}"
    "{{ '</>' }}{%- endfor -%}" + _ANSWER
)
"""Images are moved behind the text, where the representation prompt would stand before them."""

NO_IMAGES = PARTS.replace("{{ '<image>' }}", "")
"""Images are left out."""

NO_ENDING = _TURNS.replace("{{ '</>' }}", "")
"""Nothing stands behind the user's turn."""

TAMPERS = PARTS.replace("{{ part['text'] }}", "{{ part['text'] | replace('\n', ' | ') }}")
"""It writes something between the user's text and the representation prompt."""

STARTS_WITH_BLANKS = "\n  " + PARTS
NAMES_SYSTEM_MESSAGE = "{{ 'told' if system_message is defined else '' }}" + PARTS
"""It tests whether a common name is defined (as in Pixtral)."""

FITTING = {
    "parts": PARTS,
    "string system": STRING_SYSTEM,
    "strings": STRINGS,
    "raises on system": RAISES_ON_SYSTEM,
    "drops system": DROPS_SYSTEM,
    "says system twice": SAYS_SYSTEM_TWICE,
    "own system": OWN_SYSTEM,
    "thinks": THINKS,
    "trims": TRIMS,
    "dated": DATED,
    "dated alone": DATED_ALONE,
    "images first": IMAGES_FIRST,
    "images last": IMAGES_LAST,
    "numbered": NUMBERED,
    "counted first": COUNTED_FIRST,
    "starts with blanks": STARTS_WITH_BLANKS,
    "names system_message": NAMES_SYSTEM_MESSAGE,
}
"""All that some format fits."""
