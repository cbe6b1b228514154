"""Small real tokenizers, trained in a moment on a few lines, and chat templates in the manner of well-known
models.
"""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pensieve.text import ChatText

LINES = [
    "The quick brown fox jumps over the lazy dog. user assistant system tool",
    "Hello there, how are you today? I am fine, thank you very much.",
    "def f(x):\n    return x + 1\n\nYou are a helpful assistant.\n",
    "Größe, naïve, Ελληνικά, Русский язык, 日本語の文章, 中文句子, 한국어",
    "what is the capital of France and why is it Paris? think think about it",
]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]
SPECIAL += [
    "<|eom_id|>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
]
MARKUP = ["<think>", "</think>", "<tool_response>", "</tool_response>", "<tool_call>", "</tool_call>"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor "
    "%}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# The system prompt goes into the first user message; a system message anywhere else is refused.
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% "
    "set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message.role == 'user' %}[INST] {{ (system if loop.first else '') + "
    "message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)

# As MISTRAL, but the system prompt goes into the *newest* user message.
MOVING_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% "
    "set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message.role == 'user' %}[INST] {{ (system if loop.last else '') + "
    "message.content }} [/INST]"
    "{% else %} {{ message.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)

# In the manner of Hermes and Qwen: tools behind the system prompt, the answers of several tools in one user's
# message.
HERMES = (
    "{% set head = messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' %}"
    "<|im_start|>system\n{{ head }}{% if tools %}\n\n# Tools\n<tools>{% for tool in tools %}\n{{ tool | "
    "tojson }}{% endfor %}\n</tools>\n"
    "Call them within <tool_call></tool_call>.{% endif %}<|im_end|>\n"
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif message.role != 'system' %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}{% if message.content or not loop.first %}\n{% endif %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# In the manner of Llama 3.1: tools in the first user's message, one call an answer, which has no other words
# and a closing token of its own.
LLAMA31 = (
    "{{ bos_token }}{% set ns = namespace(told=false) %}{% for message in messages %}"
    "<|start_header_id|>{{ 'ipython' if message.role == 'tool' else message.role }}<|end_header_id|>\n\n"
    "{% if message.tool_calls %}{% if message.tool_calls | length != 1 %}{{ raise_exception('one call at a "
    "time') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eom_id|>'
    "{% else %}{% if message.role == 'user' and tools and not ns.told %}{% set ns.told = true %}"
    'Answer with {"name": function, "parameters": object}.\n\n{% for tool in tools %}{{ tool | tojson(indent=2) }}\n\n{% endfor %}{% endif %}'
    "{{ (message.content | tojson) if message.role == 'tool' else (message.content | trim) }}<|eot_id|>{% "
    "endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# In the manner of Mistral's third tokenizer: tools before the newest user's message, ids of nine letters.
MISTRAL_TOOLS = (
    "{{ bos_token }}{% set ns = namespace(last=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif "
    "%}{% endfor %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% "
    "endif %}"
    "[INST] {{ message.content }}[/INST]"
    "{% elif message.tool_calls %}[TOOL_CALLS] [{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have 9 letters') }}{% endif %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    "{{ ', ' if not loop.last else '' }}{% endfor %}]{{ eos_token }}"
    "{% elif message.role == 'tool' %}[TOOL_RESULTS] {{ {'content': message.content, 'call_id': "
    "message.tool_call_id} | tojson }}[/TOOL_RESULTS]"
    "{% else %} {{ message.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)

# In the manner of Mistral's newer ones: tools once, at the beginning, and a function's name as plain text.
MISTRAL_ARGS = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}[INST]{{ message.content }}[/INST]"
    "{% elif message.role == 'tool' %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]"
    "{% else %}{{ message.content }}{% for call in message.tool_calls %}"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}{{ "
    "eos_token }}{% endif %}{% endfor %}"
)

# Thinking stays only in answers after the last question.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = "
    "loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.tool_calls %}<tool_call>\n{{ message.tool_calls[0].function | tojson }}\n</tool_call>{% "
    "endif %}"
    "{% if message.role == 'tool' %}<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% elif message.role == 'assistant' and '</think>' in message.content %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ "
    "message.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ message.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

DATED = "<|im_start|>system\nToday is {{ today }}.<|im_end|>\n" + CHATML

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)


@functools.cache
def byte_level() -> Tokenizer:
    """In the manner of GPT-2, Llama 3 and Qwen: BPE over bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    _add(tokenizer)
    return tokenizer


@functools.cache
def byte_fallback(legacy: bool = False) -> Tokenizer:
    """In the manner of Llama 2 and Mistral: BPE over characters with bytes for the rest, spaces written as ▁.

    `legacy` puts the leading space with a normalizer, as the older files do.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=names, show_progress=False)
    trained.train_from_iterator(LINES[:3], trainer)  # leaves the other scripts to the bytes
    import json

    spec = json.loads(trained.to_str())
    spec["added_tokens"] = [
        token for token in spec["added_tokens"] if token["content"] in ("<unk>", "<s>", "</s>")
    ]
    spec["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if legacy:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add(tokenizer)
    return tokenizer


def _add(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])


def chat(template: str | None, backend: Tokenizer | None = None, **options: object) -> ChatText:
    return ChatText(hugging_face(template, backend), options)


def hugging_face(template: str | None, backend: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """The object that a model's folder would load as."""
    eos = (
        "<|im_end|>"
        if template and "im_end" in template
        else "<|eot_id|>"
        if template and "eot_id" in template
        else "</s>"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend or byte_level(),
        bos_token="<|begin_of_text|>" if eos == "<|eot_id|>" else "<s>",
        eos_token=eos,
    )
    tokenizer.chat_template = template
    return tokenizer
