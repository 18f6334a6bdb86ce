"""What a script trains by fused versions in FP8, against its definitions, without a GPU."""

import pytest
import torch


def first_gradients(script, s):
    """The loss of a model's first micro-batch, and its matrices' gradients."""
    torch.manual_seed(0)
    trainer, loader = script.Trainer(s, script.World()), script.TrainLoader(s, script.World())
    with torch.no_grad():
        for bank in trainer.banks:  # the zeros of the start would hide what is not read
            bank.param[:, 0] = bank.master.add_(0.02 * torch.randn(bank.master.shape))
    trainer._set_inputs(script.step_inputs(0, s))
    trainer.quantize()
    trainer.micro_step(next(loader.stream(0, 1))[0], script.Part())
    matrices = [(name, p) for name, p in trainer.model.named_parameters() if p.ndim > 1]
    return trainer.total.item(), {name: p.grad.float() for name, p in matrices}


def check_fused_versions(script, s, monkeypatch):
    """Assert that in FP8 a micro-batch has the loss and gradients of the definitions, but for rounding."""
    wanted, exact = first_gradients(script, s)
    for operator in script.Operator.every:
        monkeypatch.setattr(operator, "run", operator.run)  # to be put back
    monkeypatch.setattr(script, "in_fp8", lambda device, part: True)
    monkeypatch.setattr(script, "compiled", lambda function: function)
    monkeypatch.setattr(script.World, "dtype", torch.bfloat16)
    script.run_operators_on_gpu()
    loss, found = first_gradients(script, s)
    assert loss == pytest.approx(wanted, rel=1e-3)
    for name, grad in found.items():
        assert (grad - exact[name]).norm() <= 0.15 * exact[name].norm(), name
