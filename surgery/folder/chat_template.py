"""A chat template in the Jinja that onnxruntime-genai renders: the published one, rewritten where the two part.

What was measured on 0.15.2 to 0.18.0, and what is put in its place:

    tools                    reach the template unwrapped and cut down, unless its text has `tool.function`: a comment has
    {{ 'a' | upper }}        there is no such filter; a macro of that name is one
    {{ text | trim }}        leaves the spaces of other scripts, which Python's strip takes; a macro takes them
    {{ x | dictsort }}       sorts capitals first, Python without regard to case; pairs are sorted one by one
    'a' in text              is false of every text; a split tells it
    {{ none }}               is nothing, and `None` in jinja2
    {% if {} %}              is true; the number of keys tells it
    {% macro f(a) %}         has its arguments, and all that it sets, in one scope with the whole template: a loop of one
                             round is a scope of its own
    {% if a %}               keeps the line's end behind it and the spaces in front; they are cut out

The published template stays beside it for every other reader: GenAI looks into tokenizer_config.json first, and Hugging
Face's libraries into chat_template.jinja. What is left: letters beyond ASCII have no capitals here, so keys that differ
in these alone may stand in another order, and types of a schema are not put into capitals; null and what is not there are
told apart by name, and in a list.
"""

from __future__ import annotations

import re
from itertools import count

