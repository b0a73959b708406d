# Placed here by `reap patch` (router-fallback).
"""The call of vLLM's fused sqrt-softplus top-k router, with an answer for expert counts that the kernel refuses.

The fused kernel is compiled for a fixed list of expert counts; pruned checkpoints have others (144, 160). The kernel is
always asked first. It refuses on the host, before anything is launched, so asking is safe while a CUDA graph is being
captured; the refusal is remembered per expert count and device type. A build without the kernel (CPU) refuses every
count.

What the kernel does and this keeps (source: csrc/moe/topk_softplus_sqrt_kernels.cu of vLLM 0.22.0 and 0.32.0):
scores are sqrt(softplus(logits)) in fp32, NaN counts as 0; experts are chosen by score + bias, the lowest id on ties;
weights are the unbiased scores; hash layers ignore the bias and take their ids from a table; weights are normalised by
their sum (by 1 where the sum is 0), then scaled; rows marked as padding get id -1 and weight 0; rows of image tokens
(five ids from image_sentinel_lo on) choose with bias_vl instead. token_expert_indices, which no caller reads, is left
as it is.
"""

from typing import Any

import torch
import torch.nn.functional as F
import vllm._custom_ops as ops

# "torch" computes with PyTorch operators; "padded" pads to the next count that the kernel has and calls the kernel.
VARIANT = "torch"

# Expert counts of the kernel, the same in vLLM 0.20.0 to 0.33.0 on CUDA. Only `padded` needs them, as targets.
KERNEL_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576)

# Below any biased score that a kernel row can hold, above the -inf that the kernel would compute NaN weights from.
PADDED_BIAS = -1e30

# Consecutive token ids that stand for image patches.
IMAGE_TOKENS = 5

_refused: set[tuple[int, str]] = set()


def topk_hash_softplus_sqrt(*args: Any, **kwargs: Any) -> None:
    """Drop-in for ``vllm._custom_ops.topk_hash_softplus_sqrt``; writes into the first two arguments.

    Raises:
        RuntimeError: what the kernel raises for any other reason than its list of expert counts.
    """
    logits = args[3]
    key = (logits.shape[-1], logits.device.type)
    if key not in _refused:
        try:
            ops.topk_hash_softplus_sqrt(*args, **kwargs)
            return
        except (RuntimeError, AttributeError) as error:
            if not is_refusal(error):
                raise
            _refused.add(key)
    replacement(*args, **kwargs)


def has_kernel(logits: torch.Tensor) -> bool:
    """Whether the fused kernel can run where the logits are; a function of its own, so that a test can stand in."""
    return logits.is_cuda


def is_refusal(error: Exception) -> bool:
    """Whether the error says that this build has no kernel for this expert count, or on this device."""
    text = str(error)
    if isinstance(error, AttributeError):
        return "topk_softplus_sqrt" in text
    if isinstance(error, NotImplementedError):
        return "topk_softplus_sqrt" in text and "backend" in text
    return "Unsupported expert number" in text


def replacement(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: torch.Tensor | None = None,
    input_tokens: torch.Tensor | None = None,
    hash_indices_table: torch.Tensor | None = None,
    variant: str | None = None,
    **later: Any,
) -> None:
    """Route without a kernel of this expert count.

    Args:
        topk_weights: out, [tokens, k] float32.
        topk_indices: out, [tokens, k] of any integer type.
        token_expert_indices: not used.
        gating_output: logits, [tokens, experts], float32, float16 or bfloat16.
        renormalize: divide the weights of a token by their sum.
        routed_scaling_factor: factor on the weights, after normalising.
        e_score_correction_bias: [experts] float32, added for the choice only.
        input_tokens: [tokens] token ids; needed with a table or with bias_vl.
        hash_indices_table: [vocabulary, k] expert ids per token id; given on hash layers.
        variant: `torch` or `padded`; by default the one that the file was placed with.
        later: is_padding ([tokens] bool), bias_vl ([experts] float32), image_sentinel_lo (int), of later releases.

    Raises:
        TypeError: an argument that this file does not know: it could change what the router does.
    """
    unknown = set(later) - {"is_padding", "bias_vl", "image_sentinel_lo"}
    if unknown:
        raise TypeError(f"the router got {sorted(unknown)}, which this replacement does not know")
    padded_count = next((count for count in KERNEL_COUNTS if count >= gating_output.shape[-1]), None)
    if (variant or VARIANT) == "padded" and has_kernel(gating_output) and padded_count is not None:
        _padded(
            topk_weights,
            topk_indices,
            token_expert_indices,
            gating_output,
            renormalize,
            routed_scaling_factor,
            e_score_correction_bias,
            input_tokens,
            hash_indices_table,
            padded_count,
            later,
        )
    else:
        _plain(
            topk_weights,
            topk_indices,
            gating_output,
            renormalize,
            routed_scaling_factor,
            e_score_correction_bias,
            input_tokens,
            hash_indices_table,
            later,
        )


def _padded(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: torch.Tensor | None,
    input_tokens: torch.Tensor | None,
    table: torch.Tensor | None,
    count: int,
    later: dict[str, Any],
) -> None:
    extra = count - gating_output.shape[-1]

    def pad_bias(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else F.pad(values, (0, extra), value=PADDED_BIAS)

    if later.get("bias_vl") is not None:
        later = {**later, "bias_vl": pad_bias(later["bias_vl"])}
    ops.topk_hash_softplus_sqrt(
        topk_weights,
        topk_indices,
        token_expert_indices,
        # The score of -inf is 0; without a bias a tie at 0 goes to the lower, real id.
        F.pad(gating_output, (0, extra), value=float("-inf")),
        renormalize,
        routed_scaling_factor,
        # A hash layer ignores the bias, so it is not worth a launch there.
        bias if table is not None else pad_bias(bias),
        input_tokens,
        table,
        **later,
    )


def _plain(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: torch.Tensor | None,
    input_tokens: Any,
    table: torch.Tensor | None,
    later: dict[str, Any],
) -> None:
    k = topk_weights.shape[-1]
    scores = F.softplus(gating_output.float()).sqrt().nan_to_num(nan=0.0, posinf=float("inf"))
    bias_vl: Any = later.get("bias_vl")
    first_image = later.get("image_sentinel_lo") or 0
    image: Any = None
    if bias_vl is not None and first_image > 0:
        image = ((input_tokens >= first_image) & (input_tokens < first_image + IMAGE_TOKENS)).unsqueeze(-1)

    if table is None or image is not None:
        choice = scores if bias is None else scores + bias.float()
        if image is not None:
            choice = torch.where(image, scores + bias_vl.float(), choice)
        # topk promises nothing about ties; a stable sort keeps the lower id first.
        ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :k]
    padding = later.get("is_padding")
    if table is not None:
        tokens = input_tokens.long()
        # The rows of padding and of image tokens are replaced, and their token ids may lie outside the table: on a GPU
        # an index outside ends the process.
        if padding is not None:
            tokens = tokens.masked_fill(padding, 0)
        if image is not None:
            tokens = tokens.masked_fill(image.squeeze(-1), 0)
        listed = table[tokens].long()
        ids = listed if image is None else torch.where(image, ids, listed)

    weights = scores.gather(1, ids)
    if renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
    weights = weights * routed_scaling_factor
    if padding is not None:
        weights = weights.masked_fill(padding.unsqueeze(-1), 0.0)
        ids = ids.masked_fill(padding.unsqueeze(-1), -1)
    topk_weights.copy_(weights)
    topk_indices.copy_(ids)
