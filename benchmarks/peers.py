"""Other engines under the engine benchmark: each makes a ``Run`` of a ``Setup``.

transformers is installed with this project. vLLM and OpenVINO GenAI have interpreters of their own
(``make bench-peers``), and are imported there only.
"""
# ruff: noqa: PLC0415 - each function imports the one engine that it measures.

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.jobs import LONGEST_ANSWER, LONGEST_PROMPT, Job, Run, Setup, check

CONTEXT = LONGEST_PROMPT + LONGEST_ANSWER
KV_BLOCK = 32


def _whole(setup: Setup) -> Any:
    """The model under transformers, greedy and never ending by itself."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=setup.dtype)
    model.to(setup.device).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def hf_static(setup: Setup, *, ordered: bool = False) -> Run:
    """Batches of ``generate``, padded to the left."""
    import torch

    model = _whole(setup)

    def run(jobs: Sequence[Job]) -> None:
        queue = sorted(jobs, key=lambda job: job.tokens) if ordered else list(jobs)
        for start in range(0, len(queue), setup.slots):
            batch = queue[start : start + setup.slots]
            longest = max(len(job.prompt) for job in batch)
            pads = [longest - len(job.prompt) for job in batch]
            rows = zip(pads, batch, strict=True)
            output = model.generate(
                torch.tensor([[0] * pad + job.prompt for pad, job in rows], device=setup.device),
                attention_mask=torch.tensor(
                    [[0] * pad + [1] * (longest - pad) for pad in pads], device=setup.device
                ),
                max_new_tokens=max(job.tokens for job in batch),
            )
            check([output.shape[1] - longest], [max(batch, key=lambda job: job.tokens)])

    return run


def hf_sorted(setup: Setup) -> Run:
    """``hf_static``, given the lengths beforehand."""
    return hf_static(setup, ordered=True)


def hf_continuous(setup: Setup) -> Run:
    """Transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig

    model = _whole(setup)
    config = ContinuousBatchingConfig(
        page_size=KV_BLOCK,
        num_blocks=setup.slots * (1 + CONTEXT // KV_BLOCK),
        max_requests_per_batch=setup.slots,
        max_batch_tokens=512,
    )

    def run(jobs: Sequence[Job]) -> None:
        settings = {"continuous_batching_config": config, "warmup": False}
        with model.continuous_batching_context_manager(**settings) as manager:
            names = [
                manager.add_request(job.prompt, max_new_tokens=job.tokens, eos_token_id=-1)
                for job in jobs
            ]
            lengths: dict[str, int] = {}
            while len(lengths) < len(jobs):
                result = manager.get_result(timeout=60)
                if result is None or result.error:
                    raise SystemExit(f"hf-continuous failed: {result and result.error}")
                if result.is_finished():
                    lengths[result.request_id] = len(result.generated_tokens)
        check([lengths[name] for name in names], jobs)

    return run


def vllm(setup: Setup) -> Run:
    """The CPU build of vLLM, eager, in one process."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(setup.model),
        dtype=setup.dtype,
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=setup.slots,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def run(jobs: Sequence[Job]) -> None:
        outputs = engine.generate(
            [{"prompt_token_ids": job.prompt} for job in jobs],
            [
                SamplingParams(
                    temperature=0.0, max_tokens=job.tokens, ignore_eos=True, detokenize=False
                )
                for job in jobs
            ],
            use_tqdm=False,
        )
        check([len(output.outputs[0].token_ids) for output in outputs], jobs)

    return run


def openvino(setup: Setup) -> Run:
    """OpenVINO GenAI's continuous batching, float32 throughout."""
    import numpy as np
    import openvino_genai as genai
    from openvino import Tensor
    from optimum.intel import OVModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        model = OVModelForCausalLM.from_pretrained(
            setup.model, export=True, load_in_8bit=False, compile=False
        )
        model.save_pretrained(scratch)
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2
        scheduler.max_num_seqs = setup.slots
        scheduler.max_num_batched_tokens = 512
        scheduler.enable_prefix_caching = False
        properties = {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "INFERENCE_NUM_THREADS": setup.threads,
        }
        pipeline = genai.ContinuousBatchingPipeline(scratch, scheduler, "CPU", properties)

    def run(jobs: Sequence[Job]) -> None:
        configs = []
        for job in jobs:
            config = genai.GenerationConfig()
            config.max_new_tokens = job.tokens
            config.ignore_eos = True
            configs.append(config)
        inputs = [Tensor(np.array([job.prompt], dtype=np.int64)) for job in jobs]
        results = pipeline.generate(inputs, configs)
        check([len(result.m_generation_ids[0]) for result in results], jobs)

    return run


PEERS: dict[str, Callable[[Setup], Run]] = {
    "hf-static": hf_static,
    "hf-sorted": hf_sorted,
    "hf-continuous": hf_continuous,
    "vllm": vllm,
    "openvino": openvino,
}
OWN_INTERPRETER = ("vllm", "openvino")
"""Peers that are not installed with this project."""
