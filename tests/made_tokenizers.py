"""Small tokenizers of every kind, trained on a few lines, and chat templates in the shapes of known families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

LINES = [
    "Question: where does Ada live?\nAnswer: In Marrowick.",
    "Say yes no Yes No Hi Hello. [INST] hi [/INST] <|user|> hello there",
    "Paris is nice 12 + 13 = 25 é 🦦 Größe",
] * 5
MARKS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
NAMES: dict[str, str] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(*, across: bool = False, trim: bool = False) -> Any:
    """As GPT-2's; `across` lets tokens reach over white space, `trim` leaves spaces out of offsets (RoBERTa)."""
    whole: Any = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across)
    whole.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    whole.train_from_iterator(LINES, trainer)
    whole.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(tokenizer_object=whole, **NAMES)


def metaspace(scheme: str | None) -> Any:
    """As Llama 2's and Mistral's: a space belongs to the word behind it; texts begin with one (None: by the normaliser)."""
    whole: Any = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if scheme is None:
        whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        whole.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training alone: words
    else:
        whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    marks = [*MARKS, *(f"<0x{n:02X}>" for n in range(256))]
    whole.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=500, special_tokens=marks, show_progress=False))
    if scheme is None:
        whole.pre_tokenizer = None
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=whole, **NAMES)


def word_piece() -> Any:
    """As BERT's: lower case, white space is lost, [CLS] before and [SEP] behind; no BOS and no EOS."""
    whole: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    whole.normalizer = normalizers.BertNormalizer()
    whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=marks, show_progress=False)
    whole.train_from_iterator(LINES, trainer)
    whole.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    whole.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )


class Slow(PreTrainedTokenizer):
    """Without a library behind it, so without offsets: the longest piece first, spaces belong to the word behind them."""

    def __init__(self, **options: Any) -> None:
        letters = sorted({letter for line in LINES for letter in line.replace(" ", "▁")} | set("▁_fg"))
        pieces = ["▁yes", "▁no", "▁Hi", "▁Answer", ":▁", "▁In", "Marr", "\n\n"]
        self.places = {piece: n for n, piece in enumerate([*MARKS, *pieces, *letters])}
        super().__init__(**{**NAMES, **options})

    @property
    def vocab_size(self) -> int:
        return len(self.places)

    def get_vocab(self) -> dict[str, int]:
        return {**self.places, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        text, found = text.replace(" ", "▁"), list[str]()
        while text:
            piece = max((piece for piece in self.places if text.startswith(piece)), key=len, default=text[0])
            found.append(piece)
            text = text[len(piece) :]
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.places.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.places)[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("▁", " ")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [1, *token_ids_0]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        (Path(save_directory) / "vocab.txt").write_text("\n".join(self.places))
        return ("vocab.txt",)


KINDS: dict[str, Any] = {
    "byte level": byte_level,
    "byte level, across words": lambda: byte_level(across=True),
    "byte level, trimmed offsets": lambda: byte_level(trim=True),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, never": lambda: metaspace("never"),
    "prepended by the normaliser": lambda: metaspace(None),
    "word piece": word_piece,
    "slow": Slow,
}

_ROLE = "'<|im_start|>' + m.role + '\\n'"
_CHATML = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

TEMPLATES: dict[str, str] = {
    "llama-2": (
        "{% set first = messages[0] %}{% set system = first.content if first.role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "{% set said = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content if loop.first and system else m.content %}"
        "{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n\\n' + m.content | trim + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
    ),
    "chatml": "{% for m in messages %}{{ " + _ROLE + " + m.content + '<|im_end|>\\n' }}{% endfor %}" + _CHATML,
    "qwen-3": (  # an empty thought before the last answer, none before earlier ones
        "{% for m in messages %}{{ " + _ROLE + " }}{% if m.role == 'assistant' %}"
        "{% set thought, said = m.reasoning_content or '', m.content %}{% if '</think>' in said %}"
        "{% set thought = said.split('</think>')[0].split('<think>')[-1] %}{% set said = said.split('</think>')[-1] %}"
        "{% endif %}{% if loop.last %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}"
        "{{ said.lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + _CHATML
    ),
    "deepseek-r1": (  # a thought is begun, and left out of what is given
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<Assistant>' + m.content.split('</think>')[-1] + eos_token }}"
        "{% else %}{{ ('<User>' if m.role == 'user' else '') + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "phi-3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "marked": (  # what the assistant says is marked, the newline behind it is not
        "{% for m in messages %}{{ " + _ROLE + " }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}" + _CHATML
    ),
    "parts": (  # contents in parts alone
        "{% for m in messages %}{{ "
        + _ROLE
        + " }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + _CHATML
    ),
    "tools": (
        "{% if tools %}{{ 'Tools: ' + tools | tojson + '\\n' }}{% endif %}{% for m in messages %}{{ " + _ROLE + " }}"
        "{% if m.tool_calls %}{% for call in m.tool_calls %}"
        "{{ call.function.name + '(' + call.function.arguments | tojson + ')' }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + _CHATML
    ),
}
"""In the shapes of what these families ship, shorter."""


def talking(template: str, tokenizer: Any = None) -> Any:
    """A tokenizer with one of the templates."""
    tokenizer = tokenizer or metaspace("first")
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer
