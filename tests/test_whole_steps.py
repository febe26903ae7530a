"""A step is whole or does not happen: bad tensors and options are refused when given, or before the first write."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import prune

import fastlars
from cases import Options
from fastlars import LARS
from harness import IMPLEMENTATIONS, buffers_of, ignore_nothing_adapted, set_grads

pytestmark = ignore_nothing_adapted
OPTIONS: Options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.05, "trust_coefficient": 0.1}


def make(implementation: Options, adapt: bool = True, steps: int = 2) -> LARS:
    """Two groups of three tensors after some steps, with gradients for the next one."""
    torch.manual_seed(0)
    groups = [{"params": [Parameter(torch.randn(3, 4)) for _ in range(3)]} for _ in range(2)]
    optimizer = LARS(groups, **{**OPTIONS, "adapt": adapt, **implementation})
    for _ in range(steps):
        set_grads(params_of(optimizer), [torch.randn(3, 4) for _ in range(6)])
        optimizer.step()
    return optimizer


def params_of(optimizer: LARS) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def everything(optimizer: LARS) -> Any:
    """What a refused step could have changed; for meta tensors and the like their identities."""
    tensors = [t for p in params_of(optimizer) for t in (p, p.grad)] + buffers_of(optimizer)
    tensors += [lr for group in optimizer.param_groups if isinstance(lr := group["lr"], Tensor)]
    readable = [t for t in tensors if t is not None and not t.is_meta and not t.is_sparse]
    return (
        [t.detach().resolve_neg().tolist() for t in readable],
        [t._version for t in readable if not t.is_inference()],
        [(id(p), {key: id(value) for key, value in state.items()}) for p, state in optimizer.state.items()],
    )


def in_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.detach().clone()


# ---------------------------------------------------------------- what changes after construction
def write(**options: Any) -> Callable[[LARS], object]:
    return lambda optimizer: optimizer.param_groups[1].update(copy.deepcopy(options))


def resize_lr(optimizer: LARS) -> None:
    lr = optimizer.param_groups[1]["lr"] = torch.tensor([0.5])
    optimizer.step()
    lr.resize_(2)


def put_buffer(value: Callable[[Tensor], Tensor]) -> Callable[[LARS], object]:
    def put(optimizer: LARS) -> None:
        param = params_of(optimizer)[-1]
        optimizer.state[param]["momentum_buffer"] = value(param.detach())

    return put


def put_data(value: Tensor) -> Callable[[LARS], object]:
    def put(optimizer: LARS) -> None:
        params_of(optimizer)[-1].data = value

    return put


ONE_ELEMENT = "Tensor lr must be 1-element and of a floating dtype, got shape"
OWN = "must have its own memory for every element"
EDITS: dict[str, tuple[Callable[[LARS], object], str]] = {
    "two elements": (write(lr=torch.tensor([0.5, 0.5])), f"{ONE_ELEMENT} \\(2,\\)"),
    "empty": (write(lr=torch.tensor([])), f"{ONE_ELEMENT} \\(0,\\)"),
    "complex": (write(lr=torch.tensor(0.5j)), f"{ONE_ELEMENT} \\(\\) and torch.complex64"),
    "sparse": (write(lr=torch.tensor([0.5]).to_sparse()), f"{ONE_ELEMENT} .* of layout torch.sparse_coo"),
    "meta": (write(lr=torch.tensor(0.5, device="meta")), "Tensor lr must hold a number, got one on the meta device"),
    "resized": (resize_lr, f"{ONE_ELEMENT} \\(2,\\)"),
    "lr beyond float32": (write(lr=1e39), "lr must be at most 3.40282e\\+38 for these parameters, got 1e\\+39"),
    "lr": (write(lr=1e39), "lr must be at most 3.40282e\\+38"),
    "tensor lr": (write(lr=torch.tensor(1e39, dtype=torch.float64)), "lr must be at most 3.40282e\\+38"),
    "decay": (write(weight_decay=1e39), "weight_decay must be at most 3.40282e\\+38 for parameters of torch.float32"),
    "integer": (write(weight_decay=2**70), "got 1180591620717411303424, an integer beyond 64 bits; give a float"),
    "differentiable": (write(differentiable=True), "differentiable"),
    "expanded": (put_data(torch.ones(4).expand(3, 4)), f"a parameter of shape \\(3, 4\\) {OWN}"),
    "overlapping": (put_data(torch.ones(9).as_strided((3, 4), (2, 1))), f"a parameter of shape \\(3, 4\\) {OWN}"),
    "expanded buffer": (put_buffer(lambda p: p[:1].expand(3, 4)), f"the momentum_buffer of a parameter .* {OWN}"),
    "inference buffer": (put_buffer(in_inference_mode), "was created in inference mode and cannot be written outside it"),
    "buffer elsewhere": (put_buffer(lambda p: p.to("meta")), "on cpu has a momentum buffer on meta; move it to cpu"),
    "sparse buffer": (put_buffer(lambda p: p.to_sparse()), "must be dense, got one of layout torch.sparse_coo"),
    "complex buffer": (put_buffer(lambda p: p.to(torch.complex64)), "has a momentum buffer of torch.complex64"),
    "shape of a buffer": (put_buffer(lambda p: p[:2].clone()), "has a momentum buffer of shape \\(2, 4\\)"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_an_edit_is_refused_before_any_group_moves(edit: Callable[[LARS], object], message: str) -> None:
    """Also on every retry, and with first gradients, which create state."""
    for implementation in IMPLEMENTATIONS.values():
        for adapt in (True, False):
            optimizer = make(implementation, adapt)
            fresh = Parameter(torch.ones(5))
            optimizer.param_groups[0]["params"].append(fresh)
            edit(optimizer)
            fresh.grad = torch.ones(5)
            optimizer.state.pop(fresh, None)
            before = everything(optimizer)
            for _ in range(2):
                with pytest.raises((ValueError, RuntimeError), match=f"^param group 1: .*{message}"):
                    optimizer.step()
                assert everything(optimizer) == before, implementation


def test_the_numbers_of_a_dtype_are_read_again_when_it_changes() -> None:
    """float16 cannot hold an lr of 1e5. Adapted groups are computed in float32."""
    for adapt in (False, True):
        optimizer = make({}, adapt)
        for group in optimizer.param_groups:
            group["lr"] = 1e5
        for p in params_of(optimizer):
            p.data, p.grad, optimizer.state[p]["momentum_buffer"] = p.data.half(), None, torch.zeros_like(p.data).half()
            p.grad = torch.zeros_like(p)
        if adapt:
            optimizer.step()
        else:
            with pytest.raises(ValueError, match="lr must be at most 65504 for these parameters, got 100000"):
                optimizer.step()


# ---------------------------------------------------------------- what is given
def leaf(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_()


HALF = torch.ones(2, dtype=torch.float16)
GIVEN: dict[str, tuple[Callable[[], Tensor], Options, str]] = {
    "expanded": (lambda: leaf(torch.ones(1).expand(3)), {}, f"the parameter at position 0 {OWN}"),
    "overlapping": (lambda: leaf(torch.ones(9).as_strided((4, 2), (1, 1))), {}, f"the parameter at position 0 {OWN}"),
    "inference": (lambda: in_inference_mode(torch.ones(3)), {}, "the parameter at position 0 was created in inference mode"),
    "sparse": (lambda: torch.eye(3).to_sparse(), {}, "must be dense, got one of layout torch.sparse_coo"),
    "lr": (lambda: torch.ones(2), {"lr": 1e39}, "lr must be at most 3.40282e\\+38 for parameters of torch.float32"),
    "half lr": (lambda: HALF, {"lr": 1e5, "adapt": False}, "lr must be at most 65504 for parameters of torch.float16"),
    "dampening": (lambda: torch.ones(2), {"dampening": -1e39}, "dampening must be at most"),
    "integer lr": (lambda: torch.ones(2), {"lr": 2**63}, "got 9223372036854775808, an integer beyond 64 bits"),
    "meta lr": (lambda: torch.ones(2), {"lr": torch.ones((), device="meta")}, "must hold a number, got one on the meta"),
    "differentiable": (lambda: torch.ones(2), {"differentiable": True}, "differentiable must be the same in all groups"),
}  # fmt: skip


@pytest.mark.parametrize(("param", "options", "message"), GIVEN.values(), ids=GIVEN)
def test_wrong_arguments_are_refused_at_once(param: Callable[[], Tensor], options: Options, message: str) -> None:
    group = {"params": [param()], **options}
    with pytest.raises(ValueError, match=f"param group 0: .*{message}"):
        LARS([group], **OPTIONS)
    optimizer = make({})
    before = everything(optimizer)
    with pytest.raises(ValueError, match=f"param group 2: .*{message}"):
        optimizer.add_param_group(group)
    assert everything(optimizer) == before and len(optimizer.param_groups) == 2
    if not options:
        return
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1].update(options)
    if "half" in message or "differentiable" in options or "float16" in message:
        return  # these parameters are float32, and a state dict's differentiable flag is ignored
    with pytest.raises(ValueError, match=f"param group 1: .*{message}"):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before


@pytest.mark.parametrize(
    ("param", "options"),
    [
        (torch.ones(6).as_strided((2, 3), (3, 1)), {}),
        (torch.arange(1.0, 9).as_strided((2, 3), (3, 2)), {}),  # interleaved, so no two elements share memory
        (torch.ones(2, dtype=torch.float64), {"lr": 1e39}),
        (HALF, {"lr": 1e5, "adapt": True}),
        (torch.ones(2, device="meta"), {"lr": torch.tensor(0.5, device="meta")}),
        (torch.ones(2), {"lr": 2**40, "weight_decay": 1e38}),
    ],
    ids=str,
)
def test_unusual_but_valid_tensors_are_not_refused(param: Tensor, options: Options) -> None:
    param = param.clone() if param.is_contiguous() else param
    param.grad = torch.zeros_like(param)
    optimizer = LARS([param], **{**OPTIONS, **options})
    optimizer.step()
    optimizer.step()


def test_parameters_made_in_inference_mode_can_be_stepped_there() -> None:
    with torch.inference_mode():
        param = torch.ones(3)
        optimizer = LARS([param], lr=1.0, trust_coefficient=0.5, adapt=True)
        param.grad = torch.ones(3)
        optimizer.step()
        assert param.tolist() == [0.5] * 3
    with pytest.raises(RuntimeError, match="was created in inference mode"):
        optimizer.step()


# ---------------------------------------------------------------- differentiable
def test_a_loaded_state_dict_leaves_the_step_differentiable() -> None:
    saved = LARS([Parameter(torch.ones(3))], lr=0.5, weight_decay=0.1).state_dict()
    derivatives = []
    for load in (False, True):
        start = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        w = start.clone()
        optimizer = LARS([w], lr=0.5, weight_decay=0.1, trust_coefficient=0.1, eps=0.0, differentiable=True)
        if load:
            optimizer.load_state_dict(
                {**saved, "param_groups": [{**saved["param_groups"][0], "trust_coefficient": 0.1, "eps": 0.0}]}
            )
        (w.grad,) = torch.autograd.grad((2 * w).square().sum(), w, create_graph=True)
        optimizer.step()
        derivatives.append(torch.autograd.grad((2 * w).square().sum(), start)[0])
        assert optimizer.param_groups[0]["differentiable"] is True
    assert torch.equal(*derivatives)
    # and the other way round: a saved flag must not make steps differentiable
    optimizer = LARS([Parameter(torch.ones(3))], lr=0.5, weight_decay=0.1)
    optimizer.load_state_dict({**saved, "param_groups": [{**saved["param_groups"][0], "differentiable": True}]})
    assert optimizer.param_groups[0]["differentiable"] is False


# ---------------------------------------------------------------- loaded buffers
FLAT = torch.zeros(24)


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        (
            [FLAT[:8].view(4, 2)] * 2,
            "momentum_buffer under key 0 .* shares memory with the momentum_buffer under key 1",
        ),
        ([FLAT[:8].view(4, 2), FLAT[7:15].view(4, 2)], "shares memory with the momentum_buffer under key 1"),
        ([torch.zeros(9).as_strided((4, 2), (1, 1)), FLAT[:8].view(4, 2)], "an expanded or overlapping tensor"),
        (["param", FLAT[:8].view(4, 2)], "shares memory with the parameter of key 1"),
        ([FLAT[:8].view(4, 2), FLAT[8:16].view(4, 2)], None),
        ([FLAT[:16:2].view(4, 2), FLAT[1:17:2].view(4, 2)], None),
    ],
    ids=["one twice", "overlapping views", "as_strided", "a parameter", "neighbours", "interleaved"],
)
def test_loaded_buffers_share_no_memory(buffers: list[Any], message: str | None) -> None:
    optimizer = LARS([Parameter(torch.ones(4, 2)) for _ in range(2)], **OPTIONS)
    buffers = [params_of(optimizer)[1].detach() if isinstance(b, str) else b for b in buffers]
    saved = optimizer.state_dict()
    saved["state"] = {i: {"momentum_buffer": buffer} for i, buffer in enumerate(buffers)}
    if message is None:
        optimizer.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


# ---------------------------------------------------------------- around the step
def test_trust_ratios_of_equal_names() -> None:
    params = [Parameter(torch.full((2,), float(i + 1))) for i in range(4)]
    groups = [
        {"params": [("w", params[0])], "adapt": False},
        {"params": [("w", params[1]), ("w", params[2])]},
        {"params": [("v", params[3])]},
    ]
    optimizer = LARS(groups, lr=1.0, trust_coefficient=0.5, eps=0.0, adapt=True)
    set_grads(params, [torch.ones(2)] * 4)
    assert optimizer.trust_ratios() == pytest.approx({"w (1.0)": 1.0, "w (1.1)": 1.5, "v": 2.0})


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


RENAMED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight_orig": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),  # type: ignore[no-untyped-call]
    "weight_v": old_weight_norm,
    "parametrizations.weight.original1": nn.utils.parametrizations.weight_norm,
    "parametrizations.weight.original": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize(("name", "wrap"), RENAMED.items(), ids=RENAMED)
@pytest.mark.parametrize("out", [1, 3])
def test_the_matrix_of_a_linear_layer_is_adapted_under_any_name(
    out: int, name: str, wrap: Callable[[nn.Linear], nn.Module]
) -> None:
    adapted, rest = fastlars.param_groups(wrap(nn.Linear(4, out)), 0.1, bias_lr="same")
    assert [n for n, _ in adapted["params"]] == [name]
    assert all(n == "bias" or n.endswith(("weight_g", "original0")) for n, _ in rest["params"])


def test_parameters_without_a_shape() -> None:
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="'weight' has none yet; run the model once"):
        fastlars.param_groups(lazy, 0.1)
    optimizer = LARS(lazy.parameters(), **OPTIONS)
    lazy(torch.ones(1, 2)).sum().backward()
    optimizer.step()
