"""A few steps of a small network in double precision, alone or in several processes, with and without batch norm."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.__main__ import main
from training.data.samplers import shuffled
from training.data.sets import Images
from training.distributed import from_first, joined, rank, share_gradients, world_size
from training.errors import TrainingError
from training.loop import batches, forward_of, train_step
from training.methods.individual import IndividualLoss
from training.methods.method import Model, Stage
from training.models.multi_expert import Outputs
from training.recipe import Recipe

COUNTS = (40, 10, 3)
CASES = ((True, 1), (False, 1), (False, 3))  # batch norm or not, parts of a batch
NORM_IN_PARTS = (True, 3)  # of the last batch one of two processes has five rows, enough for two parts, the other six


class SmallNet(nn.Module):
    """Two experts over one convolution; what the routers would be scales the logits beside the network."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.experts = nn.ModuleList(nn.Linear(4, len(COUNTS)) for _ in range(2))

    def forward(self, images: Tensor) -> Outputs:
        """(B, H, W, 3) uint8 -> logits and features of both experts."""
        x = self.norm(self.first(images.permute(0, 3, 1, 2).double() / 255))
        features = torch.tanh(x).mean(dim=(2, 3))
        logits = torch.stack([expert(features) for expert in self.experts])
        return Outputs(logits, torch.stack([features, features]))


def weights_after(
    steps: int, norm: bool, scaler: torch.amp.GradScaler | None = None, **fields: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps, by labels, class weights and a teacher, and all weights after them."""
    recipe = Recipe(
        name="t", method="single", deferred_from=0.0, batch_size=14, router_batch_size=14, precision="fp32",
        compile=False, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images = Images(
        torch.randint(0, 256, (53, 8, 8, 3), generator=generator, dtype=torch.uint8),
        torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS)),
    )
    model = Model(SmallNet(norm).double(), None)  # type: ignore[arg-type]
    beside = nn.Parameter(torch.ones((), dtype=torch.float64))
    model.register_parameter("beside", beside)
    individual = IndividualLoss("ce", recipe, COUNTS)
    individual.class_weights = individual.class_weights.double()

    def losses(outputs: Outputs, labels: Tensor, epoch: int) -> dict[str, Tensor]:
        assert outputs.teacher_logits is not None
        own = torch.stack([individual(beside * z, labels, epoch) for z in outputs.expert_logits]).sum()
        return {"loss": own + (outputs.expert_logits - outputs.teacher_logits).square().mean()}

    def teacher(own: Tensor) -> Tensor:
        assert len(own) <= 14 // world_size(), "a process needs to ask it of its own rows only"
        return own.double().mean(dim=(1, 2)) / 255

    stage = Stage("t", 1, 14, model, losses, shuffled, lambda _: 0.1, 0.9, False, 0.0, teacher=teacher)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    network = forward_of(model, stage, recipe)
    seen: list[float] = []
    while len(seen) < steps:
        order = shuffled(images.labels, generator)
        for pixels, labels in batches(images, order, stage.batch_size, recipe, generator):
            found = train_step(network, stage, optimiser, pixels, labels, 1, generator, scaler)[0]
            seen.append(float(found["loss"].detach()))
    return seen, model.state_dict()


def agreed() -> dict[str, Any]:
    """A gradient that differs from process to process, shared, and what each has of a refusal by the first."""

    def refuse() -> None:
        raise TrainingError(f"process {rank()} refuses")

    beside = nn.Parameter(torch.zeros(()))
    share_gradients([beside])
    (beside * (1.0 + rank())).backward()
    try:
        from_first(refuse)
    except TrainingError as error:
        return {"gradient": float(beside.grad), "refused": str(error)}
    return {}


if __name__ == "__main__":  # under torchrun, FILE ARGUMENTS: writes what all processes have, then trains as ride-train
    with joined():
        result: dict[Any, Any] = {
            (norm, parts): weights_after(8, norm, accumulate=parts) for norm, parts in (*CASES, NORM_IN_PARTS)
        }
        result |= agreed()
        both = [None, None]
        torch.distributed.all_gather_object(both, result)
        if rank() == 0:
            torch.save(both, Path(sys.argv[1]))
        sys.exit(main(sys.argv[2:]))
