"""Kernels compiled for processors that this one can stand in for: a small model, verified there."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("torch")
numba = pytest.importorskip("numba")
from llvmlite import binding  # noqa: E402

FEATURES = {
    # Of 2013: registers of 8 floats, and half as many of them.
    "haswell": ("sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2"),
    # Of 2011: without an instruction that multiplies and adds.
    "sandybridge": ("sse4.2", "popcnt", "avx"),
}
VERIFY = """
    import sys
    import warnings
    from pathlib import Path

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from uellm_worker.engine import native
        from uellm_worker.verification.pipeline import Pipeline
        from uellm_worker.verification.reference import Reference
        from uellm_worker.verification.report import verify

    from tests.support.quantizing import Recipe, quantize_checkpoint

    torch.set_num_threads(2)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=80, intermediate_size=144, num_hidden_layers=2,
        num_attention_heads=5, num_key_value_heads=1, max_position_embeddings=64,
    )
    plain, coded = (Path(sys.argv[1]) / name for name in ("plain", "coded"))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(0, 0.3) if parameter.ndim > 1 else None
    model.half().save_pretrained(plain)
    coded.mkdir()
    quantize_checkpoint(plain, coded, Recipe("gptq", group_size=16, symmetric=False))
    for directory in (plain, coded):
        pipeline = Pipeline(directory, (1, 1), slots=3, max_tokens=60)
        reference = Reference.load(directory, torch.float32)
        prompts = [[5], [7, 8, 9] * 7, [20] * 30, [3, 4]]
        assert verify(pipeline, reference, prompts, 8).exact
        for stage in pipeline.stages:
            compiled = stage.first.fused.compiled is not None
            assert compiled == (sys.argv[2] == "compiled"), (directory, compiled)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processor", FEATURES)
def test_a_model_is_exact_by_kernels_for_another_processor(processor: str, tmp_path: Path) -> None:
    here = binding.get_host_cpu_features()
    if not all(here.get(feature) for feature in FEATURES[processor]):
        pytest.skip(f"this processor does not do what {processor} does")
    environment = os.environ | {
        "NUMBA_CPU_NAME": processor,
        "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in FEATURES[processor]),
        "NUMBA_CACHE_DIR": str(tmp_path / "kernels"),
    }
    compiled = "compiled" if "fma" in FEATURES[processor] else "not"
    arguments = [sys.executable, "-c", textwrap.dedent(VERIFY), str(tmp_path), compiled]
    subprocess.run(arguments, env=environment, check=True, timeout=300)
