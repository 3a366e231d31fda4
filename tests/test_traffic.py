"""The count of bytes and launches (`benchmarks.traffic`), and the bytes that the kernels declare."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from benchmarks.traffic import Traffic, forward_pass, settings, training_step
from diffusion.nets.unet import UNet


@pytest.mark.parametrize(
    ("operation", "gigabytes", "launches"),
    [
        (lambda x, y: x.add(y), 3, 1),
        (lambda x, y: x.mul(x), 2, 1),
        (lambda x, y: x.add_(y), 3, 1),
        (lambda x, y: x.copy_(y), 2, 1),
        (lambda x, y: x.zero_(), 1, 1),
        (lambda x, y: torch.add(x, 1, out=y), 2, 1),
        (lambda x, y: x.add(y[:1].expand_as(y)), 2.001, 1),
        (lambda x, y: x.bfloat16(), 1.5, 1),
        (lambda x, y: torch.empty_like(x), 0, 0),
        (lambda x, y: x.view(-1).unflatten(0, (500, -1)), 0, 0),
        (lambda x, y: x.t().contiguous(), 2, 1),
        (lambda x, y: x @ y.t(), 0, 1),
        (lambda x, y: nn.functional.linear(x, y), 0, 1),
        (lambda x, y: torch._foreach_add_([x, y], 1.0), 4, 1),
        (lambda x, y: torch._foreach_copy_([x], [y]), 2, 1),
        (lambda x, y: x.cpu().add(1), 2, 1),
    ],
)
def test_an_operation_reads_its_arguments_and_writes_its_results(operation, gigabytes, launches):
    with FakeTensorMode(), Traffic() as traffic:
        x, y = (torch.empty(1000, 250_000, device="cuda") for _ in range(2))
        operation(x, y)
    assert (traffic.bytes.total() / 1e9, traffic.launches.total()) == (gigabytes, launches)


def test_the_optimizer_reads_four_tensors_and_writes_three():
    with FakeTensorMode():
        parameter = nn.Parameter(torch.zeros(250_000_000, device="cuda"))
        optimizer = torch.optim.AdamW([parameter], fused=True)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with Traffic() as traffic:
            optimizer.step()
    assert round(traffic.bytes["_fused_adamw_"] / 1e9, 3) == 7
    assert traffic.launches == {"_fused_adamw_": 1, "_foreach_add_": 1}


def test_the_bias_of_a_convolution_is_a_pass_over_memory():
    with FakeTensorMode(), Traffic() as traffic:
        x, weight = torch.empty(1000, 10, 100, 100, device="cuda"), torch.empty(25, 10, 1, 1, device="cuda")
        nn.functional.conv2d(x, weight)
        nn.functional.conv2d(x, weight, torch.empty(25, device="cuda"))
    assert traffic.launches == {"products": 2, "bias of a convolution": 1}
    assert traffic.bytes.total() == 2e9


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels do not run in the interpreter")
@pytest.mark.slow
def test_kernels_declare_what_they_load_and_store(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    from diffusion.nets import fused, kernels, operations, triton_kernels

    moved = {"loads": 0, "stores": 0}

    def counted(kind, method):
        def call(builder, pointers, *rest):
            mask = rest[0] if kind == "loads" else rest[1]
            moved[kind] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return method(builder, pointers, *rest)

        return call

    for kind, name in (("loads", "create_masked_load"), ("stores", "create_masked_store")):
        monkeypatch.setattr(InterpreterBuilder, name, counted(kind, getattr(InterpreterBuilder, name)))
    launch, launched, wrong = kernels.launch, set(), []

    def compare(kernel, grid, loads, stores, *arguments, **options):
        moved.update(loads=0, stores=0)
        launch(kernel, grid, loads, stores, *arguments, **options)
        declared = {
            kind: sum(tensor.nbytes * times for tensor, times in tensors if tensor is not None)
            for kind, tensors in (("loads", loads), ("stores", stores))
        }
        launched.add(kernel.__name__)
        if declared != pytest.approx(moved):
            wrong.append(f"{kernel.__name__} declares {declared} and moves {moved}")

    monkeypatch.setattr(kernels, "launch", compare)
    monkeypatch.setattr(operations, "implementation", lambda device_type: fused)
    # Odd numbers of pixels, channels that are no power of two, and skips with fewer channels than the decoder.
    net = UNet(
        image_size=6, channels=32, channel_mult=[1, 3], res_blocks=1, attention_resolutions=[3], head_channels=32
    )
    net(torch.randn(2, 3, 6, 6), torch.arange(2)).sum().backward()
    assert not wrong, "\n".join(wrong)
    every = {name for name, value in vars(triton_kernels).items() if type(value).__name__ == "InterpretedFunction"}
    assert launched == {name for name in every if not name.startswith("_")}


@pytest.mark.slow
def test_a_step_moves_few_bytes_in_few_launches():
    run = settings("ffhq128", 64)
    step, forward = training_step(run), forward_pass(run)
    assert step.bytes.total() < 75e9 and step.launches.total() < 1500, step.table()
    assert forward.bytes.total() < 20e9, forward.table()
