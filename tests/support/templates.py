"""Chat templates that follow the rules of well-known models, as far as they matter to a conversation that grows: which
token ends an answer, what happens to the thinking of earlier ones, where tools and tool results stand. Written from
those rules for small tokenizers; none is a model's own file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """template: Jinja.  stops: tokens that may end an answer.  specials: other tokens of one id."""

    template: str
    stops: tuple[str, ...]
    specials: tuple[str, ...] = ()


# A system message is put in front where there is none; each turn ends with <|im_end|> and a line.
SMOLLM2 = Family(
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_end|>",),
    ("<|im_start|>",),
)

# Thinking stays in answers behind the last question, and is dropped from earlier ones; the last answer always has a
# block of it. Results of tools that follow one another share one user turn.
QWEN3 = Family(
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- if tools %}{{- '<|im_start|>system\n<tools>' + (tools | tojson) + '</tools><|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set thought, said = '', m.content %}"
    "{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{%- elif '</think>' in m.content %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- said }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}",
    ("<|im_end|>",),
    ("<|im_start|>",),
)

# An answer has no end of its own: the next role's token is what the policy stops at. Earlier thinking is emptied.
GLM45 = Family(
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{- '[gMASK]<sop>' }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set thought, said = '', m.content %}"
    "{%- if '</think>' in m.content %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{%- set said = m.content.split('</think>')[-1].strip() %}{%- endif %}"
    "{{- '<|assistant|>\n<think>' }}{% if loop.index0 > ns.last %}{{- thought }}{% endif %}{{- '</think>' }}"
    "{%- if said %}{{- '\n' + said }}{% endif %}"
    "{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>' + call.function.name }}"
    "{%- for name, value in call.function.arguments.items() %}"
    "{{- '\n<arg_key>' + name + '</arg_key>\n<arg_value>' + (value | string) + '</arg_value>' }}{%- endfor %}"
    "{{- '\n</tool_call>' }}{%- endfor %}"
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}",
    ("<|user|>", "<|observation|>"),
    ("<|assistant|>", "<|system|>"),
)

# Arguments of a tool are JSON text; results of tools are one block, behind which the assistant goes on without a role.
DEEPSEEK_V3 = Family(
    "{%- set ns = namespace(system='', after_tool=false) %}"
    "{%- for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endif %}{% endfor %}"
    "{{- '<s>' + ns.system }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{% set ns.after_tool = false %}{{- '<User>' + m.content + '<Assistant>' }}"
    "{%- elif m.role == 'assistant' %}{{- m.content }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '<call>' + call.function.name + '\n' + call.function.arguments + '</call>' }}{%- endfor %}{{- '</s>' }}"
    "{%- elif m.role == 'tool' %}{% set ns.after_tool = true %}{{- '<output>' + m.content + '</output>' }}{%- endif %}"
    "{%- endfor %}",
    ("</s>",),
    ("<s>", "<User>", "<Assistant>", "<call>", "</call>", "<output>", "</output>"),
)

# Each message has its role before a middle token and ends with <|im_end|>, without a line; results name their call.
KIMI_K2 = Family(
    "{%- if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}"
    "{%- for m in messages %}"
    "{%- set who = 'assistant' if m.role == 'assistant' else ('user' if m.role == 'user' else 'system') %}"
    "{{- '<|im_' + who + '|>' + m.role + '<|im_middle|>' }}"
    "{%- if m.role == 'tool' %}{{- '## Return of ' + m.tool_call_id + '\n' }}{% endif %}{{- m.content }}"
    "{%- for call in m.tool_calls or [] %}{{- '<|call|>' + call.id + (call.function.arguments | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{%- endif %}",
    ("<|im_end|>",),
    ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|call|>"),
)

# An answer ends with <|return|>, and with <|end|> once something follows; a tool call ends with <|call|>. Analysis
# stays until a final answer has been given.
GPT_OSS = Family(
    "{%- set ns = namespace(tool='') %}"
    "{{- '<|start|>system<|message|>You are a model.<|end|>' }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- if '<|channel|>' in m.content %}{{ raise_exception('put analysis in thinking') }}{% endif %}"
    "{%- if m.tool_calls %}{% set ns.tool = m.tool_calls[0].function.name %}"
    "{%- if m.thinking %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{{- '<|start|>assistant to=functions.' + ns.tool + '<|channel|>commentary json<|message|>' }}"
    "{{- (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}"
    "{%- elif loop.last and not add_generation_prompt %}"
    "{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif %}"
    "{%- elif m.role == 'tool' %}"
    "{%- if not ns.tool %}{{ raise_exception('a tool message without a tool call before it') }}{% endif %}"
    "{{- '<|start|>functions.' + ns.tool + ' to=assistant<|channel|>commentary<|message|>' + m.content + '<|end|>' }}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}",
    ("<|return|>", "<|call|>"),
    ("<|start|>", "<|end|>", "<|channel|>", "<|message|>"),
)

# Tools stand before the last question, wherever that is.
TOOLS_LAST = Family(
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}"
    "{%- if loop.index0 == ns.last and tools %}{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{% endif %}"
    "{%- if m.role == 'assistant' %}{{- m.content + '</s>' }}"
    "{% else %}{{- '[INST]' + m.content + '[/INST]' }}{% endif %}"
    "{%- endfor %}",
    ("</s>",),
    ("[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]"),
)

FAMILIES = {
    "qwen3": QWEN3,
    "glm-4.5": GLM45,
    "deepseek-v3": DEEPSEEK_V3,
    "kimi-k2": KIMI_K2,
    "gpt-oss": GPT_OSS,
    "smollm2": SMOLLM2,
    "tools-last": TOOLS_LAST,
}


def tokenizer_of(family: Family, directory: Path) -> PreTrainedTokenizerFast:
    """One of bytes with a few merges, so that a text may be cut in several ways, and this template."""
    specials = ["<|pad|>", *family.stops, *family.specials]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["an", "sw", "answ", "er", "12", "34"]
    vocab = {token: i for i, token in enumerate([*specials, *symbols, *merged])}
    merges = [("a", "n"), ("s", "w"), ("an", "sw"), ("e", "r"), ("1", "2"), ("3", "4")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    file = directory / "tokenizer.json"
    tokenizer.save(str(file))
    made = PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)
    made.chat_template = family.template
    return made
