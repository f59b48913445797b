"""Which text belongs to which tokens, for a client that resumes inside a logged chunk.

The log says which text a chunk of tokens brought, not which of its tokens brought what. Streams
only ever stop between chunks, so this matters to clients that choose their offset themselves. The
rule: the text before offset k is what decoding the first k tokens gives, no less than the log's
text before the chunk and no more than its text with it. It depends on the log alone, so every
gateway divides alike, and the parts always join to exactly the logged text.
"""

from collections.abc import Sequence

from uellm.models.tokenizer import Tokenizer
from uellm.v1 import inference_pb2


def tokens_from(
    chunks: Sequence[inference_pb2.Tokens], next_offset: int, tokenizer: Tokenizer
) -> inference_pb2.Tokens:
    """The part of the last chunk that begins at ``next_offset``, with its text.

    Args:
        chunks: the log from its beginning to the chunk that holds ``next_offset``, in order.
        next_offset: the first token wanted, inside the last chunk.
        tokenizer: the model's.
    """
    last = chunks[-1]
    skip = next_offset - last.offset
    ids = [token for chunk in chunks for token in chunk.ids]
    text = "".join(chunk.text for chunk in chunks)
    before = len(text) - len(last.text)
    decoded = _decoded_length(ids, next_offset, text, tokenizer)
    cut = min(max(decoded, before), len(text)) - before
    return inference_pb2.Tokens(
        offset=next_offset, ids=last.ids[skip:], text=last.text[cut:], logprobs=last.logprobs[skip:]
    )


def _decoded_length(ids: Sequence[int], count: int, text: str, tokenizer: Tokenizer) -> int:
    """Characters that the first ``count`` tokens give, in the way that gave the logged text.

    The prompt may be gone by now. All that it decides is whether a leading space was kept, and
    the logged text shows that.
    """
    lengths = []
    for prompt in ((), ids[:1]):
        decoder = tokenizer.decoder(prompt)
        head = decoder.push(ids[:count])
        if (head + decoder.push(ids[count:]) + decoder.flush()).startswith(text):
            return len(head)
        lengths.append(len(head))
    return lengths[0]
