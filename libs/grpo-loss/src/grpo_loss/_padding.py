"""What a packed batch costs beside what it holds: positions computed against live ones, on the host."""

import numpy as np

from grpo_loss._layout import PackedBatch
from grpo_loss._token_logp import default_chunk


def computed_positions(batch: PackedBatch, *, vocabulary: int, chunk: int | None = None) -> dict[str, tuple[int, int]]:
    """Positions that an update computes, and how many of them it needs.

    Args:
        batch: from `pack`, its arrays on the host.
        vocabulary: rows of the unembedding, which decide the chunks of `token_logp` unless they are given.
        chunk: as given to `token_logp`.

    Returns:
        (computed, live) of `rows`: positions of rows, and those with a token; `prompts`: positions of prompt slots, and
        the tokens of all prompts, each prompt once; `head`: positions whose logits `token_logp` computes, and those
        that count in the loss.
    """
    count, sizes, micro = int(batch.count), batch.live_sizes, batch.micro
    mask_MRT, length_MP = np.asarray(micro.mask_RT)[:count], np.asarray(micro.prompt_length_P)[:count]
    tokens_MPT = np.asarray(micro.prompt_tokens_PT)[:count]
    prompts = {
        (int(length), tokens_T[:length].tobytes())
        for length, tokens_T in zip(length_MP.ravel(), tokens_MPT.reshape(-1, tokens_MPT.shape[-1]), strict=True)
    }
    head = 0
    for mask_RT, size in zip(mask_MRT, sizes, strict=True):
        tokens = size.rows // batch.shards * size.row_length
        at_once = min(tokens, chunk or default_chunk(tokens, vocabulary))
        most_live = int(mask_RT.reshape(batch.shards, -1).sum(axis=1).max())
        head += batch.shards * (tokens if at_once == tokens else -(-most_live // at_once) * at_once)
    return {
        "rows": (
            sum(size.rows * size.row_length for size in sizes),
            int(np.count_nonzero(np.asarray(micro.segment_RT)[:count])),
        ),
        "prompts": (
            sum(size.prompts * size.prompt_length for size in sizes),
            sum(length for length, _ in prompts),
        ),
        "head": (head, int(mask_MRT.sum())),
    }
