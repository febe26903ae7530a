"""Lightning and Fabric: their loops give the weights of a plain loop, bit for bit."""

import contextlib
import copy
import csv
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.plugins import MixedPrecision

import fastlars

# Lightning's own warnings, none of them about optimizers
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Precision .*16-mixed is not supported by the model summary"),
]

STEPS = 40


class Plain:
    """The page's loop in plain torch, with groups and schedule written out."""

    def __init__(self, page: dict[str, Any], dtype: torch.dtype | None = None, max_norm: float | None = None) -> None:
        self.net = page["make_net"]()
        conv, norm, _, _, linear = self.net
        adapted = {"params": [conv.weight, linear.weight], "weight_decay": 1e-4}
        rest = {"params": [conv.bias, norm.weight, norm.bias, linear.bias], "lr": 0.1}
        self.optimizer = fastlars.LARS([adapted, rest], lr=20.0, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        self.dtype, self.max_norm = dtype, max_norm
        self.ratios: list[dict[str, float]] = []
        self.relative_steps: list[dict[str, float]] = []

    def train(self, page: dict[str, Any], inputs: torch.dtype = torch.float32, steps: int = STEPS) -> "Plain":
        batches = list(zip(page["images"].split(128), page["labels"].split(128), strict=True))
        for step in range(steps):
            factor = (step + 1) / 4 if step < 4 else (1 - (step - 4) / (STEPS - 4)) ** 2
            for group, lr in zip(self.optimizer.param_groups, (20.0, 0.1), strict=True):
                group["lr"] = lr * factor
            images, labels = batches[step % len(batches)]
            autocast = torch.autocast("cpu", self.dtype) if self.dtype else contextlib.nullcontext()
            with autocast:
                logits = self.net(images.to(inputs))
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            self.ratios.append(self.optimizer.trust_ratios())
            if self.max_norm is not None:
                in_its_order = [p for group in self.optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(in_its_order, self.max_norm)
            with self.optimizer.relative_steps() as relative:
                self.scaler.step(self.optimizer)
            self.relative_steps.append(relative)
            self.scaler.update()
        return self


def assert_same(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    names = list(expected.state_dict())
    assert list(actual.state_dict()) == names and len(names) == 9
    different = [name for name in names if not torch.equal(actual.state_dict()[name], expected.state_dict()[name])]
    assert not different


def loss_of(net: torch.nn.Module, page: dict[str, Any]) -> float:
    net = copy.deepcopy(net).eval()
    return torch.nn.functional.cross_entropy(net(page["images"]), page["labels"]).item()


@pytest.mark.parametrize("name", ["module", "resumed", "clipped", "scaled", "manual"])
def test_it_learns(page: dict[str, Any], name: str) -> None:
    before, after = loss_of(page["make_net"](), page), loss_of(page[name].net, page)
    assert before > 1.3 and after < 0.6


def test_automatic_optimization_and_resume_are_the_plain_loop(page: dict[str, Any]) -> None:
    plain = Plain(page).train(page)
    assert_same(page["module"].net, plain.net)
    assert_same(page["resumed"].net, plain.net)
    assert page["resumed_trainer"].global_step == STEPS


def test_resuming_trains_the_second_half_only(page: dict[str, Any]) -> None:
    """A resumed run that started from the beginning would end with the same weights."""
    seen = []

    class Counting(page["Classifier"]):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

    trainer = lightning.Trainer(max_epochs=10, accelerator="cpu", logger=False, callbacks=[page["checkpoints"]])
    trainer.fit(Counting(), page["loader"], ckpt_path="checkpoints/epoch=4-step=20.ckpt", weights_only=True)
    assert seen == pytest.approx([20 * (1 - (step - 4) / 36) ** 2 for step in range(20, 40)])


def test_the_numbers_logged_are_those_of_the_plain_loop(page: dict[str, Any]) -> None:
    plain = Plain(page).train(page)
    with open("logs/automatic/metrics.csv", newline="") as file:  # noqa: PTH123
        rows = [row for row in csv.DictReader(file) if row["trust_ratio/net.0.weight"]]
    assert [int(row["step"]) for row in rows] == [0, 10, 20, 30]
    for row in rows:
        ratios, steps = plain.ratios[int(row["step"])], plain.relative_steps[int(row["step"])]
        logged = [float(row[f"trust_ratio/net.{layer}.weight"]) for layer in (0, 4)]
        assert logged == pytest.approx(list(ratios.values()), rel=1e-6)
        names = ("0.weight", "4.weight", "0.bias", "1.weight", "1.bias", "4.bias")
        logged = [float(row[f"relative_step/net.{name}"]) for name in names]
        assert logged == pytest.approx(list(steps.values()), rel=1e-6) and min(logged[:2]) > 0


@pytest.mark.parametrize(("name", "dtype"), [("clipped", torch.bfloat16), ("scaled", torch.float16)])
def test_clipping_and_mixed_precision_are_the_plain_loop(page: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    assert_same(page[name].net, Plain(page, dtype, max_norm=0.5).train(page).net)


def test_clipping_hardly_changes_what_is_adapted(page: dict[str, Any]) -> None:
    start = page["make_net"]()
    plain, clipped = (Plain(page, max_norm=max_norm).train(page, steps=1).net for max_norm in (None, 0.1))
    weights = zip(plain.named_parameters(), clipped.parameters(), start.parameters(), strict=True)
    kept = {name: ((q - r).norm() / (p - r).norm()).item() for (name, p), q, r in weights if not torch.equal(p, r)}
    assert {name for name, share in kept.items() if share > 0.98} == {"0.weight", "4.weight"}
    assert {name for name, share in kept.items() if share < 0.1} == {"1.weight", "1.bias", "4.bias"}


# torch's warning, and right, because the first steps are skipped
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step..` before `optimizer.step")
def test_an_overflow_leaves_the_step_out(page: dict[str, Any]) -> None:
    class Watched(page["Classifier"]):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.finite.append(all(p.grad.isfinite().all() for p in self.parameters()))
            self.before = [p.clone() for p in self.parameters()]

        def on_train_batch_end(self, *_: Any) -> None:
            same = all(torch.equal(p, q) for p, q in zip(self.parameters(), self.before, strict=True))
            self.skipped.append(same)

    module = Watched()
    module.finite, module.skipped = [], []
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**25))
    trainer = lightning.Trainer(
        max_epochs=10, accelerator="cpu", plugins=precision, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, page["loader"])
    assert 0 < module.finite.count(False) < 20, "the case must be met"
    assert [not finite for finite in module.finite] == module.skipped
    assert loss_of(module.net, page) < 1.0


def test_manual_optimization_is_the_plain_loop(page: dict[str, Any]) -> None:
    plain = Plain(page, max_norm=0.5).train(page)
    assert_same(page["manual"].net, plain.net)
    assert list(page["manual"].last_ratios) == ["net.0.weight", "net.4.weight"]
    assert list(page["manual"].last_ratios.values()) == list(plain.ratios[-1].values())


def test_the_wrapper_has_our_class_but_not_our_state(page: dict[str, Any]) -> None:
    wrapped = page["manual"].optimizers()
    assert isinstance(wrapped, fastlars.LARS) and type(wrapped) is not fastlars.LARS
    assert type(wrapped.optimizer) is fastlars.LARS
    assert repr(wrapped).removeprefix("Lightning") == repr(wrapped.optimizer)
    assert isinstance(page["optimizer"], fastlars.LARS) and type(page["optimizer"]) is not fastlars.LARS


def test_fabric_is_the_plain_loop(page: dict[str, Any]) -> None:
    plain = Plain(page, torch.bfloat16, max_norm=0.5).train(page, inputs=torch.bfloat16)
    assert_same(page["net"].module, plain.net)
    assert page["ratios"] == dict(zip(["0.weight", "4.weight"], plain.ratios[-1].values(), strict=True))
    assert loss_of(page["net"].module, page) < 0.6


def test_fabric_resumes_bit_for_bit(page: dict[str, Any]) -> None:
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    net = torch.nn.Sequential(*page["make_net"]())
    for p in net.parameters():
        p.data.zero_()  # anything that is not loaded shows
    optimizer = fastlars.LARS(fastlars.param_groups(net, weight_decay=0.5), lr=1.0)
    scheduler = fastlars.schedules.warmup_polynomial(optimizer, warmup_steps=4, total_steps=40)
    net, optimizer = fabric.setup(net, optimizer)
    rest = fabric.load("fabric.ckpt", {"net": net, "optimizer": optimizer, "scheduler": scheduler}, weights_only=True)
    assert rest == {}
    for images, labels in 5 * list(fabric.setup_dataloaders(page["loader"])):
        optimizer.zero_grad()
        fabric.backward(torch.nn.functional.cross_entropy(net(images), labels))
        fabric.clip_gradients(net, optimizer, max_norm=0.5)
        optimizer.step()
        scheduler.step()
    assert_same(net.module, page["net"].module)
