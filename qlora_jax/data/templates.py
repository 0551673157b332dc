"""Chat templates by name, for models that have none or data that ask for another."""

# What Guanaco was trained on: the texts of its data set as they are, and one end.
_GUANACO = """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}\
{{ message.content }}
{% elif message.role == 'user' %}### Human: {{ message.content }}\
{% else %}### Assistant: {{ message.content }}\
{% if loop.last %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}### Assistant:{% endif %}"""

# The prompt of Stanford Alpaca.
_ALPACA = """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}\
{{ message.content }}

{% elif message.role == 'user' %}{% if loop.first %}Below is an instruction that \
describes a task. Write a response that appropriately completes the request.

{% endif %}### Instruction:
{{ message.content }}

### Response:{% else %} {{ message.content }}{{ eos_token }}
{% endif %}{% endfor %}"""

_CHATML = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# ChatML with the tool calls of Nous Hermes 2 Pro, which Qwen 2.5 has too.
_HERMES = """\
{% if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}You may call functions. Their signatures are within <tools></tools>:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
For each call, return an object with the function's name and its arguments:
<tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call><|im_end|>
{% endif %}{% for message in messages %}\
{% if message.role == 'system' and loop.first and tools %}\
{% elif message.role == 'tool' %}\
{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user
{% else %}
{% endif %}<tool_response>
{{ message.content }}
</tool_response>{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}\
<|im_end|>
{% endif %}{% else %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}\
{% if not loop.first or message.content %}{{ '\\n' }}{% endif %}<tool_call>
{"name": {{ call.function.name | tojson }}, \
"arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Texts one after another, as QLoRA's code trains on most of its data sets.
_PLAIN = """\
{{ bos_token }}{% for message in messages %}{{ message.content }}\
{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"""

TEMPLATES: dict[str, str] = {
    "guanaco": _GUANACO,
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "hermes": _HERMES,
    "plain": _PLAIN,
}


def template_source(name: str) -> str:
    """Returns the Jinja source that a name of `TEMPLATES` stands for, or the source.

    Raises:
        ValueError: if it is neither.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{" not in name:
        raise ValueError(
            f"chat_template={name!r} must be Jinja source or one of "
            f"{', '.join(TEMPLATES)}."
        )
    return name
