"""LoRA's dropout on a CPU: the distribution of torch's, and the same values around it."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pact_offline.models.cpu_dropout import CpuDropout, use_fast_dropout
from pact_offline.models.load import load_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_it_drops_that_share_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ones = torch.ones(101, 997, dtype=dtype, requires_grad=True)
    out = CpuDropout(p)(ones)
    assert out.dtype == dtype
    dropped = (out == 0).float().mean().item()
    assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) / ones.numel()) ** 0.5)
    assert out.max().item() == pytest.approx(1 / (1 - p), rel=1e-2)
    assert out.float().mean().item() == pytest.approx(1, abs=0.01)
    # Neighbours share a draw of 64 bits: their bits must be as independent as any.
    zero = (out == 0).float().flatten()
    for gap in (1, 2, 3, 4):
        both = (zero[gap:] * zero[:-gap]).mean().item()
        assert both == pytest.approx(p * p, abs=5 * (p * p / ones.numel()) ** 0.5)
    out.sum().backward()
    assert torch.equal(ones.grad, out)


def test_a_seed_repeats_it_and_evaluation_is_without_it() -> None:
    dropout, ones = CpuDropout(0.3), torch.ones(50)
    torch.manual_seed(1)
    first, second = dropout(ones), dropout(ones)
    torch.manual_seed(1)
    assert torch.equal(dropout(ones), first)
    assert not torch.equal(first, second)
    assert torch.equal(dropout.eval()(ones), ones)


@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler takes no path with a space")
def test_two_dropouts_of_one_tensor_differ_when_compiled() -> None:
    one, other = CpuDropout(0.5), CpuDropout(0.5)

    @torch.compile(dynamic=True)
    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return one(x), other(x)

    x = torch.ones(1000, requires_grad=True)
    for size in (1000, 400):
        first, second = both(x[:size])
        assert not torch.equal(first, second)
        (gradient,) = torch.autograd.grad(first.sum(), x)
        assert torch.equal(gradient[:size], first)  # the backward pass has the forward's mask


def test_without_the_cast_to_fp32_a_bfloat16_policy_computes_the_same(aligned: Path) -> None:
    logits = []
    for change in (lambda policy: None, use_fast_dropout):
        torch.manual_seed(0)
        config = LoraConfig(init_lora_weights=False, lora_dropout=0.1, task_type="CAUSAL_LM")
        policy = get_peft_model(load_model(str(aligned), "bfloat16"), config).eval()
        change(policy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits.append(policy(input_ids=torch.arange(3, 60)[None]).logits)
    assert torch.equal(*logits)
    kinds = {type(module) for name, module in policy.named_modules() if "lora_dropout." in name}
    assert kinds == {CpuDropout}