_SPACES = (
    "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
_LIST = "[" + ", ".join(f"'{space}'" for space in _SPACES) + "]"
_SHORT = "'\\t\\n\x0b\x0c\\r\x1c\x1d\x1e\x1f '"
"""What else Python's strip takes, as a literal: lists of bytes, so that no letter beyond ASCII may be in it."""

_MACROS = {
    "upper": """\
{%- macro upper(text) -%}
    {%- for letter in text | string -%}{{- letter.title() -}}{%- endfor -%}
{%- endmacro -%}
""",
    "trim": f"""\
{{%- macro trim(text) -%}}
    {{%- set left = namespace(text=(text | string).strip({_SHORT}), more=true) -%}}
    {{%- for round in range(left.text | length) -%}}
        {{%- if not left.more -%}}{{%- break -%}}{{%- endif -%}}
        {{%- set left.more = false -%}}
        {{%- for space in {_LIST} -%}}
            {{%- if left.text.startswith(space) -%}}
                {{%- set left.text = left.text[(space | length):].strip({_SHORT}) -%}}
                {{%- set left.more = true -%}}
            {{%- endif -%}}
            {{%- if left.text.endswith(space) -%}}
                {{%- set left.text = left.text[:(left.text | length) - (space | length)].strip({_SHORT}) -%}}
                {{%- set left.more = true -%}}
            {{%- endif -%}}
        {{%- endfor -%}}
    {{%- endfor -%}}
    {{{{- left.text -}}}}
{{%- endmacro -%}}
""",
    "dictsort": """\
{%- macro sort_pairs(mapping, pairs) -%}
    {%- for key in mapping -%}
        {%- set place = namespace(at=0) -%}
        {%- for pair in pairs -%}
            {%- if (pair[0] | lower) <= (key | lower) -%}{%- set place.at = place.at + 1 -%}{%- endif -%}
        {%- endfor -%}
        {%- set nothing = pairs.insert(place.at, [key, mapping[key]]) -%}
    {%- endfor -%}
{%- endmacro -%}
""",
}
_AS_THEY_ARE = "{#- The runtime hands over each tool as it is to a template that says tool.function. -#}\n"

_PATH = r"[A-Za-z_]\w*(?:\.\w+(?!\w*\()|\.get\('\w+'\)|\['\w+'\]|\[\w+\])*"
_QUOTED = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
_TAG = re.compile(rf"\{{#.*?#\}}|\{{([{{%])-?(?:{_QUOTED}|[^'\"])*?-?[}}%]\}}", re.DOTALL)
_FILTER = re.compile(r"\|\s*(\w+)")
_SORTED = re.compile(r"(\{%-?)(\s*for\s+\w+\s*,\s*\w+\s+in\s+)(.*?)\s*\|\s*dictsort\b(.*)", re.DOTALL)
_INSIDE = re.compile(rf"({_QUOTED})\s+(not\s+)?in\s+(\w+)(?![\w.\[(])")
_CONDITION = re.compile(r"\{%-?\s*(?:if|elif)\b")
_TRUTH = re.compile(rf"((?<!\bis )\b(?:if|and|or|not)\s+|\()({_PATH})(?=\s*(?:-?%\}}|\)|\band\b|\bor\b))")
_MACRO = re.compile(r"\{%-?\s*macro\s+\w+\s*\((.*)\)\s*(-?)%\}", re.DOTALL)
_END = re.compile(r"\{%(-?)\s*endmacro\b")
_OUTPUT = re.compile(r"(\{\{-?\s*)(\w+(?:\[[^\[\]]+\])*)(\s*-?\}\})")
_MEMBER = re.compile(r"(.+)\[('\w+')\]")
_GIVEN = {"bos_token", "eos_token"}
"""What the runtime always sets."""


def genai_template(published: str) -> str | None:
    """The template as GenAI has to have it; None for one that takes no tools, which it renders as it is."""
    if not re.search(r"\{%.*\btools\b.*%\}", published):
        return None
    number = count(1)
    macros = [text for name, text in _MACROS.items() if name in _FILTER.findall(published) or f"'{name}'" in published]
    whole = "".join(macros) + _without_lines_of_blocks(published)
    return _AS_THEY_ARE + _TAG.sub(lambda found: _rewritten(found[0], number), whole)


def _without_lines_of_blocks(template: str) -> str:
    """As jinja2 reads it with trim_blocks and lstrip_blocks, which transformers sets."""
    parts, at = [], 0
    for found in _TAG.finditer(template):
        between = template[at : found.start()]
        if found[0][:2] != "{{":
            between = re.sub(r"(\A|\n)[ \t]+\Z", r"\1", between) if at or found.start() else ""
        parts += [between, found[0]]
        at = found.end()
        if found[0][:2] != "{{" and template.startswith("\n", at):
            at += 1
    return "".join(parts) + template[at:].removesuffix("\n")


def _rewritten(tag: str, number: count[int]) -> str:
    if tag.startswith("{#"):
        return tag
    if found := _MACRO.fullmatch(tag):
        names = [part.partition("=")[0].strip() for part in found[1].split(",")]
        given = ", ".join(names)
        return f"{tag}{{% for {given} in [{given if len(names) == 1 else f'[{given}]'}] {found[2]}%}}"
    if found := _END.match(tag):
        return f"{{%{found[1]} endfor %}}{tag}"
    if _CONDITION.match(tag):
        tag = _TRUTH.sub(r"\1(\2 | length > 0 if \2 is mapping else \2)", tag)
    tag = _INSIDE.sub(_split, tag)
    if found := _SORTED.fullmatch(tag):
        begins, pairs, mapping, ends = found.groups()
        name = f"pairs_{next(number)}"
        return f"{begins} set {name} = [] -%}}{{{{- sort_pairs({mapping}, {name}) -}}}}{begins}{pairs}{name}{ends}"
    return _OUTPUT.sub(_with_none, tag)


def _split(found: re.Match[str]) -> str:
    """Whether a text is in a value: in another text, or among the keys or the entries of anything else."""
    quoted, negated, name = found.groups()
    inside = f"({name}.split({quoted}) | length > 1 if {name} is string else {quoted} in {name})"
    return f"(not {inside})" if negated else inside


def _with_none(found: re.Match[str]) -> str:
    begins, value, ends = found.groups()
    if value in _GIVEN or value[0].isdigit():
        return found[0]
    member = _MEMBER.fullmatch(value)
    nothing = f"('None' if {member[2]} in {member[1]} else '')" if member else "'None'"
    return f"{begins}{value} if {value} is not none else {nothing}{ends}"
