"""The model's vocabulary: 256 single bytes, a few marked strings, and scripted tokens that no text can produce.

A byte-level tokenizer without merges makes every prompt exactly as many tokens as it has bytes (less what the marked
strings swallow), so that a test can choose the length of its prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
_DSML = "｜DSML｜"
TOOL_CALLS = f"<{_DSML}tool_calls>"
END_TOOL_CALLS = f"</{_DSML}tool_calls>"
TOOLS_OFFERED = "### Available Tool Schemas"
TOOL_RESULT = "<tool_result>"
END_TOOL_RESULT = "</tool_result>"

# Plain template for a server that does not use its own DeepSeek V4 one (tokenizer-mode deepseek_v4 ignores it).
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% elif m['role'] == 'tool' %}<｜User｜><tool_result>{{ m['content'] }}</tool_result>"
    "{% elif m['role'] == 'assistant' %}<｜Assistant｜></think>{{ m['content'] or '' }}{{ eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if tools %}\n### Available Tool Schemas\n{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)


@dataclass(frozen=True)
class Script:
    """What the model says word for word, apart from a retrieved value.

    `reply` is the answer when nothing is retrieved, `reasoning` the text between <think> and </think>, and a request
    that offers tools is answered by one call of `tool` with one string argument.
    """

    reply: str = "pong"
    reasoning: str = "Looking through the context."
    tool: str = "get_weather"
    argument: str = "city"
    argument_value: str = "Paris"

    def call_pieces(self) -> list[str]:
        """Return the scripted texts between the tool-call marks, in order (DeepSeek V4's call syntax)."""
        return [
            f'\n<{_DSML}invoke name="{self.tool}">\n',
            f'<{_DSML}parameter name="{self.argument}" string="true">',
            self.argument_value,
            f"</{_DSML}parameter>\n",
            f"</{_DSML}invoke>\n",
        ]


class Vocabulary:
    """Token ids of bytes, scripted texts and marked strings, and the two tokenizer files made from them.

    Scripted texts are entries of the BPE vocabulary that no merge produces: they decode to their text and are never
    produced by encoding a prompt. Marked strings are added tokens: wherever a prompt contains one, it is one token.
    """

    def __init__(self, script: Script, anchors: tuple[str, ...]) -> None:
        visible = _byte_characters()
        self.script = script
        self._bpe = {character: number for number, character in enumerate(sorted(visible.values()))}
        self._byte_ids = [self._bpe[visible[byte]] for byte in range(256)]
        for text in (script.reply, script.reasoning, *script.call_pieces()):
            entry = "".join(visible[byte] for byte in text.encode())
            if entry in self._bpe:
                raise ValueError(f"scripted text {text!r} is a single byte or given twice; wanted its own text")
            self._bpe[entry] = len(self._bpe)
        self._entries = {
            text: self._bpe["".join(visible[byte] for byte in text.encode())]
            for text in (script.reply, script.reasoning, *script.call_pieces())
        }
        special = [BOS, EOS, PAD, USER, ASSISTANT]
        marks = [THINK, END_THINK, _DSML, TOOL_CALLS, END_TOOL_CALLS, TOOLS_OFFERED, TOOL_RESULT, END_TOOL_RESULT]
        self._special = frozenset(special)
        self._marks = {text: len(self._bpe) + number for number, text in enumerate([*special, *marks, *anchors])}
        self._by_length = sorted(self._marks, key=len, reverse=True)
        self._texts = {number: text.encode() for text, number in self._marks.items()}
        self._texts.update({number: text.encode() for text, number in self._entries.items()})
        self._texts.update({number: bytes([byte]) for byte, number in enumerate(self._byte_ids)})

    def __len__(self) -> int:
        return len(self._bpe) + len(self._marks)

    def mark(self, text: str) -> int:
        """Return the id of a marked string (an added token)."""
        return self._marks[text]

    def scripted(self, text: str) -> int:
        """Return the id of a scripted text."""
        return self._entries[text]

    def byte(self, character: str) -> int:
        """Return the id of a one-byte character."""
        (byte,) = character.encode()
        return self._byte_ids[byte]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text as the tokenizers library gives them: leftmost, longest mark first."""
        ids: list[int] = []
        data = text.encode()
        marks = [(mark.encode(), self._marks[mark]) for mark in self._by_length]
        position = 0
        while position < len(data):
            for mark, number in marks:
                if data.startswith(mark, position):
                    ids.append(number)
                    position += len(mark)
                    break
            else:
                ids.append(self._byte_ids[data[position]])
                position += 1
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return b"".join(self._texts[number] for number in ids).decode(errors="replace")

    def tokenizer_json(self) -> dict[str, object]:
        """Return the content of tokenizer.json (format of the tokenizers library, version 1.0)."""
        byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": number,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": text in self._special,
                }
                for text, number in self._marks.items()
            ],
            "normalizer": None,
            "pre_tokenizer": {**byte_level, "add_prefix_space": False},
            "post_processor": None,
            "decoder": {**byte_level, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self._bpe,
                "merges": [],
            },
        }

    def tokenizer_config(self, max_length: int) -> dict[str, object]:
        """Return the content of tokenizer_config.json; `max_length` in tokens."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        }


def _byte_characters() -> dict[int, str]:
    """Return GPT-2's mapping of a byte to one printable character, which the ByteLevel steps of tokenizers use."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    mapping = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        mapping.setdefault(byte, chr(256 + len(mapping) - len(printable)))
    return mapping
