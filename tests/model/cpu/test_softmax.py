"""The softmax over the vocabulary: torch's way and the kernel's, against float64."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from preftree.model.cpu import softmax
from preftree.model.cpu.kernels import usable
from preftree.model.cpu.softmax import exponentiate

WAYS = [
    pytest.param(True, marks=pytest.mark.skipif(not usable(), reason="no compiler for the kernels"), id="kernel"),
    pytest.param(False, id="torch"),
]


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 5, 16, 97, 1000])  # less than a vector, whole ones, and a rest
def test_against_float64(vocabulary: int, dtype: torch.dtype, compiled: bool) -> None:
    random = torch.Generator().manual_seed(vocabulary)
    logits_CV = (8 * torch.randn(7, vocabulary, generator=random)).to(dtype)
    logits_CV[0] = -1000.0  # the same everywhere, and far away
    target_C = torch.randint(vocabulary, (7,), generator=random)
    exact_CV = logits_CV.double()
    with mock.patch.object(softmax, "usable", return_value=compiled):
        logprob_C, exp_CV, total_C = exponentiate(logits_CV.clone(), target_C)
    assert logprob_C.dtype == total_C.dtype == torch.float32
    wanted_C = torch.log_softmax(exact_CV, 1).gather(1, target_C[:, None]).squeeze(1)
    torch.testing.assert_close(logprob_C.double(), wanted_C, rtol=1e-5, atol=2e-5)
    share_CV = exp_CV.double() / total_C[:, None].double()
    torch.testing.assert_close(share_CV, torch.softmax(exact_CV, 1), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_other_dtypes_are_torchs() -> None:
    logits_CV = torch.randn(3, 9, dtype=torch.float64)
    logprob_C, _, _ = exponentiate(logits_CV.clone(), torch.tensor([0, 8, 3]))
    assert logprob_C.dtype == torch.float64
