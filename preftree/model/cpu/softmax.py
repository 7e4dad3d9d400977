"""The softmax over the vocabulary as the head needs it: what the target gets, and the numerators of all."""

from __future__ import annotations

import torch
from torch import Tensor

from preftree.model.cpu.kernels import KERNEL_DTYPES, addresses, library, usable


def exponentiate(logits_CV: Tensor, target_C: Tensor, entropy_C: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target) (C,), exp(logit − its row's highest) (C, V) and the sum of that, (C,). Uses the logits' memory.

    Sums and log-probs are in float32 at least; the exponentials may stay in the logits' dtype.

    Args:
        entropy_C: filled with −Σ p log p, in the dtype of the sums, if given.
    """
    if logits_CV.device.type == "cpu" and logits_CV.dtype in KERNEL_DTYPES and usable():
        return _compiled(logits_CV.contiguous(), target_C.contiguous(), entropy_C)
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    top_C1 = wide_CV.amax(1, keepdim=True)
    target_logit_C1 = wide_CV.gather(1, target_C[:, None])
    exp_CV = wide_CV.sub_(top_C1).exp_()
    total_C1 = exp_CV.sum(1, keepdim=True)
    if entropy_C is not None:
        entropy_C.copy_((total_C1.log() + torch.special.entr(exp_CV).sum(1, keepdim=True) / total_C1).squeeze(1))
    return (target_logit_C1 - top_C1 - total_C1.log()).squeeze(1), exp_CV, total_C1.squeeze(1)


def _compiled(logits_CV: Tensor, target_C: Tensor, entropy_C: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One pass for the highest logit and one for the exponentials, while a row lies in the processor's cache."""
    rows, size = logits_CV.shape
    logprob_C, total_C = (torch.empty(rows) for _ in range(2))
    library().preftree_exponentiate(
        KERNEL_DTYPES[logits_CV.dtype],
        rows,
        size,
        torch.get_num_threads(),
        *addresses(logits_CV, target_C, logprob_C, total_C),
        None if entropy_C is None else entropy_C.data_ptr(),
    )
    return logprob_C, logits_CV, total_C
