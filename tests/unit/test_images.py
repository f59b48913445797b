"""Images of requests: what is taken, and how many tokens of a model they come to."""

import json
import re
import struct
import zlib
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.support.vision import CONFIGS, PREPROCESSORS, picture, write_vision_model_files
from uellm.cli.app import app
from uellm.core.errors import InvalidArgumentError, ModelFilesError
from uellm.models.image_tokens import MOST_ASPECT, ImageSize, expanded, read_image_counter
from uellm.models.images import MOST_BYTES, MOST_IMAGES, check_count, read_image
from uellm.models.shapes import SHAPES, decoder_config, read_decoder_shape

FIELD = "chat.messages[0].content[1].image"
SIDES = st.integers(1, 5000)


def claiming(width: int, height: int) -> bytes:
    """A PNG of some bytes that says it is large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_the_size_of_each_format(form: str) -> None:
    found = read_image(picture(64, 48, form), f"image/{form.lower()}", FIELD)
    assert found == ImageSize(64, 48)


@pytest.mark.parametrize(
    ("data", "media_type", "part", "said"),
    [
        (picture(), "image/tiff", "media_type", "none of image/png, image/jpeg"),
        (picture(), "", "media_type", "none of image/png"),
        (b"", "image/png", "data", "empty"),
        (b"https://example.org/cat.png", "image/png", "data", "a URL; nothing is fetched"),
        (b"data:image/png;base64,iVBOR", "image/png", "data", "a URL; nothing is fetched"),
        (b"iVBORw0KGgoAAAANSUhEUg==", "image/png", "data", "base64 text"),
        (b"/9j/4AAQSkZJRg==", "image/jpeg", "data", "base64 text"),
        (b"no image", "image/png", "data", "no image that is one of"),
        (b"%PDF-1.7", "image/png", "data", "no image that is one of"),
        (picture(form="JPEG"), "image/png", "data", "it is JPEG, and media_type says PNG"),
        (picture(form="BMP"), "image/png", "data", "no image that is one of PNG, JPEG"),
        (picture(300, 300)[:-400], "image/png", "data", "damaged or cut short"),
        (picture(300, 300, "JPEG")[:-800], "image/jpeg", "data", "damaged or cut short"),
        (picture(300, 300, "WEBP")[:-99], "image/webp", "data", "damaged"),
        (picture()[:20], "image/png", "data", "damaged"),
        (bytes(MOST_BYTES + 1), "image/png", "data", f"at most {MOST_BYTES}"),
        (claiming(60_000, 60_000), "image/png", "data", "60000 x 60000 pixels; at most 40000000"),
        (claiming(2**31 - 1, 1), "image/png", "data", "pixels; at most"),
    ],
)
def test_what_is_no_image_is_refused_by_field_and_limit(
    data: bytes, media_type: str, part: str, said: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read_image(data, media_type, FIELD)
    assert caught.value.field == f"{FIELD}.{part}"
    assert said in caught.value.message


@settings(max_examples=50)
@given(st.binary(max_size=200), st.integers(0, 200))
def test_damage_is_an_error_of_ours_or_none(noise: bytes, place: int) -> None:
    whole = picture(40, 40)
    data = whole[:place] + noise + whole[place + len(noise) :]
    try:
        size = read_image(data, "image/png", FIELD)
    except InvalidArgumentError as error:
        assert error.field == f"{FIELD}.data"
    else:
        assert size.width * size.height > 0


def test_too_many_images_are_refused() -> None:
    check_count(MOST_IMAGES, "chat.messages")
    with pytest.raises(InvalidArgumentError, match=f"at most {MOST_IMAGES}"):
        check_count(MOST_IMAGES + 1, "chat.messages")


def oracle(kind: str) -> Any:
    """What transformers' own processor says, without the tokenizer that it does not need."""
    from transformers.models.clip.image_processing_pil_clip import (  # noqa: PLC0415
        CLIPImageProcessorPil,
    )
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor  # noqa: PLC0415
    from transformers.models.idefics3.image_processing_pil_idefics3 import (  # noqa: PLC0415
        Idefics3ImageProcessorPil,
    )
    from transformers.models.idefics3.processing_idefics3 import (  # noqa: PLC0415
        Idefics3Processor,
    )
    from transformers.models.llava.processing_llava import LlavaProcessor  # noqa: PLC0415
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (  # noqa: PLC0415
        Qwen2VLImageProcessorPil,
    )
    from transformers.models.qwen2_vl.processing_qwen2_vl import (  # noqa: PLC0415
        Qwen2VLProcessor,
    )
    from transformers.models.smolvlm.image_processing_pil_smolvlm import (  # noqa: PLC0415
        SmolVLMImageProcessorPil,
    )
    from transformers.models.smolvlm.processing_smolvlm import (  # noqa: PLC0415
        get_image_prompt_string,
    )

    if kind == "smolvlm":
        cutter = SmolVLMImageProcessorPil(**PREPROCESSORS[kind])

        def written(size: ImageSize) -> int:
            """Of its tokenizer, marks are one token, and so are two line ends in a row."""
            _, rows, columns = cutter.get_number_of_image_patches(size.height, size.width)
            text = get_image_prompt_string(rows, columns, 64, "<fake>", "<image>", "<global>")
            return len(re.findall(r"<\w+>|\n+", text))

        return written
    processor, reader, more = {
        "llava": (
            LlavaProcessor,
            CLIPImageProcessorPil,
            {
                "patch_size": 14,
                "num_additional_image_tokens": 1,
                "vision_feature_select_strategy": "default",
            },
        ),
        "gemma3": (Gemma3Processor, None, {"image_seq_length": 256}),
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLImageProcessorPil, {}),
        "idefics3": (Idefics3Processor, Idefics3ImageProcessorPil, {"image_seq_len": 169}),
    }[kind]
    stand_in = SimpleNamespace(
        image_processor=reader(**PREPROCESSORS[kind]) if reader else None,
        tokenizer=lambda text, add_special_tokens: {"input_ids": [0]},
        _merge_kwargs=lambda **_: {"images_kwargs": {}},
        **more,
    )

    def count(size: ImageSize) -> int:
        asked = [[size.height, size.width]]
        [tokens] = processor._get_num_multimodal_tokens(stand_in, asked).num_image_tokens
        # Gemma's processor counts without the two marks and two empty lines that it writes.
        return int(tokens) + (4 if kind == "gemma3" else 0)

    return count


