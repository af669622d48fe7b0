"""Chat templates of the families: the published ones that the installed trl brings, and those written here.

A template written here follows the family's public format: its markers, the roles it refuses, what it writes at the
end of a turn.
"""

from __future__ import annotations

from importlib import resources


def published(name: str) -> str:
    """The template of this name in `trl/chat_templates`."""
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


_STRICT_ROLES = """\
{%- for message in messages %}
  {%- if message['role'] not in ('user', 'assistant') %}
    {{- raise_exception('Only user and assistant roles are supported!') }}
  {%- endif %}
  {%- if (loop.index0 % 2 == 0) != (message['role'] == 'user') %}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {%- endif %}
{%- endfor %}
"""

MISTRAL_V02 = (
    _STRICT_ROLES
    + """\
{{- bos_token }}
{%- for message in messages %}
  {%- if message['role'] == 'user' %}
    {{- '[INST] ' + message['content'] + ' [/INST]' }}
  {%- else %}
    {{- message['content'] + eos_token }}
  {%- endif %}
{%- endfor %}
"""
)
"""Mistral-7B-Instruct-v0.2: neither a system message nor two turns of one role; no generation prompt."""

MIXTRAL = (
    _STRICT_ROLES
    + """\
{{- bos_token }}
{%- for message in messages %}
  {%- if message['role'] == 'user' %}
    {{- ' [INST] ' + message['content'] + ' [/INST]' }}
  {%- else %}
    {{- ' ' + message['content'] + eos_token }}
  {%- endif %}
{%- endfor %}
"""
)
"""Mixtral-8x7B-Instruct: as Mistral v0.2, with a blank before an answer that no prompt ends with."""

CHATML = """\
{%- for message in messages %}
  {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Yi-Chat: ChatML without a system message of its own."""

GRANITE = """\
{%- if messages[0]['role'] == 'system' %}
  {%- set rules = messages[0]['content'] %}
  {%- set turns = messages[1:] %}
{%- else %}
  {%- set rules = 'Knowledge Cutoff Date: April 2024.\\nToday\\'s Date: ' + strftime_now('%B %d, %Y') + '.' %}
  {%- set turns = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + rules + '<|end_of_text|>\\n' }}
{%- if tools %}
  {{- '<|start_of_role|>tools<|end_of_role|>' + (tools | tojson(indent=4)) + '<|end_of_text|>\\n' }}
{%- endif %}
{%- for turn in turns %}
  {{- '<|start_of_role|>' + turn['role'].replace('tool', 'tool_response') + '<|end_of_role|>' }}
  {%- if turn['tool_calls'] %}
    {%- for call in turn['tool_calls'] %}
      {{- '<|tool_call|>' + ([call['function']] | tojson) }}
    {%- endfor %}
  {%- else %}
    {{- turn['content'] }}
  {%- endif %}
  {{- '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_of_role|>assistant<|end_of_role|>' }}
{%- endif %}
"""
"""Granite 3: roles between markers, a system message with today's date where a conversation has none."""
