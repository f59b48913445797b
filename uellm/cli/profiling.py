"""What a request would take of a model, without a mesh."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uellm.core.errors import InvalidArgumentError
from uellm.core.request import LEVELS
from uellm.learning.store import load_predictor
from uellm.models.image_tokens import ImageCounter, ImageNeeds, read_image_counter
from uellm.models.prompt import Prompt, chat_prompt
from uellm.models.shapes import read_decoder_shape
from uellm.models.tokenizer import Tokenizer
from uellm.prediction.interface import GREEDY, PredictionRequest
from uellm.prediction.prior import Prior
from uellm.prediction.resources import build_profile


def profile(
    directory: Path,
    text: str,
    images: Sequence[Path],
    max_tokens: int,
    dtype: str,
    profiler: Path | None,
) -> dict[str, Any]:
    """The profile of one message of a user; see ``uellm.v1.ResourceProfile``.

    Raises:
        InvalidArgumentError: naming what is wrong with text, images or ``max_tokens``.
        ModelFilesError: naming what the model's files lack.
    """
    model = read_decoder_shape(directory, dtype)
    prompt = _prompt(directory, text, images)
    left = model.max_tokens - len(prompt.ids)
    if left < max(max_tokens, 1):
        raise InvalidArgumentError(
            f"prompt: {len(prompt.ids)} tokens, {prompt.image_tokens} of them of images, leave "
            f"{max(left, 0)} of the model's {model.max_tokens}: shorten it, or ask for less",
            field="prompt",
        )
    predictor = load_predictor(profiler) if profiler is not None else Prior()
    asked = PredictionRequest(
        "", GREEDY, len(prompt.ids), max_tokens or left, text=text if predictor.needs_text else ""
    )
    [prediction] = predictor.predict_batch([asked])
    made = build_profile(
        model,
        len(prompt.ids),
        prediction.lengths,
        max_tokens or left,
        predictor.name,
        predictor.version,
        image_tokens=prompt.image_tokens,
        image_flops=prompt.image_flops,
    )
    return {
        "prompt_tokens": made.prompt_tokens,
        "image_tokens": made.image_tokens,
        "output_tokens": dict(zip(map(str, LEVELS), made.output_tokens.values, strict=True)),
        "mean_output_tokens": made.output_tokens.mean,
        "bucket": made.bucket,
        "kv_bytes": made.kv_bytes,
        "flops": made.flops,
        "predictor": made.predictor,
        "predictor_version": made.predictor_version,
    }


def _prompt(directory: Path, text: str, images: Sequence[Path]) -> Prompt:
    tokenizer, counter = Tokenizer(directory), read_image_counter(directory)
    if counter is None and not tokenizer.has_chat_template and not images:
        return Prompt(tokenizer.encode(text, special=True))
    if counter is None and images:
        raise InvalidArgumentError(
            f"image: {directory} takes text only: leave the image out", field="image"
        )
    shown = _shown(images, counter) if counter is not None and images else []
    return chat_prompt([("user", [*shown, text])], tokenizer, counter)


def _shown(paths: Sequence[Path], counter: ImageCounter) -> list[ImageNeeds]:
    try:
        from uellm.models import images
    except ModuleNotFoundError as error:
        raise InvalidArgumentError(
            f"image: {error.name} is not installed; pip install 'uellm[gateway]' brings it",
            field="image",
        ) from error
    images.check_count(len(paths), "image")
    suffixes = {name.lower(): media_type for media_type, name in images.MEDIA_TYPES.items()}
    shown = []
    for path in paths:
        suffix = path.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
        size = images.read_image(_bytes_of(path), suffixes.get(suffix, suffix), f"image {path}")
        shown.append(counter.needs(size, f"image {path}"))
    return shown


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"image: {path}: {error.strerror}", field="image") from None
