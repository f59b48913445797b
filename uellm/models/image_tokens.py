"""How many tokens of a prompt an image comes to, and what it costs to encode, by model.

Each rule is that of the model's own processor in transformers, from the numbers of its config.json
and preprocessor_config.json (or processor_config.json): nothing is decoded and no library of a
model's is run. Sizes in pixels, tokens as they enter the decoder.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uellm.core.errors import InvalidArgumentError, ModelFilesError
from uellm.models.files import CONFIG, read_json

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
MOST_ASPECT = 200
"""Of models that keep an image's shape: the longer side over the shorter."""
_LONGEST_SIDE = 4096

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ImageNeeds:
    """What one image takes.

    Attributes:
        tokens: of the prompt.
        flops: of its encoder, the projection to the decoder's width aside.
    """

    tokens: int
    flops: float


@dataclass(frozen=True, slots=True)
class _Grid:
    """An image as its encoder sees it: so many passes over so many patches, for so many tokens."""

    tokens: int
    patches: int
    passes: int = 1


@dataclass(frozen=True, slots=True)
class ImageCounter:
    """Counts for one model.

    Attributes:
        placeholder: the token that its chat template writes in the place of an image.
    """

    placeholder: int
    _rule: Callable[[ImageSize], _Grid]
    _vision: Config

    def needs(self, size: ImageSize, field: str) -> ImageNeeds:
        """What an image takes.

        Raises:
            InvalidArgumentError: naming ``field``, if the model takes no image of that shape.
        """
        long, short = max(size.width, size.height), min(size.width, size.height)
        if long > MOST_ASPECT * short:
            raise InvalidArgumentError(
                f"{field}: {size.width} x {size.height} pixels; one side is at most {MOST_ASPECT} "
                "times the other: crop it",
                field=field,
                reason="INVALID_IMAGE",
            )
        grid = self._rule(size)
        return ImageNeeds(grid.tokens, grid.passes * _encoder_flops(self._vision, grid.patches))


def expanded(ids: list[int], placeholder: int, counts: list[int]) -> list[int]:
    """A prompt's tokens with as many placeholders for each image as it has tokens.

    Raises:
        InvalidArgumentError: if the chat template did not place every image.
    """
    found = ids.count(placeholder)
    if found != len(counts):
        raise InvalidArgumentError(
            f"chat: the model's chat template places {found} images, and {len(counts)} came; put "
            "them into messages of the user",
            field="chat.messages",
            reason="CHAT_TEMPLATE",
        )
    remaining = iter(counts)
    return [
        each
        for token in ids
        for each in ([token] * next(remaining) if token == placeholder else [token])
    ]


def read_image_counter(directory: Path) -> ImageCounter | None:
    """How a checkpoint counts images; None: it takes none.

    Raises:
        ModelFilesError: if it takes images in a way that is not known, or its files lack something.
    """
    config = read_json(directory / CONFIG, "name a directory that holds a model")
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        return None
    kind = str(config.get("model_type"))
    if kind not in _RULES:
        raise ModelFilesError(
            f"{directory / CONFIG}: images of model_type {kind!r} cannot be counted; known are "
            f"{', '.join(sorted(_RULES))}"
        )
    make, name, placeholder = _RULES[kind]
    try:
        rule = make(config, _processor(directory))
        return ImageCounter(int(config.get(name, placeholder)), rule, vision)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelFilesError(
            f"{directory}: {PREPROCESSOR} and {CONFIG} do not say how images are cut ({error!r}); "
            "download them again"
        ) from None


def _processor(directory: Path) -> dict[str, Any]:
    """The image processor's settings, whichever file they are in; {}: all are its defaults."""
    found: dict[str, Any] = {}
    for name in (PREPROCESSOR, PROCESSOR):
        path = directory / name
        if path.is_file():
            content = read_json(path, "")
            found = {**content, **content.get("image_processor", {}), **found}
    return found


