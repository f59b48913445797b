"""Models that take images, as far as their configs say, and images to send them."""

import io
import json
from pathlib import Path
from typing import Any

import tokenizers
from PIL import Image

from tests.support.models import write_tiny_model_files

PLACEHOLDER = "<image>"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
_TEXT = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 400,
    "max_position_embeddings": 8192,
}
_TOWER = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": {**_TOWER, "image_size": 336, "patch_size": 14}},
    "gemma3": {"vision_config": {**_TOWER, "image_size": 896, "patch_size": 14}},
    "qwen2_vl": {"vision_config": {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "patch_size": 14}},
    "idefics3": {"vision_config": {**_TOWER, "image_size": 364, "patch_size": 14}},
    "smolvlm": {
        "vision_config": {**_TOWER, "image_size": 512, "patch_size": 16},
        "scale_factor": 4,
    },
}
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "llava": {"crop_size": {"height": 336, "width": 336}},
    "gemma3": {"size": {"height": 896, "width": 896}},
    "qwen2_vl": {"min_pixels": 3136, "max_pixels": 1003520, "patch_size": 14, "merge_size": 2},
    "idefics3": {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
    "smolvlm": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
}
_NAMES = {"llava": "image_token_index", "gemma3": "boi_token_index"}


def write_vision_model_files(directory: Path, kind: str = "llava") -> Path:
    """Config, processor and tokenizer of a model that takes images; no weights of use."""
    write_tiny_model_files(directory, chat_template=TEMPLATE)
    path = directory / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([PLACEHOLDER])
    tokenizer.save(str(path))
    config = {
        "model_type": kind,
        "architectures": ["SeesForConditionalGeneration"],
        "text_config": _TEXT,
        _NAMES.get(kind, "image_token_id"): tokenizer.token_to_id(PLACEHOLDER),
        **CONFIGS[kind],
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[kind]))
    return directory


def picture(width: int = 64, height: int = 48, form: str = "PNG") -> bytes:
    """An encoded image with something to see."""
    image = Image.radial_gradient("L").resize((width, height)).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()
