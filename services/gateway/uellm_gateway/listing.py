"""What ListModels says."""

import asyncio

from uellm.core.errors import ModelFilesError
from uellm.v1 import inference_pb2
from uellm_gateway.models import ModelView, ServedModel

LOAD_SECONDS = 2.0
"""How long a listing waits for a tokenizer that is being loaded."""


async def list_models(view: ModelView) -> list[inference_pb2.Model]:
    """Every model, by name; those that cannot take requests say why."""
    return list(await asyncio.gather(*(_describe(view, model) for model in view.models)))


async def _describe(view: ModelView, model: ServedModel) -> inference_pb2.Model:
    has_chat_template = False
    problem = ""
    try:
        text = await asyncio.wait_for(view.text(model), LOAD_SECONDS)
        has_chat_template = text.tokenizer.has_chat_template
    except TimeoutError:
        problem = "this gateway is loading its tokenizer"
    except ModelFilesError as error:
        problem = error.message
    deployment = model.deployment
    return inference_pb2.Model(
        name=model.name,
        max_tokens=model.context_tokens,
        ready_replicas=model.ready_replicas,
        replicas=deployment.wanted_replicas or len(deployment.replicas),
        has_chat_template=has_chat_template,
        ref=deployment.model,
        status=problem or model.waits_for,
        adapters=model.adapters,
        stored_dtype=deployment.profile.stored_dtype,
        dtype=deployment.dtype,
    )