def _llava(config: Config, processor: Config) -> Callable[[ImageSize], _Grid]:
    """CLIP's patches of one square crop; of its class token no features are taken."""
    vision = config["vision_config"]
    crop = processor.get(
        "crop_size", {"height": vision["image_size"], "width": vision["image_size"]}
    )
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    patch = processor.get("patch_size") or vision["patch_size"]
    patches = (crop["height"] // patch) * (crop["width"] // patch)
    full = config.get("vision_feature_select_strategy", "default") == "full"
    return lambda size: _Grid(patches + full, patches + 1)


def _gemma3(config: Config, processor: Config) -> Callable[[ImageSize], _Grid]:
    """A fixed number whatever the size, between two marks and two empty lines."""
    tokens = processor.get("image_seq_length") or config.get("mm_tokens_per_image", 256)
    vision = config["vision_config"]
    patches = (vision.get("image_size", 896) // vision.get("patch_size", 14)) ** 2
    return lambda size: _Grid(tokens + 4, patches)


def _qwen(config: Config, processor: Config) -> Callable[[ImageSize], _Grid]:
    """As many patches as the shape and the limits of pixels allow, some of which are merged."""
    vision = config["vision_config"]
    patch = processor.get("patch_size") or vision.get("patch_size", 14)
    merge = processor.get("merge_size") or vision.get("spatial_merge_size", 2)
    size = processor.get("size") or {}
    least = processor.get("min_pixels") or size["shortest_edge"]
    most = processor.get("max_pixels") or size["longest_edge"]

    def rule(size: ImageSize) -> _Grid:
        height, width = smart_resize(size, patch * merge, least, most)
        patches = (height // patch) * (width // patch)
        return _Grid(patches // merge**2, patches)

    return rule


def smart_resize(size: ImageSize, factor: int, least: int, most: int) -> tuple[int, int]:
    """Height and width in multiples of ``factor`` with ``least`` to ``most`` pixels (Qwen2-VL)."""
    height, width = (round(side / factor) * factor for side in (size.height, size.width))
    if height * width > most:
        shrink = math.sqrt(size.height * size.width / most)
        return (
            max(factor, math.floor(size.height / shrink / factor) * factor),
            max(factor, math.floor(size.width / shrink / factor) * factor),
        )
    if height * width < least:
        stretch = math.sqrt(least / (size.height * size.width))
        return (
            math.ceil(size.height * stretch / factor) * factor,
            math.ceil(size.width * stretch / factor) * factor,
        )
    return height, width


def _idefics3(config: Config, processor: Config) -> Callable[[ImageSize], _Grid]:
    """The whole image in small, and if it is larger than that, its tiles row by row, with marks."""
    vision = config["vision_config"]
    tile = processor.get("max_image_size", {}).get("longest_edge") or vision.get("image_size", 364)
    longest = processor.get("size", {}).get("longest_edge", 4 * tile)
    split = processor.get("do_image_splitting", True)
    patches = (tile // vision["patch_size"]) ** 2
    tokens = processor.get("image_seq_len") or patches // config.get("scale_factor", 2) ** 2

    def rule(size: ImageSize) -> _Grid:
        rows, columns = tiles(size, tile, longest) if split else (0, 0)
        # Of each tile a mark and its place, of each row its end; three marks about the whole.
        marked = tokens + 3 + rows * (columns * (tokens + 2) + 1)
        return _Grid(marked, patches, rows * columns + 1)

    return rule


def tiles(size: ImageSize, tile: int, longest: int) -> tuple[int, int]:
    """Rows and columns that an image is cut into; none if one tile holds all of it (Idefics3)."""
    long, short = max(size.width, size.height), min(size.width, size.height)
    # Scaled to the longest side that is wanted, the other one even, and within what is possible.
    other = int(longest / (long / short))
    other += other % 2
    if longest > _LONGEST_SIDE:
        longest, other = _LONGEST_SIDE, int(_LONGEST_SIDE / (longest / max(other, 1)))
    many, few = math.ceil(longest / tile), math.ceil(max(other, 1) / tile)
    if many == few == 1:
        return 0, 0
    return (few, many) if size.width >= size.height else (many, few)


_RULES: Mapping[str, tuple[Callable[[Config, Config], Callable[[ImageSize], _Grid]], str, int]] = {
    "llava": (_llava, "image_token_index", 32000),
    "gemma3": (_gemma3, "boi_token_index", 255_999),
    "qwen2_vl": (_qwen, "image_token_id", 151_655),
    "qwen2_5_vl": (_qwen, "image_token_id", 151_655),
    "qwen3_vl": (_qwen, "image_token_id", 151_655),
    "idefics3": (_idefics3, "image_token_id", 128_257),
    "smolvlm": (_idefics3, "image_token_id", 128_257),
}
"""By model_type: the rule, where config.json names its placeholder, and which it is else."""


def _encoder_flops(vision: Config, patches: int) -> float:
    """Work of a vision transformer over its patches: two for every weight, and attention."""
    layers = vision.get("num_hidden_layers") or vision.get("depth", 0)
    width = vision.get("embed_dim") or vision.get("hidden_size", 0)
    inner = vision.get("intermediate_size") or int(vision.get("mlp_ratio", 4) * width)
    weights = 4 * width * width + 2 * width * inner
    return float(layers * (2 * patches * weights + 4 * patches * patches * width))
