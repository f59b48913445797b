"""A tiny model's files, made on the spot: for what needs a tokenizer and no sense."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tests.support.checkpoints import write_checkpoint
from uellm.models.tokenizer import Tokenizer

BOS, EOS, USER, ASSISTANT = "<s>", "</s>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "count from one to twenty and tell a story of three sentences",
    "naïve café 你好 世界 🙂 the end",
] * 4


def _tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def write_tiny_model_files(
    directory: Path, *, max_tokens: int = 512, chat_template: str = CHAT_TEMPLATE
) -> Path:
    """Write a tiny Llama, byte-level tokenizer, weights of zeros; returns ``directory``."""
    tokenizer = _tokenizer()
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    write_checkpoint(
        directory,
        hidden=64,
        vocab=tokenizer.get_vocab_size(),
        tied=True,
        max_position_embeddings=max_tokens,
        head_dim=16,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        torch_dtype="float32",
        bos_token_id=bos,
        eos_token_id=eos,
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    contents = {
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": [eos]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": {"content": EOS, "special": True},
            "model_max_length": max_tokens,
            "chat_template": chat_template,
        },
    }
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=2))
    return directory


def tiny_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a tiny model written into ``directory``."""
    return Tokenizer(write_tiny_model_files(directory))
