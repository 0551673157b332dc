"""Makes templates.json: chat templates and the strings transformers renders with them.

Run with transformers 5.23.0:

    python make_templates.py
    python make_templates.py --check FOLDER   # all *.jinja of a folder, into a JSON

The templates write the formats of Llama 2, Llama 3.1, Mistral, ChatML, Qwen3 and Gemma,
and between them use what published ones do: loop controls, namespaces, macros, tojson,
strftime_now, raise_exception, and lines that are trimmed.
"""

import argparse
import json
import pathlib
import runpy

import transformers

HERE = pathlib.Path(__file__).parent
LLAMA2 = """\
{%- set chat = namespace(system='') -%}
{%- if messages[0].role == 'system' -%}
    {%- set chat.system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message.role == 'user') != (loop.index0 is even) -%}
        {{- raise_exception('Roles must alternate, first the user') -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {%- set text = (chat.system if loop.first else '') ~ message.content -%}
        {{- bos_token ~ '[INST] ' ~ text.strip() ~ ' [/INST]' -}}
    {%- else -%}
        {{- ' ' ~ message.content | trim ~ ' ' ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
LLAMA3 = """\
{{ bos_token }}{% macro turn(role) %}<|start_header_id|>{{ role }}<|end_header_id|>

{{ caller() }}<|eot_id|>{% endmacro %}
{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else 'today' %}
{%- set given = messages[0].role == 'system' %}
{%- call turn('system') -%}
Cutting Knowledge Date: December 2023
Today Date: {{ date | length }} letters

{% if tools is not none %}{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}
{{- messages[0].content | trim if given }}
{%- endcall %}
{%- for message in messages %}
{%- if loop.first and given %}{% continue %}{% endif %}
{%- if message.tool_calls is defined %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('One call') }}{% endif %}
{%- call turn('assistant') -%}
{%- set called = message.tool_calls[0].function -%}
{"name": "{{ called.name }}", "parameters": {{ called.arguments | tojson }}}
{%- endcall %}
{%- elif message.role in ('tool', 'ipython') %}
{%- call turn('ipython') %}{{ message.content | tojson }}{% endcall %}
{%- else %}
{%- call turn(message.role) %}{{ message.content | trim }}{% endcall %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """\
{{- bos_token }}
{%- set last = messages | selectattr('role', 'equalto', 'user') | list | length %}
{%- set seen = namespace(users=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set seen.users = seen.users + 1 %}
        {%- if tools and seen.users == last %}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- set before = messages[0]['role'] == 'system' and seen.users == last %}
        {{- '[INST]' + (messages[0]['content'] + '\\n\\n' if before else '') }}
        {{- message['content'] + '[/INST]' }}
    {%- elif message['tool_calls'] is defined and message['tool_calls'] %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message['tool_calls'] %}
            {%- set id = call['id'] | default('') %}
            {%- if id | length != 9 %}
                {{- raise_exception('Ids of calls have nine letters') }}
            {%- endif %}
            {%- set text = call['function'] | tojson %}
            {{- text[:-1] + ', "id": "' + id + '"}' + (', ' if not loop.last) }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS]{"content": ' + message['content'] | tojson + '}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- elif not loop.first %}
        {{- raise_exception('A system message comes first') }}
    {%- endif %}
{%- endfor %}
"""
CHATML = """\
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
    {% endif %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
QWEN3 = """\
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0].content if messages[0].role == 'system' }}
    {%- if tools %}
        {{- '\\n\\n# Tools\\n<tools>' }}
        {%- for tool in tools %}
            {{- '\\n' }}{{ tool | tojson }}
        {%- endfor %}
        {{- '\\n</tools>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set at = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set at.last = messages | length - loop.index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set text, thought = message.content, '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in text %}
            {%- set thought = text.split('</think>')[0].split('<think>')[-1] %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > at.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- text }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.function.name }}
            {{- '", "arguments": ' }}
            {%- set arguments = call.function.arguments %}
            {{- arguments if arguments is string else arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{% set role = {'assistant': 'model'}.get(message['role'], message['role']) %}\
<start_of_turn>{{ role }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}
"""
TEMPLATES = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "chatml": CHATML,
    "qwen3": QWEN3,
    "gemma": GEMMA,
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "123456789",
            "type": "function",
            "function": {"name": "weather", "arguments": {"place": "Zürich <CH>"}},
        }
    ],
}
THOUGHT = "<think>\nhm\n</think>\n\n2"


def said(*contents):
    """Returns turns of user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = {
    "user": said("Hi"),
    "pair": said(" Hi ", " Hello!\n"),
    "multi": said("1", "2", "3", "4", "日本語 🙂\n\nend\t"),
    "system": [SYSTEM, *said("Hi {{ x }} <b>&'", "Yo")],
    "two users": said("1")[:1] * 2,
    "assistant first": said("1", "2")[1:],
    "thoughts": said("1", THOUGHT, "3", THOUGHT),
    "system later": [*said("1"), SYSTEM],
    "tools": [
        *said("Weather?"),
        CALL,
        {"role": "tool", "name": "weather", "content": '"12 °C"\n'},
        *said("", "It is 12 °C.")[1:],
        *said("Thanks"),
    ],
}


def rendered(tokenizer, template, tools):
    """Returns what becomes of each conversation, None where it is refused."""
    cases = []
    for name, messages in CONVERSATIONS.items():
        for given in (None, tools):
            for options in (
                {},
                {"add_generation_prompt": True},
                {"add_generation_prompt": True, "enable_thinking": False},
            ):
                try:
                    text = tokenizer.apply_chat_template(
                        messages,
                        tools=given,
                        chat_template=template,
                        tokenize=False,
                        **options,
                    )
                except Exception:
                    text = None
                cases.append([name, given is not None, options, text])
    return cases


def main():
    """Writes the golden file, or checks a folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", type=pathlib.Path)
    folder = parser.parse_args().check
    chat = runpy.run_path(str(HERE / "make_chat.py"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=chat["byte_tokenizer"](),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    templates, path = TEMPLATES, HERE / "templates.json"
    if folder is not None:
        templates = {p.stem: p.read_text() for p in folder.glob("*.jinja")}
        path = folder / "templates.json"
    record = {
        "transformers": transformers.__version__,
        "tools": chat["TOOLS"],
        "conversations": CONVERSATIONS,
        "templates": templates,
        "cases": {
            name: rendered(tokenizer, template, chat["TOOLS"])
            for name, template in templates.items()
        },
    }
    text = json.dumps(record, indent=None, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    refused = sum(c[3] is None for cases in record["cases"].values() for c in cases)
    print(sum(map(len, record["cases"].values())), "cases,", refused, "refused")


if __name__ == "__main__":
    main()