COUNTED: dict[str, tuple[Any, Any]] = {}


@pytest.fixture(params=sorted(CONFIGS))
def counted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind = request.param
    if kind not in COUNTED:
        directory = write_vision_model_files(tmp_path_factory.mktemp(kind), kind)
        COUNTED[kind] = read_image_counter(directory), oracle(kind)
    return COUNTED[kind]


def test_tokens_are_those_of_the_models_own_processor(counted: Any) -> None:
    counter, count = counted

    @settings(max_examples=60, deadline=None)
    @given(SIDES, SIDES)
    def check(width: int, height: int) -> None:
        assume(max(width, height) <= MOST_ASPECT * min(width, height))
        size = ImageSize(width, height)
        needs = counter.needs(size, FIELD)
        assert needs.tokens == count(size)
        assert needs.flops > 0

    check()
    for sides in product((1, 28, 336, 364, 512, 1456, 2048, 4096), repeat=2):
        if max(sides) <= MOST_ASPECT * min(sides):
            size = ImageSize(*sides)
            assert counter.needs(size, FIELD).tokens == count(size)


def test_well_known_counts(tmp_path: Path) -> None:
    kinds = {
        kind: read_image_counter(write_vision_model_files(tmp_path / kind, kind))
        for kind in ("llava", "gemma3", "qwen2_vl")
    }
    found = {
        kind: each.needs(ImageSize(448, 448), FIELD).tokens for kind, each in kinds.items() if each
    }
    assert found == {"llava": 576, "gemma3": 260, "qwen2_vl": 256}


def test_a_sliver_is_refused(tmp_path: Path) -> None:
    counter = read_image_counter(write_vision_model_files(tmp_path, "qwen2_vl"))
    assert counter is not None
    with pytest.raises(InvalidArgumentError, match="one side is at most 200 times the other"):
        counter.needs(ImageSize(2010, 10), FIELD)


def test_the_work_of_an_encoder_by_hand(tmp_path: Path) -> None:
    counter = read_image_counter(write_vision_model_files(tmp_path, "llava"))
    assert counter is not None
    patches, width = 577, 32
    weights = 4 * width**2 + 2 * width * 64
    expected = 2 * (2 * patches * weights + 4 * patches**2 * width)
    assert counter.needs(ImageSize(10, 10), FIELD).flops == expected


def test_each_image_takes_the_place_that_the_template_gave_it() -> None:
    assert expanded([1, 9, 2, 9], 9, [2, 3]) == [1, 9, 9, 2, 9, 9, 9]
    with pytest.raises(InvalidArgumentError, match="places 1 images, and 2 came"):
        expanded([1, 9], 9, [2, 3])


def test_models_of_text_and_unknown_ones_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert read_image_counter(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", "vision_config": {}}))
    with pytest.raises(ModelFilesError, match="images of model_type 'new' cannot be counted"):
        read_image_counter(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": {}}))
    with pytest.raises(ModelFilesError, match="do not say how images are cut"):
        read_image_counter(tmp_path)


def test_the_decoder_of_a_model_with_images(tmp_path: Path) -> None:
    """What LLaVA 1.5's config leaves out are the defaults of its decoder."""
    config = {"text_config": {"model_type": "llama", "vocab_size": 32064}, "vision_config": {}}
    assert decoder_config(config) == {
        **SHAPES["llama-2-7b"],
        "model_type": "llama",
        "vocab_size": 32064,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_decoder_shape(tmp_path, "float16")
    assert (len(shape.layers), shape.kv_bytes_per_token) == (32, 524_288)


def test_profile_from_the_command_line(tmp_path: Path) -> None:
    directory = write_vision_model_files(tmp_path / "model", "llava")
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(picture())
    shown = ["--image", str(tmp_path / "one.png"), "--image", str(tmp_path / "two.png")]
    asked = ["profiler", "profile", "the fox", "--model", str(directory), "--json"]
    bare, seen = (
        json.loads(CliRunner().invoke(app, [*asked, *more]).stdout) for more in ([], shown)
    )
    assert (bare["image_tokens"], seen["image_tokens"]) == (0, 2 * 576)
    assert seen["prompt_tokens"] == bare["prompt_tokens"] + 2 * 576
    per_token = 2 * 2 * 2 * 16 * 2
    median = seen["output_tokens"]["0.5"]
    assert seen["kv_bytes"] == round(per_token * (seen["prompt_tokens"] + median))
    assert seen["flops"] > bare["flops"]
